"""From scored checkpoints to two pictures: score against MACs, and score against milliseconds.

Score each run, with several sampling seeds and on a machine that does nothing else, then name what
each file is a point of:

    sparsight evaluate runs/blue-0.5/weights.safetensors --data DIR --seeds 3 \\
        --out runs/blue-0.5/evaluation.json
    python bench/curves.py --out docs/results/<date>-curves \\
        dense=runs/dense/evaluation.json \\
        resized:0.5=runs/resized-0.5/evaluation.json \\
        "blue noise:0.5=runs/blue-0.5/evaluation.json" \\
        "blue noise:0.5=runs/blue-0.5-again/evaluation.json" \\
        "blue noise:0.6=runs/blue-0.6/evaluation.json"

What stands before the colon is the curve, a line of one colour; what stands after it labels the
point. Files of the same name are runs of one variant, trained with different seeds: the point is
their mean, its bars the standard deviation over runs. The bars of a single run are the standard
deviation over its sampling seeds. The first name is what the others' MACs are a share of: dense.

Written to --out: score_macs.png and .svg; score_ms.png and .svg, where milliseconds were measured;
table.md; points.json, with every point, its runs and their environments. For any task, one data set
at a time: mIoU, AP or top-1, whichever the files hold.

A file is what `sparsight evaluate --out` wrote, or the result.json of a training run, which has one
seed and no milliseconds. Expected fields:

    scores         list, one entry a sampling seed (in a result.json these stand at the top level):
      miou | top1 | metrics.ap     in [0, 1]
      macs_total                   per image; of a detector those of its backbone
    architecture.sampling          null for a dense model
    latency.rows   (optional) list of {name, latency_ms}: "dense, frozen" or, for a sampled model,
                   "sampled, frozen" is the point; "dense, frozen" beside it goes into the table
    dataset, environment (optional)
"""

import argparse
import json
import math
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparsight.measure import environment_block, markdown_table

_LABELS = {"miou": "mIoU", "top1": "top-1", "ap": "AP"}
# What milliseconds depend on: points that differ in one of these are not to be compared.
_SAME_FOR_MS = ("CPU", "instruction sets", "threads", "torch")


@dataclass(frozen=True)
class Run:
    """One file: a trained network, scored.

    Attributes:
        source: folder and name of the file.
        metric: "miou", "top1" or "ap".
        scores: the metric in [0, 1], one a sampling seed.
        macs: mean multiply-adds per image.
        latency_ms: of the frozen model, one image; None where it was not measured.
        dense_ms: of the frozen dense form, in the same process; None where it was not measured.
        dataset: its name; None where the file does not say.
        environment: of the measurement; empty where the file does not say.
    """

    source: str
    metric: str
    scores: list[float]
    macs: float
    latency_ms: float | None
    dense_ms: float | None
    dataset: str | None
    environment: dict[str, str]


@dataclass(frozen=True)
class Spread:
    """A number over the runs of a point.

    Attributes:
        mean: over runs of their means over seeds.
        std: standard deviation over runs; of a single run over its seeds; None where it has one.
        min: of all runs and seeds.
        max: of all runs and seeds.
    """

    mean: float
    std: float | None
    min: float
    max: float


@dataclass(frozen=True)
class Point:
    """All runs of one name.

    Attributes:
        curve: points of one line share it.
        label: of the point on its line; empty where the name has no colon.
        score: see `Run`.
        macs: see `Run`.
        latency_ms: see `Run`; None where no run was measured.
        dense_ms: see `Run`.
        runs: what the point is made of.
    """

    curve: str
    label: str
    score: Spread
    macs: Spread
    latency_ms: Spread | None
    dense_ms: Spread | None
    runs: list[Run]

    @property
    def name(self) -> str:
        """As it was given."""
        return f"{self.curve}:{self.label}" if self.label else self.curve


