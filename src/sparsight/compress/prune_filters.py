"""Filter pruning: the filters that seem to matter least are removed, nothing is fitted."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsight.compress.channel_group import ChannelGroup, keep_all_channels, removed_units
from sparsight.compress.channel_groups import find_channel_groups
from sparsight.compress.constant_channels import fold_constants
from sparsight.compress.filter_importance import (
    Importance,
    count_removed,
    filters_of,
    group_importance,
)
from sparsight.compress.layer_widths import LayerCost, count_cost, full_cost
from sparsight.compress.narrow import is_grouped
from sparsight.compress.run_model import call_with, has_channels, hooked
from sparsight.nn.evaluating import evaluating

__all__ = ["fitting_ratio", "prune_filters", "remove_zero_filters"]

Kept = dict[str, Tensor]  # group -> units that stay


def prune_filters(
    model: nn.Module,
    example: Any,
    *,
    importance: Importance = "l1",
    ratio: float | Mapping[str, float] | None = None,
    speedup: float | None = None,
    scope: Literal["layer", "global"] = "layer",
    round_to: int = 1,
    where: Callable[[str, nn.Module], bool] | None = None,
    prunes_stream: bool = False,
    seed: int = 0,
) -> nn.Module:
    """A physically smaller copy of a model, without the filters that seem to matter least.

    Nothing but weights is looked at, so it takes a moment, and the result has to be trained; where
    images are at hand, :func:`sparsight.compress.prune_channels` loses less before that.

    Pruned are the inner channels: those that one layer produces. What several layers add to, a
    residual stream, keeps its width, as in the published scripts. What a filter of zeros still
    emits, through its bias and norm, is not lost: it moves into the biases or norms of the layers
    that read it.

    Args:
        model: a dense model in any mode; not changed.
        example: what the model is called with, see :func:`find_channel_groups`.
        importance: of a filter, summed over all layers that produce the same channels:
            "l1" the sum of its magnitudes, default, as published by Li et al.; "l2" its Euclidean
            norm; "geometric_median" the sum of its distances to the layer's filters, FPGM's;
            "batch_norm" the magnitude of the norm's scale, as in network slimming; "random"; or
            importance(model, group) -> (group.channels,), small for what can go.
        ratio: share of the units to remove from every group, in [0, 1); rounded down to whole ones.
            Or one for each layer that is named, and none from the others.
        speedup: instead of `ratio`, how many times fewer multiply-adds, at least 1, for the shape
            of the example; all convolutions and linear layers are counted. The same ratio
            everywhere, or the same threshold, is searched for.
        scope: "layer" removes the same share from every group; "global" the least important units
            wherever they are, each compared by its importance over the mean of its group; one unit
            of a group always stays.
        round_to: counts of channels are rounded up to multiples of it, for the kernels compute in
            vectors: 8 or 16 are better than the default 1 where time counts. Groups of fewer than
            eight times as many channels get the largest power of two that leaves them eight steps:
            2 for 16 channels, 4 for 32, 8 for 64.
        where: where(qualified name, module) -> bool for the layers that produce channels; a group
            is pruned if it is True for all of them. Default: all.
        prunes_stream: also prune what several layers produce. Default False.
        seed: of "random".

    Returns:
        The pruned copy, in the mode of the source. Equal ratios, and weights, give equal models: of
        equally important units those with the lower index go. With nothing to remove it is a copy,
        bit for bit.

    Raises:
        TypeError: the model is no module.
        ValueError: neither or both of `ratio` and `speedup`; one out of range; an unknown
            importance or scope; a name that is no layer, or that of one that cannot be pruned
            alone, with its group; nothing to prune; a speed-up out of reach, with the largest.
        ImportError: the extra `sparsight[compress]` is not installed.

    Warns:
        UserWarning: a constant that no bias and no norm could take.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
        >>> smaller = prune_filters(net, torch.zeros(1, 3, 8, 8), ratio=0.5)
        >>> smaller[0].weight.shape, smaller[2].weight.shape
        (torch.Size([4, 3, 3, 3]), torch.Size([4, 4, 3, 3]))

    Source: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, arXiv 1608.08710; He et
    al., FPGM, CVPR 2019, arXiv 1811.00250; Liu et al., "Network Slimming", ICCV 2017, arXiv
    1708.06519.
    """
    _check_arguments(ratio, speedup, scope, round_to)
    groups = find_channel_groups(model, example)
    chosen = _chosen_groups(model, groups, ratio, where, prunes_stream)
    generator = torch.Generator().manual_seed(seed)
    ranks = {
        group.name: group_importance(model, group, importance, generator=generator)
        for group in chosen
    }
    if speedup is None:
        assert ratio is not None
        kept = _keep_at(ratio, chosen, ranks, scope, round_to)
    else:
        kept = _keep_for(speedup, model, example, chosen, ranks, scope, round_to)[1]
    return _without(model, example, chosen, kept)


def fitting_ratio(model: nn.Module, example: Any, *, speedup: float) -> float:
    """Return the smallest common ratio at which `prune_filters` reaches a speed-up.

    Args:
        model: as for `prune_filters`; its weights do not matter.
        example: of the shape to count at.
        speedup: how many times fewer multiply-adds, at least 1.

    Raises:
        ValueError: as `prune_filters`.
    """
    _check_arguments(None, speedup, "layer", 1)
    chosen = _chosen_groups(model, find_channel_groups(model, example), None, None, False)
    ranks = {group.name: torch.zeros(group.channels) for group in chosen}
    return _keep_for(speedup, model, example, chosen, ranks, "layer", 1)[0]


def remove_zero_filters(model: nn.Module, example: Any) -> nn.Module:
    """A smaller copy without the filters that are zero, which computes the same.

    What soft filter pruning leaves is removed for good: every unit whose filters are zero in all
    layers that produce it, biases aside. At least one unit of a group stays. Filters of a residual
    stream are seldom the same in all layers that add to it: those stay, as zeros.

    Args:
        model: in any mode; not changed.
        example: as for :func:`find_channel_groups`.

    Returns:
        The copy. In eval mode its outputs are those of `model`, but for rounding, if the channels
        of zero filters are constant zero; other constants move into the biases of the layers that
        read them, which cannot follow at the border of a zero-padded map.
    """
    groups = [group for group in find_channel_groups(model, example) if group.removable]
    kept = {}
    for group in groups:
        zero = _silent_units(model, group)
        if zero.all():
            zero[0] = False
        kept[group.name] = (~zero).nonzero().flatten()
    return _without(model, example, groups, kept)


def _silent_units(model: nn.Module, group: ChannelGroup) -> Tensor:
    """Which units have nothing but zeros in the filters of all layers that produce them."""
    silent = torch.ones(group.channels, dtype=torch.bool)
    for name in group.producers:
        zero = ~filters_of(model.get_submodule(name)).any(1).cpu()
        silent &= zero[torch.tensor(group.of(name, "out").units)].all(1)
    return silent


def _without(model: nn.Module, example: Any, groups: list[ChannelGroup], kept: Kept) -> nn.Module:
    smaller = copy.deepcopy(model)
    for parameter in smaller.parameters():
        parameter.grad = None
    removed: dict[str, list[int]] = {}
    if not any(parameter.is_meta for parameter in model.parameters()):
        for group in groups:
            silent = _silent_units(model, group)
            gone = [i for i in removed_units(group, kept[group.name]) if silent[i]]
            for name in group.consumers if gone else ():
                units = group.of(name, "in").units
                removed.setdefault(name, []).extend(i for unit in gone for i in units[unit])
    if removed:
        with evaluating(smaller):
            left = fold_constants(smaller, example, removed)
        if left:
            names = ", ".join(f"{name} ({count})" for name, count in left)
            warnings.warn(
                f"prune_filters: constant channels are removed that no bias and no batch norm of "
                f"the layers reading them could take: {names}",
                stacklevel=3,
            )
    keep_all_channels(smaller, [(group, kept[group.name]) for group in groups])
    return smaller


def _check_arguments(
    ratio: float | Mapping[str, float] | None, speedup: float | None, scope: str, round_to: int
) -> None:
    if (ratio is None) == (speedup is None):
        raise ValueError(
            f"prune_filters: ratio={ratio} and speedup={speedup}; exactly one of them is required; "
            "pass ratio=0.3, or speedup=2.0."
        )
    shares = ratio.values() if isinstance(ratio, Mapping) else [] if ratio is None else [ratio]
    for share in shares:
        if not 0 <= share < 1:
            raise ValueError(
                f"prune_filters: ratio={share}; the share to remove, in [0, 1), is required; pass "
                "0.3 to remove 30 %."
            )
    if speedup is not None and not (1 <= speedup < math.inf):
        raise ValueError(
            f"prune_filters: speedup={speedup}; a number of at least 1 is required; pass 2.0 for "
            "half the multiply-adds."
        )
    if scope not in ("layer", "global"):
        raise ValueError(
            f"prune_filters: scope={scope!r}; 'layer' or 'global' is required; leave it out for "
            "the same share from every layer."
        )
    if scope == "global" and isinstance(ratio, Mapping):
        raise ValueError(
            "prune_filters: scope='global' with a ratio for each layer; one share of all units is "
            "required; pass a number, or leave scope out."
        )
    if round_to < 1:
        raise ValueError(
            f"prune_filters: round_to={round_to}; at least 1 is required; 1 allows any width."
        )


def _chosen_groups(
    model: nn.Module,
    groups: list[ChannelGroup],
    ratio: float | Mapping[str, float] | None,
    where: Callable[[str, nn.Module], bool] | None,
    prunes_stream: bool,
) -> list[ChannelGroup]:
    """Return the groups to prune; ValueError if one that was named cannot be, or none is left."""

    def obstacle(group: ChannelGroup) -> str | None:
        if group.is_stream and group.removable and not prunes_stream:
            others = ", ".join(group.producers[:4]) + (", ..." if len(group.producers) > 4 else "")
            return f"its channels are also those of others ({others}); prunes_stream=True takes all"
        return group.reason

    if isinstance(ratio, Mapping):
        homes = {name: group for group in groups for name in (*group.producers, *group.grouped)}
        for name in ratio:
            if name not in homes:
                raise ValueError(
                    f"prune_filters: ratio names {name!r}, which is no convolution or linear layer "
                    "that the model calls; qualified names of layers are required; see "
                    "find_channel_groups."
                )
            trouble = obstacle(homes[name])
            if trouble is not None:
                raise ValueError(
                    f"prune_filters: {name!r} cannot be pruned alone: it is in the group of "
                    f"{homes[name].name!r}, and {trouble}; a layer whose channels can go is "
                    "required; leave it out of ratio."
                )
    chosen = [
        group
        for group in groups
        if obstacle(group) is None
        and (
            where is None or all(where(name, model.get_submodule(name)) for name in group.producers)
        )
    ]
    if not chosen:
        reasons = "\n".join(f"  {group.name}: {obstacle(group) or 'where'}" for group in groups[:8])
        raise ValueError(
            f"prune_filters: nothing of {type(model).__name__} can be pruned; a group of channels "
            f"that are not its outputs is required; these were found:\n{reasons}"
        )
    return chosen


def _keep_at(
    ratio: float | Mapping[str, float],
    groups: list[ChannelGroup],
    ranks: dict[str, Tensor],
    scope: str,
    round_to: int,
) -> Kept:
    if scope == "global":
        assert not isinstance(ratio, Mapping)
        return _keep_globally(ratio, groups, ranks, round_to)
    kept = {}
    for group in groups:
        names = (*group.producers, *group.grouped)
        share = (
            max((ratio[name] for name in names if name in ratio), default=0.0)
            if isinstance(ratio, Mapping)
            else ratio
        )
        stays = group.channels - count_removed(group.channels, share)
        kept[group.name] = _strongest(group, ranks[group.name], stays, round_to)
    return kept


def _keep_globally(
    ratio: float, groups: list[ChannelGroup], ranks: dict[str, Tensor], round_to: int
) -> Kept:
    relative = [r / r.mean().clamp(min=1e-300) for r in (ranks[g.name] for g in groups)]
    every = torch.cat(relative)
    goes = torch.zeros(len(every), dtype=torch.bool)
    goes[every.argsort(stable=True)[: count_removed(len(every), ratio)]] = True
    kept, start = {}, 0
    for group in groups:
        stays = group.channels - int(goes[start : start + group.channels].sum())
        start += group.channels
        kept[group.name] = _strongest(group, ranks[group.name], max(1, stays), round_to)
    return kept


def _strongest(group: ChannelGroup, rank: Tensor, count: int, round_to: int) -> Tensor:
    """The units that stay, ascending, as many as make a multiple of `round_to` channels."""
    channels = group.of(group.producers[0], "out").width
    in_unit = channels // group.channels
    multiple = 1
    while 2 * multiple <= round_to and 16 * multiple <= channels:
        multiple *= 2
    if 8 * round_to <= channels:
        multiple = round_to
    step = math.lcm(in_unit, multiple) // in_unit
    count = min(group.channels, math.ceil(count / step) * step)
    order = rank.argsort(stable=True)
    return order[group.channels - count :].sort().values


def _keep_for(
    speedup: float,
    model: nn.Module,
    example: Any,
    groups: list[ChannelGroup],
    ranks: dict[str, Tensor],
    scope: str,
    round_to: int,
) -> tuple[float, Kept]:
    """Search the smallest ratio that saves enough; counts fall in steps as it grows."""
    costs = _layer_costs(model, example, groups)
    full = count_cost(costs, {group.name: group.channels for group in groups})

    def gain(ratio: float) -> tuple[float, Kept]:
        kept = _keep_at(ratio, groups, ranks, scope, round_to)
        return full / count_cost(costs, {name: len(units) for name, units in kept.items()}), kept

    low, high = 0.0, 1.0 - 1e-6
    if speedup == 1:
        return 0.0, gain(0.0)[1]
    best, kept = gain(high)
    if best < speedup:
        raise ValueError(
            f"prune_filters: speedup={speedup} is out of reach; at most {best:.3g} is possible, "
            f"with one unit of each of the {len(groups)} groups left; ask for less, or allow more "
            "layers (where, prunes_stream, a smaller round_to)."
        )
    for _ in range(24):
        middle = (low + high) / 2
        reached, found = gain(middle)
        if reached >= speedup:
            high, kept = middle, found
        else:
            low = middle
    return high, kept


def _layer_costs(model: nn.Module, example: Any, groups: list[ChannelGroup]) -> list[LayerCost]:
    """Return the multiply-adds of all layers that run, as functions of the groups' widths."""
    positions: dict[str, int] = {}

    def observe(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            out = module.out_features if isinstance(module, nn.Linear) else module.out_channels
            # A transposed convolution multiplies at its input's positions.
            is_transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
            count = (
                args[0].numel() // module.in_channels if is_transposed else output.numel() // out
            )
            positions[name] = positions.get(name, 0) + count

        return hook

    with torch.no_grad(), evaluating(model), hooked(model, has_channels, observe):
        call_with(model, example)
    costs = {name: full_cost(model.get_submodule(name), at) for name, at in positions.items()}
    for group in groups:
        for member in group.members:
            cost, size = costs.get(member.name), len(member.units[0])
            if cost is None:
                continue
            if member.side == "out":
                cost.out.append((group.name, size))
                cost.fixed_out -= size * group.channels
            # The groups of a grouped convolution stay as deep as they are.
            elif member.side == "in" and not is_grouped(model.get_submodule(member.name)):
                cost.inputs.append((group.name, size))
                cost.fixed_in -= size * group.channels
    return list(costs.values())
