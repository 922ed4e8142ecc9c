"""The steps from a dense network to a small one in a table: score, multiply-adds, milliseconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsight.convert import freeze
from sparsight.measure import LatencyComparison, measure_latency
from sparsight.nn.channels_last import channels_last
from sparsight.train.checkpoint import load_checkpoint


@dataclass(frozen=True)
class ChainStep:
    """One network of a chain, and what it costs beside the first one.

    Attributes:
        name: of the step.
        checkpoint: its file, below the folder of the run.
        metric: what is scored, "top1" or "miou".
        score: in [0, 1].
        macs_total: mean multiply-adds per validation image, everything counted.
        share: of those of the first network of the chain, the dense one.
        latency_ms: median of the frozen network for one image; None where it was not measured.
        iqr_ms: distance of the quartiles.
        time_ratio: `latency_ms` over that of the first network, frozen as well.
    """

    name: str
    checkpoint: str
    metric: str
    score: float
    macs_total: float
    share: float
    latency_ms: float | None = None
    iqr_ms: float | None = None
    time_ratio: float | None = None

    @staticmethod
    def of(
        name: str,
        checkpoint: str | Path,
        scored: Any,
        *,
        first: Any,
        measured: LatencyComparison | None = None,
    ) -> ChainStep:
        """Return the step of a score.

        Args:
            name: of the step.
            checkpoint: its file.
            scored: `ClassificationScore` or `Score`.
            first: the same of the chain's first network.
            measured: milliseconds by name of the step, the first network first.
        """
        metric, score = next(iter(scored.figures.items()))
        row = None if measured is None else measured[name]
        return ChainStep(
            name=name,
            checkpoint=Path(checkpoint).as_posix(),
            metric=metric,
            score=score,
            macs_total=scored.macs_total,
            share=scored.macs_total / first.macs_total,
            latency_ms=None if row is None else row.latency_ms,
            iqr_ms=None if row is None else row.iqr_ms,
            time_ratio=None if row is None else row.ratio,
        )


def measure_frozen(checkpoints: Mapping[str, Path], example: Tensor) -> LatencyComparison:
    """Return milliseconds of frozen networks, in turns, as `sparsight evaluate` measures them.

    Args:
        checkpoints: files by name, the baseline first.
        example: (1, 3, H, W), one image, normalised.
    """
    image = channels_last(example)
    frozen: dict[str, nn.Module] = {}
    for name, path in checkpoints.items():
        model, _ = load_checkpoint(path)
        frozen[name] = freeze(model.eval(), example=image)
    return measure_latency(frozen, image)


def chain_table(steps: Sequence[ChainStep]) -> str:
    """Return the steps as a table in Markdown; milliseconds only where they were measured.

    Args:
        steps: at least one, in order.
    """
    titles = {"top1": "top-1", "miou": "mIoU"}
    metric = titles.get(steps[0].metric, steps[0].metric)
    has_times = all(step.latency_ms is not None for step in steps)
    heads = ["step", metric, "MMACs", "share of dense"]
    if has_times:
        heads += ["ms, frozen", "share of the time"]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for step in steps:
        cells = [
            step.name,
            f"{100 * step.score:.2f}",
            f"{step.macs_total / 1e6:.2f}",
            f"{step.share:.3f}",
        ]
        if has_times:
            cells += [f"{step.latency_ms:.3f}", f"{step.time_ratio:.3f}"]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
