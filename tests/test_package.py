"""What `import sparsight` gives and leaves unloaded; the README and the examples run."""

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sparsight
from sparsight import measure, ops

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("compress", "convert", "measure", "models", "nn", "ops")
HEAVY = (
    "lightning",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "sklearn",
    "torch_pruning",
    "torchmetrics",
    "torchvision",
    "triton",
)


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    result = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_rooms_are_attributes_and_heavy_packages_stay_unloaded():
    printed = run(f"""
import sys, sparsight
for room in {ROOMS}:
    getattr(sparsight, room)
print(sparsight.measure.profile.__name__)
print([name for name in {HEAVY} if name in sys.modules])
print("sparsight.train" in sys.modules)
""")
    assert printed.split("\n")[:3] == ["profile", "[]", "False"]


def test_a_heavy_package_would_be_seen():
    """The check above, on a module that is loaded: json stands for a heavy package."""
    assert "['json']" in run("import sys, json; print([n for n in ['json'] if n in sys.modules])")


def test_every_public_name_exists_and_is_documented():
    for name in sparsight.__all__:
        assert getattr(sparsight, name).__doc__, name


def test_the_version_is_a_number():
    """The build reads it from the source; pip refuses what is no version."""
    assert all(part.isdigit() for part in sparsight.__version__.split("."))
    assert len(sparsight.__version__.split(".")) == 3


MODULES = [
    found.name
    for found in pkgutil.walk_packages(sparsight.__path__, "sparsight.")
    if not found.name.endswith("._kernels")
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    if name.startswith("sparsight.ops.triton."):
        pytest.importorskip("triton", reason="triton is not installed: it comes with torch's CUDA")
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize(
    "function",
    [
        sparsight.calibrate,
        sparsight.freeze,
        sparsight.record_sampling,
        sparsight.sampling_loss,
        sparsight.sparsify,
        measure.count_macs,
        measure.measure_latency,
        measure.profile,
        ops.interpolate,
        ops.sampled_conv2d,
        ops.sites_from_mask,
    ],
    ids=lambda function: function.__name__,
)
def test_public_functions_have_an_example(function):
    assert doctest.DocTestParser().get_examples(function.__doc__)


def test_the_readme_runs(capsys):
    """Its first block of Python, on a smaller image."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    assert "256, 512" in code
    exec(code.replace("256, 512", "32, 64"), {})
    printed = capsys.readouterr().out
    assert "backbone.layer4.2" in printed
    assert re.search(r"^sampled .*\d", printed, re.MULTILINE)


def test_the_links_of_the_documents_lead_somewhere():
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    assert len(documents) > 3
    dead = [
        f"{document.name}: {link}"
        for document in documents
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text())
        if not link.startswith("http") and not (document.parent / link).exists()
    ]
    assert dead == []
