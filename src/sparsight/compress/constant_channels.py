"""What a channel that never changes adds to the layers that read it, moved into their bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsight.compress.narrow import is_grouped
from sparsight.compress.run_model import call_with, has_channels, hooked, input_channels

__all__ = ["fold_constants", "norms_behind"]


def norms_behind(model: nn.Module, example: Any) -> dict[str, str]:
    """Return which batch norm reads the output of which convolution, and nothing else, by name.

    Args:
        model: in eval mode; called once.
        example: as for `find_channel_groups`.
    """
    made: dict[int, tuple[str, Tensor]] = {}  # the tensors are kept, or their ids were used again
    found: dict[str, str] = {}

    def observe(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if has_channels(module):
                made[id(output)] = (name, output)
            elif id(args[0]) in made:
                found[made[id(args[0])][0]] = name

        return hook

    def is_watched(module: nn.Module) -> bool:
        return has_channels(module) or getattr(module, "running_mean", None) is not None

    with torch.no_grad(), hooked(model, is_watched, observe):
        call_with(model, example)
    return found


def fold_constants(
    model: nn.Module, example: Any, removed: dict[str, list[int]]
) -> list[tuple[str, int]]:
    """Add what constant channels contribute to their readers to the readers' biases, in place.

    The filter of a channel that was set to zero leaves what its norm makes of nothing, a constant:
    removed without more ado it would be missing. A channel that varies over the example's positions
    or images is left alone. With zero padding the constant is not the same at the border; there,
    and only there, the result differs.

    Args:
        model: at full width, in eval mode; its biases, or the running means of the batch norms
            behind, change.
        example: as for `find_channel_groups`.
        removed: input channels that are going to be removed, by layer.

    Returns:
        (layer, channels) for every layer that has neither a bias nor a batch norm to take the
        constants of so many channels.
    """
    behind = norms_behind(model, example)
    shifts: dict[str, Tensor] = {}

    def observe(name: str) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            if name in shifts or not args[0].numel():
                return
            values = input_channels(module, args[0])[removed[name]]  # (channels, positions)
            low, high = values.amin(1), values.amax(1)
            constant = torch.where(high - low <= 1e-6 * high.abs(), high, 0).double()
            weight = module.weight.detach().double()
            if isinstance(module, nn.modules.conv._ConvTransposeNd):
                weight = weight.transpose(0, 1)
            weight = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
            shifts[name] = weight[:, removed[name]] * constant

        return hook

    readers = {name: model.get_submodule(name) for name, gone in removed.items() if gone}
    chosen = {module for module in readers.values() if not is_grouped(module)}
    with torch.no_grad(), hooked(model, lambda module: module in chosen, observe):
        call_with(model, example)
    left = []
    for name, by_channel in shifts.items():
        shift = by_channel.sum(1)
        layer: Any = readers[name]
        if not shift.any():
            continue
        norm: Any = model.get_submodule(behind[name]) if name in behind else None
        with torch.no_grad():
            if layer.bias is not None:
                layer.bias.add_(shift.to(layer.bias))
            elif norm is not None:
                norm.running_mean.sub_(shift.to(norm.running_mean))
            else:
                left.append((name, int(by_channel.any(0).sum())))
    return left
