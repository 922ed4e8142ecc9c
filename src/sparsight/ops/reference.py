"""Every operator in plain aten: the truth for tests, the path for other devices and dtypes.

Shapes: B batch, C channels, H W input size, O output channels, Ho Wo output size, K window side.
Nothing here is fast; everything here is differentiable by autograd, in any float dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sites_from_mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    """List the active sites of each image, ascending, followed by its holes, ascending.

    Args:
        mask: (B, 1, Ho, Wo) bool.

    Returns:
        index (B, Ho*Wo) int32 of flat positions y*Wo + x, and count (B,) int32 of active sites.
    """
    flat = mask.flatten(1)
    order = torch.argsort(flat.logical_not().to(torch.uint8), dim=1, stable=True)
    return order.to(torch.int32), flat.sum(1, dtype=torch.int32)


def mask_from_sites(index: Tensor, count: Tensor, height: int, width: int) -> Tensor:
    """Invert `sites_from_mask`: (B, 1, Ho, Wo) bool."""
    rank = torch.arange(index.shape[1], device=index.device)
    active = rank[None, :] < count[:, None]
    mask = torch.zeros_like(active).scatter_(1, index.long(), active)
    return mask.view(-1, 1, height, width)


def sampled_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Convolve everywhere, keep the sites: what the kernels must equal.

    Args:
        x: (B, C, H, W) float.
        weight: (O, C/groups, kh, kw), same dtype.
        bias: (O,) or None.
        mask: (B, 1, Ho, Wo) bool.
        stride: vertical and horizontal step.
        padding: zero padding, vertical and horizontal.
        dilation: distance of the taps.
        groups: number of channel groups.
        residual: (B, O, Ho, Wo) added before the activation, or None.
        relu: clamp at zero from below.

    Returns:
        (B, O, Ho, Wo): the result at the sites, zero elsewhere.
    """
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if residual is not None:
        y = y + residual
    if relu:
        y = F.relu(y)
    return torch.where(mask, y, torch.zeros((), dtype=y.dtype, device=y.device))


def _window(x: Tensor, dy: int, dx: int, height: int, width: int) -> Tensor:
    """View of a padded map, moved by one tap."""
    return x[..., dy : dy + height, dx : dx + width]


