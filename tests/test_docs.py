"""The pages: their Python runs, their commands have the flags that they are given."""

import dataclasses
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsight import cli
from sparsight.measure import count_macs
from sparsight.train.distillation import shared_flags
from sparsight.train.hardware import Hardware
from sparsight.train.sampling_flags import sampling_flags

ROOT = Path(__file__).resolve().parents[1]
PAGE, DISTIL = (
    (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    for name in ("training", "distillation")
)


MODEL_PAGES = ["frrn.md", "refinenet.md"]


def blocks(language: str, page: str = PAGE) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def read(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


# For a test the network is shallower, the images are smaller, the steps fewer.
SMALLER = {
    "resnet_cifar(20)": "resnet_cifar(8)",
    "torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))": (
        "torch.randn(4, 3, 16, 16), torch.randint(0, 10, (4,))"
    ),
    "range(20)": "range(10)",
    "num_steps=10": "num_steps=4",
}


def test_its_python_runs_and_meets_the_budget(capsys):
    code = "".join(blocks("python"))
    for written, smaller in SMALLER.items():
        assert code.count(written) == 1, written
        code = code.replace(written, smaller)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["share"] == pytest.approx(names["budget"], abs=0.01)
    counted = count_macs(names["fast"], names["batches"][0][0])
    assert counted.total / counted.dense == pytest.approx(names["budget"], abs=0.02)
    assert "of the dense multiply-adds (budget 0.700)" in capsys.readouterr().out


def test_the_python_of_distillation_runs_and_learns(tmp_path, capsys):
    torch.manual_seed(0)
    names: dict[str, Any] = {"cache_folder": tmp_path}
    exec("".join(blocks("python", DISTIL)), names)
    assert names["losses"][-1] < 0.8 * names["losses"][0]
    assert capsys.readouterr().out == "4 4\n"


@pytest.mark.parametrize("name", MODEL_PAGES)
def test_the_example_of_a_model_runs(name):
    names: dict[str, object] = {}
    exec("".join(blocks("python", read(name))), names)
    assert names["logits"].shape == (1, 11, 60, 80) and names["logits"].isfinite().all()


def test_the_example_of_instance_fcn_runs(capsys):
    names: dict[str, Any] = {}
    exec("".join(blocks("python", read("instance_fcn.md"))), names)
    assert set(names["losses"]) == {"loss_objectness", "loss_mask"}
    assert names["found"]["masks"].shape[1:] == (1, 60, 80)
    assert float(capsys.readouterr().out) > 0


def commands() -> list[str]:
    model_pages = map(read, [*MODEL_PAGES, "instance_fcn.md"])
    pages = [PAGE, DISTIL, read("compress.md"), *model_pages]
    lines = (
        "".join(b for page in pages for b in blocks("bash", page)).replace("\\\n", " ").splitlines()
    )
    return [line for line in lines if line.strip() and not line.startswith("pip install ")]


def flags_of(function) -> set[str]:
    """The flags of a recipe or a command, with those that all recipes share."""
    found = set(inspect.signature(function).parameters)
    if "shared" in found:
        found |= set(inspect.signature(shared_flags).parameters)
        found |= set(inspect.signature(sampling_flags).parameters)
        found |= {field.name for field in dataclasses.fields(Hardware)}
    return found


def function_of(words: list[str]):
    """What a command calls, and the flags it is given."""
    if words[1] == "train":
        return cli.load_recipe(cli.find_recipe(words[2])), words[3:]
    return getattr(cli, words[1]), words[2:]


@pytest.mark.parametrize("command", commands())
def test_its_commands_have_their_flags(command):
    words = shlex.split(command)
    if words[0] == "python":
        assert (ROOT / words[1]).is_file()
        return
    assert words[0] == "sparsight"
    function, rest = function_of(words)
    flags = {word[2:].replace("-", "_") for word in rest if word.startswith("--")}
    assert flags <= flags_of(function)


def test_flags_in_its_text_are_those_of_a_recipe_or_a_command():
    known = {"traceback"}
    for path in (ROOT / "recipes").glob("*/*.py"):
        known |= flags_of(cli.load_recipe(path))
    for name in ("evaluate", "masks", "predict", "profile"):
        known |= flags_of(getattr(cli, name))
    for page, at_least in ((PAGE, 16), (DISTIL, 3)):
        text = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
        used = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][\w-]*)", text)}
        assert len(used) >= at_least and used <= known


def test_every_recipe_has_a_row():
    for path in (ROOT / "recipes").glob("*/*.py"):
        assert f"`{path.parent.name}/{path.name}`" in PAGE
