"""How a dense model becomes a sampled one, in plain values; and what a recipe's flags make of it.

The paper's baselines are kinds of sampler, of interpolation or of input size, so that every task
takes them through the same two functions: `plan` turns flags into settings, `apply_sampling` a
dense model into a sampled one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import nn

from sparsight.convert import sparsify
from sparsight.measure import count_macs
from sparsight.nn import (
    AveragePoolInterpolation,
    ConvInterpolation,
    NearestInterpolation,
    PerforatedSampler,
    RBFInterpolation,
    ReLUGate,
    Sampler,
    ZeroFill,
)
from sparsight.nn.budget import BudgetController, SamplingPrice, ShareWeights, check_budget

Where = Callable[[str, nn.Module], bool]
Method = Literal["sampled", "resized", "relu_gate", "perforated"]
# What recipes have beside: sfp and fpgm prune filters (`sparsight.train.filter_pruning`).
RecipeMethod = Literal["sampled", "resized", "relu_gate", "perforated", "sfp", "fpgm"]
SamplerKind = Literal["gumbel", "relu_gate", "perforated"]
InterpolationKind = Literal["rbf", "conv", "average", "nearest"]
Layout = Literal["a", "b", "c"]
Noise = Literal["white", "blue", "none"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a model was converted by `sparsight.sparsify`.

    Attributes:
        layout: masks per block, "a" one, "b" (paper's default) two, "c" one per convolution.
        noise: "white" as published, "blue", or "none" for the deterministic baseline.
        grid_stride: every grid_stride-th row and column is always computed; 11 as published, None
            for no grid.
        sampler: "gumbel", the paper's (`sparsight.nn.Sampler`); or a baseline: "relu_gate"
            (`ReLUGate`, zeros in the holes whatever `interpolation` says), "perforated"
            (`PerforatedSampler`). noise and grid_stride are of "gumbel" only.
        interpolation: kernel that fills the holes: "rbf" (the paper's default), "conv", "average",
            "nearest"; None leaves zeros.
        window: side of the square of sites that a hole sees, odd; 7 as published. On maps of few
            channels a smaller one is cheaper: interpolation costs window^2 against 9 * channels.
        eps: added to the interpolation's denominator; None divides exactly, 1e-5 is the published
            code's. Of "rbf" and "conv" only.
        is_straight_through: masks of training are hard in value and soft in gradient.
        rate: of "perforated": share of the positions that is computed.
    """

    layout: Layout = "b"
    noise: Noise = "white"
    grid_stride: int | None = 11
    sampler: SamplerKind = "gumbel"
    interpolation: InterpolationKind | None = "rbf"
    window: int = 7
    eps: float | None = None
    is_straight_through: bool = False
    rate: float = 0.5


def apply_sampling(
    dense: nn.Module, sampling: Sampling | None, *, where: Where | None = None
) -> nn.Module:
    """Return `dense` itself for None, else a sparsified copy of it.

    Args:
        dense: any model that `sparsight.sparsify` converts.
        sampling: how.
        where: which layers, as for `sparsify`. Default: every residual block.

    Raises:
        ConversionError: nothing in the model can be sampled.
    """
    if sampling is None:
        return dense
    return sparsify(
        dense,
        layout=sampling.layout,
        sampler=_sampler(sampling),
        interpolation=_interpolation(sampling),
        where=where,
    )


def _sampler(sampling: Sampling) -> Callable[..., nn.Module]:
    if sampling.sampler == "relu_gate":
        # Nearly open at first: training starts from the dense network's weights.
        return partial(ReLUGate, bias=1.0)
    if sampling.sampler == "perforated":
        return partial(PerforatedSampler, rate=sampling.rate)
    return partial(
        Sampler,
        noise=sampling.noise,
        grid_stride=sampling.grid_stride,
        straight_through=sampling.is_straight_through,
    )


