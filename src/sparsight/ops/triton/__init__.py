"""The GPU kernels, in Triton: what `ops` runs on CUDA tensors where Triton is installed.

Enters: tensors whose arguments have passed the public door of the op. Leaves: the same as `cpu`.
May import torch and triton, which is imported by the kernels' files only and never by this one;
nothing else of sparsight.
"""

import importlib.util

import torch
from torch import Tensor

__all__ = ["missing_for"]

_is_installed: bool | None = None
# By device: the query of its capability costs more than the rest of a call.
_capability: dict[torch.device, tuple[int, int]] = {}


def missing_for(x: Tensor) -> str | None:
    """Why the kernels cannot run on a CUDA tensor, or None where they can."""
    global _is_installed
    if _is_installed is None:
        _is_installed = importlib.util.find_spec("triton") is not None
    if not _is_installed:
        return "triton is not installed"
    capability = _capability.get(x.device)
    if capability is None:
        capability = _capability[x.device] = torch.cuda.get_device_capability(x.device)
    # What Triton itself supports; AMD's devices report 9 and more.
    least = (8, 0) if x.dtype == torch.bfloat16 else (7, 0)
    if capability < least:
        return (
            f"the GPU's compute capability is {capability[0]}.{capability[1]}, and Triton needs "
            f"{least[0]}.{least[1]} for {x.dtype}"
        )
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"there are no kernels for {x.dtype}"
    return None
