"""How much a small error in a layer's output moves what the whole network returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsight.compress.narrow import is_convolution

__all__ = ["output_sensitivity"]


def output_sensitivity(
    model: nn.Module, batches: Iterable[Any], names: Iterable[str], *, seed: int
) -> dict[str, Tensor] | None:
    """Return what a squared error of one in each output of some layers costs in the model's output.

    To first order an error e of a layer moves the model's output by J e. Its expected square, over
    images and positions, is estimated by the gradient of a random projection of the output: no
    labels and no loss are needed, and channels that nothing behind them listens to count for
    little.

    Args:
        model: in eval mode; no gradients are left on it.
        batches: what it takes as its one argument.
        names: of the layers, convolutions or linear ones.
        seed: of the projections.

    Returns:
        For every layer (O,) float64, for one image, summed over positions; the variance of each
        output of the model counts as one. None if the model's outputs do not depend differentiably
        on one of the layers, as a detector's in eval mode may not.

    Cost: a forward and a backward pass over the batches.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = set(names)
    squares: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, out: Tensor) -> None:
            def accumulate(gradient: Tensor) -> None:
                channel = 1 if is_convolution(module) else -1
                rows = gradient.detach().movedim(channel, -1).flatten(0, -2).double()
                squares[name] = squares.get(name, 0) + rows.square().sum(0).cpu()

            if out.requires_grad:
                out.register_hook(accumulate)

        return hook

    num_images = 0
    with ExitStack() as hooks, torch.enable_grad():
        for name, module in model.named_modules():
            if name in wanted:
                hooks.callback(module.register_forward_hook(watch(name)).remove)
        for batch in batches:
            num_images += len(batch)
            sources = pytree.tree_map_only(
                Tensor, lambda image: image.detach().clone().requires_grad_(), batch
            )
            outputs = [
                leaf
                for leaf in pytree.tree_leaves(model(sources))
                if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.numel() > 1
            ]
            if not outputs:
                return None
            projected = torch.zeros(())
            for leaf in outputs:
                signs = torch.randn(leaf.shape, generator=generator).to(leaf)
                projected = projected + (signs * leaf).sum() / leaf.detach().std().clamp_min(1e-12)
            torch.autograd.grad(projected, pytree.tree_leaves(sources), allow_unused=True)
    if wanted - squares.keys():
        return None
    return {name: total / num_images for name, total in squares.items()}
