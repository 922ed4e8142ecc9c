"""Channels that can only be removed together, and removing some of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsight.compress.narrow import is_grouped, keep_indices

__all__ = [
    "ChannelGroup",
    "Member",
    "Side",
    "keep_all_channels",
    "keep_channels",
    "removed_units",
    "width_of",
]

Side = Literal["out", "in", "norm"]


@dataclass(frozen=True)
class Member:
    """Where the channels of a group are in one of its layers.

    Attributes:
        name: qualified name of the layer.
        side: "out" its output channels, "in" its input channels, "norm" its one value per channel.
        units: for every unit of the group, the indices of its channels in that layer; several for a
            linear layer behind a flattened map, and where a grouped convolution makes blocks.
        width: channels that the layer has there, those of other groups included (concatenations).
    """

    name: str
    side: Side
    units: tuple[tuple[int, ...], ...] = field(repr=False)
    width: int


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can only be removed together, unit by unit.

    A unit is one channel in each of the producers, in plain networks; with grouped convolutions,
    and GroupNorm, in between it is a block, since they can only lose whole groups.

    Attributes:
        name: qualified name of the first producer, in the order of execution.
        channels: units; each of them can be removed independently of the others.
        producers: convolutions and linear layers whose output channels these are. More than one
            where they are added, as in the residual stream, or read by one and the same layer.
        consumers: convolutions and linear layers whose input channels these are.
        norms: layers in between with one value per channel: norms and PReLU.
        grouped: convolutions in between that keep the channels apart, depthwise ones and those of
            several groups: neither producers nor consumers, they lose input, output and groups.
        removable: whether units can be removed.
        reason: why not; None if they can.
        members: where the units are in each of these layers; a grouped convolution has two.
    """

    name: str
    channels: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    norms: tuple[str, ...]
    removable: bool
    reason: str | None
    grouped: tuple[str, ...] = ()
    members: tuple[Member, ...] = field(default=(), repr=False)

    @property
    def is_stream(self) -> bool:
        """Whether several layers produce these channels, as those of a residual stream."""
        return len(self.producers) > 1

    def of(self, name: str, side: Side) -> Member:
        """Return the member of this layer and side; KeyError if there is none."""
        for member in self.members:
            if (member.name, member.side) == (name, side):
                return member
        raise KeyError(f"ChannelGroup.of: {self.name!r} has no {side!r} of {name!r}.")


def keep_channels(model: nn.Module, group: ChannelGroup, keep: Tensor) -> None:
    """Remove the units of a group that are not to be kept from all its layers, in place.

    Parameters become new, smaller ones that keep requires_grad, dtype, device and memory format;
    their gradients are None. Optimisers have to be made afterwards.

    Args:
        model: the model that the group was found in; changed.
        group: one of `find_channel_groups`; a removable one.
        keep: (K) indices of the units to keep, integers in [0, group.channels), each once, in any
            order: channels stay in theirs. All of them change nothing.

    Raises:
        TypeError: `keep` is no tensor of integers.
        ValueError: the group is not removable, or was found before its layers were changed by
            another; no index, an index twice, or one out of range.

    Example:
        >>> from sparsight.compress import find_channel_groups
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> keep_channels(net, find_channel_groups(net, torch.zeros(1, 3, 8, 8))[0],
        ...               torch.tensor([0, 5, 6]))
        >>> net[0].weight.shape[0], net[2].weight.shape[1]
        (3, 3)
    """
    keep_all_channels(model, [(group, keep)])


def keep_all_channels(model: nn.Module, kept: Iterable[tuple[ChannelGroup, Tensor]]) -> None:
    """Do the same as `keep_channels` for several groups found together.

    One by one, groups that are read by one and the same layer, as concatenated ones are, would
    have to be found again: their indices in that layer move.

    Args:
        model: the model that all groups were found in; changed.
        kept: pairs of group and units to keep.

    Raises:
        TypeError: as `keep_channels`.
        ValueError: as `keep_channels`, before anything is changed.
    """
    removed: dict[tuple[str, Side], set[int]] = {}
    for group, keep in kept:
        gone = removed_units(group, keep)
        for member in group.members:
            _checkwidth_of(model, group, member)
            channels = chain.from_iterable(member.units[unit] for unit in gone)
            removed.setdefault((member.name, member.side), set()).update(channels)
    for (name, side), gone in removed.items():
        if not gone:
            continue
        module = model.get_submodule(name)
        if side == "in" and is_grouped(module):
            continue  # its "out" member takes both sides along
        width = width_of(module, side)
        keep_indices(module, side, [i for i in range(width) if i not in gone])


def removed_units(group: ChannelGroup, keep: Tensor) -> list[int]:
    """Return the units that `keep` leaves out; checks it as `keep_channels` says."""
    at = f"keep_channels: group {group.name!r}"
    if not isinstance(keep, Tensor) or keep.is_floating_point() or keep.dtype == torch.bool:
        given = keep.dtype if isinstance(keep, Tensor) else type(keep).__name__
        raise TypeError(
            f"{at}: keep is {given}; a tensor of integers, the units to keep, is required; pass "
            "mask.nonzero().flatten() for a mask."
        )
    if not group.removable:
        raise ValueError(
            f"{at} cannot lose channels: {group.reason}; a removable group is required; leave it."
        )
    units = keep.flatten().tolist()
    if not units or len(set(units)) < len(units) or not 0 <= min(units) <= max(units):
        raise ValueError(
            f"{at}: keep holds {len(units)} indices, {len(set(units))} of them different, the "
            f"smallest {min(units, default=None)}; at least one, each once and none negative is "
            "required; pass the units to keep."
        )
    if max(units) >= group.channels:
        raise ValueError(
            f"{at}: keep holds {max(units)}, but it has {group.channels} units; indices below that "
            "are required; count units, not channels (`group.channels`)."
        )
    stays = set(units)
    return [unit for unit in range(group.channels) if unit not in stays]


def _checkwidth_of(model: nn.Module, group: ChannelGroup, member: Member) -> None:
    width = width_of(model.get_submodule(member.name), member.side)
    if width != member.width:
        raise ValueError(
            f"keep_channels: {member.name!r} of group {group.name!r} has {width} channels "
            f"({member.side}), but had {member.width} when the group was found; groups of the "
            "model as it is are required; call find_channel_groups again."
        )


def width_of(module: Any, side: Side) -> int:
    """Return how many channels a layer has on one side."""
    if side == "norm":
        for name in ("num_features", "num_channels", "num_parameters"):
            if hasattr(module, name):
                return getattr(module, name)
        return next(chain(module.parameters(False), module.buffers(False))).numel()
    if isinstance(module, nn.Linear):
        return module.out_features if side == "out" else module.in_features
    return module.out_channels if side == "out" else module.in_channels
