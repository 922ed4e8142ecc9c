"""Where the time goes: the machine's two roofs, measured, and the blocks below them.

    python bench/roofline.py --out runs/bench/today     after bench/block.py wrote block.json there
    python bench/roofline.py --only blocks --out ...    some of roofs and blocks
    python bench/roofline.py --quick

The compute roof is the rate of multiply-adds in registers, the memory roof an in-place addition of
two arrays (12 bytes an element) from each level of the memory; both by a C++ loop compiled here for
this machine, one thread per core used. With a block.json (in the folder --out, or --blocks) every
row of it is set against them: the bound is the larger of its multiply-adds at the peak rate and its
measured in-place addition. The figure `roofline.svg` shows the same.
"""

import ctypes
import json
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from harness.native import build_library
from harness.possible import bound_ms
from harness.script import Settings, argument_parser, measure_into, open_file, settings_of
from harness.stages import Row, Stage

REPEATS = 7
# Per thread: both arrays in L2, in the shared L3, in DRAM.
WORKING_SETS_MIB = {"L2": 0.5, "L3": 8.0, "DRAM": 256.0}


def build_loops(folder: Path) -> Any | str:
    """The compiled loops, or why there are none."""
    library = build_library("peak_rate.cpp", folder, ["-march=native"])
    if isinstance(library, str):
        return library
    loops = ctypes.CDLL(str(library))
    loops.multiply_add.restype = loops.add_in_place.restype = ctypes.c_int64
    loops.multiply_add.argtypes = [ctypes.c_int64, ctypes.c_void_p]
    loops.add_in_place.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 2
    return loops


def rate(work: Callable[[int], int], threads: int, repeats: int) -> float:
    """Best rate over the repeats of `work(thread)` in that many threads at once, in 1e9 a second.

    A peak is a maximum: whatever disturbs the machine only lowers it.
    """
    best = 0.0
    for _ in range(repeats):
        done = [0] * threads
        gate = threading.Barrier(threads + 1)

        def run(i: int, done: list[int] = done, gate: threading.Barrier = gate) -> None:
            gate.wait()
            done[i] = work(i)
            gate.wait()

        workers = [threading.Thread(target=run, args=(i,)) for i in range(threads)]
        for worker in workers:
            worker.start()
        gate.wait()
        start = time.perf_counter()
        gate.wait()
        elapsed = time.perf_counter() - start
        for worker in workers:
            worker.join()
        best = max(best, sum(done) / elapsed / 1e9)
    return best


def peak_rows(loops: Any, settings: Settings) -> list[Row]:
    """Compute and memory roofs, for one thread and for all."""
    rows: list[Row] = []
    repeats = 3 if settings.quick else REPEATS
    rounds = 10**6 if settings.quick else 3 * 10**7
    sink = torch.zeros(64 * settings.threads)
    for threads in sorted({1, settings.threads}):

        def multiply(i: int) -> int:
            return loops.multiply_add(rounds, sink[64 * i :].data_ptr())

        peak = rate(multiply, threads, repeats)
        rows.append({"roof": "fp32 multiply-adds", "threads": threads, "GMAC/s": peak})
    for level, mib in WORKING_SETS_MIB.items():
        if settings.quick and level == "DRAM":
            continue
        count = int(mib * 2**20 / 8)
        times = max(1, int((2**25 if settings.quick else 2**28) / count))
        for threads in sorted({1, settings.threads}):
            arrays = [(torch.ones(count), torch.full((count,), 1e-6)) for _ in range(threads)]

            def add(i: int, arrays: list = arrays, count: int = count, times: int = times) -> int:
                left, right = arrays[i]
                return loops.add_in_place(left.data_ptr(), right.data_ptr(), count, times)

            gb = rate(add, threads, repeats)
            rows.append(
                {"roof": f"addition, {level}", "threads": threads, "MiB each": mib, "GB/s": gb}
            )
    return rows


def block_rows(blocks: list[Row], peak_gmacs: float) -> list[Row]:
    """Each block of a block.json below the roofs."""
    rows: list[Row] = []
    for block in blocks:
        if not isinstance(block.get("ours ms"), float):
            continue
        # The addition was measured beside the block: its time is the memory roof.
        bound, roof = bound_ms(block["MMACs"] * 1e6, block["addition ms"], peak_gmacs)
        rows.append(
            {
                "planes": block["planes"],
                "density": block["asked density"],
                "MMACs": block["MMACs"],
                "ours ms": block["ours ms"],
                "openvino ms": faster(block.get("openvino ms"), block.get("openvino nhwc ms")),
                "compute ms": block["MMACs"] / peak_gmacs,
                "addition ms": block["addition ms"],
                "bound ms": bound,
                "bound by": roof,
                "GMAC/s": block["MMACs"] / block["ours ms"],
                "share of peak": block["MMACs"] / block["ours ms"] / peak_gmacs,
                "share of bound": bound / block["ours ms"],
            }
        )
    return rows


