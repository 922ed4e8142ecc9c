"""Choosing channels and refitting their readers, from rows of the original and the pruned network.

Letters in shapes: N sampled rows, D columns that a layer reads, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsight.compress.lasso import LassoSelection, channel_moments
from sparsight.compress.observe_layers import LayerUse, Rows
from sparsight.compress.prune_targets import PruneTarget
from sparsight.compress.reconstruct import Moments, refit, squared_error

__all__ = ["Reader", "TargetFit", "make_reader"]


@dataclass(frozen=True)
class Reader:
    """A layer that reads channels to be pruned, and what an error in its output costs.

    Attributes:
        name: qualified name.
        weight: (O, D) float64, its filters.
        unit_of_column: (D,) the unit that each column belongs to, -1 for none.
        scale: (O,) float64, the factor of its norm on each output; ones without a norm.
        has_bias: whether a constant can be added to its output: by its own bias, or by the norm.
    """

    name: str
    weight: Tensor
    unit_of_column: Tensor
    scale: Tensor
    has_bias: bool


def make_reader(model: nn.Module, use: LayerUse, unit_of_channel: Tensor) -> Reader:
    """Describe a layer of a model as it is now."""
    module: Any = model.get_submodule(use.name)
    weight = module.weight.detach().flatten(1).cpu().double()
    window = weight.shape[1] // len(unit_of_channel)
    scale = torch.ones(len(weight)).double()
    if use.norm is not None:
        scale = norm_scale(model.get_submodule(use.norm))
    return Reader(
        use.name,
        weight,
        unit_of_channel.repeat_interleave(window),
        scale,
        module.bias is not None or use.norm is not None,
    )


def norm_scale(norm: Any) -> Tensor:
    """Return the factor (C,) of a norm in eval mode, float64."""
    scale = (norm.running_var.detach().double() + getattr(norm, "eps", 1e-5)).rsqrt()
    if getattr(norm, "weight", None) is not None:
        scale = scale * norm.weight.detach().double()
    return scale.cpu()


class TargetFit:
    """The regression of one target: its readers' moments, filled row by row, and what follows.

    Args:
        target: the channels.
        readers: the layers that read them.
        corrects_shortcut: whether a reader whose output is added to a shortcut also makes up for
            what the shortcut has lost.
    """

    def __init__(
        self, target: PruneTarget, readers: Sequence[Reader], *, corrects_shortcut: bool
    ) -> None:
        self.target = target
        self.readers = readers
        self.corrects_shortcut = corrects_shortcut
        self.moments = {
            reader.name: Moments.zeros(reader.weight.shape[1], len(reader.weight))
            for reader in readers
        }
        self.signal: dict[str, list[Tensor]] = {reader.name: [] for reader in readers}
        self._selection: LassoSelection | None = None

    def add(
        self, original: Mapping[str, Iterable[Rows]], current: Mapping[str, Iterable[Rows]]
    ) -> None:
        """Add the rows of one batch.

        Args:
            original: of the original network: outputs and shortcuts.
            current: of the network so far: inputs and shortcuts.

        Raises:
            ValueError: a row holds NaN or infinite values.
        """
        for reader in self.readers:
            for whole, now in zip(original[reader.name], current[reader.name], strict=True):
                assert now.inputs is not None
                inputs, targets = now.inputs.cpu(), whole.outputs.cpu().double()
                features = targets * reader.scale
                if whole.shortcut is not None:
                    assert now.shortcut is not None
                    features = features + whole.shortcut.cpu()
                    if self.corrects_shortcut:
                        lost = (whole.shortcut - now.shortcut).cpu().double()
                        targets = targets + _through_norm(lost, reader.scale)
                for values, what in ((inputs, "reads"), (targets, "returns")):
                    if not torch.isfinite(values).all():
                        raise ValueError(
                            f"prune_channels: images: layer {reader.name!r} {what} NaN or infinite "
                            "values for them, and finite ones are required; check the images' "
                            "normalisation and the model's weights."
                        )
                self.moments[reader.name].add(inputs, targets)
                self.signal[reader.name].append(_sums(features))

    def check_rows(self) -> None:
        """Raise ValueError if a reader has seen fewer rows than there are channels to choose."""
        for reader in self.readers:
            num_rows = self.moments[reader.name].num_rows
            if num_rows < self.target.units:
                raise ValueError(
                    f"prune_channels: images: they give {num_rows} samples of what {reader.name!r} "
                    f"reads, fewer than the {self.target.units} channels to choose from "
                    f"({self.target.name!r}); pass more images, or a larger num_positions."
                )

    def choose(self, num_kept: int) -> Tensor:
        """Return the units that LASSO keeps, (num_kept,) ascending; one choice for all readers."""
        if self._selection is None:
            units = self.target.units
            quadratic = torch.zeros(units, units).double()
            linear = torch.zeros(units).double()
            for reader in self.readers:
                moments = self.moments[reader.name]
                xx, xy, _ = moments.averaged(is_centred=reader.has_bias)
                rest = torch.nonzero(reader.unit_of_column < 0).flatten()
                if len(rest):  # channels of others explain a part of the output already
                    xy = xy - xx[:, rest] @ reader.weight[:, rest].T
                scale = reader.scale
                part = channel_moments(
                    xx, xy * scale, reader.weight * scale[:, None], reader.unit_of_column, units
                )
                signal = self._signal(reader.name)
                quadratic += part[0] / signal
                linear += part[1] / signal
            self._selection = LassoSelection(quadratic, linear)
        return self._selection.keep(num_kept)

    def _signal(self, name: str) -> float:
        """The variance of what a reader's output ends up in, over all outputs."""
        count, total, squares = torch.stack(self.signal[name]).sum(0)
        variance = (squares / count - (total / count).square()).sum().item()
        return max(variance, torch.finfo(torch.float32).tiny)

    def columns(self, reader: Reader, kept: Tensor) -> Tensor:
        """Return the columns of a reader that are left when these units are kept."""
        unit = reader.unit_of_column
        return torch.nonzero((unit < 0) | torch.isin(unit, kept)).flatten()

    def solve(self, reader: Reader, kept: Tensor, *, refits: bool) -> tuple[Tensor, Tensor | None]:
        """Return the filters (O, K) on the columns that are left, and what to add to the output.

        Without `refits` the filters are what they were, and there is nothing to add.
        """
        columns = self.columns(reader, kept)
        if not refits:
            return reader.weight[:, columns], None
        weight, bias = refit(
            self.moments[reader.name], reader.weight, columns, has_bias=reader.has_bias
        )
        return weight, bias if reader.has_bias else None

    def error(self, reader: Reader, kept: Tensor, weight: Tensor) -> float:
        """Return the squared error behind the norm, relative to what the output ends up in.

        The best bias is included where the layer has one.
        """
        error = squared_error(
            self.moments[reader.name],
            weight,
            self.columns(reader, kept),
            has_bias=reader.has_bias,
        )
        return (error * reader.scale.square()).sum().item() / self._signal(reader.name)

    def damage(self, num_kept: int, *, refits: bool) -> float:
        """Return the error, summed over readers, that keeping so many channels alone makes."""
        kept = self.choose(num_kept)
        return sum(
            self.error(reader, kept, self.solve(reader, kept, refits=refits)[0])
            for reader in self.readers
        )


def _sums(features: Tensor) -> Tensor:
    """Count, sum and sum of squares of each output: (3, O)."""
    count = torch.full_like(features[0], len(features))
    return torch.stack([count, features.sum(0), features.square().sum(0)])


def _through_norm(lost: Tensor, scale: Tensor) -> Tensor:
    """What to add before a norm, so that `lost` is added behind it; nothing where it is closed."""
    is_open = scale.abs() > 1e-6 * scale.abs().max()
    return torch.where(is_open, lost / torch.where(is_open, scale, 1), 0)
