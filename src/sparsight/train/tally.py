"""What a model computes, added up over batches while something else looks at its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from sparsight.measure import MacCount, count_macs
from sparsight.nn import RecordedDecision, record_sampling


class ComputeTally:
    """Runs a model and adds up its multiply-adds and densities.

    Args:
        model: dense, converted or frozen, in eval mode.

    Attributes:
        num_images: so far.
        density: mean share of positions computed so far, per sampler, in the order they run; empty
            for a dense model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.num_images = 0
        self._is_sampled = any(hasattr(module, "samplers_named") for module in model.modules())
        self._dense = self._total = 0
        self._computed: dict[str, float] = {}

    def run(
        self, images: Tensor | Sequence[Tensor]
    ) -> tuple[Any, list[RecordedDecision], MacCount]:
        """Return what the model makes of a batch, what its samplers decided, and what that cost.

        Args:
            images: what the model takes: (B, C, H, W), or a list of B images.

        Cost: two passes, one of them inside `count_macs`.
        """
        with record_sampling(self.model) if self._is_sampled else nullcontext() as record:
            output = self.model(images)
        decisions = record.decisions if record else []
        sites: dict[str, list[int]] = {}  # computed, and there, over all calls of a sampler
        for decision in decisions:
            counts = sites.setdefault(decision.name, [0, 0])
            counts[0] += int(decision.mask.sum())
            counts[1] += decision.mask.numel()
        for name, (computed, there) in sites.items():
            share = computed / there * len(images)
            self._computed[name] = self._computed.get(name, 0.0) + share
        counted = count_macs(self.model, images)
        self._dense += counted.dense
        self._total += counted.total
        self.num_images += len(images)
        return output, decisions, counted

    def check(self, caller: str) -> None:
        """Refuse to have seen nothing.

        Raises:
            ValueError: no batch was run.
        """
        if self.num_images == 0:
            raise ValueError(
                f"{caller}: no batch arrived; at least one image is required; check the split of "
                "the data set."
            )

    @property
    def macs_dense(self) -> float:
        """Multiply-adds per image with all masks full."""
        return self._dense / self.num_images

    @property
    def macs_total(self) -> float:
        """Mean multiply-adds per image that ran, sampler heads and interpolation included."""
        return self._total / self.num_images

    @property
    def share(self) -> float:
        """What ran, of the dense multiply-adds."""
        return self._total / self._dense

    @property
    def density(self) -> dict[str, float]:
        """See the attributes of the class."""
        return {name: value / self.num_images for name, value in self._computed.items()}
