"""Windows assembled from score maps, against a loop over windows and against plain torch.

    python bench/assemble.py --out runs/bench/today
    python bench/assemble.py --only forward        some of forward, train, memory and exact
    python bench/assemble.py --quick

2,000 windows of 21x21 cells, 5x5 bins, on the 1x25x75x112 score maps of a 600x900 image at stride
8, drawn evenly over the map: at its border they hang over. Float32.

loop          for each window: cut it out of the padded maps, and gather the cells of their bins.
bins loop     for each window and bin: copy a piece of one map.
gather        all windows at once, by an index of every cell (sparsight.ops' own reference).
compile       that in torch.compile.

forward   contiguous and channels-last. Held against the faster one of the two loops.
train     forward and backward. The loop over bins is left out, whose backward makes a map a piece.
memory    MiB that one forward and one forward and backward take, at most, each candidate in a fresh
          process. Linux only.
exact     cells that differ from those of the loop over bins, and the largest error of the gradient
          against float64, of ours and of gather, in every dtype.

"asked" is what the column before it should be.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.resident import peak_kib, resident_kib, row_of_fresh_process, start_watching
from harness.script import (
    Candidate,
    Settings,
    argument_parser,
    cells,
    compare,
    run_script,
    settings_of,
)
from harness.stages import Row, Stage
from sparsight.measure import Latency
from sparsight.ops import assemble_reference as reference
from sparsight.ops import assemble_windows

SIZE, K = 21, 5
FULL = (2000, 75, 112)  # windows, height and width of the map
QUICK = (30, 12, 17)
FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# What is asked of the time of the loop over ours.
LEAST_SPEED_UP = 20.0
WARMUP = 3  # calls before memory is watched

Assemble = Callable[[Tensor], Tensor]


def maps_and_windows(quick: bool, layout: str) -> tuple[Tensor, Tensor]:
    """The score maps and the windows, centred anywhere in the map."""
    count, height, width = QUICK if quick else FULL
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(1, K * K, height, width, generator=generator)
    centre = torch.rand(count, 2, generator=generator) * torch.tensor([height, width])
    corner = centre.floor().long() - (SIZE - 1) // 2
    windows = torch.cat([torch.zeros(count, 1, dtype=torch.int64), corner], dim=1)
    return maps.contiguous(memory_format=FORMATS[layout]), windows


def loop(windows: Tensor) -> Assemble:
    """A window after another: a cut and a gather."""
    g = reference.bins_of(SIZE, K, True)
    channel = (g[:, None] * K + g)[None]
    places = windows.tolist()

    def run(maps: Tensor) -> Tensor:
        padded = F.pad(maps, (SIZE,) * 4)
        made = []
        for image, y, x in places:
            top, left = y + SIZE, x + SIZE
            window = padded[image, :, top : top + SIZE, left : left + SIZE]
            made.append(window.gather(0, channel))
        return torch.cat(made)

    return run


def bins_loop(windows: Tensor) -> Assemble:
    """A window after another, and a bin of it after another: a copy of a piece."""
    counts = torch.bincount(reference.bins_of(SIZE, K, True), minlength=K).tolist()
    ends = torch.tensor(counts).cumsum(0).tolist()
    parts = [(end - count, end) for count, end in zip(counts, ends, strict=True)]
    places = windows.tolist()

    def run(maps: Tensor) -> Tensor:
        padded = F.pad(maps, (SIZE,) * 4)
        out = maps.new_empty(len(places), SIZE, SIZE)
        for w, (image, y, x) in enumerate(places):
            top, left = y + SIZE, x + SIZE
            for gy, (i, i_end) in enumerate(parts):
                for gx, (j, j_end) in enumerate(parts):
                    out[w, i:i_end, j:j_end] = padded[
                        image, gy * K + gx, top + i : top + i_end, left + j : left + j_end
                    ]
        return out

    return run


def assemblers(windows: Tensor) -> dict[str, Assemble]:
    """The candidates by name, but for what is compiled."""
    return {
        "ours": lambda maps: assemble_windows(maps, windows, size=SIZE),
        "loop": loop(windows),
        "bins loop": bins_loop(windows),
        "gather": lambda maps: reference.assemble_windows(maps, windows, SIZE, True),
    }


def training(assemble: Assemble, maps: Tensor) -> Assemble:
    """A call of forward and backward."""
    leaf = maps.detach().requires_grad_()
    grad = torch.ones_like(assemble(maps))

    def run(_: Tensor) -> Tensor:
        # Samples are taken in inference mode, which records no gradient.
        with torch.inference_mode(False), torch.enable_grad():
            return torch.autograd.grad(assemble(leaf), leaf, grad)[0]

    return run


def first_columns(maps: Tensor, windows: Tensor, layout: str) -> Row:
    """What a row is of."""
    return {"map": "x".join(map(str, maps.shape)), "windows": len(windows), "layout": layout}


def timed(settings: Settings, row: Row, candidates: dict[str, Candidate], maps: Tensor) -> Row:
    """The row with the times of all candidates, and what a loop and plain torch take of ours."""
    times = compare(settings, candidates, maps)
    ms = {name: time.latency_ms for name, time in times.items() if isinstance(time, Latency)}
    for name, latency in times.items():
        row.update(cells(name, latency))
    row["loop / ours"] = min(ms[name] for name in ("loop", "bins loop") if name in ms) / ms["ours"]
    met = "met" if row["loop / ours"] >= LEAST_SPEED_UP else "MISSED"
    row["asked"] = f">= {LEAST_SPEED_UP:g}: {met}"
    row["gather / ours"] = (
        min(ms[name] for name in ("gather", "compile") if name in ms) / ms["ours"]
    )
    return row


def forward_rows(settings: Settings) -> Iterator[Row]:
    """Inference."""
    for layout in FORMATS:
        maps, windows = maps_and_windows(settings.quick, layout)
        candidates: dict[str, Candidate] = {**assemblers(windows)}
        left_out = settings.left_out("compile")
        gather = assemblers(windows)["gather"]
        candidates["compile"] = left_out or torch.compile(gather, dynamic=False)
        yield timed(settings, first_columns(maps, windows, layout), candidates, maps)


def training_rows(settings: Settings) -> Iterator[Row]:
    """Forward and backward."""
    for layout in FORMATS:
        maps, windows = maps_and_windows(settings.quick, layout)
        candidates: dict[str, Candidate] = {
            name: training(assemble, maps)
            for name, assemble in assemblers(windows).items()
            if name != "bins loop"
        }
        yield timed(settings, first_columns(maps, windows, layout), candidates, maps)


@dataclass(frozen=True)
class Task:
    """What one process measures.

    Attributes:
        name: of the candidate.
        backward: whether after each forward its gradient is taken.
        quick: the size.
        threads: of torch.
    """

    name: str
    backward: bool
    quick: bool
    threads: int


def watch(task: Task) -> Row:
    """Run one candidate in this process, and say what one more call takes at most."""
    torch.set_num_threads(task.threads)
    maps, windows = maps_and_windows(task.quick, "contiguous")
    run = assemblers(windows)[task.name]
    if task.backward:
        run = training(run, maps)
    with torch.inference_mode():
        for _ in range(WARMUP):
            run(maps)
        start_watching()
        before = resident_kib()
        made = run(maps)
    return {
        "candidate": task.name,
        "call": "forward and backward" if task.backward else "forward",
        "result MiB": made.nbytes / 2**20,
        "taken MiB": max(0, peak_kib() - before) / 1024,
    }


def memory_rows(settings: Settings) -> Iterator[Row]:
    """What one call takes, its result included."""
    for backward in (False, True):
        for name in ("ours",) if settings.quick else ("ours", "loop", "gather"):
            task = Task(name, backward, settings.quick, settings.threads)
            yield row_of_fresh_process(__file__, task, os.environ)


def exact_rows(settings: Settings) -> Iterator[Row]:
    """Whether the copies are the same, and how far off the sums of the gradient are."""
    for layout in FORMATS:
        for dtype in DTYPES:
            maps, windows = maps_and_windows(settings.quick, layout)
            maps = maps.to(dtype)
            made, copied = (assemblers(windows)[name](maps) for name in ("ours", "bins loop"))
            grad = torch.randn(made.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            truth = reference.assemble_windows_backward(grad.double(), windows, maps.shape, True)
            errors = {}
            for name in ("ours", "gather"):
                leaf = maps.detach().requires_grad_()
                (sent,) = torch.autograd.grad(assemblers(windows)[name](leaf), leaf, grad)
                errors[f"{name}, error of gradient"] = (sent.double() - truth).abs().max().item()
            wrong = int((made != copied).sum())
            yield {
                **first_columns(maps, windows, layout),
                "dtype": str(dtype).removeprefix("torch."),
                "cells that differ": wrong,
                "asked": f"0: {'MISSED' if wrong else 'met'}",
                **errors,
            }


def main() -> None:
    """Measure forward, training, memory and error, or be one of the processes that do."""
    parser = argument_parser(__doc__)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(watch(Task(**json.loads(args.child)))))
        return
    settings = settings_of(args)
    run_script(
        settings,
        "assemble",
        [
            Stage("forward", lambda: forward_rows(settings)),
            Stage("train", lambda: training_rows(settings)),
            Stage("memory", lambda: memory_rows(settings)),
            Stage("exact", lambda: exact_rows(settings)),
        ],
        title="Windows assembled from score maps",
        notes=(
            f"Windows of {SIZE}x{SIZE} cells, {K}x{K} bins (see bench/assemble.py). Times are "
            "medians, IQR is the distance of the quartiles; `loop / ours` is of the faster loop in "
            "the row, `gather / ours` of the faster one of gather and compile. What a call takes "
            "is the high-water mark of the resident memory less what was resident before it."
        ),
    )


if __name__ == "__main__":
    main()