def read_run(path: Path) -> Run:
    """Return what a file says of a run.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is neither an evaluation nor a result; says which field is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"curves: {path} does not exist; a file that `sparsight evaluate --out` wrote, or the "
            "result.json of a training run, is required; score the run first."
        )
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        entries: list[dict[str, Any]] = content.get("scores", [content])
        metric = next(name for name in _LABELS if _score(entries[0], name) is not None)
        scores = [_score(entry, metric) for entry in entries]
        macs = statistics.fmean(entry["macs_total"] for entry in entries)
        own = "dense, frozen" if content["architecture"]["sampling"] is None else "sampled, frozen"
        rows = content.get("latency", {}).get("rows", [])
        milliseconds = {row["name"]: float(row["latency_ms"]) for row in rows}
        if None in scores:
            raise KeyError(metric)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, StopIteration) as error:
        raise ValueError(
            f"curves: {path} is no scored run ({type(error).__name__}: {error}); miou, top1 or "
            "metrics.ap, macs_total and architecture.sampling are required, see the top of "
            "bench/curves.py; write it with `sparsight evaluate --out`."
        ) from error
    return Run(
        source=f"{path.resolve().parent.name}/{path.name}",
        metric=metric,
        scores=[float(score) for score in scores if score is not None],
        macs=macs,
        latency_ms=milliseconds.get(own),
        dense_ms=milliseconds.get("dense, frozen"),
        dataset=content.get("dataset"),
        environment=content.get("environment", {}),
    )


def _score(entry: Mapping[str, Any], metric: str) -> float | None:
    return entry.get("metrics", {}).get("ap") if metric == "ap" else entry.get(metric)


def read_points(arguments: Sequence[str]) -> list[Point]:
    """Return the points of `name=file` arguments, in the order in which their names first appear.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: an argument without a name or a file, a file that is no scored run, or files of
            different metrics or data sets.
    """
    runs: dict[str, list[Run]] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not (name and equals and path):
            raise ValueError(
                f"curves: {argument!r}; name=file is required, with the same name for runs of one "
                "variant; see the top of bench/curves.py."
            )
        runs.setdefault(name, []).append(read_run(Path(path)))
    every = [run for of_name in runs.values() for run in of_name]
    for what in ("metric", "dataset"):
        found = {getattr(run, what): run.source for run in every if getattr(run, what) is not None}
        if len(found) > 1:
            listed = ", ".join(f"{value} in {source}" for value, source in found.items())
            raise ValueError(
                f"curves: files of more than one {what}: {listed}; one is required, on one picture "
                "they cannot be compared; draw them apart."
            )
    return [_point(name, of_name) for name, of_name in runs.items()]


def _point(name: str, runs: list[Run]) -> Point:
    curve, _, label = name.partition(":")
    return Point(
        curve,
        label,
        score=_spread([run.scores for run in runs]),
        macs=_spread([[run.macs] for run in runs]),
        latency_ms=_measured(runs, lambda run: run.latency_ms),
        dense_ms=_measured(runs, lambda run: run.dense_ms),
        runs=runs,
    )


def _spread(by_run: Sequence[Sequence[float]]) -> Spread:
    means = [statistics.fmean(values) for values in by_run]
    spreading = means if len(means) > 1 else by_run[0]
    flat = [value for values in by_run for value in values]
    std = statistics.stdev(spreading) if len(spreading) > 1 else None
    return Spread(statistics.fmean(means), std, min(flat), max(flat))


def _measured(runs: Sequence[Run], of: Callable[[Run], float | None]) -> Spread | None:
    found = [value for value in map(of, runs) if value is not None]
    return _spread([[value] for value in found]) if found else None


def macs_unit(points: Sequence[Point]) -> tuple[float, str]:
    """Return what multiply-adds are divided by, and the name of the unit."""
    most = max(point.macs.mean for point in points)
    return (1e9, "GMACs") if most >= 5e8 else (1e6, "MMACs")


def table(points: Sequence[Point]) -> str:
    """Return the points as Markdown, one row each."""
    divisor, unit = macs_unit(points)
    metric = _LABELS[points[0].runs[0].metric]
    rows = []
    for point in points:
        rows.append(
            {
                "variant": point.name,
                "runs": str(len(point.runs)),
                "seeds": "+".join(str(len(run.scores)) for run in point.runs),
                metric: _cell(point.score, 100, 1),
                "least to greatest": f"{100 * point.score.min:.1f} to {100 * point.score.max:.1f}",
                unit: _cell(point.macs, 1 / divisor, 3 if divisor == 1e9 else 2),
                "share": f"{point.macs.mean / points[0].macs.mean:.3f}",
                "frozen ms": _cell(point.latency_ms, 1, 1),
                "dense frozen ms": _cell(point.dense_ms, 1, 1),
            }
        )
    return markdown_table(rows)


def _cell(spread: Spread | None, factor: float, digits: int) -> str:
    if spread is None:
        return ""
    text = f"{factor * spread.mean:.{digits}f}"
    return text if spread.std is None else f"{text} ± {factor * spread.std:.{digits}f}"


def notes(points: Sequence[Point]) -> str:
    """Return what must be known to read the table, and where its numbers come from."""
    runs = [run for point in points for run in point.runs]
    counted = "the backbone's" if runs[0].metric == "ap" else "the whole model's"
    lines = [
        "± is the standard deviation over the runs of a variant; of a single run, over its "
        f"sampling seeds. Multiply-adds are {counted}, sampler heads and interpolation included; "
        f"the share is of those of {points[0].name}. Milliseconds are of one image, frozen, and "
        "stand beside those of the frozen dense form at the same input size in the same process: "
        "between processes trust ratios only.",
    ]
    described = [run.environment for run in runs if run.environment]
    timed = [run.environment for run in runs if run.latency_ms is not None]
    differing = [
        name for name in _SAME_FOR_MS if len({each.get(name, "not said") for each in timed}) > 1
    ]
    if differing:
        lines.append(
            f"**Milliseconds of different environments** ({', '.join(differing)}): they must not "
            "be compared. points.json has the environment of every run."
        )
    if described:
        commits = sorted({each.get("commit", "not said") for each in described})
        shown = {name: text for name, text in described[0].items() if name != "commit"}
        shown["commit"] = ", ".join(commits)
        title = "## Environment" if not differing else "## Environment of the first run"
        lines += [title, environment_block(shown)]
    return "\n\n".join(lines)


def draw(points: Sequence[Point], cost: str, path: Path) -> bool:
    """Draw score against a cost, a line per curve; returns whether any point has that cost.

    Args:
        points: what is drawn.
        cost: "macs" or "latency_ms".
        path: without suffix; a PNG and an SVG are written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    known = [point for point in points if getattr(point, cost) is not None]
    if not known:
        return False
    divisor, unit = macs_unit(points) if cost == "macs" else (1.0, "milliseconds")
    metric = known[0].runs[0].metric
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for curve in dict.fromkeys(point.curve for point in known):
        of_curve = [point for point in known if point.curve == curve]
        of_curve.sort(key=lambda point: getattr(point, cost).mean)
        costs = [getattr(point, cost) for point in of_curve]
        drawn = axes.errorbar(
            [spread.mean / divisor for spread in costs],
            [100 * point.score.mean for point in of_curve],
            xerr=[_bar(spread) / divisor for spread in costs],
            yerr=[100 * _bar(point.score) for point in of_curve],
            marker="o",
            markersize=4,
            capsize=3,
            linewidth=1.2,
            label=curve,
        )
        for point, spread in zip(of_curve, costs, strict=True):
            axes.annotate(
                point.label,
                (spread.mean / divisor, 100 * point.score.mean),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=7,
                color=drawn.lines[0].get_color(),
            )
    counted = "backbone" if metric == "ap" else "whole model"
    costly = {
        "macs": f"{unit} per image, {counted}, heads and interpolation counted",
        "latency_ms": "milliseconds, one image, frozen",
    }[cost]
    axes.set(xlabel=costly, ylabel=f"{_LABELS[metric]}, %", xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    # The same points give the same bytes: no date, no random names inside.
    with matplotlib.rc_context({"svg.hashsalt": "sparsight"}):
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(path.with_suffix(".png"), dpi=150)
    return True


def _bar(spread: Spread) -> float:
    return math.nan if spread.std is None else spread.std  # which draws none


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("points", nargs="+", metavar="NAME=FILE", help="dense first")
    parser.add_argument("--out", type=Path, required=True, help="folder for table and pictures")
    arguments = parser.parse_args(argv)
    points = read_points(arguments.points)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    shown = [
        f"{point.name}={run.source}" for point in points for run in point.runs
    ]  # no folders of one machine
    command = f"python bench/curves.py --out {out.name} {shlex.join(shown)}"
    written = {
        "command": command,
        "metric": points[0].runs[0].metric,
        "dataset": next((r.dataset for p in points for r in p.runs if r.dataset), None),
        "points": [{"name": point.name} | asdict(point) for point in points],
    }
    (out / "points.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    text = table(points)
    page = f"{text}\n\n{notes(points)}\n\n```bash\n{command}\n```\n"
    (out / "table.md").write_text(page, encoding="utf-8")
    print(text)
    draw(points, "macs", out / "score_macs")
    if not draw(points, "latency_ms", out / "score_ms"):
        print("no milliseconds: score the runs with `sparsight evaluate --out`")


if __name__ == "__main__":
    main()
