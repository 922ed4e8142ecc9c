"""Multiply-adds of one operator call, from its shapes.

MACs are multiply-adds; the formulas for dense operators are those of `torch.utils.flop_counter`,
halved. An operator without a formula costs nothing: normalisation, activations, pooling, additions
and resizing are not counted.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

# sparsight's own operators, outside a module that count_macs knows how to read, cost what their
# sites say.
FREE_SPARSIGHT_OPERATORS = {
    "assemble_windows",
    "assemble_windows_backward",
    "merge_maps",
    "sites_from_mask",
    "soft_pool",
    "soft_pool_backward",
}


def _matrix_vector(args: Sequence[Any]) -> int:
    return prod(args[0].shape)


def _add_matrix_vector(args: Sequence[Any]) -> int:
    return prod(args[1].shape)


def _dot(args: Sequence[Any]) -> int:
    return args[0].numel()


def _add_batched(args: Sequence[Any]) -> int:
    batch, rows, inner = args[1].shape
    return batch * rows * inner * args[2].shape[2]


# Products that torch's registry leaves out.
_EXTRA: dict[Any, Callable[[Sequence[Any]], int]] = {
    aten.mv: _matrix_vector,
    aten.addmv: _add_matrix_vector,
    aten.dot: _dot,
    aten.vdot: _dot,
    aten.addbmm: _add_batched,
}


@cache
def _flop_formulas() -> Mapping[Any, Callable[..., int]]:
    # Imports triton where it is installed: only for those who count.
    from torch.utils.flop_counter import flop_registry

    return flop_registry


@cache
def has_formula(func: Any) -> bool:
    """Whether an operator is counted as it stands, instead of by what it is composed of."""
    packet = func.overloadpacket
    return (
        packet in _EXTRA
        or packet in _flop_formulas()
        or func.namespace in ("torchvision", "sparsight")
    )


def multiply_adds(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int | None:
    """Multiply-adds of one call of an operator.

    Args:
        func: the overload that ran, e.g. `aten.convolution.default`.
        args: its positional arguments.
        kwargs: its keyword arguments.
        out: what it returned.

    Returns:
        The number of multiply-adds of the whole batch; None if there is no formula, which for an
        operator of torch means that it multiplies nothing with a weight.

    Raises:
        RuntimeError: an operator of sparsight ran whose cost is not known here; counting 0 for it
            would be a lie.
    """
    packet = func.overloadpacket
    if packet in _EXTRA:
        return _EXTRA[packet](args)
    formula = _flop_formulas().get(packet)
    if formula is not None:
        flops = formula(*args, **kwargs, out_val=out)
        assert flops % 2 == 0, f"{packet}: {flops} floating point operations are no multiply-adds"
        return flops // 2
    namespace, _, name = func.name().partition("::")
    name = name.partition(".")[0]
    if namespace == "torchvision" and name == "deform_conv2d":
        # As a convolution; the bilinear gathering of its inputs is not counted, its offset branch
        # is, where it runs.
        return prod(out.shape) * prod(args[1].shape[1:])
    if namespace == "sparsight" and name not in FREE_SPARSIGHT_OPERATORS:
        names = [argument.name for argument in func._schema.arguments]
        return _sparsight_operator(name, dict(zip(names, args, strict=False)) | kwargs, out)
    return None


def _sparsight_operator(name: str, given: dict[str, Any], out: Any) -> int:
    if name in ("sampled_conv2d", "sampled_deform_conv2d"):
        sites = int(given["count"].sum())
        return sites * prod(given["weight"].shape)
    if name == "interpolate":
        mask: Tensor = given["mask"]
        window = given["log_kernel"].shape[0]
        return interpolation_macs(mask, mask.logical_not(), window, out.shape[1])
    raise RuntimeError(
        f"count_macs: the operator sparsight::{name} ran outside a module that declares its "
        "convolutions, and has no formula; every multiply-add must be counted; give the module "
        "that calls it `convolutions()` or `source_conv`."
    )


def convolution_macs(conv: Any, positions: int) -> int:
    """Multiply-adds of a convolution at some output positions, padding included, without bias.

    Args:
        conv: anything with `in_channels`, `out_channels`, `kernel_size` and `groups` as in
            `nn.Conv2d`.
        positions: output positions, over the whole batch.
    """
    taps = prod(conv.kernel_size)
    return positions * taps * conv.out_channels * (conv.in_channels // conv.groups)


def interpolation_macs(mask: Tensor, holes: Tensor, window: int, channels: int) -> int:
    """Multiply-adds of filling holes: one per hole, site in its window, and channel.

    Args:
        mask: (B, 1, H, W) bool (or float, non-zero where computed); the sites.
        holes: (B, 1, H, W) bool; the positions that are filled.
        window: side of the window, in positions, odd.
        channels: of the map that is filled.
    """
    # Pooling with divisor 1 is a sum, exact in float64, and no operator that would itself be
    # counted.
    sites = (mask != 0).to(torch.float64)
    seen = F.avg_pool2d(sites, window, stride=1, padding=window // 2, divisor_override=1)
    return round(float((seen * holes).sum())) * channels


def read_footprint(sites: Tensor, conv: Any, height: int, width: int) -> Tensor:
    """Positions of a convolution's input that it reads when it runs at given output sites.

    Args:
        sites: (B, 1, Ho, Wo) bool.
        conv: anything with `kernel_size`, `stride`, `padding`, `dilation` as in `nn.Conv2d`.
        height: of the input.
        width: of the input.

    Returns:
        (B, 1, height, width) bool.
    """
    (py, px), taps = _padding(conv), prod(conv.kernel_size)
    geometry = zip(sites.shape[-2:], conv.kernel_size, conv.stride, conv.dilation, strict=True)
    reach_y, reach_x = ((n - 1) * s + d * (k - 1) + 1 for n, k, s, d in geometry)
    # How often each position is read, from the first of the padding on.
    reads = F.fold(
        sites.float().flatten(2).expand(-1, taps, -1),
        (reach_y, reach_x),
        conv.kernel_size,
        dilation=conv.dilation,
        stride=conv.stride,
    )
    reads = F.pad(reads, (0, max(0, px + width - reach_x), 0, max(0, py + height - reach_y)))
    return reads[..., py : py + height, px : px + width] > 0


def _padding(conv: Any) -> tuple[int, int]:
    """Zeros before the first row and column."""
    if conv.padding == "valid":
        return 0, 0
    if conv.padding == "same":
        reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return reach[0] // 2, reach[1] // 2
    return conv.padding[0], conv.padding[1]
