"""What the recipes' flags say of sampling: defined, documented and turned into a plan once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsight.nn.budget import ShareWeights
from sparsight.train.hardware import Hardware
from sparsight.train.sampling import (
    ClassificationMethod,
    InterpolationKind,
    Layout,
    Method,
    Noise,
    Plan,
    Sampling,
    plan,
)


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """What a run is to compute, and at what price; `sampling_flags` makes it of a recipe's flags.

    Attributes:
        method: the paper's, or a baseline; see `plan`. "sfp" and "fpgm" prune filters, see
            `plan_filter_pruning`, and are for classification.
        sampling: how the dense model is converted.
        budget: share of the dense MACs; None for none.
        sampling_weight: fixed price instead; None for none.
        weights: what the fixed price is charged on.
        anneal_share: part of the run in which the temperature falls, in (0, 1].
        remeasures_norms: the norms' statistics are measured again after training.
    """

    method: ClassificationMethod
    sampling: Sampling
    budget: float | None
    sampling_weight: float | None
    weights: ShareWeights
    anneal_share: float
    remeasures_norms: bool

    def plan(self, *, size: tuple[int, int], dense: Callable[[], nn.Module]) -> Plan:
        """Return what the run trains; arguments and errors as of `sparsight.train.plan`.

        Where filters are pruned that is the dense model: what is pruned is seen to elsewhere.
        """
        if self.method == "sfp" or self.method == "fpgm":
            return Plan(sampling=None, objective=None, size=size, settles=False)
        return plan(
            method=self.method,
            sampling=self.sampling,
            size=size,
            budget=self.budget,
            sampling_weight=self.sampling_weight,
            weights=self.weights,
            dense=dense,
        )


def sampling_flags(
    *,
    method: Method = "sampled",
    budget: float | None = None,
    sampling_weight: float | None = None,
    weights: ShareWeights = "macs",
    layout: Layout = "b",
    noise: Noise = "white",
    grid_stride: int | None = 11,
    interpolation: InterpolationKind | None = "rbf",
    eps: float | None = None,
    straight_through: bool = False,
    anneal_share: float = 1.0,
    remeasure_norms: bool = True,
    **hardware: Any,
) -> tuple[SamplingFlags, Hardware]:
    """Return what the flags say of sampling, and of what the run computes on.

    Args:
        method: "sampled", the paper's; or a baseline: "resized" (the dense model on an input that
            meets the budget; `size` is the full one; not for classification), "relu_gate" (computed
            where an activation is positive, zeros elsewhere), "perforated" (fixed patterns; the
            paper behind it fills with `interpolation="nearest"`). The deterministic baseline is
            "sampled" with `noise="none"`.
        budget: share of the dense model's MACs to compute, in (0, 1], everything counted; of a
            detector the backbone's. None: a dense model, unless `sampling_weight` is given.
        sampling_weight: fixed weight of the expected share instead of a budget, as published.
        weights: what `sampling_weight` is charged on: share of MACs, the published mean of
            probabilities, or the plain mean over the masks.
        layout: masks per residual block: "a" one, "b" (the paper's default) two, "c" one per
            convolution.
        noise: sampling noise: "white" (the paper), "blue", "none".
        grid_stride: spacing of the pixels that are always computed; the paper's 11, its ablation's
            9 and 13, or None for no grid.
        interpolation: kernel that fills what is not computed: "rbf" (the paper's default), "conv",
            "average", "nearest"; None leaves zeros (the paper's "zero fill").
        eps: added to the interpolation's denominator, 1e-5 in the published code; None is exact.
        straight_through: train with hard masks and soft gradients; wants an `eps`.
        anneal_share: part of the run in which the temperature falls, in (0, 1].
        remeasure_norms: after training, measure the running statistics of batch norms again, on
            augmented training images, with the masks of inference; of dense models too.
        **hardware: flags of `sparsight.train.Hardware`: processes, machines, memory.

    Raises:
        ValueError: flags of the hardware that contradict each other; see `plan` for the others.
    """
    flags = SamplingFlags(
        method=method,
        sampling=Sampling(
            layout=layout,
            noise=noise,
            grid_stride=grid_stride,
            interpolation=interpolation,
            eps=eps,
            is_straight_through=straight_through,
        ),
        budget=budget,
        sampling_weight=sampling_weight,
        weights=weights,
        anneal_share=anneal_share,
        remeasures_norms=remeasure_norms,
    )
    return flags, Hardware(**hardware)
