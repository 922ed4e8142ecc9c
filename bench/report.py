"""From the benchmarks' JSON to the tables of docs/performance.md.

    python bench/report.py --json docs/results/<date>                           prints them
    python bench/report.py --json docs/results/<date> --into docs/performance.md

With --into, what stands between `<!-- begin NAME -->` and `<!-- end NAME -->` is replaced, and
nothing else. A table whose JSON is not there says so, and so does a goal of which only some rows
were measured: no number is typed by hand.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.possible import geometric_mean
from sparsight.measure import environment_block, markdown_table

Row = dict[str, Any]
# The rows of each benchmark by its name ("block", "network-bfloat16", ...).
Results = dict[str, list[Row]]

NOT_MEASURED = "not measured"
QUICK = "form: quick"  # as the environment of such a file says
# Columns of the tables in the page; the dated results hold all of them.
BLOCK = (
    "planes", "map", "asked density", "MMACs", "openvino ms", "openvino nhwc ms", "onnxruntime ms",
    "compile ms", "eager ms", "addition ms", "ours ms", "ours IQR ms", "speed-up",
    "possible speed-up", "realised/possible", "openvino in a chain ms", "ours in a chain ms",
    "speed-up in a chain", "realised/possible in a chain",
)  # fmt: skip
NETWORK = (
    "network", "image", "asked density", "GMACs", "MAC ratio", "openvino ms", "openvino nhwc ms",
    "onnxruntime ms", "compile ms", "eager ms", "frozen dense ms", "ours ms", "ours IQR ms",
    "against", "speed-up", "possible speed-up", "realised/possible",
)  # fmt: skip
COLUMNS = {
    "block": BLOCK,
    "block-bfloat16": BLOCK,
    "network": NETWORK,
    "network-bfloat16": NETWORK,
    "overhead": (
        "what", "planes", "map", "us per call", "block ms", "heads ms", "lists ms",
        "interpolation ms", "share of time", "share of MACs", "time/MACs",
    ),
    "memory": (
        "variant", "network", "size", "calls", "before MiB", "peak MiB", "growth KiB",
        "late growth KiB", "page faults per call", "allocations per call",
        "allocated MiB per call",
    ),
    "crossover": ("shape", "map", "openvino ms", "openvino nhwc ms", "crossover density"),
    "roofline": (
        "roof", "threads", "GB/s", "planes", "density", "ours ms", "compute ms", "addition ms",
        "bound by", "GMAC/s", "share of peak", "share of bound",
    ),
    "pool-forward": (
        "map", "window", "layout", "dtype", "ours ms", "ours IQR ms", "avg_pool2d ms",
        "max_pool2d ms", "formula ms", "ours / slower pool", "formula / ours",
    ),
    "pool-train": (
        "map", "window", "layout", "dtype", "ours ms", "ours IQR ms", "max_pool2d ms",
        "formula ms", "ours / max_pool2d", "formula / ours",
    ),
    "pool-memory": (
        "map", "window", "layout", "dtype", "ours keeps MiB", "max_pool2d keeps MiB",
        "formula keeps MiB",
    ),
    "pool-error": (
        "map", "window", "layout", "dtype", "ours, error", "formula, error", "error ratio",
    ),
    "training_step": (
        "network", "size", "batch", "dtype", "dense ms", "dense IQR ms", "sampled ms",
        "sampled IQR ms", "time ratio", "dense kept MiB", "sampled kept MiB", "kept ratio",
        "dense live MiB", "sampled live MiB", "live ratio", "peak ratio",
    ),
}  # fmt: skip
# Rows that a goal is about: it is not met by half of them.
NUM_BLOCKS = 16  # four stages at four densities
NUM_STAGES = 4
NUM_POOLINGS = 8  # two maps, two windows, two layouts
NUM_POOLING_DTYPES = 3
NUM_TRAINED = 6  # the semantic FPN at two sizes and a ResNet for CIFAR, in two dtypes
SOAK_CALLS = 10_000  # constant memory is asked of as many; of fewer it is only reported
FEATURES = "ResNet-50 features"


@dataclass(frozen=True)
class Goal:
    """A line of the table of goals.

    Attributes:
        what: is compared.
        values: measured.
        reach: that each of the values must keep to, or None where they are only reported.
        at_most: whether the reach is an upper bound.
        expected: number of values that a complete run has.
    """

    what: str
    values: Sequence[float]
    reach: float | None = None
    at_most: bool = False
    expected: int = 1

    @property
    def asked(self) -> str:
        """The reach in words."""
        if self.reach is None:
            return "report"
        return f"{'<=' if self.at_most else '>='} {self.reach:g}"

    def verdict(self) -> str:
        """Met or missed; a missing value is neither."""
        if not self.values:
            return NOT_MEASURED
        partial = len(self.values) < self.expected
        missing = f"only {len(self.values)} of {self.expected} rows measured"
        if self.reach is None:
            return missing if partial else "-"
        if not all(v <= self.reach if self.at_most else v >= self.reach for v in self.values):
            return "missed"
        return missing if partial else "met"


def numbers(rows: Sequence[Row], column: str, **wanted: Any) -> list[float]:
    """A column of the rows that hold the wanted values; words (a missing rival) are left out."""
    return [
        row[column]
        for row in rows
        if isinstance(row.get(column), int | float)
        and all(row.get(name) == value for name, value in wanted.items())
    ]


def fully_rivalled(rows: Sequence[Row]) -> list[Row]:
    """The rows that had both bindings of OpenVINO to beat: a goal is not met against the slower."""
    return [
        row
        for row in rows
        if all(numbers([row], name) for name in ("openvino ms", "openvino nhwc ms"))
    ]


def spread(values: Sequence[float]) -> str:
    """The values, or their range where there are many."""
    if not values:
        return NOT_MEASURED
    if len(values) <= 2:
        return ", ".join(f"{value:.3g}" for value in values)
    return f"{min(values):.3g} to {max(values):.3g}"


def block_goals(results: Results) -> list[Goal]:
    """What single blocks must reach; in bfloat16 and in a chain they are reported."""
    shares = numbers(fully_rivalled(results.get("block", [])), "realised/possible")
    mean = [geometric_mean(shares)] if shares else []
    name = "blocks, realised / possible: geometric mean"
    # The mean of some rows is neither within the goal nor beyond it.
    is_whole = len(shares) >= NUM_BLOCKS
    goals = [
        Goal(name, mean, 0.95)
        if is_whole
        else Goal(f"{name} (of {len(shares)} of {NUM_BLOCKS} rows)", mean),
        Goal("blocks, realised / possible: each", shares, 0.8, expected=NUM_BLOCKS),
    ]
    words = {"block": "blocks", "block-bfloat16": "blocks in bf16"}
    for name, column in (
        ("block", "realised/possible in a chain"),
        ("block-bfloat16", "realised/possible"),
        ("block-bfloat16", "realised/possible in a chain"),
    ):
        where = " in a chain" if column.endswith("chain") else ""
        what = f"{words[name]}{where}, realised / possible: geometric mean"
        shares = numbers(results.get(name, []), column)
        goals.append(Goal(what, [geometric_mean(shares)] if shares else []))
    return goals


def network_goals(results: Results) -> list[Goal]:
    """What networks must reach, and the whole models, which are reported."""
    rows, half = results.get("network", []), results.get("network-bfloat16", [])

    def features(rows: list[Row], column: str, density: float) -> list[float]:
        wanted = {"network": FEATURES, "asked density": density}
        return numbers(fully_rivalled(rows), column, **wanted)

    full = [1 / speedup for speedup in features(rows, "speed-up", 1.0)]
    named = [row for row in rows if row.get("network", FEATURES) != FEATURES]
    parts = [row for row in named if str(row["network"]).endswith("sampled part")]
    wholes = [row for row in named if row not in parts]
    goals = [
        Goal("ResNet-50 features, density 1: time / OpenVINO's", full, 1.1, at_most=True),
        Goal(
            "the same, density 0.3: realised / possible",
            features(rows, "realised/possible", 0.3),
            0.9,
        ),
        Goal(
            "the same in bf16, density 0.3: times faster than OpenVINO bf16",
            features(half, "speed-up", 0.3),
            2.0,
        ),
        Goal(
            "FCN and Faster R-CNN, density 0.3, sampled part: realised / possible",
            numbers(parts, "realised/possible", against="compile"),
            0.9,
            expected=2,
        ),
    ]
    for word in ("fcn_resnet50", "fasterrcnn_resnet50_fpn"):
        found = [row for row in wholes if str(row["network"]).startswith(word)]
        against = ", ".join(str(row["against"]) for row in found if "against" in row)
        what = f"{word}, density 0.3, whole model: times faster than {against or 'compile'}"
        goals.append(Goal(what, numbers(found, "speed-up")))
    return goals


def sampling_goals(results: Results) -> list[Goal]:
    """What sampling may add to a block."""
    rows = results.get("overhead", [])
    calls = numbers(
        [row for row in rows if str(row.get("what")).startswith("block operator, masks given")],
        "us per call",
    )
    added = numbers(rows, "time/MACs")
    words = "heads, site lists, interpolation, density 0.3: share of time / share of MACs"
    return [
        Goal(words, added, 1.5, at_most=True, expected=NUM_STAGES),
        Goal("one call of the block operator on an empty mask, us", calls, 30.0, at_most=True),
    ]


def memory_goals(results: Results) -> list[Goal]:
    """What frozen networks may take."""
    rows = results.get("memory", [])
    frozen = [row for row in rows if row.get("variant") != "eager"]
    blocks = [row for row in frozen if row.get("network") == "block"]
    networks = [row for row in frozen if row.get("network") != "block"]
    peaks = [
        row["peak MiB"] / eager["peak MiB"]
        for row in frozen
        for eager in rows
        if eager["variant"] == "eager"
        and (row["network"], row["size"]) == (eager["network"], eager["size"])
    ]
    most = max((row["calls"] for row in networks), default=0)
    late = numbers([row for row in networks if row["calls"] == most], "late growth KiB")
    allocated = "allocations per call"
    return [
        Goal("peak memory / eager's", peaks, 1.0, at_most=True, expected=2),
        Goal("allocations in a warm call of a block", numbers(blocks, allocated), 0, True),
        Goal("allocations in a warm call of a network", numbers(networks, allocated), 0, True, 3),
        Goal(
            f"growth over the second half of {most or SOAK_CALLS} calls, KiB",
            late,
            None if late and most < SOAK_CALLS else 0,
            at_most=True,
        ),
    ]


def pooling_goals(results: Results) -> list[Goal]:
    """What SoftPool must reach, against torch's poolings and against its own formula."""
    forward, train = results.get("pool-forward", []), results.get("pool-train", [])
    kept = [
        row["ours keeps MiB"] / row["formula keeps MiB"]
        for row in results.get("pool-memory", [])
        if len(numbers([row], "ours keeps MiB") + numbers([row], "formula keeps MiB")) == 2
    ]

    def goal(what: str, values: Sequence[float], reach: float, at_most: bool = True) -> Goal:
        expected = NUM_POOLINGS * (NUM_POOLING_DTYPES if "error" in what else 1)
        return Goal(f"SoftPool, {what}", values, reach, at_most, expected)

    slower = numbers(forward, "ours / slower pool")
    faster = numbers(forward, "formula / ours")
    errors = numbers(results.get("pool-error", []), "error ratio")
    return [
        goal("forward: time / that of the slower of average and max pooling", slower, 1.5),
        goal("forward: times faster than its formula", faster, 5.0, at_most=False),
        goal("with backward: time / max pooling's", numbers(train, "ours / max_pool2d"), 1.5),
        goal("kept for backward / what its formula keeps", kept, 1.0),
        goal("error / that of its formula in the same dtype", errors, 2.0),
    ]


