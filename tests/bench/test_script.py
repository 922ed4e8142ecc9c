"""The flags of the benchmarks, the number of samples, and rows where somebody is missing."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsight.measure import Latency

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def bench():
    """Import a file of bench/ by name."""
    pytest.importorskip("torchvision")
    sys.path.insert(0, str(BENCH))
    try:
        modules = {name: importlib.import_module(name) for name in ("block", "harness.script")}
        return {**modules, "rivals": importlib.import_module("harness.rivals")}
    finally:
        sys.path.remove(str(BENCH))


def settings_of(bench, *flags, **known):
    script = bench["harness.script"]
    parser = script.argument_parser("", dtypes=True)
    threads = str(torch.get_num_threads())
    return script.settings_of(parser.parse_args([*flags, "--threads", threads]), **known)


@pytest.mark.parametrize(
    ("call_ms", "samples"), [(50.0, 20), (200.0, 7), (499.0, 7), (501.0, 3), (1e-3, 40)]
)
def test_samples_follow_from_the_budget_within_bounds(bench, call_ms, samples):
    assert bench["harness.script"].num_samples(call_ms, budget_s=1.0) == samples


def test_a_rival_left_out_says_so_and_is_not_built(bench, monkeypatch):
    rivals = bench["rivals"]

    def forbidden(*args):
        raise AssertionError("must not be built")

    for name in ("onnx_bytes", "compiled"):
        monkeypatch.setattr(rivals, name, forbidden)
    settings = settings_of(bench, "--without", *rivals.EXPORTED, "compile")
    x = torch.randn(1, 3, 8, 8)
    made = rivals.dense_rivals(nn.Conv2d(3, 4, 3).eval().requires_grad_(False), x, settings)
    assert {name for name, run in made.items() if run == "left out by --without"} == {
        *rivals.EXPORTED,
        "compile",
    }
    assert callable(made["eager"])


def test_rivals_in_bfloat16_take_and_return_float32(bench):
    rivals = bench["rivals"]
    x = torch.randn(1, 3, 8, 8)
    conv = nn.Conv2d(3, 4, 3).eval().requires_grad_(False)
    network = rivals.in_dtype(conv, torch.bfloat16)
    out = network(x)
    assert out.dtype == torch.float32 and conv.weight.dtype == torch.float32
    assert torch.equal(out, out.bfloat16().float()) and not torch.equal(out, conv(x))
    assert rivals.in_dtype(conv, torch.float32) is conv


def latency(ms):
    return Latency("", ms, 0.1, ms, 7, 1.0)


def times_of(**changed):
    names = ("openvino", "openvino nhwc", "onnxruntime", "compile", "eager")
    return {name: latency(10.0) for name in names} | {
        "addition": latency(1.0),
        "openvino in a chain": latency(32.0),
        **{name.replace("_", " "): value for name, value in changed.items()},
    }


def test_a_block_in_bfloat16_is_held_against_the_chain_with_bfloat16_maps(bench):
    block = bench["block"]
    times = times_of()
    times |= {"ours at 0.3": latency(20.0), "ours in a chain at 0.3": latency(16.0)}
    times["addition in a chain"] = latency(40.0)
    settings = settings_of(bench, "--dtype", "bfloat16")
    counted = block.count_macs(
        block.sampled_at(block.dense_block(4), 1.0), block.block_input(4, (4, 4))
    )
    row = block.block_row(4, (4, 4), 0.3, counted, times, settings)
    # Alone: 10 ms of OpenVINO times the MAC ratio. In a chain: 8 ms, or 40 of moving the maps.
    assert row["realised/possible"] == pytest.approx(10.0 * counted.ratio / 20.0)
    assert row["speed-up in a chain"] == pytest.approx(0.5)
    assert row["realised/possible in a chain"] == pytest.approx(40.0 / 16.0)


def test_a_block_that_cannot_be_frozen_keeps_its_rivals_in_the_row(bench):
    block = bench["block"]
    counted = block.count_macs(
        block.sampled_at(block.dense_block(4), 1.0), block.block_input(4, (4, 4))
    )
    times = times_of(openvino="left out by --without")
    times |= {"ours at 0.3": "no bfloat16: because", "ours in a chain at 0.3": "no bfloat16"}
    times["addition in a chain"] = latency(1.0)
    row = block.block_row(4, (4, 4), 0.3, counted, times, settings_of(bench, "--dtype", "bfloat16"))
    assert row["ours ms"] == "no bfloat16: because" and row["ours in a chain ms"] == "no bfloat16"
    assert row["openvino ms"] == "left out by --without" and row["openvino nhwc ms"] == 10.0
    assert "realised/possible" not in row and "realised/possible in a chain" not in row


def test_the_addition_moves_the_bytes_of_the_maps(bench):
    x = torch.rand(1, 4, 4, 4)
    whole = bench["block"].addition(x, torch.float32)(None)
    half = bench["block"].addition(x, torch.bfloat16)(None)
    assert whole.nbytes == x.nbytes and half.nbytes == x.bfloat16().nbytes
    assert whole.dtype == half.dtype == torch.float32


class Narrow(nn.Module):
    """Stands for a frozen block in bfloat16."""

    output_dtype = torch.float32

    def forward(self, x):
        return (x.bfloat16() * 2).to(self.output_dtype)


def test_inside_a_chain_a_block_is_given_and_returns_bfloat16(bench):
    block = bench["block"]
    made = nn.Sequential(Narrow()).eval()
    x = torch.rand(1, 4, 4, 4)
    call = block.inside_chain(made, x, torch.bfloat16)
    assert call(None).dtype == torch.bfloat16
    assert made(x).dtype == torch.float32, "the block alone is not changed"
    assert "no output_dtype" in block.inside_chain(nn.Sequential(nn.ReLU()), x, torch.bfloat16)
    assert block.inside_chain("no bfloat16", x, torch.bfloat16) == "no bfloat16"
