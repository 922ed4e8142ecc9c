"""What the tests of the GPU kernels share: the interpreter's process, and a compiler without a GPU.

Each law is run twice: on a GPU, where there is one, else a visible skip; and on the CPU in Triton's
interpreter, which must be chosen before Triton is imported, so that each file runs itself once
more, in a process of its own with TRITON_INTERPRET=1, where the laws take CPU tensors.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_generate_tests(metafunc) -> None:
    """The device of the laws: the CPU in the interpreter, else the GPU."""
    if "device" in metafunc.fixturenames:
        gpu = [
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ]
        device = "cpu" if IS_INTERPRETED else pytest.param("cuda", marks=gpu)
        metafunc.parametrize("device", [device])


def rerun(file: str, at_least: int) -> None:
    """Raise unless a test file passes in the interpreter, with so many laws."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            file,
        ],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**environment, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
    # Every law, and nothing but what is for outside was skipped.
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed is not None and int(passed[1]) >= at_least, ran.stdout
    skipped = [line for line in ran.stdout.splitlines() if line.startswith("SKIPPED")]
    assert all("laws only" in line or "no CUDA device" in line for line in skipped), skipped


@pytest.fixture
def run_in_interpreter() -> Callable[[str, int], None]:
    return rerun


class AbsentGpu:
    """As much of a driver as the compiler asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        # Triton keeps what it compiled by device: no two tests may share one, nor with a real GPU.
        return 1000 + self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compile_only(monkeypatch, tmp_path) -> Callable[[int], list[tuple[str, Any]]]:
    """Turn launches into compilations for a capability; what was made comes by kernel's name."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def start(capability: int) -> list[tuple[str, Any]]:
        made = []

        def compiled(self, *arguments, grid, warmup, **options):
            made.append((self.__name__, run(self, *arguments, grid=grid, warmup=True, **options)))

        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(JITFunction, "run", compiled)
        monkeypatch.setattr(driver, "_active", AbsentGpu(capability))
        return made

    return start
