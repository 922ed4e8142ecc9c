"""`interpolate`: keep the sites, fill the holes from the sites around them."""

import torch
from torch import Tensor

from sparsight.ops import cpu, reference
from sparsight.ops.operators import LIBRARY

LIBRARY.define("interpolate(Tensor features, Tensor mask, Tensor log_kernel, float? eps) -> Tensor")
LIBRARY.define(
    "interpolate_backward(Tensor grad, Tensor features, Tensor mask, Tensor log_kernel, float? "
    "eps) -> (Tensor, Tensor, Tensor)"
)


def _has_kernel(features: Tensor, mask: Tensor, log_kernel: Tensor) -> bool:
    # Bfloat16 is what training in mixed precision has; at inference the fill is part of a block.
    is_narrow = features.dtype == torch.bfloat16 and mask.dtype == torch.float32
    return (
        (features.dtype == torch.float32 or (is_narrow and cpu.has_bfloat16()))
        and log_kernel.dtype == torch.float32
        and log_kernel.shape[0] <= cpu.MAX_WINDOW
    )


@torch.library.impl(LIBRARY, "interpolate", "CompositeExplicitAutograd")
def _interpolate_any(
    features: Tensor, mask: Tensor, log_kernel: Tensor, eps: float | None
) -> Tensor:
    y = reference.interpolate(features, mask, log_kernel, eps)
    return y.contiguous(memory_format=torch.channels_last)


@torch.library.impl(LIBRARY, "interpolate", "CPU")
def _interpolate_cpu(
    features: Tensor, mask: Tensor, log_kernel: Tensor, eps: float | None
) -> Tensor:
    if not _has_kernel(features, mask, log_kernel):
        return _interpolate_any(features, mask, log_kernel, eps)
    return cpu.interpolate(features, mask, log_kernel, eps)


@torch.library.register_fake("sparsight::interpolate", lib=LIBRARY)
def _interpolate_fake(
    features: Tensor, mask: Tensor, log_kernel: Tensor, eps: float | None
) -> Tensor:
    return torch.empty_like(features).contiguous(memory_format=torch.channels_last)


