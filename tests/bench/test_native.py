"""The preloaded counter sees large allocations, all of them and nothing else."""

import importlib
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"

# Two of 2 MiB, by malloc and aligned_alloc, one of 3 MiB by calloc; small ones are not counted.
PROGRAM = """
import ctypes
c = ctypes.CDLL(None)
c.num_large_allocations.restype = c.large_allocation_bytes.restype = ctypes.c_int64
count, total = c.num_large_allocations(), c.large_allocation_bytes()
c.malloc.restype = c.aligned_alloc.restype = c.calloc.restype = ctypes.c_void_p
c.malloc(ctypes.c_size_t(2 << 20))
c.aligned_alloc(ctypes.c_size_t(64), ctypes.c_size_t(2 << 20))
c.calloc(ctypes.c_size_t(3), ctypes.c_size_t(1 << 20))
c.malloc(ctypes.c_size_t(1 << 19))
print(c.num_large_allocations() - count, c.large_allocation_bytes() - total)
"""


@pytest.fixture(scope="module")
def native():
    sys.path.insert(0, str(BENCH))
    try:
        return importlib.import_module("harness.native")
    finally:
        sys.path.remove(str(BENCH))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the counter knows glibc only")
def test_large_allocations_are_counted(native, tmp_path):
    counter = native.build_library("count_allocations.cpp", tmp_path, ["-fno-builtin"])
    if isinstance(counter, str):
        pytest.skip(counter)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LD_PRELOAD": str(counter)},
    )
    assert done.stdout.split() == ["3", str(7 << 20)]


def test_without_a_compiler_the_reason_is_returned(native, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert native.build_library("peak_rate.cpp", tmp_path) == "no C++ compiler found"
