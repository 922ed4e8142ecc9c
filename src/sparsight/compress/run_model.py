"""Running a model to look at it: with any example, a copy to trace, hooks that go away again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import Tensor, nn

from sparsight.compress.narrow import is_convolution

__all__ = [
    "call_with",
    "channel_dim",
    "has_channels",
    "hooked",
    "input_channels",
    "tensors_in",
    "traceable_copy",
]


def traceable_copy(model: nn.Module) -> nn.Module:
    """Return a copy whose parameters all take part in autograd; gradients are not copied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        learns = parameter.is_floating_point() or parameter.is_complex()
        memo[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=learns)
    return copy.deepcopy(model, memo)


def call_with(model: nn.Module, example: Any) -> Any:
    """Call a model with an example, as `find_channel_groups` takes it."""
    if isinstance(example, tuple):
        return model(*example)
    return model(**example) if isinstance(example, dict) else model(example)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from chain.from_iterable(map(tensors_in, value.values()))
    elif isinstance(value, list | tuple):
        yield from chain.from_iterable(map(tensors_in, value))


def has_channels(module: nn.Module) -> bool:
    """Whether it is a convolution or a linear layer."""
    return is_convolution(module) or isinstance(module, nn.Linear)


@contextmanager
def hooked(
    model: nn.Module, which: Callable[[nn.Module], bool], hook: Callable[[str], Callable[..., Any]]
) -> Iterator[None]:
    """Have hook(name) called after the forward of every module of one kind, in a `with` block."""
    handles = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if which(module)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def channel_dim(module: nn.Module, value: Tensor) -> int:
    """Return the dimension of channels in the input or output of a layer."""
    layer: Any = module
    return value.ndim - 1 - (0 if isinstance(module, nn.Linear) else len(layer.kernel_size))


def input_channels(module: nn.Module, value: Tensor) -> Tensor:
    """Return the input of a convolution or linear layer as (channels, positions and images)."""
    return value.movedim(channel_dim(module, value), 0).flatten(1)
