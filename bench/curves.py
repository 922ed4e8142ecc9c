"""From trained runs to a table and two curves: score against MACs, and against milliseconds.

    sparsight evaluate runs/a/weights.safetensors --data DIR --seeds 3 --out runs/a/evaluation.json
    python bench/curves.py --runs runs/dense runs/a runs/b --out docs/results/<date>-curves

A run is a folder with the `result.json` that training wrote, and where it was evaluated the
`evaluation.json` of `sparsight evaluate`, whose mean over sampling seeds and milliseconds then
count. Written are table.md, score_macs.png and, where milliseconds were measured, score_ms.png.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsight.measure import markdown_table


@dataclass(frozen=True)
class Run:
    """What is known of a trained run.

    Attributes:
        name: of its folder.
        curve: runs of one curve share it: the method, or the noise of a sampled model.
        score: in [0, 1], mean over the sampling seeds.
        spread: standard deviation over them; NaN for one seed.
        num_seeds: sampling seeds.
        gmacs: per image, everything counted.
        latency_ms: of the frozen model, one image; NaN where it was not measured.
    """

    name: str
    curve: str
    score: float
    spread: float
    num_seeds: int
    gmacs: float
    latency_ms: float


def read_run(folder: Path) -> Run:
    """Return the run in a folder.

    Raises:
        FileNotFoundError: there is neither result.json nor evaluation.json.
    """
    result, evaluation = (_read(folder / name) for name in ("result.json", "evaluation.json"))
    if not result and not evaluation:
        raise FileNotFoundError(
            f"curves: {str(folder)!r} holds neither result.json nor evaluation.json; a folder that "
            "`sparsight train` wrote is required; pass its --out."
        )
    curve = _curve(result, (evaluation or result)["architecture"]["sampling"])
    if not evaluation:
        return Run(
            folder.name, curve, result["miou"], math.nan, 1, result["macs_total"] / 1e9, math.nan
        )
    scores = evaluation["scores"]
    rows = evaluation.get("latency", {}).get("rows", [])
    frozen = [row["latency_ms"] for row in rows if "frozen" in row["name"]]
    spread = evaluation["miou_std"]
    return Run(
        folder.name,
        curve,
        evaluation["miou_mean"],
        math.nan if spread is None else spread,
        len(scores),
        sum(score["macs_total"] for score in scores) / len(scores) / 1e9,
        frozen[0] if frozen else math.nan,
    )


def _curve(result: dict[str, Any], sampling: dict[str, Any] | None) -> str:
    if sampling is None:
        return "resized" if result.get("method") == "resized" else "dense"
    kind = sampling.get("sampler", "gumbel")
    return f"sampled, {sampling['noise']} noise" if kind == "gumbel" else kind.replace("_", " ")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def table(runs: Sequence[Run]) -> str:
    """Return the runs as Markdown, one row each; the share is of the first run's MACs."""
    rows = []
    for run in runs:
        spread = "" if math.isnan(run.spread) else f" ± {100 * run.spread:.1f}"
        rows.append(
            {
                "run": run.name,
                "kind": run.curve,
                "mIoU": f"{100 * run.score:.1f}{spread}",
                "seeds": run.num_seeds,
                "GMACs": f"{run.gmacs:.3f}",
                "share": f"{run.gmacs / runs[0].gmacs:.3f}",
                "frozen ms": "" if math.isnan(run.latency_ms) else f"{run.latency_ms:.1f}",
            }
        )
    return markdown_table(rows)


def draw(runs: Sequence[Run], cost: str, label: str, path: Path) -> bool:
    """Draw score against a cost, one line per curve; returns whether any run has that cost."""
    from matplotlib.figure import Figure

    known = [run for run in runs if not math.isnan(getattr(run, cost))]
    if not known:
        return False
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for curve in dict.fromkeys(run.curve for run in known):
        points = sorted((r for r in known if r.curve == curve), key=lambda r: getattr(r, cost))
        axes.errorbar(
            [getattr(run, cost) for run in points],
            [100 * run.score for run in points],
            yerr=[0 if math.isnan(run.spread) else 100 * run.spread for run in points],
            marker="o",
            capsize=3,
            label=curve,
        )
    axes.set(xlabel=label, ylabel="mIoU", xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    return True


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument("--runs", nargs="+", type=Path, required=True, help="folders, dense first")
    parser.add_argument("--out", type=Path, required=True, help="folder for table and pictures")
    arguments = parser.parse_args(argv)
    runs = [read_run(folder) for folder in arguments.runs]
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = table(runs)
    (arguments.out / "table.md").write_text(text + "\n")
    print(text)
    draw(runs, "gmacs", "GMACs per image, everything counted", arguments.out / "score_macs.png")
    if not draw(runs, "latency_ms", "milliseconds, frozen", arguments.out / "score_ms.png"):
        print("no milliseconds: evaluate the runs with `sparsight evaluate ... --out`")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the docstring."""


if __name__ == "__main__":
    main()
