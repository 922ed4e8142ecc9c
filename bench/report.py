"""From the benchmarks' JSON to the tables of docs/performance.md.

    python bench/report.py --json docs/results/<date>/*.json                           prints them
    python bench/report.py --json docs/results/<date>/*.json --into docs/performance.md

With --into, what stands between `<!-- begin NAME -->` and `<!-- end NAME -->` is replaced, and
nothing else. A table whose JSON was not given says so: no number is typed by hand.
"""

import argparse
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.possible import geometric_mean
from sparsight.measure import environment_block, markdown_table

Row = dict[str, Any]
# The rows of each benchmark by its name ("block", "network-bfloat16", ...).
Results = dict[str, list[Row]]

NOT_MEASURED = "not measured"
# Columns of the tables in the page; the dated results hold all of them.
COLUMNS = {
    "block": (
        "planes", "map", "asked density", "MMACs", "openvino ms", "openvino nhwc ms",
        "onnxruntime ms", "compile ms", "eager ms", "addition ms", "ours ms", "ours IQR ms",
        "speed-up", "possible speed-up", "realised/possible",
    ),
    "network": (
        "network", "image", "asked density", "GMACs", "MAC ratio", "openvino ms",
        "openvino nhwc ms", "onnxruntime ms", "compile ms", "eager ms", "frozen dense ms",
        "ours ms", "ours IQR ms", "against", "speed-up", "possible speed-up", "realised/possible",
    ),
    "overhead": (
        "what", "planes", "map", "us per call", "block ms", "heads ms", "lists ms",
        "interpolation ms", "share of time", "share of MACs", "time/MACs",
    ),
    "memory": ("variant", "image", "calls", "before MiB", "peak MiB", "growth KiB"),
    "crossover": ("shape", "map", "openvino ms", "openvino nhwc ms", "crossover density"),
    "roofline": (
        "planes", "density", "ours ms", "compute ms", "addition ms", "bound by", "GMAC/s",
        "share of peak", "share of bound",
    ),
}  # fmt: skip


def numbers(rows: Sequence[Row], column: str, **wanted: Any) -> list[float]:
    """A column of the rows that hold the wanted values; words (a missing rival) are left out."""
    return [
        row[column]
        for row in rows
        if isinstance(row.get(column), int | float)
        and all(row.get(name) == value for name, value in wanted.items())
    ]


def verdict(values: Sequence[float], reach: float, *, at_most: bool = False) -> str:
    """Whether all values are within reach."""
    if not values:
        return NOT_MEASURED
    met = all(value <= reach if at_most else value >= reach for value in values)
    return "yes" if met else "no"


def spread(values: Sequence[float]) -> str:
    """The values, or their range where there are many."""
    if not values:
        return NOT_MEASURED
    if len(values) <= 2:
        return ", ".join(f"{value:.3g}" for value in values)
    return f"{min(values):.3g} to {max(values):.3g}"


