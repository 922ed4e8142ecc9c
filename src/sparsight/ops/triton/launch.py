"""How a kernel is launched: on how many programs, on which device, with offsets of which width."""

from typing import Any

import torch
import triton
from torch import Tensor

__all__ = ["is_int64", "launch"]

# Offsets beyond this are computed in int64; a tile may hang over the end.
MAX_INT32_OFFSET = 2**31 - 2**16


def is_int64(*tensors: Tensor) -> bool:
    """Whether an element lies too far from the first of its tensor for int32."""
    return max(max(_last_offset(x), x.numel()) for x in tensors) > MAX_INT32_OFFSET


def _last_offset(x: Tensor) -> int:
    return sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))


def launch(kernel: Any, count: int, block: int, *arguments: Any, **options: Any) -> None:
    """Run a kernel over `count` results, `block` a program, where its first argument lies."""
    if count > 0:
        with torch.cuda.device_of(arguments[0]):
            kernel[(triton.cdiv(count, block),)](*arguments, **options)
