"""Memory of a network, frozen and eager, and whether it grows from call to call.

    python bench/memory.py --out runs/bench/today     ResNet-50 features at 512x1024
    python bench/memory.py --quick

Every row is a fresh process that builds its model, frees what it was built from, resets the
high-water mark of its resident memory (`/proc/self/clear_refs`) and only then runs. `peak` is that
mark after the calls, everything included: Python, torch, weights, maps. `growth` is how much the
resident memory at the end exceeds that after the warm-up. Linux only.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path

import torch

from harness.models import frozen, resnet, sampled_at
from harness.rivals import folded
from harness.script import Row, argument_parser, publish, settings_of
from sparsight.models.semantic_fpn import ResNetStages

WARMUP = 20


def status_kib(field: str) -> int:
    """A field of /proc/self/status, e.g. VmRSS or VmHWM."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0])
    raise KeyError(field)


def start_watching() -> None:
    """Give freed memory back and forget the high-water mark so far."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def watch(variant: str, image: tuple[int, int], tiny: bool, calls: int, threads: int) -> Row:
    """Build one variant in this process, call it, and say what that took."""
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    x = torch.randn(1, 3, *image).to(memory_format=torch.channels_last)
    source = ResNetStages(resnet((1, 1, 1, 1) if tiny else (3, 4, 6, 3))).eval()
    if variant == "eager":
        model = folded(source)
    else:
        density = float(variant.split()[-1])
        made = frozen(sampled_at(source, density), x, torch.float32)
        assert not isinstance(made, str)
        model = made
    del source
    start_watching()
    before = status_kib("VmRSS")
    with torch.inference_mode():
        for _ in range(WARMUP):
            model(x)
        warm = status_kib("VmRSS")
        for _ in range(calls):
            model(x)
    return {
        "variant": variant,
        "image": f"{image[0]}x{image[1]}",
        "blocks": 4 if tiny else 16,
        "calls": calls,
        "before MiB": before / 1024,
        "peak MiB": status_kib("VmHWM") / 1024,
        "growth KiB": status_kib("VmRSS") - warm,
    }


def in_fresh_process(
    variant: str, image: tuple[int, int], *, tiny: bool, calls: int, threads: int
) -> Row:
    """The row of one variant, from a process of its own."""
    numbers = [*image, int(tiny), calls, threads]
    command = [sys.executable, __file__, "--child", variant, *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"bench/memory.py: the process of {variant!r} exited with {done.returncode}, but must "
            f"print a row; its last words: {done.stderr[-2000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def parser() -> argparse.ArgumentParser:
    """The shared flags and this script's own."""
    made = argument_parser(__doc__)
    made.add_argument("--calls", type=int, default=200, help="calls of each variant, warm")
    made.add_argument(
        "--many-calls", type=int, default=10_000, help="calls of a small network, for growth"
    )
    made.add_argument("--child", nargs=6, help=argparse.SUPPRESS)
    return made


def main() -> None:
    """Measure every variant, or be one of the processes that do."""
    args = parser().parse_args()
    if args.child:
        variant, height, width, tiny, calls, threads = args.child
        image = int(height), int(width)
        print(json.dumps(watch(variant, image, bool(int(tiny)), int(calls), int(threads))))
        return
    settings = settings_of(args, repeats=1)
    tiny, image = settings.quick, (64, 96) if settings.quick else (512, 1024)
    variants = ["eager", "frozen at 1", "frozen at 0.3"]
    rows = []
    for variant in ["eager", "frozen at 0.3"] if settings.quick else variants:
        # Eager only has to reach its peak.
        calls = 10 if settings.quick or variant == "eager" else args.calls
        rows.append(
            in_fresh_process(variant, image, tiny=tiny, calls=calls, threads=settings.threads)
        )
    if not settings.quick:
        rows.append(
            in_fresh_process(
                "frozen at 0.3",
                (64, 96),
                tiny=True,
                calls=args.many_calls,
                threads=settings.threads,
            )
        )
    publish(
        settings,
        "memory",
        rows,
        title="Resident memory of ResNet features, frozen and eager",
        notes="Each row is a fresh process; eager is channels-last with norms folded. Batch 1.",
    )


if __name__ == "__main__":
    main()
