"""What a frozen layer keeps of its samplers: noise, settings, and a place where hooks watch."""

import copy

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sparsight.nn.noise import NoiseKind, sampling_noise
from sparsight.nn.sampler import Sampler, SamplingDecision
from sparsight.ops import block as block_ops

__all__ = ["ComputedEverywhere", "FrozenSampler"]

_NUM_CACHED = 8


class ComputedEverywhere(nn.Module):
    """In the place of a sampler in a layer that is computed dense: nothing is decided any more."""

    def forward(
        self, mask: Bool[Tensor, "B 1 Ho Wo"], probability: Float[Tensor, "B 1 Ho Wo"]
    ) -> SamplingDecision:
        """What is computed, for hooks to see: all of it.

        Args:
            mask: (B, 1, Ho, Wo) bool, all true.
            probability: (B, 1, Ho, Wo) float32, all one.

        Returns:
            Both, as a SamplingDecision.
        """
        return SamplingDecision(mask, probability, None)


class FrozenSampler(nn.Module):
    """Where a frozen layer's decision can be watched, and the noise that it adds to the logits.

    The head itself is packed with the layer. forward is only called while a hook is registered.

    Args:
        sampler: the sampler that the decision comes from.
        inside: whether the layer's kernel evaluates the head; if not, a copy of `sampler` is
            run.

    Attributes:
        head: shape of the head that the layer's kernel evaluates, for `measure`; else None.
        seed: of the noise, where the kernel evaluates the head; may be set at any time between two
            calls, see `sparsight.nn.set_seed`.
    """

    kind: NoiseKind
    seed: int
    ranks: Tensor | None

    def __init__(self, sampler: nn.Module, *, inside: bool) -> None:
        super().__init__()
        self.inside = inside
        self.source = None if inside else copy.deepcopy(sampler)
        self.head: block_ops.StageShape | None = None
        if inside:
            assert isinstance(sampler, Sampler)
            self.kind = sampler.noise
            self.seed, self.layer = sampler.seed, sampler.layer
            self.grid_stride = sampler.grid_stride
            self.head = block_ops.StageShape(
                in_channels=sampler.head.in_channels,
                out_channels=1,
                groups=1,
                kernel_size=(3, 3),
                stride=(sampler.head.stride[0], sampler.head.stride[1]),
                padding=(1, 1),
                dilation=(1, 1),
                mask=0,
            )
            self.register_buffer("ranks", sampler.ranks, persistent=False)
        # Noise of the last few seeds and map sizes: a pure function of these, not state.
        self._noise: dict[tuple[int, int, int, int], Tensor] = {}

    def noise(self, batch: int, height: int, width: int) -> Float[Tensor, "B 1 Ho Wo"]:
        """What is added to the logits of a map of this size."""
        if torch.compiler.is_compiling():
            return self._draw(batch, height, width)
        key = (self.seed, batch, height, width)
        noise = self._noise.get(key)
        if noise is None:
            noise = self._draw(batch, height, width)
            # A new dict, not a changed one: other threads may be reading.
            kept = list(self._noise.items())[-(_NUM_CACHED - 1) :]
            self._noise = {**dict(kept), key: noise}
        return noise

    def _draw(self, batch: int, height: int, width: int) -> Tensor:
        return sampling_noise(
            self.kind,
            seed=self.seed,
            layer=self.layer,
            ranks=self.ranks,
            batch=batch,
            height=height,
            width=width,
            device=torch.device("cpu"),
        )

    def forward(
        self, mask: Bool[Tensor, "B 1 Ho Wo"], probability: Float[Tensor, "B 1 Ho Wo"]
    ) -> SamplingDecision:
        """The decision, for hooks to see.

        Args:
            mask: (B, 1, Ho, Wo) bool.
            probability: (B, 1, Ho, Wo) float32.

        Returns:
            Both, as a SamplingDecision.
        """
        return SamplingDecision(mask, probability, None)

    def extra_repr(self) -> str:
        """The source's settings, with the seed as it is now, for repr."""
        if self.source is not None:
            return self.source.extra_repr()
        return (
            f"noise={self.kind!r}, grid_stride={self.grid_stride}, seed={self.seed}, "
            f"layer={self.layer}"
        )
