"""The environment names machine and versions, and nobody."""

import getpass
import platform
import socket
import subprocess
from pathlib import Path

import torch

from sparsight.measure import environment
from sparsight.measure.environment import _commit


def test_what_it_says():
    described = environment()
    assert {"CPU", "cores", "threads", "OS", "Python", "torch", "GPU"} <= set(described)
    assert described["torch"] == torch.__version__
    assert described["Python"] == platform.python_version()
    assert described["threads"] == str(torch.get_num_threads())
    assert all(isinstance(text, str) and text for text in described.values())


def test_threads_are_those_of_now():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert environment()["threads"] == "1"
    finally:
        torch.set_num_threads(before)


def test_no_person_host_or_path():
    text = "\n".join(environment().values())
    for private in (socket.gethostname(), str(Path.home()), str(Path.cwd())):
        assert private not in text
    assert getpass.getuser() not in text.split()


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True
    )


def test_commit_of_a_tracked_file(tmp_path):
    """The commit of the checkout that the file belongs to, marked when something changed."""
    tracked, stranger = tmp_path / "tracked.py", tmp_path / "stranger.py"
    tracked.write_text("1")
    assert _commit(tracked) == ""
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "tracked.py")
    git(tmp_path, "commit", "-q", "-m", "first")
    stranger.write_text("2")
    clean = _commit(tracked)
    assert len(clean) == 12
    assert int(clean, 16) >= 0
    assert _commit(stranger) == ""
    tracked.write_text("3")
    assert _commit(tracked) == f"{clean}-dirty"