def _interpolation(sampling: Sampling) -> Callable[[], nn.Module]:
    if sampling.sampler == "relu_gate" or sampling.interpolation is None:
        return ZeroFill
    if sampling.interpolation == "rbf":
        return partial(RBFInterpolation, window=sampling.window, eps=sampling.eps)
    if sampling.interpolation == "conv":
        return partial(ConvInterpolation, window=sampling.window, eps=sampling.eps)
    if sampling.eps is not None:
        raise ValueError(
            f"Sampling: eps={sampling.eps} with interpolation={sampling.interpolation!r}; only "
            "'rbf' and 'conv' have a denominator to add it to; leave eps out."
        )
    if sampling.interpolation == "average":
        return partial(AveragePoolInterpolation, window=sampling.window)
    return partial(NearestInterpolation, window=sampling.window)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run trains.

    Attributes:
        sampling: for the architecture; None for a dense model.
        objective: price of computing, for the task; None where nothing is charged.
        size: (height, width) of the input in pixels.
        settles: whether the samplers' levels are to be shifted onto the budget after training.
    """

    sampling: Sampling | None
    objective: BudgetController | SamplingPrice | None
    size: tuple[int, int]
    settles: bool


def plan(
    *,
    method: Method,
    sampling: Sampling,
    size: tuple[int, int],
    budget: float | None,
    sampling_weight: float | None,
    weights: ShareWeights = "macs",
    dense: Callable[[], nn.Module],
) -> Plan:
    """Return what a recipe's flags ask for: the method of the paper, a baseline, or a dense model.

    Args:
        method: "sampled" is the paper's, with `sampling.noise="none"` its deterministic baseline;
            without budget and weight, a dense model. "relu_gate" computes where an activation is
            positive; without budget and weight its density is what training makes of it, as in its
            source. "perforated" has fixed patterns; with a budget, of the rate that meets it.
            "resized" is the dense network on a smaller input that meets the budget.
        sampling: settings of the conversion; its sampler is replaced by the method's, and for
            "perforated" its rate if there is a budget.
        size: (height, width) of the full input.
        budget: share of the dense model's MACs at `size`, in (0, 1].
        sampling_weight: fixed price instead of a budget.
        weights: what the fixed price is charged on, see `SamplingPrice`.
        dense: builds the dense model; called for "resized" and "perforated" with a budget only.

    Raises:
        ValueError: a budget outside (0, 1], a budget and a weight at once, weights that only a
            fixed price has, or a method that cannot use what was given.
    """
    if budget is not None:
        check_budget(budget, name="plan")
        if sampling_weight is not None:
            raise ValueError(
                f"plan: budget={budget} and sampling_weight={sampling_weight} were both given; at "
                "most one is required; drop --sampling_weight to meet the budget."
            )
    if weights != "macs" and sampling_weight is None:
        raise ValueError(
            f"plan: weights={weights!r} without a sampling_weight; a budget is a share of MACs, "
            "and other weights are charged at a fixed price only; add --sampling_weight, or leave "
            "--weights out."
        )
    if method in ("resized", "perforated") and sampling_weight is not None:
        raise ValueError(
            f"plan: sampling_weight={sampling_weight} with method={method!r}; nothing is there to "
            "be priced: what it computes does not depend on what it learns; pass --budget instead."
        )
    if method == "resized":
        if budget is None:
            raise ValueError(
                "plan: method='resized' without a budget; the size follows from it; add --budget, "
                "or pass --size and leave --method out."
            )
        smaller = resized_size(dense(), size, budget)
        return Plan(sampling=None, objective=None, size=smaller, settles=False)
    if method == "perforated":
        sampling = replace(sampling, sampler="perforated")
        if budget is not None:
            sampling = replace(sampling, rate=fitting_rate(dense(), sampling, size, budget))
        return Plan(sampling=sampling, objective=None, size=size, settles=False)
    objective: BudgetController | SamplingPrice | None = None
    if budget is not None:
        objective = BudgetController(budget)
    elif sampling_weight is not None:
        objective = SamplingPrice(sampling_weight, weights=weights)
    if method == "relu_gate":
        sampling = replace(sampling, sampler="relu_gate", interpolation=None, eps=None)
    elif objective is None:
        return Plan(sampling=None, objective=None, size=size, settles=False)
    return Plan(sampling=sampling, objective=objective, size=size, settles=budget is not None)


def resized_size(
    dense: nn.Module, size: tuple[int, int], budget: float, *, multiple: int = 8
) -> tuple[int, int]:
    """Return the input size at which a dense network comes nearest to a share of its MACs.

    Both sides shrink by sqrt(budget) and are rounded to a multiple, each down or up, whichever pair
    is counted nearest: maps at a stride of 32 round as well, so that areas alone would mislead.

    Args:
        dense: the dense model.
        size: (height, width) in pixels.
        budget: share of the MACs, in (0, 1].
        multiple: of both sides, in pixels.
    """
    factor = math.sqrt(check_budget(budget, name="resized_size"))
    sides = []
    for side in size:
        lower = max(1, math.floor(side * factor / multiple)) * multiple
        sides.append((lower, lower + multiple))
    model = dense.eval()
    full = _dense_macs(model, size)
    candidates = [(height, width) for height in sides[0] for width in sides[1]]
    return min(candidates, key=lambda s: abs(_dense_macs(model, s) / full - budget))


def _dense_macs(model: nn.Module, size: tuple[int, int]) -> int:
    return count_macs(model, torch.zeros(1, 3, *size)).dense


def fitting_rate(
    dense: nn.Module, sampling: Sampling, size: tuple[int, int], budget: float
) -> float:
    """Return the rate at which a perforated network needs `budget` of the dense MACs.

    Args:
        dense: the dense model; not changed.
        sampling: settings of the conversion.
        size: (height, width) of the input; what a pattern computes depends on nothing else.
        budget: share of the dense MACs, everything counted.

    Raises:
        ValueError: the layers that are not perforated alone need more than the budget.
    """
    model = apply_sampling(dense, replace(sampling, sampler="perforated")).eval()
    patterns = [module for module in model.modules() if isinstance(module, PerforatedSampler)]
    image = torch.zeros(1, 3, *size)

    def share_at(rate: float) -> float:
        for pattern in patterns:
            pattern.rate = rate
        counted = count_macs(model, image)
        return counted.total / counted.dense

    low, high = 0.01, 1.0
    least = share_at(low)
    if least > budget:
        raise ValueError(
            f"fitting_rate: budget={budget}, but {least:.3f} of the MACs are needed even at rate "
            f"{low}; stem, shortcuts and head are not perforated; ask for more."
        )
    for _ in range(10):  # patterns on small maps change in steps: finer is not to be had
        rate = 0.5 * (low + high)
        low, high = (rate, high) if share_at(rate) <= budget else (low, rate)
    return low
