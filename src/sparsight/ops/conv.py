"""`sampled_conv2d`: a convolution computed at the sites only."""

from typing import Literal

import torch
from torch import Tensor

from sparsight.ops import cpu, reference
from sparsight.ops.operators import LIBRARY
from sparsight.ops.sites import Sites

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def pair(
    value: int | tuple[int, int], *, name: str, minimum: int, caller: str = "sampled_conv2d"
) -> tuple[int, int]:
    """A vertical and a horizontal integer, checked."""
    both = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(both) != 2 or any(not isinstance(v, int) or v < minimum for v in both):
        raise ValueError(
            f"{caller}: {name} is {value!r}; an integer >= {minimum} or two of them are "
            "needed: pass what torch.nn.Conv2d takes."
        )
    return both


def output_size(
    input_size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int]:
    """Size of the output map of a convolution."""
    height, width = (
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(input_size, kernel, stride, padding, dilation, strict=True)
    )
    return height, width


def check_convolution(
    caller: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    sites: Sites,
    stride: int | tuple[int, int],
    padding: int | tuple[int, int],
    dilation: int | tuple[int, int],
    groups: int | None,
    residual: Tensor | None,
    activation: str,
    **others: Tensor | None,
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Raise unless the arguments of a convolution at sites fit; its three pairs and output size.

    `groups` None is taken from the channels; `others` are tensors of the dtype and device of `x`.
    """
    if x.ndim != 4:
        raise ValueError(
            f"{caller}: x has shape {tuple(x.shape)}; (B, C, H, W) is needed: add the batch "
            "dimension with x.unsqueeze(0)."
        )
    if weight.ndim != 4:
        raise ValueError(
            f"{caller}: weight has shape {tuple(weight.shape)}; (O, C/groups, kh, kw) is "
            "needed: pass the weight of a torch.nn.Conv2d."
        )
    if x.dtype not in _FLOATS:
        raise TypeError(
            f"{caller}: x has dtype {x.dtype}; a floating-point dtype is needed: call x.float()."
        )
    for name, tensor in {"weight": weight, "bias": bias, "residual": residual, **others}.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(
                f"{caller}: {name} has dtype {tensor.dtype} but x has {x.dtype}; one dtype "
                f"is needed: convert with {name}.to(x.dtype)."
            )
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"{caller}: {name} is on {tensor.device} but x is on {x.device}; one device "
                f"is needed: move it with {name}.to(x.device)."
            )
    if sites.index.device != x.device:
        raise ValueError(
            f"{caller}: sites are on {sites.index.device} but x is on {x.device}; one device "
            "is needed: build them from a mask on x.device."
        )
    step = pair(stride, name="stride", minimum=1, caller=caller)
    pad = pair(padding, name="padding", minimum=0, caller=caller)
    dilate = pair(dilation, name="dilation", minimum=1, caller=caller)
    if groups is None:
        groups = max(1, x.shape[1] // max(1, weight.shape[1]))
    if groups < 1 or weight.shape[0] % groups or x.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"{caller}: x has {x.shape[1]} channels, weight has shape {tuple(weight.shape)} "
            f"and groups is {groups}; x needs weight.shape[1] * groups = "
            f"{weight.shape[1] * groups} channels and groups must divide the "
            "output channels: check in_channels and groups."
        )
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(
            f"{caller}: bias has shape {tuple(bias.shape)}; ({weight.shape[0]},) is needed: "
            "one value per output channel."
        )
    size = output_size(
        (x.shape[2], x.shape[3]), (weight.shape[2], weight.shape[3]), step, pad, dilate
    )
    if min(size) < 1:
        raise ValueError(
            f"{caller}: a {weight.shape[2]}x{weight.shape[3]} kernel with padding {pad} and "
            f"dilation {dilate} does not fit a {x.shape[2]}x{x.shape[3]} input; an output of at "
            "least 1x1 is needed: use a larger input or more padding."
        )
    if (sites.height, sites.width) != size:
        raise ValueError(
            f"{caller}: sites describe a {sites.height}x{sites.width} grid but stride {step} "
            f"on a {x.shape[2]}x{x.shape[3]} input yields {size[0]}x{size[1]}; build the mask at "
            "output resolution."
        )
    if sites.index.shape[0] != x.shape[0]:
        raise ValueError(
            f"{caller}: sites are for {sites.index.shape[0]} images but x has {x.shape[0]}; "
            "one mask per image is needed: expand the mask over the batch."
        )
    if residual is not None and residual.shape != (x.shape[0], weight.shape[0], *size):
        raise ValueError(
            f"{caller}: residual has shape {tuple(residual.shape)}; "
            f"{(x.shape[0], weight.shape[0], *size)} is needed: the shape of the output."
        )
    if activation not in ("none", "relu"):
        raise ValueError(
            f"{caller}: activation is {activation!r}; 'none' or 'relu' is needed: apply "
            "other activations to the result."
        )
    return step, pad, dilate, size


LIBRARY.define("sites_from_mask(Tensor mask) -> (Tensor, Tensor)")
LIBRARY.define(
    "sampled_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor index, Tensor count, int[] "
    "output_size, int[] stride, int[] padding, int[] dilation, int groups, Tensor? residual, "
    "bool relu) -> Tensor"
)


@torch.library.impl(LIBRARY, "sites_from_mask", "CPU")
def _sites_cpu(mask: Tensor) -> tuple[Tensor, Tensor]:
    return cpu.sites_from_mask(mask)


@torch.library.impl(LIBRARY, "sites_from_mask", "CompositeExplicitAutograd")
def _sites_any(mask: Tensor) -> tuple[Tensor, Tensor]:
    return reference.sites_from_mask(mask)


@torch.library.register_fake("sparsight::sites_from_mask", lib=LIBRARY)
def _sites_fake(mask: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, height, width = mask.shape
    return (
        mask.new_empty((batch, height * width), dtype=torch.int32),
        mask.new_empty((batch,), dtype=torch.int32),
    )


@torch.library.impl(LIBRARY, "sampled_conv2d", "CompositeExplicitAutograd")
def _conv_any(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    count: Tensor,
    output_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    mask = reference.mask_from_sites(index, count, output_size[0], output_size[1])
    y = reference.sampled_conv2d(
        x,
        weight,
        bias,
        mask,
        stride=(stride[0], stride[1]),
        padding=(padding[0], padding[1]),
        dilation=(dilation[0], dilation[1]),
        groups=groups,
        residual=residual,
        relu=relu,
    )
    return y.contiguous(memory_format=torch.channels_last)


@torch.library.impl(LIBRARY, "sampled_conv2d", "CPU")
def _conv_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    count: Tensor,
    output_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    if x.dtype != torch.float32 or weight.shape[2] * weight.shape[3] > cpu.MAX_TAPS:
        return _conv_any(
            x,
            weight,
            bias,
            index,
            count,
            output_size,
            stride,
            padding,
            dilation,
            groups,
            residual,
            relu,
        )
    return cpu.sampled_conv2d(
        x,
        weight,
        bias,
        index,
        count,
        (output_size[0], output_size[1]),
        stride=(stride[0], stride[1]),
        padding=(padding[0], padding[1]),
        dilation=(dilation[0], dilation[1]),
        groups=groups,
        residual=residual,
        relu=relu,
    )


@torch.library.register_fake("sparsight::sampled_conv2d", lib=LIBRARY)
def _conv_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    count: Tensor,
    output_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    shape = (x.shape[0], weight.shape[0], output_size[0], output_size[1])
    return x.new_empty(shape).contiguous(memory_format=torch.channels_last)


def _conv_setup(ctx, inputs, output) -> None:
    x, weight, bias, index, count, size, stride, padding, dilation, groups, residual, relu = inputs
    ctx.save_for_backward(x, weight, index, count, output if relu else None)
    ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
    ctx.numbers = size, stride, padding, dilation, groups


def _conv_backward(ctx, grad: Tensor):
    x, weight, index, count, output = ctx.saved_tensors
    size, stride, padding, dilation, groups = ctx.numbers
    active = reference.mask_from_sites(index, count, size[0], size[1])
    if output is not None:
        active = active & (output > 0)
    grad = torch.where(active, grad, torch.zeros((), dtype=grad.dtype, device=grad.device))
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[1], ctx.has_bias and needs[2]]
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups, wanted
    )
    grad_residual = grad if ctx.has_residual and needs[10] else None
    return (
        grad_x,
        grad_weight,
        grad_bias,
        None,
        None,
        None,
        None,
        None,
        None,
        None,
        grad_residual,
        None,
    )


torch.library.register_autograd(
    "sparsight::sampled_conv2d", _conv_backward, setup_context=_conv_setup, lib=LIBRARY
)


def sampled_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    sites: Sites,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    activation: Literal["none", "relu"] = "none",
) -> Tensor:
    """Convolution at the sites, zero elsewhere.

    Args:
        x: (B, C, H, W) floating point; channels-last is read in place, other layouts are copied.
        weight: (O, C/groups, kh, kw), the dtype and device of `x`.
        bias: (O,), or None.
        sites: from `sites_from_mask`, at the output resolution.
        stride: step, an integer or (vertical, horizontal).
        padding: zeros on each side, likewise.
        dilation: distance between taps, likewise.
        groups: channel groups; `groups == C` is depthwise.
        residual: (B, O, Ho, Wo) added at the sites before the activation, or None.
        activation: "none" or "relu".

    Returns:
        (B, O, Ho, Wo) channels-last, the dtype of `x`.

    Raises:
        TypeError: dtypes differ or are not floating point.
        ValueError: ranks, channels, devices or the resolution of the sites do not fit.

    Cost: share of active sites times the MACs of the dense convolution. float32 on the CPU runs the
    compiled kernel (scalar, AVX2 or AVX-512); other dtypes and devices run `ops.reference`.

    Gradient: with respect to x, weight, bias and residual; zero from positions off the sites.

    Example:
        >>> import torch
        >>> from sparsight.ops import sampled_conv2d, sites_from_mask
        >>> x = torch.ones(1, 2, 3, 3)
        >>> mask = torch.eye(3, dtype=torch.bool).view(1, 1, 3, 3)
        >>> sampled_conv2d(x, torch.ones(1, 2, 1, 1), sites=sites_from_mask(mask)).sum()
        tensor(6.)

    Source: the operation of Xie et al., ECCV 2020 (arXiv 2003.08866), section 3; the indirect GEMM
    is Dukhan, 2019 (arXiv 1907.02129).
    """
    step, pad, dilate, size = check_convolution(
        "sampled_conv2d",
        x,
        weight,
        bias,
        sites=sites,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        residual=residual,
        activation=activation,
    )
    return torch.ops.sparsight.sampled_conv2d(
        x,
        weight,
        bias,
        sites.index,
        sites.count,
        list(size),
        list(step),
        list(pad),
        list(dilate),
        groups,
        residual,
        activation == "relu",
    )
