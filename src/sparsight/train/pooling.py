"""Which pooling a model is trained with, in plain values."""

from __future__ import annotations

from typing import Literal

from torch import nn

from sparsight.convert import replace_pooling

PoolingKind = Literal["own", "max", "average", "soft"]


def apply_pooling(dense: nn.Module, kind: PoolingKind, *, pools_strides: bool) -> nn.Module:
    """Return `dense` itself for "own", else a copy of it with poolings of another kind.

    Args:
        dense: any model that `sparsight.convert.replace_pooling` converts; the global pooling
            before a classifier stays.
        kind: "max", "average" or "soft"; "own" for what the model was written with.
        pools_strides: a convolution that steps becomes one of stride 1 with a pooling behind it.

    Raises:
        ValueError: `pools_strides` without a kind.
        ConversionError: the model has nothing to replace, or all of it is of that kind already.
    """
    if kind != "own":
        return replace_pooling(dense, kind=kind, strided_convolutions=pools_strides)
    if pools_strides:
        raise ValueError(
            "apply_pooling: pools_strides=True came with pooling='own'; the pooling that takes the "
            "place of the strides is required; pass --pooling max, average or soft."
        )
    return dense
