"""What `import sparsight` gives, and what it leaves unloaded."""

import subprocess
import sys

import sparsight

ROOMS = ("convert", "measure", "models", "nn", "ops")
HEAVY = ("lightning", "matplotlib", "onnx", "onnxruntime", "torchmetrics", "torchvision", "triton")


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
