"""The rows of bench/frrn.py: against whom, of what, and what is said where a rival is missing."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsight.measure import Latency, count_macs
from sparsight.nn import ConvPair

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def frrn():
    """The script, imported."""
    pytest.importorskip("torchvision")
    sys.path.insert(0, str(BENCH))
    try:
        return importlib.import_module("frrn")
    finally:
        sys.path.remove(str(BENCH))


def settings_of(frrn, *flags):
    parser = frrn.argument_parser("", dtypes=True)
    return frrn.settings_of(parser.parse_args([*flags, "--threads", str(torch.get_num_threads())]))


def times(**changed):
    names = ("openvino", "openvino nhwc", "compile", "eager", "frozen dense", "ours at 0.5")
    told = {name.replace("_", " "): value for name, value in changed.items()}
    return {name: told.get(name, Latency("", 10.0, 0.1, 10.0, 7, 1.0)) for name in names}


def row(frrn, model, **changed):
    x = torch.randn(1, 4, 24, 32)
    source, density, counted = frrn.sampled_to(model, 0.5, x)
    settings = settings_of(frrn)
    made = frrn.share_row("net", x, 0.5, density, counted, times(**changed), settings=settings)
    return made, source, counted


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 16, 1), ConvPair(16, 16)).eval()


def test_masks_are_drawn_where_the_whole_model_has_the_share(frrn):
    made, source, counted = row(frrn, model())
    assert counted.ratio == pytest.approx(0.5, abs=0.003)
    assert made["MAC ratio"] == counted.ratio == count_macs(source, torch.randn(1, 4, 24, 32)).ratio
    # Heads, interpolation and the first convolution take a part of the share.
    assert 0.2 < made["density"] < 0.45


def test_speed_ups_are_against_each_rival_and_the_faster_openvino(frrn):
    fast, slow = Latency("", 8.0, 0.1, 8.0, 7, 1.0), Latency("", 12.0, 0.1, 12.0, 7, 1.0)
    ours = Latency("", 5.0, 0.1, 5.0, 7, 1.0)
    made, _, counted = row(
        frrn, model(), openvino=slow, openvino_nhwc=fast, **{"ours at 0.5": ours}
    )
    assert made["speed-up, openvino"] == 8.0 / 5.0
    assert made["speed-up, compile"] == made["speed-up, frozen dense"] == 2.0
    assert made["realised/possible, openvino"] == pytest.approx(1.6 * counted.ratio)
    assert made["realised/possible, compile"] == pytest.approx(2.0 * counted.ratio)


def test_a_missing_rival_has_no_speed_up(frrn):
    made, _, _ = row(frrn, model(), compile="left out by --without")
    assert made["compile ms"] == "left out by --without"
    assert "speed-up, compile" not in made and "speed-up, openvino" in made
