"""Two processes on the CPU (gloo) against one with twice the batch, through the command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsight.cli import load_recipe
from sparsight.train.data import write_synthetic_coco
from sparsight.train.processes import average_norm_statistics, reduce_over_processes

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*deprecated")
RECIPE = Path(__file__).with_name("distributed_runs.py")
# Sums of float32 in another order; six steps of AdamW from there.
TOLERANCE = {"rel": 1e-4, "abs": 1e-5}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What one process saw with batches of 4, and each of two with batches of 2."""
    out = tmp_path_factory.mktemp("runs")
    for folder in ("one", "two"):
        write_synthetic_coco(out / folder / "data", num_images=7, size=(32, 48))
    flags = ["--batch-size", "2", "--devices", "2", "--strategy", "ddp", "--accelerator", "cpu"]
    command = [sys.executable, "-m", "sparsight.cli", "train", str(RECIPE), *flags]
    two = subprocess.Popen(
        [*command, "--out", str(out / "two")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    torch.set_num_threads(1)
    one = load_recipe(RECIPE)(out=str(out / "one"), batch_size=4, accelerator="cpu")
    printed, _ = two.communicate(timeout=900)
    assert two.returncode == 0, printed[-4000:]
    return one, [torch.load(out / "two" / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_two_processes_train_as_one_with_twice_the_batch(runs):
    one, two = runs[0]["same"], [run["same"] for run in runs[1]]
    losses = [sum(step) / 2 for step in zip(*(run["loss"] for run in two), strict=True)]
    assert len(losses) == 6
    assert losses == pytest.approx(one["loss"], **TOLERANCE)
    assert one["multiplier"][-1] > 1e-3
    assert {"loss", "expected_share", "val_miou", "val_share"} <= set(one["metrics"])
    for run in two:
        assert run["multiplier"] == pytest.approx(one["multiplier"], rel=1e-3, abs=1e-6)
        assert run["metrics"] == pytest.approx(one["metrics"], **TOLERANCE)
        for name, value in one["state"].items():
            torch.testing.assert_close(
                run["state"][name], value, rtol=TOLERANCE["rel"], atol=TOLERANCE["abs"], msg=name
            )


@pytest.mark.parametrize("name", ["same", "noisy"])
def test_all_processes_hold_the_same_bits(runs, name):
    first, second = (run[name] for run in runs[1])
    assert first["multiplier"] == second["multiplier"]
    assert first["metrics"] == second["metrics"]
    for key, value in first["state"].items():
        assert torch.equal(second["state"][key], value), key


@pytest.mark.parametrize("name", ["soft", "hard"])
def test_all_processes_choose_the_same_filters(runs, name):
    """From weights alone, which are equal; norms of the processes differ until validation."""
    first, second = (run[name] for run in runs[1])
    assert len(first["history"]) == 3  # before training, and after each epoch
    assert first["history"] == second["history"]
    if name == "soft":  # something was learnt that changed it
        assert first["history"][0] != first["history"][-1]
    assert first["history"][0] == runs[0][name]["history"][0]
    for key, value in first["state"].items():
        assert torch.equal(second["state"][key], value), key
    chosen = first["history"][-1]["layer1.0.conv1"]
    assert sum(chosen) == 4
    weight = first["state"]["model.layer1.0.conv1.weight"]
    mean = first["state"]["model.layer1.0.bn1.running_mean"]
    assert (weight[torch.tensor(chosen)] == 0).all()
    assert (mean[torch.tensor(chosen)] == 0).all()  # silent in all of them, at the end


def test_no_two_processes_draw_the_same_noise(runs):
    draws = [draw for run in runs[1] for draw in run["noisy"]["noise"]]
    assert len({tuple(draw) for draw in draws}) == len(draws) == 12


def test_norms_are_validated_with_the_mean_of_all_statistics(runs):
    first, second = (run["noisy"] for run in runs[1])
    assert len(first["validated_mean"]) == 3
    for own, other, validated in zip(
        first["own_mean"], second["own_mean"], first["validated_mean"], strict=True
    ):
        assert own != other
        mean = [(a + b) / 2 for a, b in zip(own, other, strict=True)]
        assert validated == pytest.approx(mean, rel=1e-6)


def test_every_validation_image_is_scored_once(runs):
    """Seven images in batches of 2 by two processes: the last of them has one for both."""
    for found in (runs[0], *runs[1]):
        ((images, num_detections),) = found["detection"]["scored"]
        assert images == [100 + 7 * i for i in range(7)]
        assert num_detections == runs[0]["detection"]["scored"][0][1] > 0


def test_only_the_first_process_goes_on_and_waits_for_no_other(runs):
    assert [run["same"]["goes_on"] for run in runs[1]] == [True, False]
    assert all(run["same"]["is_alone"] for run in runs[1])
    assert runs[0]["same"]["goes_on"]


@pytest.mark.parametrize("how", ["mean", "sum", "max"])
def test_a_single_process_has_its_own_value_without_gradient(how):
    value = torch.tensor([1.0, 3.0], requires_grad=True)
    reduced = reduce_over_processes(value, how)
    assert torch.equal(reduced, value)
    assert not reduced.requires_grad


def test_a_single_process_keeps_its_norms():
    norm = nn.BatchNorm2d(2)
    norm(torch.randn(2, 2, 4, 4))
    before = norm.running_mean.clone()
    average_norm_statistics(norm)
    assert torch.equal(norm.running_mean, before)
