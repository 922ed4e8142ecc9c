"""The page on pooling: its Python runs, its tests exist, its picture is drawn by its script."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from sparsight.nn import SoftPool2d
from sparsight.nn.pooling import PooledConv2d

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "pooling.md").read_text(encoding="utf-8")


def test_its_python_runs(capsys):
    code = "".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    names: dict = {}
    exec(code, names)
    assert f"{names['y'].item():.4f}" == "3.4927"
    (printed,) = re.findall(r"print\(soft\.maxpool\)  # (.*)", PAGE)
    assert capsys.readouterr().out.strip() == printed

    def count(model, kind):
        return sum(isinstance(module, kind) for module in model.modules())

    assert [count(names[name], SoftPool2d) for name in ("soft", "stem", "pooled")] == [1, 1, 8]
    assert count(names["pooled"], PooledConv2d) == 7


def test_each_of_the_eight_defects_has_the_test_it_names():
    tests = (ROOT / "tests" / "ops" / "test_pool.py").read_text(encoding="utf-8")
    named = re.findall(r"\| `(test_defect_\w+)` \|", PAGE)
    assert [int(name.split("_")[2]) for name in named] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert all(f"def {name}(" in tests for name in named)


@pytest.fixture(scope="module")
def picture():
    spec = importlib.util.spec_from_file_location("pooling", ROOT / "docs/pictures/pooling.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_the_picture_shows_is_between_average_and_maximum(picture):
    rows = picture.pooled(picture.photograph())
    average, soft, maximum = (rows[kind][1] for kind in ("average", "SoftPool", "maximum"))
    assert (average <= soft + 1e-5).all() and (soft <= maximum + 1e-5).all()
    assert [step.shape[-1] for step in rows["SoftPool"]] == [512, 256, 128, 64, 32]
    assert torch.isfinite(rows["SoftPool"][-1]).all()


def test_the_script_draws_the_picture_of_the_page(picture, tmp_path):
    picture.draw(tmp_path / "drawn.png")
    with (
        Image.open(tmp_path / "drawn.png") as drawn,
        Image.open(ROOT / "docs" / "pictures" / "pooling.png") as shown,
    ):
        assert drawn.size == shown.size
        both = [torch.tensor(bytearray(image.convert("L").tobytes())) for image in (drawn, shown)]
    # Letters may differ a little between releases of matplotlib.
    assert (both[0].float() - both[1].float()).abs().mean() < 2
