"""Norms and activations into the dense convolutions before them, where that is seen to be safe."""

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparsight.convert.find import has_hooks
from sparsight.nn.frozen_block import fold_norm

__all__ = ["fold_norms", "fuse_pools", "fuse_relus"]

_TAG = "_sparsight_producer"


def _is_norm(module: nn.Module) -> bool:
    return type(module) is nn.BatchNorm2d or (
        type(module).__name__ == "FrozenBatchNorm2d" and hasattr(module, "running_mean")
    )


class _Consumers(TorchDispatchMode):
    """Counts, for every tagged tensor, the modules of interest that read it; None is elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.reader: str | None = None
        self.readers: dict[str, set[str | None]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in args:
            if isinstance(value, Tensor) and hasattr(value, _TAG):
                self.readers.setdefault(getattr(value, _TAG), set()).add(self.reader)
        return func(*args, **(kwargs or {}))


@contextmanager
def _observed(
    model: nn.Module, consumers: _Consumers, is_reader: Callable[[nn.Module], bool]
) -> Iterator[dict[str, int]]:
    calls: dict[str, int] = {}
    handles = []

    def tag(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1
            setattr(output, _TAG, name)

        return hook

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            consumers.reader = name

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        consumers.reader = None
        # An in-place activation returns the convolution's own tensor: it is another value now.
        if hasattr(output, _TAG):
            delattr(output, _TAG)

    try:
        for name, module in model.named_modules():
            # Somebody watches it: it is neither changed nor taken out.
            if has_hooks(module):
                continue
            if type(module) is nn.Conv2d:
                handles.append(module.register_forward_hook(tag(name)))
            elif is_reader(module):
                handles.append(module.register_forward_pre_hook(enter(name)))
                handles.append(module.register_forward_hook(leave))
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _sole_readers(
    model: nn.Module, example: Any, is_reader: Callable[[nn.Module], bool]
) -> list[tuple[str, str]]:
    """(convolution, reader) for every reader that alone reads it; both run once in the call.

    The operations that read each convolution's output are seen one by one, also those that no
    module stands for.
    """
    consumers = _Consumers()
    with torch.no_grad(), _observed(model, consumers, is_reader) as calls, consumers:
        model(example)
    pairs = []
    for conv_name, readers in consumers.readers.items():
        if len(readers) != 1 or None in readers or calls[conv_name] != 1:
            continue
        (reader,) = readers
        assert reader is not None
        if calls[reader] == 1:
            pairs.append((conv_name, reader))
    return pairs


def fold_norms(model: nn.Module, example: Any) -> list[tuple[str, str]]:
    """Fold, in place, every batch norm that alone reads the output of a dense convolution.

    The model is run once on `example` in eval mode to see what reads each convolution's output: one
    whose output goes anywhere besides one norm is left as it is, and so is one that runs more than
    once per call.

    Args:
        model: in eval mode, with the sampled layers still unfrozen; changed.
        example: what the model takes as its one argument.

    Returns:
        The folded pairs, (name of the convolution, name of the norm).
    """
    folded = _sole_readers(model, example, _is_norm)
    for conv_name, norm_name in folded:
        conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d)
        weight, bias = fold_norm(conv.weight, conv.bias, norm)
        conv.weight = nn.Parameter(weight, requires_grad=False)
        conv.bias = nn.Parameter(bias, requires_grad=False)
        _remove(model, norm_name)
    return folded


def fuse_relus(model: nn.Module, example: Any, *, among: Container[str] | None = None) -> list[str]:
    """Take out, in place, every `nn.ReLU` that alone reads the output of a dense convolution.

    Args:
        model: in eval mode, its norms folded; changed: it misses these activations afterwards.
        example: what the model takes as its one argument.
        among: names of the convolutions that can clamp in its stead; None means all.

    Returns:
        Names of the convolutions whose output is to be clamped in the ReLU's stead.
    """
    pairs = _sole_readers(model, example, lambda module: type(module) is nn.ReLU)
    pairs = [pair for pair in pairs if among is None or pair[0] in among]
    for _, relu_name in pairs:
        _remove(model, relu_name)
    return [conv_name for conv_name, _ in pairs]


def fuse_pools(
    model: nn.Module, example: Any, *, allowed: Callable[[str, nn.MaxPool2d], bool]
) -> dict[str, nn.MaxPool2d]:
    """Take out, in place, every `nn.MaxPool2d` that alone reads the output of a dense convolution.

    Args:
        model: in eval mode, its norms folded and its activations fused; changed: it misses these
            poolings afterwards.
        example: what the model takes as its one argument.
        allowed: whether the convolution of that name can pool in its stead.

    Returns:
        The pooling that was taken out, by the name of the convolution that is to do it.
    """
    pools = {}
    for conv_name, pool_name in _sole_readers(
        model, example, lambda module: type(module) is nn.MaxPool2d
    ):
        pool = model.get_submodule(pool_name)
        assert isinstance(pool, nn.MaxPool2d)
        if allowed(conv_name, pool):
            pools[conv_name] = pool
            _remove(model, pool_name)
    return pools


def _remove(model: nn.Module, name: str) -> None:
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = nn.Identity().eval()
