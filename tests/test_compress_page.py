"""The page on pruning: its Python runs, and the names in it exist; its commands: test_docs.py."""

import re
from pathlib import Path

import pytest

import sparsight.compress

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "compress.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"), ids=["channels", "filters", "groups"])
def test_its_python_runs(code, capsys):
    code = code.replace("resnet_cifar(20)", "resnet_cifar(8)").replace("3, 32, 32", "3, 16, 16")
    exec(code, {})
    assert capsys.readouterr().out


def test_names_in_its_text_exist():
    for name in re.findall(r"`sparsight\.compress\.(\w+)`", PAGE):
        assert hasattr(sparsight.compress, name), name