def interpolate(features: Tensor, mask: Tensor, log_kernel: Tensor, eps: float | None) -> Tensor:
    """Keep the sites and fill the holes with the kernel-weighted mean of the sites in the window.

    mask * features + (1 - mask) * I, with I_p = sum_q K(p-q) M_q Y_q / (sum_q K(p-q) M_q [+ eps]).

    Args:
        features: (B, C, H, W) float.
        mask: (B, 1, H, W) bool, or float in [0, 1].
        log_kernel: (K, K) logarithm of a non-negative kernel, K odd.
        eps: None divides exactly, by a softmax over the window in log space, and gives 0 where no
            site is seen; a number is added to the denominator as in the published code.

    Returns:
        (B, C, H, W), the dtype of `features`.
    """
    size = log_kernel.shape[0]
    radius = size // 2
    height, width = features.shape[-2:]
    hard = mask.dtype == torch.bool
    soft = mask.to(features.dtype)
    values = torch.where(mask, features, 0.0) if hard else features
    # log 0 would give NaN gradients; tiny is exact zero weight next to any site.
    tiny = torch.finfo(features.dtype).tiny
    log_mask = torch.where(soft > 0, soft.clamp_min(tiny).log(), -torch.inf)
    padded_values = F.pad(values, (radius,) * 4)
    padded_log = F.pad(log_mask, (radius,) * 4, value=-torch.inf)
    logits = torch.stack(
        [
            _window(padded_log, dy, dx, height, width) + log_kernel[dy, dx]
            for dy in range(size)
            for dx in range(size)
        ]
    )  # (K*K, B, 1, H, W)
    if eps is None:
        shift = logits.amax(0).detach()
        shift = torch.where(torch.isfinite(shift), shift, 0.0)
        weights = torch.where(torch.isfinite(logits), (logits - shift).exp(), 0.0)
        total = weights.sum(0)
        total = torch.where(total > 0, total, 1.0)
    else:
        weights = torch.where(torch.isfinite(logits), logits.exp(), 0.0)
        total = weights.sum(0) + eps
    filled = torch.zeros_like(features)
    for tap in range(size * size):
        shifted = _window(padded_values, tap // size, tap % size, height, width)
        filled = filled + weights[tap] * shifted
    filled = filled / total
    if hard:
        return torch.where(mask, features, filled)
    return soft * features + (1 - soft) * filled


def interpolate_backward(
    grad: Tensor, features: Tensor, mask: Tensor, log_kernel: Tensor, eps: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `interpolate`, written out.

    With weights w_pq normalised over q, hole share h_p = 1 - M_p, and the slope
    s_pq = h_p g_p . (Y_q - I_p): dY_q = M_q g_q + sum_p h_p w_pq g_p, dlogK = sum_pq w_pq s_pq, and
    dM_q = g_q . (Y_q - I_q) + sum_p (w_pq / M_q) s_pq, where w_pq / M_q stays finite as M_q -> 0
    and is bounded by 2^80: beside a narrow kernel it would overflow, and inf times a vanishing
    factor is NaN.

    Args:
        grad: (B, C, H, W), the gradient of the result.
        features: as given to `interpolate`.
        mask: as given.
        log_kernel: as given.
        eps: as given.

    Returns:
        Gradients of features (B, C, H, W), of the mask (B, 1, H, W) (a scalar zero for a bool mask)
        and of log_kernel (K, K).
    """
    size = log_kernel.shape[0]
    radius = size // 2
    height, width = features.shape[-2:]
    hard = mask.dtype == torch.bool
    soft = mask.to(features.dtype)
    values = torch.where(mask, features, 0.0) if hard else features
    tiny = torch.finfo(features.dtype).tiny
    log_mask = torch.where(soft > 0, soft.clamp_min(tiny).log(), -torch.inf)
    padded_values = F.pad(values, (radius,) * 4)
    padded_log = F.pad(log_mask, (radius,) * 4, value=-torch.inf)
    taps = [(dy, dx) for dy in range(size) for dx in range(size)]
    logits = torch.stack(
        [_window(padded_log, dy, dx, height, width) + log_kernel[dy, dx] for dy, dx in taps]
    )
    if eps is None:
        shift = logits.amax(0)
        shift = torch.where(torch.isfinite(shift), shift, 0.0)
    else:
        shift = torch.zeros_like(logits[0])
    weights = torch.where(torch.isfinite(logits), (logits - shift).exp(), 0.0)
    total = weights.sum(0) + (0.0 if eps is None else eps)
    inverse = torch.where(total > 0, 1 / torch.where(total > 0, total, 1.0), 0.0)
    filled = torch.zeros_like(features)
    for tap, (dy, dx) in enumerate(taps):
        filled = filled + weights[tap] * inverse * _window(padded_values, dy, dx, height, width)
    hole = 1 - soft
    steepest = min(2.0**80, torch.finfo(features.dtype).max)
    through = (grad * filled).sum(1, keepdim=True)
    padded_grad_features = torch.zeros_like(padded_values)
    padded_grad_mask = torch.zeros_like(padded_log)
    grad_kernel = torch.zeros_like(log_kernel)
    for tap, (dy, dx) in enumerate(taps):
        seen = _window(padded_values, dy, dx, height, width)
        slope = hole * ((grad * seen).sum(1, keepdim=True) - through)
        weight = weights[tap] * inverse
        grad_kernel[dy, dx] = (weight * slope).sum()
        _window(padded_grad_features, dy, dx, height, width).add_(hole * weight * grad)
        unit = ((log_kernel[dy, dx] - shift).exp() * inverse).clamp_max(steepest)
        _window(padded_grad_mask, dy, dx, height, width).add_(unit * slope)
    inside = (
        slice(None),
        slice(None),
        slice(radius, radius + height),
        slice(radius, radius + width),
    )
    grad_features = padded_grad_features[inside]
    if hard:
        grad_features = torch.where(mask, grad_features + grad, 0.0)
        return grad_features, features.new_zeros(()), grad_kernel
    grad_mask = padded_grad_mask[inside] + (grad * features).sum(1, keepdim=True) - through
    return (grad_features + soft * grad).contiguous(), grad_mask.contiguous(), grad_kernel
