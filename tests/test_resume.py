"""A recipe that was killed in the middle of an epoch, and resumed, ends as one that was not."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsight.cli import main
from sparsight.models import resnet_cifar

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*deprecated")
RECIPES = Path(__file__).resolve().parents[1] / "recipes"
# By name of the run: the recipe, and its flags.
RUNS = {
    "taught": (
        "classification/cifar10",
        [
            *("--depth", "20", "--distill-features", "layer2=layer3", "--precision", "bf16-mixed"),
            *("--budget", "0.7"),
        ],
    ),
    "detection": ("detection/coco", ["--backbone", "resnet18", "--sampling-weight", "0.1"]),
    "filters": (
        "classification/cifar10",
        ["--depth", "8", "--method", "fpgm", "--filter-ratio", "0.3", "--lr", "0.05"],
    ),
    "chain": ("classification/prune_and_sample_cifar10", ["--budget", "0.7", "--latency", "false"]),
}
# Two epochs of two batches; the second batch of the second epoch never starts.
KILLED = """
import os, signal, sys
from sparsight.cli import main
from sparsight.train.recipe import StepSeed

seed = StepSeed.on_train_batch_start

def killed(self, trainer, *rest):
    seed(self, trainer, *rest)
    if trainer.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)

StepSeed.on_train_batch_start = killed
main(sys.argv[1:])
"""


def command(run, out, teacher):
    recipe, own = RUNS[run]
    flags = ["--quick", "--progress-bar", "false", "--accelerator", "cpu"]
    if run == "taught":
        flags += ["--teacher", str(teacher), "--cache-teacher", str(Path(out) / "outputs")]
    return ["train", str(RECIPES / f"{recipe}.py"), *own, *flags, "--out", str(out)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "resnet8.pt"
    torch.manual_seed(3)
    torch.save(resnet_cifar(8).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def killed(tmp_path_factory, teacher):
    """The folders of the runs after the kill; the processes run side by side."""
    folders = {run: tmp_path_factory.mktemp("killed") for run in RUNS}
    processes = {
        run: subprocess.Popen(
            [sys.executable, "-c", KILLED, *command(run, folder, teacher)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for run, folder in folders.items()
    }
    for process in processes.values():
        printed, _ = process.communicate(timeout=900)
        assert process.returncode == -signal.SIGKILL, printed[-4000:]
    return folders


@pytest.mark.parametrize("run", RUNS)
def test_a_killed_run_resumes_to_the_same_bits(run, killed, tmp_path, teacher):
    """Classification learns from a teacher too, through an adapter, its outputs kept on disk."""
    folder = killed[run]
    assert not (folder / "weights.safetensors").exists()
    stored = torch.load(folder / "last.ckpt", weights_only=True)
    assert (stored["epoch"], stored["global_step"]) == (0, 2)

    is_taught = any("adapters" in name for name in stored["state_dict"])
    assert is_taught == (run == "taught")

    assert main(command(run, tmp_path, teacher)) == 0
    assert main([*command(run, folder, teacher), "--resume"]) == 0
    whole, resumed = (load_file(out / "weights.safetensors") for out in (tmp_path, folder))
    assert set(resumed) == set(whole)
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
    for name, value in stored["state_dict"].items():
        if name == "model.conv1.weight" or name.endswith("box_predictor.cls_score.weight"):
            assert not torch.equal(whole[name.removeprefix("model.")], value), "nothing was learnt"
