"""Memory of a network, frozen and eager, and whether a warm call takes or keeps any.

    python bench/memory.py --out runs/bench/today     ResNet-50 features at 512x1024, and a soak
    python bench/memory.py --only soak --soak 100000  some of eager, frozen-1, frozen-0.3, block and
                                                      soak
    python bench/memory.py --quick

Every row is a fresh process that builds its model, frees what it was built from, resets the
high-water mark of its resident memory (`/proc/self/clear_refs`) and only then runs.

peak          that mark after the calls, everything included: Python, torch, weights, maps.
growth        resident memory at the end minus that after the warm-up; "late growth" counts from
              the middle of the calls. A leak of one map a call would be megabytes.
allocations   of 1 MiB and more in one warm call, by whomever: malloc and its kin are counted by a
              library that is preloaded. Smaller ones come back from malloc's own lists.
page faults   of one warm call: memory that the process did not have before.

`block` is one frozen bottleneck, so that no dense layer of torch is counted; `soak` calls a small
network 10,000 times. Linux with glibc only.
"""

import argparse
import ctypes
import functools
import json
import os
import resource
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from harness.models import STAGES, block_input, dense_block, frozen, resnet, sampled_at
from harness.native import build_library
from harness.resident import peak_kib, resident_kib, row_of_fresh_process, start_watching
from harness.rivals import folded
from harness.script import argument_parser, run_script, settings_of
from harness.stages import Row, Stage
from sparsight.models.resnet_stages import ResNetStages

WARMUP = 20
PLANES = 64  # of the single block


@dataclass(frozen=True)
class Task:
    """What one process measures.

    Attributes:
        variant: "eager" or "frozen at <density>".
        network: "ResNet-50", "small ResNet" or "block".
        size: height and width of the image, or of the block's map.
        calls: after the warm-up.
        threads: of torch.
    """

    variant: str
    network: str
    size: tuple[int, int]
    calls: int
    threads: int


def large_allocations() -> tuple[int, int] | None:
    """Number and bytes so far, or None where the counter is not preloaded."""
    process = ctypes.CDLL(None)
    if not hasattr(process, "num_large_allocations"):
        return None
    process.num_large_allocations.restype = ctypes.c_int64
    process.large_allocation_bytes.restype = ctypes.c_int64
    return process.num_large_allocations(), process.large_allocation_bytes()


def model_of(task: Task) -> tuple[nn.Module, torch.Tensor]:
    """The model and its input; the dense one it was made from is free again."""
    if task.network == "block":
        source, x = dense_block(PLANES), block_input(PLANES, task.size)
    else:
        torch.manual_seed(1)
        x = torch.randn(1, 3, *task.size).to(memory_format=torch.channels_last)
        layers = (3, 4, 6, 3) if task.network == "ResNet-50" else (1, 1, 1, 1)
        source = ResNetStages(resnet(layers)).eval()
    if task.variant == "eager":
        return folded(source), x
    density = float(task.variant.split()[-1])
    made = frozen(sampled_at(source, density), x, torch.float32)
    assert not isinstance(made, str)
    return made, x


def watch(task: Task) -> Row:
    """Build one variant in this process, call it, and say what that took."""
    torch.set_num_threads(task.threads)
    model, x = model_of(task)
    start_watching()
    before = resident_kib()
    with torch.inference_mode():
        for _ in range(WARMUP):
            model(x)
        warm, middle = resident_kib(), 0
        allocated, faults = large_allocations(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for i in range(task.calls):
            if i == task.calls // 2:
                middle = resident_kib()
            model(x)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        at_end = large_allocations()
    row: Row = {
        "variant": task.variant,
        "network": task.network,
        "size": f"{task.size[0]}x{task.size[1]}",
        "calls": task.calls,
        "before MiB": before / 1024,
        "peak MiB": peak_kib() / 1024,
        "growth KiB": resident_kib() - warm,
        "late growth KiB": resident_kib() - middle,
        "page faults per call": faults / task.calls,
    }
    if allocated is None or at_end is None:
        return {**row, "allocations per call": "not counted"}
    row["allocations per call"] = (at_end[0] - allocated[0]) / task.calls
    row["allocated MiB per call"] = (at_end[1] - allocated[1]) / task.calls / 2**20
    return row


def in_fresh_process(task: Task) -> Row:
    """The row of one variant, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        counter = build_library("count_allocations.cpp", Path(folder), ["-fno-builtin"])
        environment = dict(os.environ)
        if isinstance(counter, Path):
            environment["LD_PRELOAD"] = str(counter)
        row = row_of_fresh_process(__file__, task, environment)
    if isinstance(counter, str):
        row["allocations per call"] = f"not counted: {counter}"
    return row


def parser() -> argparse.ArgumentParser:
    """The shared flags and this script's own."""
    made = argument_parser(__doc__)
    made.add_argument("--calls", type=int, help="of each variant, warm; default 50")
    made.add_argument("--soak", type=int, help="calls of a small network; default 10000")
    made.add_argument("--child", help=argparse.SUPPRESS)
    return made


def main() -> None:
    """Measure every variant, or be one of the processes that do."""
    args = parser().parse_args()
    if args.child:
        task = json.loads(args.child)
        print(json.dumps(watch(Task(**{**task, "size": tuple(task["size"])}))))
        return
    settings = settings_of(args)
    quick = settings.quick
    calls, soak = args.calls or (10 if quick else 50), args.soak or (50 if quick else 10_000)
    network, size = ("small ResNet", (64, 96)) if quick else ("ResNet-50", (512, 1024))
    map_size = (32, 64) if quick else STAGES[PLANES]
    tasks = {
        # Eager only has to reach its peak.
        "eager": Task("eager", network, size, min(calls, 10), settings.threads),
        "frozen-1": Task("frozen at 1", network, size, calls, settings.threads),
        "frozen-0.3": Task("frozen at 0.3", network, size, calls, settings.threads),
        "block": Task("frozen at 0.3", "block", map_size, calls, settings.threads),
        "soak": Task("frozen at 0.3", "small ResNet", (64, 96), soak, settings.threads),
    }
    if quick:
        # A process each, of seconds; of the small network the soak is left, and says the same.
        del tasks["frozen-1"], tasks["frozen-0.3"]
    run = {name: functools.partial(in_fresh_process, task) for name, task in tasks.items()}
    run_script(
        settings,
        "memory",
        [Stage(name, lambda measure=measure: [measure()]) for name, measure in run.items()],
        title="Resident memory of ResNet features, frozen and eager",
        notes=(
            "Each row is a fresh process; eager is channels-last with norms folded. Allocations "
            "are those of 1 MiB and more, in the whole process. Batch 1, float32."
        ),
    )


if __name__ == "__main__":
    main()
