"""The fuzz runner: the same number is the same case, and what is wrong is a miss."""

import importlib.util
from pathlib import Path

import pytest
import torch

from sparsight.ops import cpu

SPEC = importlib.util.spec_from_file_location("fuzz_run", Path(__file__).with_name("run.py"))
assert SPEC is not None and SPEC.loader is not None
run = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(run)


def test_every_kind_is_drawn_and_passes():
    kinds = {run.run_case(1, number) for number in range(24)}
    expected = {"convolution", "interpolation", "block", "pooling", "assembling", "merging"}
    if cpu.has_bfloat16():
        expected |= {"bfloat16 block", "bfloat16 weight"}
    assert kinds == expected


def test_a_number_is_always_the_same_case():
    draws = [run.shared.Draw(1_000_003_000 + 5) for _ in range(2)]
    one, two = (run.shared.draw_conv_case(draw) for draw in draws)
    assert str(one) == str(two)
    assert torch.equal(one.x, two.x)


@pytest.mark.parametrize(
    "kernel",
    [
        "sampled_conv2d",
        "interpolate",
        "sampled_block",
        "soft_pool",
        "soft_pool_backward",
        "assemble_windows",
        "assemble_windows_backward",
        "merge_maps",
    ],
)
def test_one_wrong_element_is_a_miss(kernel, monkeypatch):
    right = getattr(cpu, kernel)
    monkeypatch.setattr(cpu, kernel, lambda *args, **options: spoil(right, *args, **options))
    with pytest.raises(AssertionError, match=r"over its bound"):
        for number in range(40):
            run.run_case(1, number)


def spoil(kernel, *args, out=None, **options):
    """Run the kernel; where the runner looks at `out`, move its last element by a little."""
    made = kernel(*args, out=out, **options)
    if out is not None and out.numel():
        out[(-1,) * out.ndim] += 0.01
    return made
