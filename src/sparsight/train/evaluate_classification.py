"""What a classifier scores and what it computes for that, on the same images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsight.nn.channels_last import channels_last
from sparsight.train.classification_task import top_k_accuracies
from sparsight.train.tally import ComputeTally


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

    @property
    def figures(self) -> dict[str, float | None]:
        """The metrics by name, the one that models are compared by first."""
        return {"top1": self.top1, "top5": self.top5}

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
        model: in eval mode; (B, 3, H, W), or clips (B, 1, T, H, W), -> (B, K).
        batches: (images, classes).
        num_classes: number of classes K.

    Cost: two passes over the images, one of them inside `count_macs`.

    Raises:
        ValueError: no batch arrived.
    """
    accuracies = top_k_accuracies(num_classes)
    tally = ComputeTally(model)
    for images, labels in batches:
        output, _, _ = tally.run(channels_last(images))
        for metric in accuracies.values():
            metric.update(output.float(), labels)  # type: ignore[operator]  # a ModuleDict of metrics
    tally.check("score_classification")
    found = {name: float(metric.compute()) for name, metric in accuracies.items()}  # type: ignore[operator]
    return ClassificationScore(
        top1=found["top1"],
        top5=found.get("top5"),
        num_images=tally.num_images,
        macs_dense=tally.macs_dense,
        macs_total=tally.macs_total,
        share=tally.share,
        density=tally.density,
    )
