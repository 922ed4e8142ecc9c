"""How much each filter of a layer matters, and which of them go."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from sparsight.compress.channel_group import ChannelGroup, Member

__all__ = [
    "Importance",
    "ImportanceName",
    "count_removed",
    "distances_to_others",
    "filter_norms",
    "filters_of",
    "group_importance",
    "weakest_filters",
]

ImportanceName = Literal["l1", "l2", "geometric_median", "batch_norm", "random"]
Importance = ImportanceName | Callable[[nn.Module, ChannelGroup], Tensor]


def filters_of(layer: nn.Module) -> Tensor:
    """Return the filters of a convolution or linear layer as rows (C, K), a view if possible."""
    weight: Any = layer.weight
    if isinstance(layer, _ConvTransposeNd) and layer.groups == 1:
        weight = weight.transpose(0, 1)
    return weight.detach().flatten(1)


def filter_norms(filters: Tensor, *, p: float = 2.0) -> Tensor:
    """Return the norm of every filter.

    Args:
        filters: (C, K) rows.
        p: 1 for the sum of magnitudes, 2 for the Euclidean norm.

    Returns:
        (C,) float64, at least 0; small ones matter little.

    Source: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, arXiv 1608.08710
    (p = 1); He et al., "Soft Filter Pruning", IJCAI 2018, arXiv 1808.06866 (p = 2).
    """
    return torch.linalg.vector_norm(filters.double(), ord=p, dim=1)


def distances_to_others(filters: Tensor) -> Tensor:
    """Return the sum of the Euclidean distances of every filter to all filters.

    A filter near the geometric median of the layer has a small one: the others can stand in for it.

    Args:
        filters: (C, K) rows.

    Returns:
        (C,) float64, at least 0; small ones are replaceable.

    Source: He et al., "Filter Pruning via Geometric Median", CVPR 2019, arXiv 1811.00250, eq. 6.
    """
    rows = filters.double()
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").sum(1)


def count_removed(channels: int, ratio: float) -> int:
    """Return int(channels * ratio), as published: what is removed is rounded down.

    A product that only binary rounding keeps below an integer counts as that integer: 100 * 0.29
    removes 29.
    """
    return math.floor(channels * ratio + 1e-9)


def weakest_filters(
    filters: Tensor, *, norm_ratio: float = 0.0, distance_ratio: float = 0.0
) -> Tensor:
    """Return which filters SFP or FPGM take: first by norm, then by distance among the rest.

    Args:
        filters: (C, K) rows.
        norm_ratio: share of all filters to take by their small Euclidean norm; alone it is SFP.
        distance_ratio: share of all filters to take, of those that are left, by their small sum of
            distances to the others that are left; alone it is FPGM. 0.1 and 0.2 are the published
            mix of 30 %.

    Returns:
        (C,) bool, True for int(C * norm_ratio) + int(C * distance_ratio) filters. Of equally weak
        ones those with the lower index are taken: all processes of a run take the same.

    Raises:
        ValueError: a share outside [0, 1), or both together 1 or more.
    """
    if not (0 <= norm_ratio and 0 <= distance_ratio and norm_ratio + distance_ratio < 1):
        raise ValueError(
            f"weakest_filters: norm_ratio={norm_ratio} and distance_ratio={distance_ratio}; shares "
            "from 0 that together stay below 1 are required; pass 0.3 to take 30 %."
        )
    channels = len(filters)
    taken = torch.zeros(channels, dtype=torch.bool, device=filters.device)
    by_norm = count_removed(channels, norm_ratio)
    taken[filter_norms(filters).argsort(stable=True)[:by_norm]] = True
    left = (~taken).nonzero().flatten()
    by_distance = count_removed(channels, distance_ratio)
    order = distances_to_others(filters[left]).argsort(stable=True)[:by_distance]
    taken[left[order]] = True
    return taken


def group_importance(
    model: nn.Module,
    group: ChannelGroup,
    importance: Importance,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the importance of every unit of a group, summed over the layers that produce it.

    Args:
        model: that the group was found in.
        group: a removable one.
        importance: see `prune_filters`.
        generator: draws "random".

    Returns:
        (group.channels,) float64 on the CPU.

    Raises:
        ValueError: an unknown name; no norm with weights in the group, for "batch_norm"; NaN, or
            another shape, from a function.
    """
    if callable(importance):
        scores = importance(model, group)
        if scores.shape != (group.channels,):
            raise ValueError(
                f"prune_filters: importance gave shape {tuple(scores.shape)} for group "
                f"{group.name!r}; ({group.channels},), one value per unit, is required; sum over "
                "what a unit consists of."
            )
    elif importance == "random":
        scores = torch.rand(group.channels, generator=generator)
    elif importance == "batch_norm":
        scores = _norm_scales(model, group)
    elif importance in get_args(ImportanceName):
        scores = torch.zeros(group.channels, dtype=torch.float64)
        for name in group.producers:
            filters = filters_of(model.get_submodule(name))
            rows = filters[_rows(group.of(name, "out"), filters.device)].flatten(1)
            if importance == "geometric_median":
                scores += distances_to_others(rows).cpu()
            else:
                scores += filter_norms(rows, p=1.0 if importance == "l1" else 2.0).cpu()
    else:
        raise ValueError(
            f"prune_filters: importance={importance!r}; one of "
            f"{', '.join(get_args(ImportanceName))} or a function (model, group) -> (units,) is "
            "required."
        )
    scores = scores.detach().double().cpu()
    if scores.isnan().any():
        raise ValueError(
            f"prune_filters: the importance of group {group.name!r} has NaN in it; numbers are "
            "required; look for NaN in the weights."
        )
    return scores


def _rows(member: Member, device: torch.device) -> Tensor:
    return torch.tensor(member.units, device=device)  # (units, channels in a unit)


def _norm_scales(model: nn.Module, group: ChannelGroup) -> Tensor:
    scores = torch.zeros(group.channels, dtype=torch.float64)
    found = False
    for name in group.norms:
        layer: Any = model.get_submodule(name)
        scale = getattr(layer, "weight", None)
        if scale is None or isinstance(layer, nn.PReLU):
            continue
        found = True
        rows = _rows(group.of(name, "norm"), scale.device)
        scores += scale.detach().double().abs()[rows].sum(1).cpu()
    if not found:
        raise ValueError(
            "prune_filters: importance='batch_norm', but no norm with weights follows the layers "
            f"of group {group.name!r} ({', '.join(group.producers)}); a norm in every group is "
            "required; pass another importance, or leave that group out with where."
        )
    return scores