@torch.library.impl(LIBRARY, "interpolate_backward", "CompositeExplicitAutograd")
def _backward_any(
    grad: Tensor, features: Tensor, mask: Tensor, log_kernel: Tensor, eps: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    grad_features, grad_mask, grad_kernel = reference.interpolate_backward(
        grad, features, mask, log_kernel, eps
    )
    return grad_features.contiguous(memory_format=torch.channels_last), grad_mask, grad_kernel


@torch.library.impl(LIBRARY, "interpolate_backward", "CPU")
def _backward_cpu(
    grad: Tensor, features: Tensor, mask: Tensor, log_kernel: Tensor, eps: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    if not _has_kernel(features, mask, log_kernel):
        return _backward_any(grad, features, mask, log_kernel, eps)
    return cpu.interpolate_backward(grad, features, mask, log_kernel, eps)


@torch.library.register_fake("sparsight::interpolate_backward", lib=LIBRARY)
def _backward_fake(
    grad: Tensor, features: Tensor, mask: Tensor, log_kernel: Tensor, eps: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    hard = mask.dtype == torch.bool
    return (
        torch.empty_like(features).contiguous(memory_format=torch.channels_last),
        features.new_empty(()) if hard else torch.empty_like(mask).contiguous(),
        torch.empty_like(log_kernel).contiguous(),
    )


def _setup(ctx, inputs, output) -> None:
    features, mask, log_kernel, eps = inputs
    ctx.save_for_backward(features, mask, log_kernel)
    ctx.eps = eps


def _backward(ctx, grad: Tensor):
    features, mask, log_kernel = ctx.saved_tensors
    grad_features, grad_mask, grad_kernel = torch.ops.sparsight.interpolate_backward(
        grad, features, mask, log_kernel, ctx.eps
    )
    return grad_features, grad_mask if ctx.needs_input_grad[1] else None, grad_kernel, None


torch.library.register_autograd(
    "sparsight::interpolate", _backward, setup_context=_setup, lib=LIBRARY
)


def interpolate(
    features: Tensor, mask: Tensor, log_kernel: Tensor, *, eps: float | None = None
) -> Tensor:
    """Keep the features at the sites, fill the holes with a weighted mean of the sites around.

    mask * features + (1 - mask) * I,  I_p = sum_q K(p-q) M_q Y_q / (sum_q K(p-q) M_q [+ eps]),
    q over the K x K window of p inside the map, K = exp(log_kernel).

    Args:
        features: (B, C, H, W) floating point. With a bool mask the values off the sites are never
            read.
        mask: (B, 1, H, W), bool (inference) or floating point in [0, 1] (training).
        log_kernel: (K, K), K odd: the logarithm of a non-negative kernel (-inf is a weight of
            zero).
        eps: None (default) divides exactly, in log space: the weights of a hole sum to one however
            small the kernel is, and a hole that sees no site is 0. A number is added to the
            denominator, as in the published code (1e-5): holes far from a site shrink to 0.

    Returns:
        (B, C, H, W) channels-last, the dtype of `features`; computed in float32 at least.

    Raises:
        TypeError: dtypes are not floating point (bool for the mask).
        ValueError: shapes or devices do not fit, the window is even, eps is not positive.

    Cost: at most K*K MACs per channel and hole. On the CPU a compiled float32 kernel runs, which
    skips weights below 2^-26 of the sum; with a float mask it reads and writes bfloat16 as it is,
    where the CPU has AVX-512 BF16, else half precision pays for a cast to float32 and back around
    it. float64, windows above 15 and other devices run `ops.reference`.

    Gradient: with respect to features, a float mask, and log_kernel.

    Example:
        >>> import torch
        >>> from sparsight.ops import interpolate
        >>> features = torch.tensor([4.0, 0.0, 8.0]).view(1, 1, 1, 3)
        >>> mask = torch.tensor([True, False, True]).view(1, 1, 1, 3)
        >>> interpolate(features, mask, torch.zeros(3, 3)).flatten()
        tensor([4., 6., 8.])

    Source: Xie et al., ECCV 2020 (arXiv 2003.08866), section 3.2. The division in log space is
        ours.
    """
    if features.ndim != 4:
        raise ValueError(
            f"interpolate: features have shape {tuple(features.shape)}; (B, C, H, W) is needed: "
            "add the batch dimension with unsqueeze(0)."
        )
    if not features.is_floating_point():
        raise TypeError(
            f"interpolate: features have dtype {features.dtype}; floating point is needed: "
            "call .float()."
        )
    batch, _, height, width = features.shape
    if mask.shape != (batch, 1, height, width):
        raise ValueError(
            f"interpolate: mask has shape {tuple(mask.shape)} but features have "
            f"{tuple(features.shape)}; {(batch, 1, height, width)} is needed: one "
            "channel at the resolution of the features."
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"interpolate: mask has dtype {mask.dtype}; bool or floating point is needed: "
            "threshold it, e.g. mask >= 0.5."
        )
    if (
        log_kernel.ndim != 2
        or log_kernel.shape[0] != log_kernel.shape[1]
        or log_kernel.shape[0] % 2 == 0
    ):
        raise ValueError(
            f"interpolate: log_kernel has shape {tuple(log_kernel.shape)}; (K, K) with K odd is "
            "needed: a window has a centre."
        )
    if not log_kernel.is_floating_point():
        raise TypeError(
            f"interpolate: log_kernel has dtype {log_kernel.dtype}; floating point is needed: call "
            ".float()."
        )
    if mask.device != features.device or log_kernel.device != features.device:
        raise ValueError(
            f"interpolate: features are on {features.device}, mask on {mask.device}, log_kernel on "
            f"{log_kernel.device}; one device is needed: move them together."
        )
    if eps is not None and not eps > 0:
        raise ValueError(
            f"interpolate: eps is {eps}; None or a positive number is needed: None is exact, 1e-5 "
            "is the published formula."
        )
    computed_in, mask, log_kernel = as_computed(features, mask, log_kernel)
    filled = torch.ops.sparsight.interpolate(features.to(computed_in), mask, log_kernel, eps)
    return filled.to(features.dtype)


def as_computed(
    features: Tensor, mask: Tensor, log_kernel: Tensor
) -> tuple[torch.dtype, Tensor, Tensor]:
    """Return the dtype in which features are filled, and mask and log_kernel as they are then."""
    # Half precision would lose the exponents: at least float32 inside, whatever autocast made.
    dtype = torch.promote_types(features.dtype, torch.float32)
    mask = mask if mask.dtype == torch.bool else mask.to(dtype)
    log_kernel = log_kernel.to(dtype)
    if features.device.type == "cpu" and _has_kernel(features, mask, log_kernel):
        dtype = features.dtype
    return dtype, mask, log_kernel
