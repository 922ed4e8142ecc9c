"""A checkpoint on its data set: metric, cost, their spread over sampling seeds, milliseconds."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sparsight.convert import freeze
from sparsight.measure import (
    LatencyComparison,
    count_published_macs,
    environment,
    measure_latency,
)
from sparsight.nn import set_seed
from sparsight.nn.channels_last import put_channels_last
from sparsight.train.architecture import AnyArchitecture, at_size, build_dense
from sparsight.train.checkpoint import load_checkpoint
from sparsight.train.dense_inference import DenseInference
from sparsight.train.evaluation_data import (
    DatasetName,
    Split,
    dataset_of,
    open_evaluation_data,
)


def evaluate_checkpoint(
    checkpoint: str | Path,
    *,
    data: str | Path | None = None,
    dataset: DatasetName | None = None,
    split: Split = "val",
    size: tuple[int, int] | None = None,
    frozen: bool = True,
    latency: bool = True,
    seeds: int = 1,
    batch_size: int = 8,
    inference: DenseInference | None = None,
) -> dict[str, Any]:
    """Return metric, MACs, their spread over sampling seeds and milliseconds, in plain values.

    Args:
        checkpoint: a file that `save_checkpoint` wrote.
        data: folder of the data set; None for one that is drawn.
        dataset: which; default: what the checkpoint says, see `dataset_of`.
        split: which images.
        size: of the input, see `at_size`; default: that of training.
        frozen: freeze the model first.
        latency: also measure milliseconds for one image.
        seeds: number of sampling seeds, from 0. A model that draws no noise is scored once.
        batch_size: images scored at once; the noise depends on an image's place in its batch.
        inference: scales, mirror images and windows of a segmentation model; costs and milliseconds
            are those of all of them. Default: the image as it is.

    Returns:
        "checkpoint", "dataset", "task", "split", "size", "frozen", "architecture", "environment",
        "inference", the fields of `DenseInference`;
        "metric": the name of the one that models are compared by;
        "seeds": those that were scored;
        "summary": by name of a metric, and for "share" and "macs_total", {"mean", "std", "min",
        "max"} over the seeds, "std" None for one seed;
        "scores": the fields of `Score`, `ClassificationScore`, `DetectionScore` or
        `ProposalScore`, per seed;
        "published_gmacs", for detectors: the paper's count, per seed;
        "latency", if measured: the fields of `LatencyComparison`, see `latency_rows`.

    Raises:
        FileNotFoundError: checkpoint or data missing.
        ValueError: fewer than one seed or image at once; or checkpoint, data set and size do not
            fit together.
    """
    if seeds < 1:
        raise ValueError(
            f"evaluate_checkpoint: seeds={seeds}; at least 1 is required; leave --seeds out for "
            "one."
        )
    if batch_size < 1:
        raise ValueError(
            f"evaluate_checkpoint: batch_size={batch_size}; at least 1 is required; leave "
            "--batch-size out for 8."
        )
    inference = inference or DenseInference()
    name = dataset_of(checkpoint, dataset)
    model, stored = load_checkpoint(checkpoint)
    model.eval()
    inference.check_task("evaluate_checkpoint", stored.task)
    architecture = at_size(model, stored, size)
    images = open_evaluation_data(
        name,
        data,
        split=split,
        num_classes=architecture.num_classes,
        size=architecture.size,
        task=architecture.task,
    )
    example = images.example()
    part = inference.example(example)
    deployed = inference.wrap(freeze(model, example=part) if frozen else model)
    scores = []
    for seed in range(seeds):
        if set_seed(deployed, seed) == 0 and seed > 0:
            print(f"seeds 1 to {seeds - 1}: left out, nothing is drawn in this model")
            break
        scores.append(images.score(deployed, batch_size=batch_size))
        print(f"seed {seed}: {scores[-1]}", flush=True)
    summary = _summarise(scores)
    metric = next(iter(scores[0].figures))
    result: dict[str, Any] = {
        "checkpoint": Path(checkpoint).name,
        "dataset": name,
        "task": images.task,
        "split": split,
        "architecture": stored.to_json(),
        "size": list(architecture.size),
        "frozen": frozen,
        "inference": inference.to_json(),
        "metric": metric,
        "seeds": list(range(len(scores))),
        "summary": summary,
        "scores": [dataclasses.asdict(score) for score in scores],
        "environment": environment(),
    }
    if architecture.task == "detection":
        # The paper's "GFLOPs": the backbone at one nominal size, with these mean densities.
        result["published_gmacs"] = [
            count_published_macs(
                model, shorter_side=architecture.size[0], density=score.density or 1.0
            ).total
            / 1e9
            for score in scores
        ]
    print(describe(result))
    if latency:
        set_seed(deployed, 0)
        rows = latency_rows(
            model,
            architecture,
            example,
            frozen=deployed if frozen else None,
            inference=inference,
        )
        print(rows)
        result["latency"] = dataclasses.asdict(rows)
    return result


def describe(result: dict[str, Any]) -> str:
    """Return the spread over seeds that `evaluate_checkpoint` found, as a line of text."""
    parts = []
    for name in (result["metric"], "share"):
        spread = result["summary"].get(name)
        if spread is None:
            parts.append(f"{name} none")
            continue
        text = f"{name} {spread['mean']:.4f}"
        if spread["std"] is not None:
            text += f" ± {spread['std']:.4f} ({spread['min']:.4f} to {spread['max']:.4f})"
        parts.append(text)
    num_seeds = len(result["seeds"])
    return f"{'; '.join(parts)}; {num_seeds} sampling seed{'s' if num_seeds > 1 else ''}"


def _summarise(scores: Sequence[Any]) -> dict[str, dict[str, float | None]]:
    figures = [
        score.figures | {"share": score.share, "macs_total": score.macs_total} for score in scores
    ]
    summary = {}
    for name in figures[0]:
        values = [found[name] for found in figures]
        if None in values:  # nothing of that kind is in the images
            continue
        summary[name] = {
            "mean": statistics.fmean(values),
            "std": statistics.stdev(values) if len(values) > 1 else None,
            "min": min(values),
            "max": max(values),
        }
    return summary


def latency_rows(
    model: nn.Module,
    architecture: AnyArchitecture,
    example: Any,
    *,
    frozen: nn.Module | None = None,
    inference: DenseInference | None = None,
) -> LatencyComparison:
    """Measure a model frozen against its dense form, with the same weights, in turns.

    Args:
        model: in eval mode, dense or sampled.
        architecture: what it is, at the size of its input.
        example: one image, as the model takes it.
        frozen: `model` frozen and wrapped by `inference`, if that was done already.
        inference: see `evaluate_checkpoint`; each of the forms runs like that.

    Returns:
        Rows "dense, eager channels-last", "dense, frozen" and, of a sampled model, "sampled,
        frozen".
    """
    dense = build_dense(dataclasses.replace(architecture, sampling=None)).eval()
    own = dense.state_dict()  # what a detector's heads cost depends on what is found
    dense.load_state_dict({key: value for key, value in model.state_dict().items() if key in own})
    inference = inference or DenseInference()
    part = inference.example(example)
    if frozen is None:
        frozen = inference.wrap(freeze(model, example=part))
    put_channels_last(dense)
    candidates = {"dense, eager channels-last": inference.wrap(dense)}
    if architecture.sampling is None:
        candidates["dense, frozen"] = frozen
    else:
        candidates["dense, frozen"] = inference.wrap(freeze(dense, example=part))
        candidates["sampled, frozen"] = frozen
    return measure_latency({name: (lambda m=m: m(example)) for name, m in candidates.items()})
