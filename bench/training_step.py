"""A training step, dense against sampled: its time and the memory it takes.

    python bench/training_step.py --out runs/bench/today
    python bench/training_step.py --only fpn-240x320 --dtype bfloat16
    python bench/training_step.py --quick

A step is the forward pass, the loss (cross-entropy on random labels; sampled, the expected share of
the dense MACs too), the backward pass and AdamW. Weights are random, samplers as `sparsify` makes
them: nearly all positions have weight, and training computes all of them whatever the masks say.
bfloat16 is autocast. Networks and settings are those of the recipes: the semantic FPN of CamVid,
batch 4, and ResNet-56 for CIFAR-10, batch 64, blue noise, no grid, window 3; layout b.

ms     of whole steps, dense and sampled in turns.
kept   what autograd keeps from the forward to the backward pass: the sum over distinct storages of
       all saved tensors, but for weights and the image.
peak   of a fresh process: high-water mark of its resident memory over three steps minus what was
       resident before them (after one step: weights, AdamW's state, libraries). Gradients, what
       is kept, and what operators need for the moment.

The issue this answers asks for at most 1.3 times the time and 1.2 times the memory. Peak memory is
measured on Linux with glibc only.
"""

import argparse
import functools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import sparsight
from harness.resident import peak_kib, resident_kib, row_of_fresh_process, start_watching
from harness.script import Settings, argument_parser, compare, run_script, settings_of
from harness.stages import Row, Stage
from sparsight.measure import Latency, count_macs
from sparsight.models import resnet_cifar, semantic_fpn
from sparsight.nn import RBFInterpolation, Sampler, record_sampling, sampling_loss

NUM_CLASSES = 11
PRICE = 0.1
NUM_STEPS = 3  # whose peak is taken


@dataclass(frozen=True)
class Task:
    """What one process measures.

    Attributes:
        network: "fpn" or "cifar".
        depth: of the ResNet.
        size: height and width of the images.
        batch: images.
        dtype: float32, or bfloat16 by autocast.
        is_sampled: or dense.
        threads: of torch.
    """

    network: str
    depth: int
    size: tuple[int, int]
    batch: int
    dtype: str
    is_sampled: bool = False
    threads: int = 1


def model_of(task: Task) -> nn.Module:
    """The network in training mode, channels-last."""
    torch.manual_seed(0)
    if task.network == "cifar":
        model: nn.Module = resnet_cifar(task.depth)
        sampler = functools.partial(Sampler, noise="blue", grid_stride=None)
        settings = {
            "sampler": sampler,
            "interpolation": functools.partial(RBFInterpolation, window=3),
        }
    else:
        assert task.depth == 18
        model = semantic_fpn("resnet18", num_classes=NUM_CLASSES, fpn_channels=48, head_channels=48)
        settings = {}
    if task.is_sampled:
        model = sparsight.sparsify(model, layout="b", **settings)
    return model.train().to(memory_format=torch.channels_last)