def reach_rows(results: Results) -> list[Row]:
    """One line per goal: what was asked, what was measured, whether it is met."""
    block, network = results.get("block", []), results.get("network", [])
    half, memory = results.get("network-bfloat16", []), results.get("memory", [])
    overhead = results.get("overhead", [])
    shares = numbers(block, "realised/possible")
    mean = [geometric_mean(shares)] if shares else []
    features: dict[str, Any] = {"network": "ResNet-50 features"}
    full = [1 / s for s in numbers(network, "speed-up", **features, **{"asked density": 1.0})]
    sparse = numbers(network, "realised/possible", **features, **{"asked density": 0.3})
    bf16 = numbers(half, "speed-up", **features, **{"asked density": 0.3})
    parts = [row for row in network if str(row.get("network", "")).endswith("sampled part")]
    wholes = [row for row in network if row not in parts and row["network"] != features["network"]]
    sampled = numbers(parts, "realised/possible")
    added = numbers(overhead, "time/MACs")
    calls = [
        row["us per call"]
        for row in overhead
        if str(row["what"]).startswith("block operator, masks given")
    ]
    peaks = [
        row["peak MiB"] / eager["peak MiB"]
        for row in memory
        for eager in memory
        if eager["variant"] == "eager"
        and row["variant"] != "eager"
        and row["image"] == eager["image"]
    ]
    growth = [row["growth KiB"] for row in memory if row["variant"] != "eager"]
    lines = [
        ("blocks, realised / possible: geometric mean", ">= 0.95", mean, 0.95, False),
        ("blocks, realised / possible: each", ">= 0.8", shares, 0.8, False),
        ("ResNet-50 features, density 1: time / OpenVINO's", "<= 1.1", full, 1.1, True),
        ("the same, density 0.3: realised / possible", ">= 0.9", sparse, 0.9, False),
        ("the same in bf16: speed-up over OpenVINO bf16", ">= 2.0", bf16, 2.0, False),
        ("FCN and Faster R-CNN, sampled part: realised / possible", ">= 0.9", sampled, 0.9, False),
        ("heads, lists, interpolation: share of time / of MACs", "<= 1.5", added, 1.5, True),
        ("peak memory / eager's", "<= 1", peaks, 1.0, True),
        ("growth of memory over warm calls, KiB", "0", growth, 0.0, True),
        ("one call on an empty mask, us", "<= 30", calls, 30.0, True),
    ]
    made: list[Row] = [
        {"what": what, "reach": goal, "measured": spread(values),
         "met": verdict(values, reach, at_most=at_most)}
        for what, goal, values, reach, at_most in lines
    ]  # fmt: skip
    for row in wholes:
        made.append(
            {
                "what": f"{row['network']}, density {row['asked density']}, whole model: speed-up",
                "reach": "report",
                "measured": spread(numbers([row], "speed-up")),
                "met": "-",
            }
        )
    return made


def table(results: Results, name: str) -> str:
    """The page's columns of one benchmark."""
    columns = COLUMNS[name]
    rows = [
        {column: row[column] for column in columns if column in row}
        for row in results.get(name, [])
    ]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        return f"{NOT_MEASURED[0].upper()}{NOT_MEASURED[1:]}: no {name}.json was given."
    # Columns in the page's order, also where the first row lacks some.
    ordered = [c for c in columns if any(c in row for row in rows)]
    return markdown_table([{c: row.get(c, "") for c in ordered} for row in rows])


def sections(files: Sequence[Path], page: Path | None) -> dict[str, str]:
    """Every generated part of the page, by name."""
    results: Results = {}
    sources = []
    described: dict[str, str] = {}
    for path in sorted(files):
        content = json.loads(path.read_text(encoding="utf-8"))
        results[path.stem] = content["rows"]
        described = described or content["environment"]
        sources.append(f"- {path.name}: {content['date']}, `{content['command']}`, commit "
                       f"{content['environment'].get('commit', 'unknown')}")  # fmt: skip
    made = {"reach": markdown_table(reach_rows(results))}
    made |= {name: table(results, name) for name in COLUMNS}
    figures = [path.with_suffix(".svg") for path in files if path.stem == "roofline"]
    made["figure"] = "No figure yet: it is drawn by bench/roofline.py."
    if figures and figures[0].exists():
        start = page.parent if page else Path()
        link = Path(os.path.relpath(figures[0], start)).as_posix()
        made["figure"] = f"![Time of each block, and its bounds]({link})"
    made["environment"] = "\n".join([*sources, "", environment_block(described)])
    return made


def fill(text: str, parts: dict[str, str]) -> str:
    """The page with its generated parts replaced."""
    for name, part in parts.items():
        pattern = re.compile(f"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        text = pattern.sub(lambda found, part=part: f"{found[1]}{part}\n{found[2]}", text)
    return text


def main() -> None:
    """Print the tables, or put them into a page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, nargs="+", required=True, help="of the benchmarks")
    parser.add_argument("--into", type=Path, help="page with begin and end marks")
    args = parser.parse_args()
    parts = sections(args.json, args.into)
    if args.into is None:
        print("\n\n".join(f"## {name}\n\n{part}" for name, part in parts.items()))
        return
    text = args.into.read_text(encoding="utf-8")
    args.into.write_text(fill(text, parts), encoding="utf-8")


if __name__ == "__main__":
    main()
