"""What a classifier scores and what it computes for that, on the same images."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsight.measure import count_macs
from sparsight.nn import record_sampling
from sparsight.train.classification_task import top_k_accuracies


@dataclass(frozen=True)
class ClassificationScore:
    """Accuracy beside its cost.

    Attributes:
        top1: share of the images whose class is the likeliest, in [0, 1].
        top5: share of those whose class is among the five likeliest; None for up to five classes.
        num_images: images scored.
        macs_dense: MACs per image of the dense model, convolutions and linear layers.
        macs_total: mean MACs per image that ran, sampler heads and interpolation included.
        share: `macs_total / macs_dense`.
        density: share of positions computed, per sampler, in the order they run; empty for a dense
            model.
    """

    top1: float
    top5: float | None
    num_images: int
    macs_dense: float
    macs_total: float
    share: float
    density: dict[str, float]

    def __str__(self) -> str:
        text = f"top-1 {100 * self.top1:.2f}"
        if self.top5 is not None:
            text += f", top-5 {100 * self.top5:.2f}"
        text += f" on {self.num_images} images; {self.macs_total / 1e6:.2f} MMACs per image"
        if self.density:
            text += f", {self.share:.3f} of the dense {self.macs_dense / 1e6:.2f}"
        return text


@torch.inference_mode()
def score_classification(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, num_classes: int
) -> ClassificationScore:
    """Return accuracy, MACs and densities of a dense, sparsified or frozen classifier.

    Args:
        model: in eval mode; (B, 3, H, W) -> (B, K).
        batches: (images, classes).
        num_classes: number of classes K.

    Cost: two passes over the images, one of them inside `count_macs`.

    Raises:
        ValueError: no batch arrived.
    """
    accuracies = top_k_accuracies(num_classes)
    is_sampled = any(hasattr(module, "samplers_named") for module in model.modules())
    num_images = 0
    dense = total = 0.0
    density: dict[str, float] = {}
    for images, labels in batches:
        images = images.contiguous(memory_format=torch.channels_last)
        with record_sampling(model) if is_sampled else nullcontext() as record:
            logits = model(images).float()
        for metric in accuracies.values():
            metric.update(logits, labels)  # type: ignore[operator]  # a ModuleDict of metrics
        for decision in record.decisions if record else ():
            computed = float(decision.mask.float().mean()) * len(images)
            density[decision.name] = density.get(decision.name, 0.0) + computed
        counted = count_macs(model, images)
        dense, total = dense + counted.dense, total + counted.total
        num_images += len(images)
    if num_images == 0:
        raise ValueError(
            "score_classification: no batch arrived; at least one image is required; check the "
            "split of the data set."
        )
    found = {name: float(metric.compute()) for name, metric in accuracies.items()}  # type: ignore[operator]
    return ClassificationScore(
        top1=found["top1"],
        top5=found.get("top5"),
        num_images=num_images,
        macs_dense=dense / num_images,
        macs_total=total / num_images,
        share=total / dense,
        density={name: value / num_images for name, value in density.items()},
    )