class TrainingStep:
    """One step of a task's network on one batch, again and again.

    Attributes:
        model: the network.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.model = model_of(task)
        self.images = torch.randn(task.batch, 3, *task.size).to(memory_format=torch.channels_last)
        shape = (task.batch, *(task.size if task.network == "fpn" else ()))
        self.labels = torch.randint(10, shape)
        with torch.no_grad():
            self.total_macs = count_macs(self.model.eval(), self.images).dense
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def loss(self) -> Tensor:
        """The loss, with its graph."""
        is_bfloat16 = self.task.dtype == "bfloat16"
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bfloat16):
            if not self.task.is_sampled:
                return self._task_loss()
            with record_sampling(self.model) as record:
                loss = self._task_loss()
            return loss + PRICE * sampling_loss(record, total_macs=self.total_macs)

    def _task_loss(self) -> Tensor:
        out = self.model(self.images)
        return F.cross_entropy((out["out"] if isinstance(out, dict) else out).float(), self.labels)

    def __call__(self) -> None:
        """Take a step; also where the caller measures inference."""
        with torch.inference_mode(False), torch.enable_grad():
            self.optimizer.zero_grad()
            self.loss().backward()
            self.optimizer.step()

    def kept_bytes(self) -> int:
        """Bytes of what autograd keeps of a forward pass."""
        tensors = [*self.model.parameters(), *self.model.buffers(), self.images, self.labels]
        known = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self.loss()  # alive to the end: nothing that was kept is freed and counted twice
        total = sum(kept.values())
        del loss
        return total


def watch(task: Task) -> Row:
    """Peak memory of the steps of one network, in this process."""
    torch.set_num_threads(task.threads)
    step = TrainingStep(task)
    step()
    step.optimizer.zero_grad()
    start_watching()
    before = resident_kib()
    for _ in range(NUM_STEPS):
        step()
    return {"peak MiB": (peak_kib() - before) / 1024}


def training_rows(settings: Settings, task: Task) -> Iterator[Row]:
    """The row of one network at one size: time, what is kept, and the peak, of both forms."""
    tasks = {
        "dense": task,
        "sampled": replace(task, is_sampled=True),
    }
    peaks = {
        name: row_of_fresh_process(__file__, each, os.environ)["peak MiB"]
        for name, each in tasks.items()
    }
    steps: dict[str, Callable[[], None]] = {}
    kept = {}
    for name, each in tasks.items():
        step = TrainingStep(each)
        kept[name] = step.kept_bytes() / 2**20
        steps[name] = step
    times = compare(settings, steps)
    row: Row = {
        "network": "semantic FPN ResNet-18" if task.network == "fpn" else f"ResNet-{task.depth}",
        "size": f"{task.size[0]}x{task.size[1]}",
        "batch": task.batch,
        "dtype": task.dtype,
    }
    for name, latency in times.items():
        assert isinstance(latency, Latency)
        row |= {f"{name} ms": latency.latency_ms, f"{name} IQR ms": latency.iqr_ms}
    row["time ratio"] = row["sampled ms"] / row["dense ms"]
    for what, found in (("kept", kept), ("peak", peaks)):
        row |= {f"{name} {what} MiB": value for name, value in found.items()}
        row[f"{what} ratio"] = found["sampled"] / found["dense"]
    yield row


def parser() -> argparse.ArgumentParser:
    """The shared flags and this script's own."""
    made = argument_parser(__doc__, dtypes=True)
    made.add_argument("--child", help=argparse.SUPPRESS)
    return made


def main() -> None:
    """Measure every network, or be one of the processes that do."""
    args = parser().parse_args()
    if args.child:
        task = json.loads(args.child)
        print(json.dumps(watch(Task(**{**task, "size": tuple(task["size"])}))))
        return
    settings = settings_of(args, budget_s=10.0)
    shared = {"dtype": settings.dtype_name, "threads": settings.threads}
    if settings.quick:
        # One network: every row is two processes, which take seconds to begin.
        tasks = {"fpn": Task("fpn", 18, (32, 64), 1, **shared)}
    else:
        tasks = {
            "fpn-240x320": Task("fpn", 18, (240, 320), 4, **shared),
            "fpn-360x480": Task("fpn", 18, (360, 480), 4, **shared),
            "cifar": Task("cifar", 56, (32, 32), 64, **shared),
        }
    run_script(
        settings,
        "training_step",
        [
            Stage(name, functools.partial(training_rows, settings, task))
            for name, task in tasks.items()
        ],
        title="A training step, dense and sampled",
        notes=(
            "Forward, loss, backward and AdamW; layout b, random weights. Kept: distinct storages "
            "that autograd saves, without weights and images. Peak: growth of resident memory "
            "over three steps, in a fresh process."
        ),
    )


if __name__ == "__main__":
    main()
