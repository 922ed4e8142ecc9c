"""A student's loss against its teacher, for any training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsight.compress.distillation import distillation_loss

__all__ = ["Distiller", "logits_in"]


def logits_in(output: Any) -> Tensor:
    """Return the logits in what a network returned: itself, or its "out".

    Raises:
        TypeError: neither a tensor nor a mapping with a tensor under "out", as torchvision's
            segmentation models return.
    """
    found = output.get("out") if isinstance(output, Mapping) else output
    if not isinstance(found, Tensor):
        raise TypeError(
            f"Distiller: the network returned a {type(output).__name__}; logits, or a mapping with "
            "logits under 'out', are required; pass logits_of, which finds them in it, or None to "
            "distil features alone."
        )
    return found


class Distiller(nn.Module):
    """Holds a teacher and gives the loss of its student."""

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        *,
        temperature: float = 4.0,
        alpha: float = 0.9,
        ignore_index: int = -100,
        logits_of: Callable[[Any], Tensor] = logits_in,
    ) -> None:
        super().__init__()
        # In a tuple: a child would be trained, saved, and set to training mode.
        self._teacher = (teacher.eval().requires_grad_(False),)
        self.temperature = temperature
        self.alpha = alpha
        self.ignore_index = ignore_index
        self.logits_of = logits_of

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        """Take the teacher along to another device."""
        self._teacher[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def loss(
        self,
        images: Tensor,
        output: Any,
        labels: Tensor | None = None,
        *,
        hard_loss: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of what the student made of `images`."""
        with torch.no_grad():
            taught = self.logits_of(self._teacher[0].eval()(images))
        soft = {"temperature": self.temperature, "ignore_index": self.ignore_index}
        logits = self.logits_of(output)
        if hard_loss is None:
            return distillation_loss(logits, taught, labels, alpha=self.alpha, **soft)
        divergence = distillation_loss(logits, taught, **soft)
        return self.alpha * divergence + (1 - self.alpha) * hard_loss
