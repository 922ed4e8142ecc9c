"""Layers with fewer channels: taking channels out, and shaping a fresh model like a pruned one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

__all__ = ["is_channelwise", "is_convolution", "is_grouped", "keep_indices", "narrow", "shapes_of"]


def is_convolution(module: nn.Module) -> bool:
    """Whether it is a convolution of torch's, transposed ones and subclasses included."""
    return isinstance(module, _ConvNd)


def is_grouped(module: nn.Module) -> bool:
    """Whether it is a convolution of several groups, depthwise ones included."""
    return isinstance(module, _ConvNd) and module.groups > 1


def is_channelwise(module: nn.Module) -> bool:
    """Whether it has one value, or several, of its own for every channel: norms and PReLU.

    LayerNorm is not among them: it mixes channels, so that removing some changes the others.
    """
    if isinstance(module, nn.PReLU):
        return module.num_parameters > 1
    # torchvision's, whose import is not needed for this
    frozen = type(module).__name__ == "FrozenBatchNorm2d" and hasattr(module, "running_mean")
    return frozen or isinstance(module, _BatchNorm | _InstanceNorm | nn.GroupNorm)


def keep_indices(
    module: nn.Module, side: Literal["out", "in", "norm"], indices: Sequence[int]
) -> None:
    """Keep only some channels of one layer, in place.

    Args:
        module: a convolution, a linear layer, or what `is_channelwise` accepts.
        side: "out" or "in" for its output or input channels, "norm" for a channelwise layer. A
            grouped convolution loses whole groups, on both sides, whichever is named.
        indices: channels to keep, ascending, each once; for a grouped convolution and for GroupNorm
            complete groups of them.
    """
    layer: Any = module
    if side == "norm":
        _keep_channelwise(layer, indices)
    elif isinstance(module, nn.Linear):
        _select(layer, "weight", 0 if side == "out" else 1, indices)
        if side == "out":
            _select(layer, "bias", 0, indices)
            layer.out_features = len(indices)
        else:
            layer.in_features = len(indices)
    elif is_grouped(module):
        _keep_groups(layer, side, indices)
    else:
        first = isinstance(module, _ConvTransposeNd)  # (in, out / groups, ...) there
        _select(layer, "weight", int(first) if side == "out" else int(not first), indices)
        if side == "out":
            _select(layer, "bias", 0, indices)
            layer.out_channels = len(indices)
        else:
            layer.in_channels = len(indices)


