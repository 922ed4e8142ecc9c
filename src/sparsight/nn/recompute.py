"""Less memory for more time: blocks that keep their inputs only, for the time of a `with` block."""

import functools
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from sparsight.nn.record import recording_paused

__all__ = ["recompute_activations"]


@contextmanager
def recompute_activations(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Let blocks keep only their inputs for the backward pass, which computes the rest again.

    What is called inside the `with` block is meant; its backward pass may come later. Gradients and
    buffers are those of ordinary training, bit for bit on the CPU: the second pass draws the same
    sampling noise, running statistics of batch norms see each batch once, and `record_sampling`
    lists each decision once. Calls without gradient are as ever.

    Args:
        blocks: modules whose calls are computed again, usually residual blocks, dense or sampled;
            none may hold another.

    Cost: one more forward pass of the blocks in each backward pass, about a third of a training
    step.

    Example:
        >>> import torch
        >>> block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sigmoid())
        >>> with recompute_activations([block]):
        ...     loss = block(torch.ones(1, 3, 2, 2)).sum()
        >>> loss.backward()
        >>> block[0].weight.grad.shape
        torch.Size([3, 3, 1, 1])

    Source: Chen, Xu, Zhang, Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016, arXiv
    1604.06174, by `torch.utils.checkpoint`.
    """
    with ExitStack() as stack:
        for block in blocks:
            forward = block.forward
            was_own = "forward" in vars(block)
            block.forward = functools.partial(_forward, block, forward)
            stack.callback(_restore, block, forward if was_own else None)
        yield


def _restore(block: nn.Module, forward: Any) -> None:
    if forward is None:
        del block.forward  # the class's shows through again
    else:
        block.forward = forward


def _forward(block: nn.Module, forward: Any, /, *args: Any, **keywords: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **keywords)
    return checkpoint(
        forward,
        *args,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _SecondPass(block)),
        **keywords,
    )


class _SecondPass:
    """The second of two passes of a block over the same batch; may be entered again and again."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __enter__(self) -> None:
        self.stack = ExitStack()
        self.stack.enter_context(recording_paused())
        for norm in self.block.modules():
            if not isinstance(norm, _BatchNorm) or not norm.training:
                continue
            # The statistics that this pass updates are copies, and are forgotten.
            for name, buffer in norm.named_buffers():
                setattr(norm, name, buffer.clone())
                self.stack.callback(setattr, norm, name, buffer)

    def __exit__(self, *_: Any) -> None:
        self.stack.close()
