"""Channels-last, for pictures and for clips."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def channels_last(batch: Tensor) -> Tensor:
    """Return (B, C, H, W) or (B, C, T, H, W), whose channels lie side by side in memory."""
    return batch.contiguous(memory_format=_FORMATS[batch.ndim])


def put_channels_last(model: nn.Module) -> None:
    """Lay the weights of 2-D and 3-D convolutions out so, in place.

    `model.to(memory_format=torch.channels_last)` refuses the 3-D ones.
    """
    for parameter in model.parameters():
        if parameter.ndim in _FORMATS:
            parameter.data = channels_last(parameter.data)
