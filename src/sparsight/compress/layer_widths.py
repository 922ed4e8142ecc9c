"""How many channels every group keeps, so that a network loses the least for its multiply-adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

__all__ = ["LayerCost", "candidate_widths", "count_cost", "full_cost", "spread_widths"]


@dataclass
class LayerCost:
    """Multiply-adds of a layer as a function of the widths of groups.

    Attributes:
        scale: multiply-adds for each pair of an output and an input channel.
        out: (group, channels of the layer in each of its units); the rest of the outputs stay.
        inputs: the same on the input side; empty for a grouped convolution, whose inputs follow its
            outputs.
        fixed_out: output channels of no group.
        fixed_in: input channels of no group; of a grouped convolution those of one of its groups.
    """

    scale: float
    out: list[tuple[str, int]] = field(default_factory=list)
    inputs: list[tuple[str, int]] = field(default_factory=list)
    fixed_out: int = 0
    fixed_in: int = 0

    def at(self, widths: Mapping[str, int]) -> float:
        """Return the multiply-adds at these widths, in units of each group."""
        out = self.fixed_out + sum(widths[name] * size for name, size in self.out)
        inputs = self.fixed_in + sum(widths[name] * size for name, size in self.inputs)
        return self.scale * out * inputs


def full_cost(layer: Any, positions: int) -> LayerCost:
    """Return the cost of a convolution or a linear layer none of whose channels is in a group.

    Args:
        layer: the module.
        positions: at which it multiplies in all calls; see `LayerUse`.
    """
    if isinstance(layer, nn.Linear):
        return LayerCost(positions, fixed_out=layer.out_features, fixed_in=layer.in_features)
    return LayerCost(
        positions * layer.weight[0, 0].numel(),
        fixed_out=layer.out_channels,
        fixed_in=layer.in_channels // layer.groups,
    )


def count_cost(layers: Sequence[LayerCost], widths: Mapping[str, int]) -> float:
    """Return the multiply-adds of all layers."""
    return sum(layer.at(widths) for layer in layers)


def candidate_widths(units: int, channels: int, round_to: int) -> list[int]:
    """Return the widths that a group may be given, in units, ascending; the last is all of them.

    Args:
        units: how many units can be removed independently.
        channels: channels of a layer that they stand for; more than units where a grouped
            convolution ties several.
        round_to: channel counts are multiples of it, where the layer is wide enough: the largest
            power of two not above it that leaves eight steps counts, 2 for 16 channels, 4 for 32.
    """
    size = max(1, channels // units)
    step = 1
    while 2 * step <= round_to and 16 * step <= channels:
        step *= 2
    step = min(step, round_to)
    in_units = max(1, -(-step // size))
    return [*range(in_units, units, in_units), units]


def spread_widths(
    layers: Sequence[LayerCost],
    damage: Mapping[str, Mapping[int, float]],
    *,
    max_cost: float,
) -> dict[str, int] | None:
    """Return the widths that reach a cost at the least total damage; None if none does.

    Greedy: from full width, always the step that costs the least damage for each multiply-add it
    saves at the widths so far, however long the step; at the end the marginal damage for a
    multiply-add is about the same everywhere. What the last step saved beyond the goal is given
    back where it undoes the most damage.

    Args:
        layers: what costs.
        damage: for every group, the damage at each of its candidate widths; the largest is where
            it starts.
        max_cost: multiply-adds to come down to.
    """
    widths = {name: max(curve) for name, curve in damage.items()}
    touched: dict[str, list[LayerCost]] = {name: [] for name in damage}
    for layer in layers:
        for name in {name for name, _ in (*layer.out, *layer.inputs)}:
            if name in touched:
                touched[name].append(layer)
    cost = count_cost(layers, widths)
    while cost > max_cost:
        best: tuple[float, str, int, float] | None = None
        for name, curve in damage.items():
            now = count_cost(touched[name], widths)
            for width, value in curve.items():
                if width >= widths[name]:
                    continue
                saved = now - count_cost(touched[name], {**widths, name: width})
                if saved <= 0:
                    continue
                slope = (value - curve[widths[name]]) / saved
                if best is None or slope < best[0]:
                    best = slope, name, width, saved
        if best is None:
            return None
        _, name, width, saved = best
        widths[name] = width
        cost -= saved
    _give_back(layers, damage, widths, max_cost)
    return widths


def _give_back(
    layers: Sequence[LayerCost],
    damage: Mapping[str, Mapping[int, float]],
    widths: dict[str, int],
    max_cost: float,
) -> None:
    """Spend what the last, long step saved too much where it undoes the most damage."""
    while True:
        best: tuple[float, str, int] | None = None
        for name, curve in damage.items():
            for width, value in curve.items():
                gain = curve[widths[name]] - value
                if width <= widths[name] or (best is not None and gain <= best[0]):
                    continue
                if count_cost(layers, {**widths, name: width}) <= max_cost:
                    best = gain, name, width
        if best is None:
            return
        _, name, widths[name] = best