def training_goals(results: Results) -> list[Goal]:
    """What a sampled training step may take, against the dense one."""
    rows = results.get("training_step", [])
    return [
        Goal(
            f"training step, sampled / dense: {what}",
            numbers(rows, column),
            reach,
            at_most=True,
            expected=NUM_TRAINED,
        )
        for what, column, reach in (("time", "time ratio", 1.3), ("memory", "live ratio", 1.2))
    ]


def reach_rows(results: Results) -> list[Row]:
    """One line per goal: what was asked, what was measured, whether it is met."""
    goals = [
        *block_goals(results),
        *network_goals(results),
        *sampling_goals(results),
        *memory_goals(results),
        *pooling_goals(results),
        *training_goals(results),
    ]
    return [
        {"what": goal.what, "asked": goal.asked, "measured": spread(goal.values),
         "verdict": goal.verdict()}
        for goal in goals
    ]  # fmt: skip


def table_of(stem: str, row: Row) -> str:
    """The table that a row of a file belongs to.

    Rows of one kind may lie in files by dtype, and rows of several kinds in one file: of SoftPool,
    what they hold tells forward, training, memory and error apart.
    """
    if stem.startswith("training_step"):
        return "training_step"
    if "pool" not in stem.split("-"):
        return stem
    telling = {"error ratio": "error", "ours / max_pool2d": "train", "ours keeps MiB": "memory"}
    kind = next((kind for column, kind in telling.items() if column in row), "forward")
    return f"pool-{kind}"


