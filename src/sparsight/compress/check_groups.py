"""Groups of channels put to the test: marks must arrive where the group says, removal must run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from sparsight.compress.channel_group import ChannelGroup, keep_all_channels
from sparsight.compress.narrow import is_grouped
from sparsight.compress.run_model import (
    call_with,
    channel_dim,
    has_channels,
    hooked,
    input_channels,
    traceable_copy,
)

__all__ = ["refuse_stray_marks", "refuse_what_fails"]


def refuse_stray_marks(
    model: nn.Module, example: Any, groups: list[ChannelGroup]
) -> list[ChannelGroup]:
    """Refuse the groups whose channels do not arrive where they were computed to.

    Args:
        model: a copy in eval mode; without values, on the meta device, nothing is checked.
        example: as for `find_channel_groups`.
        groups: all that were found.

    Cost: one pass where nothing is to be refused, else one more for each group.
    """
    removable = [group for group in groups if group.removable]
    if any(parameter.is_meta for parameter in model.parameters()):
        return groups
    # Layers let no mark through, so that groups do not disturb each other.
    if _stray_mark(model, example, removable) is None:
        return groups
    troubles = {group.name: _stray_mark(model, example, [group]) for group in removable}
    return [
        replace(group, removable=False, reason=trouble)
        if (trouble := troubles.get(group.name)) is not None
        else group
        for group in groups
    ]


def _stray_mark(model: nn.Module, example: Any, groups: list[ChannelGroup]) -> str | None:
    """Mark some units with NaN in all producers and look which input channels turn NaN where."""
    expected: dict[tuple[str, str], set[int]] = {}
    between: set[str] = set()
    for group in groups:
        # Other units in each group: two that are taken for each other would not be seen else.
        generator = torch.Generator().manual_seed(len(group.name) + sum(map(ord, group.name)))
        chosen = torch.randperm(group.channels, generator=generator)[:3].tolist()
        between.update(group.grouped)
        for member in group.members:
            marks = chain.from_iterable(member.units[unit] for unit in chosen)
            expected.setdefault((member.name, member.side), set()).update(marks)
    seen: list[str] = []

    def observe(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            found = _marked(module, args[0]) if args[0].numel() else None
            wanted = expected.get((name, "in"), set())
            if found is not None and found != wanted:
                seen.append(
                    f"{len(found)} of their channels arrive at {name!r} where {len(wanted)} other "
                    "ones should: something between rearranges or mixes channels"
                    if len(found) != len(wanted)
                    else f"they arrive at {name!r} in another order: something rearranges channels"
                )
            if is_grouped(module) and name in between:
                return output
            output = torch.nan_to_num(output, nan=0.0)
            if (name, "out") in expected:
                channels = torch.tensor(sorted(expected[name, "out"]), device=output.device)
                output.index_fill_(channel_dim(module, output), channels, torch.nan)
            return output

        return hook

    with hooked(model, has_channels, observe):
        call_with(model, example)
    return seen[0] if seen else None


def _marked(module: nn.Module, value: Tensor) -> set[int]:
    channels = input_channels(module, value).isnan().any(1)
    return set(channels.nonzero().flatten().tolist())


def refuse_what_fails(
    model: nn.Module, example: Any, groups: list[ChannelGroup]
) -> list[ChannelGroup]:
    """Refuse the groups without whose last unit the model does not run."""
    removable = [group for group in groups if group.removable]
    if _failure(model, example, removable) is None:
        return groups
    runs: list[ChannelGroup] = []
    refused: dict[str, str] = {}
    for group in removable:
        trouble = _failure(model, example, [*runs, group])
        if trouble is None:
            runs.append(group)
        else:
            refused[group.name] = f"the model does not run with fewer of them ({trouble})"
    return [
        replace(group, removable=False, reason=refused[group.name])
        if group.name in refused
        else group
        for group in groups
    ]


def _failure(model: nn.Module, example: Any, groups: list[ChannelGroup]) -> str | None:
    smaller = traceable_copy(model).eval()
    keep_all_channels(smaller, [(group, torch.arange(group.channels - 1)) for group in groups])
    try:
        call_with(smaller, example)
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None
