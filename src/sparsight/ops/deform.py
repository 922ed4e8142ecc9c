"""`sampled_deform_conv2d`: a deformable convolution computed at the sites only."""

from typing import Literal

import torch
from torch import Tensor

from sparsight.ops import cpu, deform_reference, reference
from sparsight.ops.conv import check_convolution
from sparsight.ops.operators import LIBRARY
from sparsight.ops.sites import Sites

LIBRARY.define(
    "sampled_deform_conv2d(Tensor x, Tensor offset, Tensor weight, Tensor? bias, Tensor? "
    "modulation, Tensor index, Tensor count, int[] stride, int[] padding, int[] dilation, Tensor? "
    "residual, bool relu) -> Tensor"
)
LIBRARY.define(
    "sampled_deform_conv2d_backward(Tensor grad, Tensor x, Tensor offset, Tensor weight, Tensor? "
    "modulation, Tensor index, Tensor count, int[] stride, int[] padding, int[] dilation) -> "
    "(Tensor, Tensor, Tensor, Tensor)"
)


def _numbers(
    stride: list[int], padding: list[int], dilation: list[int]
) -> dict[str, tuple[int, int]]:
    return {
        "stride": (stride[0], stride[1]),
        "padding": (padding[0], padding[1]),
        "dilation": (dilation[0], dilation[1]),
    }