def file_of(name: str) -> str:
    """The file that the rows of a table come from."""
    return "pool.json" if name.startswith("pool-") else f"{name}.json"


def table(results: Results, name: str) -> str:
    """The page's columns of one benchmark."""
    columns = COLUMNS[name]
    rows = [
        {column: row[column] for column in columns if column in row}
        for row in results.get(name, [])
    ]
    rows = [row for row in rows if row]
    if not rows:
        file = file_of(name)
        return f"{NOT_MEASURED[0].upper()}{NOT_MEASURED[1:]}: there is no {file} with such rows."
    # Columns in the page's order, also where the first row lacks some.
    ordered = [c for c in columns if any(c in row for row in rows)]
    return markdown_table([{c: row.get(c, "") for c in ordered} for row in rows])


def json_files(given: Sequence[Path]) -> list[Path]:
    """The files among those given, and those of a given folder; what is missing is said aloud."""
    found = []
    for path in given:
        if path.is_dir():
            found += sorted(path.glob("*.json"))
        elif path.exists():
            found.append(path)
        else:
            print(f"report: {path} is not there; its rows count as not measured", file=sys.stderr)
    return found


def source_lines(path: Path, content: dict[str, Any]) -> list[str]:
    """Where a table comes from: the commands, and the stages that are not complete."""
    commit = content["environment"].get("commit", "unknown")
    cut = [name for name, stage in content["stages"].items() if not stage["complete"]]
    note = f"; cut short: {', '.join(cut)}" if cut else ""
    return [f"- {path.name}: {content['date']}, `{content['command']}`, commit {commit}{note}"]


