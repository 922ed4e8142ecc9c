"""A batch norm, a ReLU and the fill of its holes in one step of training: less is kept of it.

Apart, the fill keeps its input for the backward pass, a whole map more than a dense network has.
But the batch norm keeps its own input anyway, and is cheap to compute again.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsight.ops.interpolate import as_computed, interpolate


class _NormalisedFill(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mask: Tensor,
        log_kernel: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        settings: tuple[bool, float, float, bool, float | None],
    ) -> Tensor:
        training, momentum, norm_eps, relu, eps = settings
        normalised, mean, inverse_std = torch.native_batch_norm(
            x, weight, bias, running_mean, running_var, training, momentum, norm_eps
        )
        ctx.settings = settings
        # Statistics that are constants are needed again; those of the batch are in mean and
        # inverse_std, and running ones change with the next batch.
        constants = () if training else (running_mean, running_var)
        ctx.save_for_backward(x, weight, bias, mask, log_kernel, mean, inverse_std, *constants)
        return interpolate(normalised.relu_() if relu else normalised, mask, log_kernel, eps=eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        training, _, norm_eps, relu, eps = ctx.settings
        x, weight, bias, mask, log_kernel, mean, inverse_std, *constants = ctx.saved_tensors
        running_mean, running_var = constants or (None, None)
        normalised, *_ = torch.native_batch_norm(
            x, weight, bias, running_mean, running_var, training, 0.0, norm_eps
        )
        if relu:
            normalised.relu_()
        computed_in, soft, kernel = as_computed(normalised, mask, log_kernel)
        grad_map, grad_mask, grad_kernel = torch.ops.sparsight.interpolate_backward(
            grad.to(computed_in), normalised.to(computed_in), soft, kernel, eps
        )
        grad_map = grad_map.to(x.dtype)
        if relu:
            grad_map = torch.ops.aten.threshold_backward(grad_map, normalised, 0)
        needed = list(ctx.needs_input_grad[:3])
        grads = torch.ops.aten.native_batch_norm_backward(
            grad_map,
            x,
            weight,
            running_mean,
            running_var,
            mean,
            inverse_std,
            training,
            norm_eps,
            needed,
        )
        grad_mask = grad_mask.to(mask.dtype) if ctx.needs_input_grad[3] else None
        return (*grads, grad_mask, grad_kernel.to(log_kernel.dtype), None, None, None)


def normalised_fill(
    x: Tensor,
    mask: Tensor,
    log_kernel: Tensor,
    *,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float = 0.1,
    norm_eps: float = 1e-5,
    relu: bool,
    eps: float | None = None,
) -> Tensor:
    """Return ``interpolate(relu(batch_norm(x)), mask, log_kernel, eps=eps)``, bit for bit.

    For the backward pass `x` is kept, and neither the normalised map nor its ReLU: they are
    computed again.

    Args:
        x: (B, C, H, W) float, the output of a convolution; not written to.
        mask: as for `interpolate`.
        log_kernel: as for `interpolate`.
        weight: (C,) of the norm.
        bias: (C,) of the norm.
        running_mean: (C,) of the norm; in training it is moved towards that of `x`.
        running_var: as `running_mean`.
        training: normalise by the statistics of `x`, not by the running ones.
        momentum: of the running statistics.
        norm_eps: added to the variance.
        relu: whether a ReLU follows the norm.
        eps: of `interpolate`.

    Returns:
        (B, C, H, W) channels-last.

    Cost: a batch norm and a ReLU more in the backward pass, for one map less in memory until then.

    Gradient: with respect to x, weight, bias, a float mask, and log_kernel; once.
    """
    settings = (training, momentum, norm_eps, relu, eps)
    if not torch.is_grad_enabled():
        normalised = F.batch_norm(
            x, running_mean, running_var, weight, bias, training, momentum, norm_eps
        )
        return interpolate(F.relu(normalised) if relu else normalised, mask, log_kernel, eps=eps)
    return _NormalisedFill.apply(
        x, weight, bias, mask, log_kernel, running_mean, running_var, settings
    )
