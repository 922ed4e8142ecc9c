"""The whole path in minutes, without a download: train, convert, fine-tune, freeze, compare."""

from __future__ import annotations

import base64
import copy
import html
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from sparsight.convert import freeze, sparsify
from sparsight.measure import environment, measure_latency
from sparsight.nn.budget import BudgetController
from sparsight.train.architecture import Architecture, Sampling, build_dense
from sparsight.train.checkpoint import save_checkpoint, write_atomically
from sparsight.train.data import (
    SeededView,
    SyntheticScenes,
    evaluation_transform,
    training_transform,
)
from sparsight.train.evaluate import Score, score
from sparsight.train.pictures import draw_masks
from sparsight.train.recipe import Recipe
from sparsight.train.settling import measure_norms_again, settle
from sparsight.train.tasks import SegmentationTask


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: what ran.
        score: of the validation scenes.
        latency_ms: median milliseconds for one image.
    """

    name: str
    score: Score
    latency_ms: float


def demo(
    *,
    out: str = "sparsight-demo",
    budget: float = 0.4,
    size: tuple[int, int] = (128, 192),
    num_scenes: int = 200,
    epochs: int = 8,
    fine_tuning_epochs: int = 6,
    quick: bool = False,
) -> list[Row]:
    """Train a small network on drawn scenes, make it compute where content is, and compare.

    Rows of the table: the dense network (trained on as long as the sampled one); the same network
    on images shrunk until it computes what the budget allows, the baseline that gets its saving on
    every runtime; and the sampled network, frozen. All times are for one image, interleaved, on
    this machine's CPU with torch's number of threads.

    Args:
        out: folder for `report.html`, `masks.png`, `result.json`, `weights.safetensors`.
        budget: share of the dense MACs the sampled network may compute, in (0, 1].
        size: height and width of the scenes in pixels, as 128x192.
        num_scenes: training scenes.
        epochs: passes over them before the conversion.
        fine_tuning_epochs: passes over them after it, for the sampled network and its control.
        quick: a few steps on small scenes, to prove that everything runs; scores mean nothing.

    Returns:
        The rows, in the order printed.
    """
    start = time.monotonic()
    if quick:
        size, num_scenes, epochs, fine_tuning_epochs = (64, 96), 16, 1, 1
    torch.manual_seed(0)
    scenes = SyntheticScenes(num_scenes, size=size, seed=1)
    held_out = SyntheticScenes(8 if quick else 32, size=size, seed=2)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    ignore_index, classes = scenes.ignore_index, scenes.classes
    architecture = Architecture(
        num_classes=len(classes), fpn_channels=32, head_channels=32, size=size
    )
    recipe = Recipe(
        train_data=scenes,
        train_transform=training_transform(size, ignore_index=ignore_index, scale=(0.8, 1.3)),
        val_data=held_out,
        val_transform=evaluation_transform(size),
        out=folder / "training",
        epochs=epochs,
        batch_size=8,
    )

    def train(network: nn.Module, described: Architecture, name: str) -> nn.Module:
        is_first = name == "dense"
        objective = BudgetController(budget) if described.sampling else None
        lr = 1e-3 if is_first else 5e-4
        task = SegmentationTask(
            network, described, ignore_index=ignore_index, objective=objective, lr=lr
        )
        length = epochs if is_first else fine_tuning_epochs
        run = replace(recipe, out=recipe.out / name, epochs=length)
        run.fit(task)
        network.cpu().eval()
        measure_norms_again(network, run, num_images=256)
        return network

    print("\n== 1 of 3: the dense network, from scratch", flush=True)
    dense = train(build_dense(architecture), architecture, "dense")
    print(f"\n== 2 of 3: sampled, fine-tuned to {budget:.0%} of the MACs", flush=True)
    sampled_form = replace(architecture, sampling=Sampling())
    sampled = train(sparsify(dense), sampled_form, "sampled")
    print("\n== 3 of 3: the dense network again, for as many steps more", flush=True)
    control = train(copy.deepcopy(dense), architecture, "control")

    settle(sampled, recipe, budget, num_images=32)
    save_checkpoint(folder / "weights.safetensors", sampled, sampled_form)

    shrink = math.sqrt(budget)
    small = (max(32, round(size[0] * shrink)), max(32, round(size[1] * shrink)))
    images, _ = next(iter(recipe.validation_batches()))
    image = images[:1].contiguous(memory_format=torch.channels_last)
    small_image = SeededView(held_out, evaluation_transform(small))[0][0][None]
    small_image = small_image.contiguous(memory_format=torch.channels_last)
    frozen = freeze(sampled, example=image)
    print("\n== measuring", flush=True)
    milliseconds = _milliseconds(
        {
            "dense": lambda: control(image),
            "resized": lambda: control(small_image),
            "sampled": lambda: frozen(image),
        }
    )

    def scored(model: nn.Module, at: tuple[int, int]) -> Score:
        view = SeededView(held_out, evaluation_transform(at))
        return score(
            model, DataLoader(view, batch_size=8), classes=classes, ignore_index=ignore_index
        )

    resized_score = scored(control, small)
    rows = [
        Row(f"dense, {size[0]}x{size[1]}", scored(control, size), milliseconds["dense"]),
        Row(f"dense, resized to {small[0]}x{small[1]}", resized_score, milliseconds["resized"]),
        Row(
            f"sampled and frozen, {size[0]}x{size[1]}",
            scored(frozen, size),
            milliseconds["sampled"],
        ),
    ]
    pictures = []
    for index in range(2):
        path = folder / ("masks.png" if index == 0 else f"masks{index}.png")
        normalised, labels = SeededView(held_out, evaluation_transform(size))[index]
        draw_masks(
            frozen, normalised, labels, path=path, ignore_index=ignore_index, reference=control
        )
        pictures.append(path)

    table = format_table(rows)
    attraction = describe_attraction(rows[-1].score)
    machine = "; ".join(f"{name}: {text}" for name, text in environment().items())
    footnote = f"{machine}\n{time.monotonic() - start:.0f} s in all, training included"
    print(f"\n{table}\n\n{attraction}\n\n{footnote}")
    page = folder / "report.html"
    write_atomically(page, _page(table, attraction, footnote, pictures).encode())
    write_atomically(
        folder / "result.json",
        json.dumps(
            [{"name": r.name, "latency_ms": r.latency_ms, **vars(r.score)} for r in rows], indent=2
        ).encode(),
    )
    print(f"\n{page.resolve()}")
    return rows


def format_table(rows: Sequence[Row]) -> str:
    """Return the comparison as plain text; the first row is the baseline."""
    first = rows[0]
    lines = [f"{'':34}{'mIoU':>7}{'MMACs':>9}{'share':>7}{'density':>9}{'ms':>8}{'speed-up':>10}"]
    for row in rows:
        densities = row.score.density.values()
        density = f"{sum(densities) / len(densities):.2f}" if densities else "1"
        mmacs = row.score.macs_total / 1e6
        share = row.score.macs_total / first.score.macs_dense
        speed_up = first.latency_ms / row.latency_ms
        lines.append(
            f"{row.name:34}{100 * row.score.miou:7.1f}{mmacs:9.0f}{share:7.2f}{density:>9}"
            f"{row.latency_ms:8.2f}{speed_up:9.2f}x"
        )
    return "\n".join(lines)


def describe_attraction(sampled: Score) -> str:
    """Return one sentence on which classes are computed most and least."""
    ordered = sorted(sampled.class_density.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{name} {density:.0%}" for name, density in ordered)
    return f"Share of the positions on each class that is computed (mean over all masks): {listed}."


def _milliseconds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    measured = measure_latency(calls)
    return {name: measured[name].latency_ms for name in calls}


def _page(table: str, attraction: str, footnote: str, pictures: Sequence[Path]) -> str:
    embedded = "\n".join(
        f'<img alt="input, predictions and masks" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}">'
        for path in pictures
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>sparsight demo</title>
<style>body{{font:16px/1.5 sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}}
pre{{background:#f4f4f4;padding:1rem;overflow-x:auto}}img{{max-width:100%}}</style>
<h1>sparsight: computed where the image needs it</h1>
<p>Drawn street scenes the networks have not seen. mIoU is counted at full resolution in every row;
MACs and milliseconds are for one image, everything counted.</p>
<pre>{html.escape(table)}</pre>
<p>{html.escape(attraction)}</p>
<p>In the masks, bright is computed and dark is interpolated.</p>
{embedded}
<pre>{html.escape(footnote)}</pre>
</html>
"""


if __name__ == "__main__":
    demo()