def environments(described: dict[str, dict[str, str]]) -> str:
    """The environment of all files, and what differs in some."""
    if not described:
        return f"{NOT_MEASURED[0].upper()}{NOT_MEASURED[1:]} yet."
    first = next(iter(described.values()))
    differences = [
        f"- **{file}** has {name}: {other.get(name, 'absent')}"
        for file, other in described.items()
        for name in dict.fromkeys([*first, *other])
        if other.get(name) != first.get(name)
    ]
    parts = [environment_block(first)]
    if differences:
        parts += ["Not everything was measured in this environment:", "\n".join(differences)]
    return "\n\n".join(parts)


def sections(files: Sequence[Path], page: Path | None) -> dict[str, str]:
    """Every generated part of the page, by name."""
    results: Results = {}
    sources: list[str] = []
    described: dict[str, dict[str, str]] = {}
    for path in sorted(files):
        content = json.loads(path.read_text(encoding="utf-8"))
        for row in content["rows"]:
            results.setdefault(table_of(path.stem, row), []).append(row)
        described[path.name] = content["environment"]
        sources += source_lines(path, content)
    made = {"reach": markdown_table(reach_rows(results))}
    made |= {name: table(results, name) for name in COLUMNS}
    figures = [path.with_suffix(".svg") for path in files if path.stem == "roofline"]
    made["figure"] = "No figure yet: it is drawn by bench/roofline.py."
    if figures and figures[0].exists():
        start = page.parent if page else Path()
        link = Path(os.path.relpath(figures[0], start)).as_posix()
        made["figure"] = f"![Time of each block, and its bounds]({link})"
    missing = dict.fromkeys(file_of(name) for name in COLUMNS if name not in results)
    if missing:
        sources.append(f"- not measured: {', '.join(missing)}")
    made["environment"] = "\n\n".join(["\n".join(sources), environments(described)])
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
    parser.add_argument(
        "--json", type=Path, nargs="+", required=True, help="files, or folders of them"
    )
    parser.add_argument("--into", type=Path, help="page with begin and end marks")
    args = parser.parse_args()
    parts = sections(json_files(args.json), args.into)
    if args.into is not None and QUICK in parts["environment"]:
        sys.exit(
            "report: some of the rows are of the quick form, tiny shapes and few samples, but a "
            "page is filled with results only; measure without --quick, or leave --into out."
        )
    if args.into is None:
        print("\n\n".join(f"## {name}\n\n{part}" for name, part in parts.items()))
        return
    text = args.into.read_text(encoding="utf-8")
    args.into.write_text(fill(text, parts), encoding="utf-8")


if __name__ == "__main__":
    main()