def _keep_groups(layer: Any, side: str, indices: Sequence[int]) -> None:
    blocks = {"in": layer.in_channels // layer.groups, "out": layer.out_channels // layer.groups}
    kept = sorted({i // blocks[side] for i in indices})
    assert len(kept) * blocks[side] == len(indices), "a group of a convolution was torn apart"
    channels = {
        name: [group * size + i for group in kept for i in range(size)]
        for name, size in blocks.items()
    }
    is_transposed = isinstance(layer, _ConvTransposeNd)
    _select(layer, "weight", 0, channels["in" if is_transposed else "out"])
    _select(layer, "bias", 0, channels["out"])
    layer.groups = len(kept)
    layer.in_channels, layer.out_channels = len(channels["in"]), len(channels["out"])


def _keep_channelwise(layer: Any, indices: Sequence[int]) -> None:
    if isinstance(layer, nn.GroupNorm):
        layer.num_groups = len(indices) // (layer.num_channels // layer.num_groups)
    for name, value in [
        *layer.named_parameters(recurse=False),
        *layer.named_buffers(recurse=False),
    ]:
        if value.ndim == 1:  # num_batches_tracked has no channels
            _select(layer, name, 0, indices)
    for name in ("num_features", "num_channels", "num_parameters"):
        if hasattr(layer, name):
            setattr(layer, name, len(indices))


def _select(layer: Any, name: str, dim: int, indices: Sequence[int]) -> None:
    value: Tensor | None = getattr(layer, name)
    if value is None:
        return
    chosen = torch.tensor(indices, dtype=torch.int64, device=value.device)
    kept = value.detach().index_select(dim, chosen)
    for memory_format, ndim in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
        if value.ndim == ndim and value.is_contiguous(memory_format=memory_format):
            kept = kept.contiguous(memory_format=memory_format)
    if isinstance(value, nn.Parameter):
        kept = nn.Parameter(kept, requires_grad=value.requires_grad)
    setattr(layer, name, kept)


def shapes_of(model: nn.Module) -> dict[str, list[int]]:
    """Return the shape of every tensor in the state_dict, in plain values for a record."""
    return {name: list(value.shape) for name, value in model.state_dict().items()}


def narrow(model: nn.Module, shapes: Mapping[str, Tensor | Sequence[int]]) -> None:
    """Give a fresh dense model the widths of a pruned one, in place.

    The first channels of each layer stay: load the pruned model's state_dict afterwards.

    Args:
        model: the architecture that was pruned, at full width; changed.
        shapes: a state_dict of the pruned model, or the shapes in it, by name; names that are left
            out keep their width.

    Raises:
        ValueError: a name that the model does not have, a layer that cannot be narrowed, or a shape
            that cannot be reached by removing channels; nothing was changed.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> narrow(net, {"0.weight": [5, 3, 3, 3], "0.bias": [5], "2.weight": [4, 5, 3, 3]})
        >>> net(torch.zeros(1, 3, 8, 8)).shape
        torch.Size([1, 4, 4, 4])
    """
    wanted = {
        name: tuple(value.shape if isinstance(value, Tensor) else value)
        for name, value in shapes.items()
    }
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    unknown = sorted(wanted.keys() - own.keys())
    if unknown:
        raise ValueError(
            f"narrow: shapes name {unknown[:3]}, which {type(model).__name__} does not have; names "
            "of its own state_dict are required; build the architecture that was pruned."
        )
    plans = {}
    for name, shape in wanted.items():
        if shape == own[name]:
            continue
        at, _, attribute = name.rpartition(".")
        module = model.get_submodule(at)
        if not (is_channelwise(module) or is_convolution(module) or isinstance(module, nn.Linear)):
            raise ValueError(
                f"narrow: {name!r} is to have shape {list(shape)}, not {list(own[name])}, but "
                f"{type(module).__name__} is no layer that is narrowed; convolutions, linear "
                "layers and norms are; build the architecture that was pruned."
            )
        _check_reach(name, module, own[name], shape)
        if attribute == "weight" or is_channelwise(module):
            plans[at] = (module, own[name], shape)
    for module, before, after in plans.values():
        _shrink(module, before, after)


def _check_reach(name: str, module: Any, own: tuple[int, ...], shape: tuple[int, ...]) -> None:
    layer = module  # what the checks below do not narrow
    fits = len(own) == len(shape) and all(0 < b <= a for a, b in zip(own, shape, strict=True))
    if fits and (is_convolution(module) or isinstance(module, nn.Linear)):
        fits = own[2:] == shape[2:]
    if fits and is_grouped(module):
        fits = own[1:] == shape[1:] and shape[0] % (own[0] // layer.groups) == 0
    if fits and isinstance(module, nn.GroupNorm):
        fits = shape[0] % (own[0] // layer.num_groups) == 0
    if not fits:
        raise ValueError(
            f"narrow: {name!r} is to have shape {list(shape)}, but the model has {list(own)}; a "
            "shape with fewer channels, and else the same, is required (grouped layers lose whole "
            "groups); build the architecture that was pruned."
        )


def _shrink(module: nn.Module, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    if is_channelwise(module):
        keep_indices(module, "norm", range(after[0]))
        return
    if is_grouped(module):
        keep_indices(
            module, "in" if isinstance(module, _ConvTransposeNd) else "out", range(after[0])
        )
        return
    sides: tuple[Literal["out", "in"], Literal["out", "in"]] = ("out", "in")
    if isinstance(module, _ConvTransposeNd):
        sides = ("in", "out")
    for side, was, now in zip(sides, before, after, strict=False):
        if now != was:
            keep_indices(module, side, range(now))
