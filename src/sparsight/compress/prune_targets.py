"""What channel pruning may remove in a network, who reads it, and what it costs.

Groups of channels come from `find_channel_groups`; this module says which of them can be pruned
by reconstruction, and why the others cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsight.compress.channel_groups import ChannelGroup, Member
from sparsight.compress.layer_widths import LayerCost, full_cost
from sparsight.compress.narrow import is_grouped
from sparsight.compress.observe_layers import LayerUse
from sparsight.nn.deform_conv import DeformableConv2d

__all__ = ["PruneTarget", "find_targets", "layer_costs", "without_channels"]

# The moments of a regression on more columns than this would take more than 2 GiB.
_MAX_COLUMNS = 16384


@dataclass(frozen=True)
class PruneTarget:
    """One choice of channels: those of a group, or those that a branch reads of its stream.

    Attributes:
        name: of the group's first producer; where a branch selects, that of its first layer and
            ":in".
        group: None where channels are selected, not removed.
        units: how many can be removed independently.
        channels: channels of the first consumer that they stand for.
        unit_of_channel: for every consumer, the unit of each of its input channels, -1 for none.
        refusal: why it is not pruned unless it is named; None if it is.
    """

    name: str
    group: ChannelGroup | None
    units: int
    channels: int
    unit_of_channel: Mapping[str, Tensor] = field(repr=False)
    refusal: str | None = None

    @property
    def touched(self) -> list[str]:
        """The layers that pruning it changes."""
        group = self.group
        return [*self.unit_of_channel, *((*group.producers, *group.grouped) if group else ())]


def find_targets(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    uses: Mapping[str, LayerUse],
    *,
    num_images: int,
    num_rows: Callable[[LayerUse], int],
    selects_inputs: bool,
) -> tuple[list[PruneTarget], dict[str, str]]:
    """Return what can be pruned, from the front, and why the rest cannot.

    Args:
        model: the dense model.
        groups: its groups of channels.
        uses: how it uses its layers, seen in one call.
        num_images: images in that call.
        num_rows: how many rows will be sampled for a layer.
        selects_inputs: also let the first layers of branches select from a stream.

    Returns:
        The targets, and for every layer with channels that none of them removes the reason.
    """
    targets: list[PruneTarget] = []
    reasons: dict[str, str] = {}
    for group in groups:
        reason = _refuse(model, group, uses, num_images)
        if reason is not None:
            reasons |= dict.fromkeys((*group.producers, *group.grouped), reason)
        else:
            units = {name: _units(group, name) for name in group.consumers}
            refusal = _refuse_default(model, group, uses, num_rows)
            first = group.consumers[0]
            width = len(torch.nonzero(units[first] >= 0))
            if isinstance(model.get_submodule(first), nn.Linear):
                width = group.channels
            targets.append(PruneTarget(group.name, group, group.channels, width, units, refusal))
        if selects_inputs and group.is_stream:
            targets += _selections(model, group, uses, num_images)
    targets.sort(key=lambda target: min(uses[name].order for name in target.unit_of_channel))
    return targets, reasons


def _units(group: ChannelGroup, consumer: str) -> Tensor:
    member = group.of(consumer, "in")
    unit_of_channel = torch.full((member.width,), -1)
    for unit, channels in enumerate(member.units):
        unit_of_channel[list(channels)] = unit
    return unit_of_channel


def _refuse(
    model: nn.Module, group: ChannelGroup, uses: Mapping[str, LayerUse], num_images: int
) -> str | None:
    if group.is_stream:
        others = ", ".join(repr(name) for name in group.producers)
        return (
            f"its channels are those of group {group.name!r}, which {others} produce together, as "
            "a residual stream is added up; the stream keeps its width here, and prune_filters "
            "removes channels from all of them at once"
        )
    if not group.removable:
        return group.reason
    if not group.consumers:
        return "no layer reads its channels, so that there is nothing to reconstruct"
    for name in group.consumers:
        reason = _refuse_reader(model.get_submodule(name), uses.get(name), num_images)
        if reason is not None:
            return f"{name!r} reads its channels, and {reason}"
    return None


def _refuse_reader(module: Any, use: LayerUse | None, num_images: int) -> str | None:
    if use is None:
        return "did not run"
    if isinstance(module, DeformableConv2d) or is_grouped(module):
        return f"a {type(module).__name__} of {module.groups} groups is not refitted"
    if not isinstance(module, nn.Conv2d | nn.Linear):
        return f"a {type(module).__name__} is not refitted"
    if any(leading != num_images for leading in use.leading):
        return "sees something else than one map for each image, so that rows do not match"
    return None


def _refuse_default(
    model: nn.Module,
    group: ChannelGroup,
    uses: Mapping[str, LayerUse],
    num_rows: Callable[[LayerUse], int],
) -> str | None:
    for name in group.consumers:
        module: Any = model.get_submodule(name)
        columns = module.weight[0].numel()
        if columns > _MAX_COLUMNS:
            return f"{name!r} reads {columns} columns, more than {_MAX_COLUMNS}"
        rows = num_rows(uses[name])
        if isinstance(module, nn.Linear) and rows < group.channels:
            return f"{name!r} gives {rows} rows for {group.channels} channels"
    return None


def _selections(
    model: nn.Module, group: ChannelGroup, uses: Mapping[str, LayerUse], num_images: int
) -> list[PruneTarget]:
    """A selection for every convolution that reads the stream and does not write to it again."""
    found = []
    for name in group.consumers:
        module: Any = model.get_submodule(name)
        use = uses.get(name)
        if not isinstance(module, nn.Conv2d) or _refuse_reader(module, use, num_images):
            continue
        assert use is not None
        if use.num_sums == 0 and use.num_calls == 1:
            channels = module.in_channels
            found.append(
                PruneTarget(f"{name}:in", None, channels, channels, {name: torch.arange(channels)})
            )
    return found


def without_channels(target: PruneTarget, other: PruneTarget, kept: Tensor) -> PruneTarget:
    """Return a target as it is after units of another one were removed.

    A layer that reads both, as one behind a concatenation does, has fewer channels then, and those
    of `target` have moved.
    """
    units = {
        name: channels[_stays(other.unit_of_channel[name], kept)]
        if name in other.unit_of_channel
        else channels
        for name, channels in target.unit_of_channel.items()
    }
    group = target.group
    if group is not None and other.group is not None:
        removed = {(member.name, member.side): member for member in other.group.members}
        members = tuple(
            _moved(member, removed[member.name, member.side], kept)
            if (member.name, member.side) in removed
            else member
            for member in group.members
        )
        group = replace(group, members=members)
    return replace(target, group=group, unit_of_channel=units)


def _stays(unit_of_channel: Tensor, kept: Tensor) -> Tensor:
    return torch.nonzero((unit_of_channel < 0) | torch.isin(unit_of_channel, kept)).flatten()


def _moved(member: Member, other: Member, kept: Tensor) -> Member:
    """Where the channels of a member are when another group has lost some in the same layer."""
    stays = set(kept.tolist())
    gone = {c for unit, channels in enumerate(other.units) if unit not in stays for c in channels}
    left = [channel for channel in range(member.width) if channel not in gone]
    place = {old: new for new, old in enumerate(left)}
    units = tuple(tuple(place[channel] for channel in unit) for unit in member.units)
    return replace(member, units=units, width=len(left))


def layer_costs(
    model: nn.Module, uses: Mapping[str, LayerUse], targets: Sequence[PruneTarget]
) -> list[LayerCost]:
    """Return the multiply-adds of every layer that runs, as functions of the targets' widths."""
    costs = {
        name: full_cost(model.get_submodule(name), use.positions) for name, use in uses.items()
    }
    for target in targets:
        for name, units in target.unit_of_channel.items():
            size = len(torch.nonzero(units >= 0)) // target.units
            costs[name].inputs.append((target.name, size))
            costs[name].fixed_in -= size * target.units
        for member in target.group.members if target.group is not None else ():
            if member.side == "out" and member.name in costs:
                size = len(member.units[0])
                costs[member.name].out.append((target.name, size))
                costs[member.name].fixed_out -= size * target.units
    return list(costs.values())