@torch.library.impl(LIBRARY, "sampled_deform_conv2d", "CompositeExplicitAutograd")
def _deform_any(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    modulation: Tensor | None,
    index: Tensor,
    count: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    mask = reference.mask_from_sites(index, count, offset.shape[2], offset.shape[3])
    y = deform_reference.sampled_deform_conv2d(
        x,
        offset,
        weight,
        bias,
        mask,
        modulation=modulation,
        residual=residual,
        relu=relu,
        **_numbers(stride, padding, dilation),
    )
    return y.contiguous(memory_format=torch.channels_last)


@torch.library.impl(LIBRARY, "sampled_deform_conv2d", "CPU")
def _deform_cpu(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    modulation: Tensor | None,
    index: Tensor,
    count: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    if x.dtype != torch.float32 or weight.shape[2] * weight.shape[3] > cpu.MAX_TAPS:
        return _deform_any(
            x,
            offset,
            weight,
            bias,
            modulation,
            index,
            count,
            stride,
            padding,
            dilation,
            residual,
            relu,
        )
    return cpu.sampled_deform_conv2d(
        x,
        offset,
        weight,
        bias,
        modulation,
        index,
        count,
        stride=(stride[0], stride[1]),
        padding=(padding[0], padding[1]),
        dilation=(dilation[0], dilation[1]),
        residual=residual,
        relu=relu,
    )


@torch.library.register_fake("sparsight::sampled_deform_conv2d", lib=LIBRARY)
def _deform_fake(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    modulation: Tensor | None,
    index: Tensor,
    count: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    shape = (x.shape[0], weight.shape[0], offset.shape[2], offset.shape[3])
    return x.new_empty(shape).contiguous(memory_format=torch.channels_last)


@torch.library.impl(LIBRARY, "sampled_deform_conv2d_backward", "CompositeExplicitAutograd")
def _backward_any(
    grad: Tensor,
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    modulation: Tensor | None,
    index: Tensor,
    count: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return deform_reference.sampled_deform_conv2d_backward(
        grad,
        x,
        offset,
        weight,
        modulation,
        index,
        count,
        **_numbers(stride, padding, dilation),
    )


@torch.library.register_fake("sparsight::sampled_deform_conv2d_backward", lib=LIBRARY)
def _backward_fake(
    grad: Tensor,
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    modulation: Tensor | None,
    index: Tensor,
    count: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape).contiguous(memory_format=torch.channels_last),
        offset.new_empty(offset.shape),
        weight.new_empty(weight.shape),
        x.new_empty(() if modulation is None else modulation.shape),
    )


def _setup(ctx, inputs, output) -> None:
    x, offset, weight, bias, modulation, index, count, *numbers, residual, relu = inputs
    ctx.save_for_backward(x, offset, weight, modulation, index, count, output if relu else None)
    ctx.has_bias, ctx.has_modulation = bias is not None, modulation is not None
    ctx.has_residual, ctx.numbers = residual is not None, numbers


def _backward(ctx, grad: Tensor):
    x, offset, weight, modulation, index, count, output = ctx.saved_tensors
    active = reference.mask_from_sites(index, count, offset.shape[2], offset.shape[3])
    if output is not None:
        active = active & (output > 0)
    grad = torch.where(active, grad, torch.zeros((), dtype=grad.dtype, device=grad.device))
    grad_x, grad_offset, grad_weight, grad_modulation = (
        torch.ops.sparsight.sampled_deform_conv2d_backward(
            grad, x, offset, weight, modulation, index, count, *ctx.numbers
        )
        if any(ctx.needs_input_grad[i] for i in (0, 1, 2, 4))
        else (None, None, None, None)
    )
    grad_bias = grad.sum((0, 2, 3)) if ctx.has_bias else None
    if not ctx.has_modulation:
        grad_modulation = None
    grad_residual = grad if ctx.has_residual else None
    return (
        grad_x,
        grad_offset,
        grad_weight,
        grad_bias,
        grad_modulation,
        None,
        None,
        None,
        None,
        None,
        grad_residual,
        None,
    )


torch.library.register_autograd(
    "sparsight::sampled_deform_conv2d", _backward, setup_context=_setup, lib=LIBRARY
)


def sampled_deform_conv2d(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    sites: Sites,
    modulation: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    residual: Tensor | None = None,
    activation: Literal["none", "relu"] = "none",
) -> Tensor:
    """Deformable convolution at the sites, zero elsewhere.

    With a full mask this is `torchvision.ops.deform_conv2d`: tap t of output p reads x at
    p * stride - padding + t * dilation + offset, bilinear between pixels and zero outside of the
    map. A pixel whose bilinear weight times modulation is zero is not read: what is not finite
    there does not arrive.

    Args:
        x: (B, C, H, W) floating point; channels-last is read in place, other layouts are copied.
        offset: (B, 2 * G * kh * kw, Ho, Wo) in px, y before x for each tap, G offset groups that
            divide C. Off the sites it is not read: compute it there with `sampled_conv2d`.
        weight: (O, C/groups, kh, kw); the number of groups follows from C.
        bias: (O,), or None.
        sites: from `sites_from_mask`, at the output resolution.
        modulation: (B, G * kh * kw, Ho, Wo), a factor of each tap (v2), usually a sigmoid; None is
            all one (v1). Off the sites it is not read.
        stride: step, an integer or (vertical, horizontal).
        padding: zeros on each side, likewise.
        dilation: distance between taps, likewise.
        residual: (B, O, Ho, Wo) added at the sites before the activation, or None.
        activation: "none" or "relu".

    Returns:
        (B, O, Ho, Wo) channels-last, the dtype of `x`.

    Raises:
        TypeError: dtypes differ or are not floating point.
        ValueError: ranks, channels, devices or the resolution of the sites do not fit.

    Cost: share of active sites times the MACs of the dense convolution; mixing the rows adds 4
    multiply-adds per site, tap and channel, which `measure.count_macs` leaves out. float32 on the
    CPU runs the compiled kernel, which holds the mixed rows of a block of sites (1 to 8 MB); other
    dtypes and devices run plain aten.

    Gradient: with respect to x, offset, weight, bias, modulation and residual, in plain aten; zero
    from positions off the sites. At whole-pixel positions the gradient of the offset is that of
    the side of larger coordinates, as torchvision's.

    Example:
        >>> import torch
        >>> from sparsight.ops import sampled_deform_conv2d, sites_from_mask
        >>> x = torch.arange(4.0).view(1, 1, 1, 4)
        >>> mask = torch.tensor([True, True, False, True]).view(1, 1, 1, 4)
        >>> offset = torch.zeros(1, 2, 1, 4)
        >>> offset[:, 1] = 0.5  # half a pixel to the right
        >>> sampled_deform_conv2d(x, offset, torch.ones(1, 1, 1, 1), sites=sites_from_mask(mask))
        tensor([[[[0.5000, 1.5000, 0.0000, 1.5000]]]])

    Source: Dai et al., ICCV 2017 (arXiv 1703.06211); Zhu et al., CVPR 2019 (arXiv 1811.11168); at
    sites in Xie et al., ECCV 2020 (arXiv 2003.08866), section 4.1.
    """
    step, pad, dilate, size = check_convolution(
        "sampled_deform_conv2d",
        x,
        weight,
        bias,
        sites=sites,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=None,
        residual=residual,
        activation=activation,
        offset=offset,
        modulation=modulation,
    )
    taps = weight.shape[2] * weight.shape[3]
    offset_groups = offset.shape[1] // (2 * taps) if offset.ndim == 4 else 0
    if (
        offset_groups < 1
        or x.shape[1] % offset_groups
        or offset.shape != (x.shape[0], 2 * offset_groups * taps, *size)
    ):
        raise ValueError(
            f"sampled_deform_conv2d: offset has shape {tuple(offset.shape)}; "
            f"{(x.shape[0], 2 * taps, *size)}, or {2 * taps} channels for each of G offset groups "
            f"that divide {x.shape[1]}, is needed: a convolution with the stride of this one makes "
            "them."
        )
    if modulation is not None and modulation.shape != (x.shape[0], offset_groups * taps, *size):
        raise ValueError(
            f"sampled_deform_conv2d: modulation has shape {tuple(modulation.shape)} but offset has "
            f"{offset_groups} groups; {(x.shape[0], offset_groups * taps, *size)} is needed: one "
            "factor for each tap."
        )
    return torch.ops.sparsight.sampled_deform_conv2d(
        x,
        offset,
        weight,
        bias,
        modulation,
        sites.index,
        sites.count,
        list(step),
        list(pad),
        list(dilate),
        residual,
        activation == "relu",
    )
