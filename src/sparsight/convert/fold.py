"""Batch norms into the dense convolutions before them, where the data flow shows it safe."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparsight.nn.frozen_block import fold_norm

__all__ = ["fold_norms"]

_TAG = "_sparsight_producer"


def _is_norm(module: nn.Module) -> bool:
    return type(module) is nn.BatchNorm2d or (
        type(module).__name__ == "FrozenBatchNorm2d" and hasattr(module, "running_mean")
    )


class _Consumers(TorchDispatchMode):
    """Counts, for every tagged tensor, the operations that read it inside and outside a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm: str | None = None
        self.readers: dict[str, set[str | None]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in args:
            if isinstance(value, Tensor) and hasattr(value, _TAG):
                self.readers.setdefault(getattr(value, _TAG), set()).add(self.norm)
        return func(*args, **(kwargs or {}))


@contextmanager
def _observed(model: nn.Module, consumers: _Consumers) -> Iterator[dict[str, int]]:
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
            consumers.norm = name

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        consumers.norm = None

    try:
        for name, module in model.named_modules():
            if type(module) is nn.Conv2d:
                handles.append(module.register_forward_hook(tag(name)))
            elif _is_norm(module):
                handles.append(module.register_forward_pre_hook(enter(name)))
                handles.append(module.register_forward_hook(leave))
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def fold_norms(model: nn.Module, example: Any) -> list[tuple[str, str]]:
    """Fold, in place, every batch norm that alone reads the output of a dense convolution.

    The model is run once on `example` in eval mode, and the operations that read each convolution's
    output are seen one by one, also those that no module stands for: a convolution whose output
    goes anywhere besides one norm is left as it is, and so is one that runs more than once per
    call.

    Args:
        model: in eval mode, with the sampled layers still unfrozen; changed.
        example: what the model takes as its one argument.

    Returns:
        The folded pairs, (name of the convolution, name of the norm).
    """
    consumers = _Consumers()
    with torch.no_grad(), _observed(model, consumers) as calls, consumers:
        model(example)
    folded = []
    for conv_name, readers in consumers.readers.items():
        if len(readers) != 1 or None in readers or calls[conv_name] != 1:
            continue
        (norm_name,) = readers
        assert norm_name is not None
        if calls[norm_name] != 1:
            continue
        conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d)
        weight, bias = fold_norm(conv.weight, conv.bias, norm)
        conv.weight = nn.Parameter(weight, requires_grad=False)
        conv.bias = nn.Parameter(bias, requires_grad=False)
        parent, _, child = norm_name.rpartition(".")
        model.get_submodule(parent)._modules[child] = nn.Identity().eval()
        folded.append((conv_name, norm_name))
    return folded