def faster(*times: Any) -> float | str:
    """The smallest number among the cells, or the first of the words that stand there instead."""
    numbers = [time for time in times if isinstance(time, int | float)]
    return min(numbers) if numbers else str(times[0])


def draw(rows: list[Row], path: Path) -> None:
    """Bars of the measured times by stage, with the bound of each as a line across it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stages = list(dict.fromkeys(row["planes"] for row in rows))
    figure, panels = pyplot.subplots(1, len(stages), figsize=(2.6 * len(stages), 3.4))
    for panel, planes in zip([panels] if len(stages) == 1 else panels, stages, strict=True):
        of_stage = [row for row in rows if row["planes"] == planes]
        names = ["dense\nOpenVINO", *(f"{row['density']:g}" for row in of_stage)]
        dense = of_stage[0]["openvino ms"]
        dense_ms = 0.0 if isinstance(dense, str) else dense
        heights = [dense_ms, *(row["ours ms"] for row in of_stage)]
        panel.bar(range(len(names)), heights, color=["0.75"] + ["tab:blue"] * len(of_stage))
        for i, row in enumerate(of_stage, start=1):
            panel.hlines(row["compute ms"], i - 0.4, i + 0.4, color="black", label="peak FMA")
            panel.hlines(
                row["addition ms"], i - 0.4, i + 0.4, color="tab:red", ls=":", label="memory"
            )
            panel.text(i, row["ours ms"], f"{row['share of peak']:.0%}", ha="center", va="bottom")
        panel.margins(y=0.12)
        panel.set_xticks(range(len(names)), names, fontsize=8)
        panel.set_title(f"{planes} planes", fontsize=10)
        panel.set_xlabel("density")
    first = panels if len(stages) == 1 else panels[0]
    first.set_ylabel("ms per block; share of peak above")
    handles, labels = first.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))  # each bar drew both lines
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    figure.legend(unique.values(), unique.keys(), fontsize=8, ncols=2, loc="upper center")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def roof_rows(settings: Settings) -> list[Row]:
    """The roofs, or why they are not measured."""
    with tempfile.TemporaryDirectory() as folder:
        loops = build_loops(Path(folder))
        if isinstance(loops, str):
            return [{"roof": f"not measured: {loops}"}]
        return peak_rows(loops, settings)


def rows_below(blocks: Path | None, roofs: list[Row]) -> list[Row]:
    """The blocks of a block.json below the roofs, or what is missing for that."""
    if blocks is None or not blocks.exists():
        return [{"roof": "no block.json, so no blocks below the roofs: pass --blocks"}]
    peaks = [row["GMAC/s"] for row in roofs if "GMAC/s" in row]
    if not peaks:
        return [{"roof": "no roofs, so no blocks below them: measure the stage roofs first"}]
    return block_rows(json.loads(blocks.read_text(encoding="utf-8"))["rows"], max(peaks))


def main() -> None:
    """Measure the roofs, and hold the blocks against them."""
    parser = argument_parser(__doc__)
    parser.add_argument("--blocks", type=Path, help="block.json; default: that in --out")
    args = parser.parse_args()
    settings = settings_of(args)
    path = args.blocks or (settings.out / "block.json" if settings.out else None)
    file = open_file(
        settings,
        "roofline",
        ("roofs", "blocks"),
        title="The machine's roofs, and the blocks below them",
        notes=(
            "Roofs are the best of the repeats. `compute ms` is MMACs at the peak of all threads; "
            "`bound` the larger of it and the in-place addition measured beside the block."
        ),
    )
    stages = [
        Stage("roofs", lambda: roof_rows(settings)),
        Stage("blocks", lambda: rows_below(path, file.rows("roofs"))),
    ]
    measure_into(file, settings, stages)
    below = [row for row in file.rows("blocks") if "ours ms" in row]
    if settings.out is not None and below:
        draw(below, settings.out / "roofline.svg")


if __name__ == "__main__":
    main()
