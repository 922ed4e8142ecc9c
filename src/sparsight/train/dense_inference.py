"""A segmentation model over several scales, mirrored, or window by window; same contract.

Letters in shapes: B batch, H W height and width in pixels, K number of classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Averaged(nn.Module):
    """The mean of what a model says of an image at several sizes, and of its mirror images.

    Args:
        model: (B, 3, H, W) -> {"out": (B, K, H, W)}, logits.
        scales: factors on height and width, each above 0.
        flip: each scale also mirrored, left to right.

    Raises:
        ValueError: no scale, or one that is not above 0.
    """

    def __init__(self, model: nn.Module, *, scales: Sequence[float], flip: bool) -> None:
        super().__init__()
        if not scales or not all(scale > 0 for scale in scales):
            raise ValueError(
                f"Averaged: scales={tuple(scales)}; one or more factors above 0 are required; "
                "pass for example --scales 0.75,1,1.25, or leave it out."
            )
        self.model = model
        self.scales = tuple(scales)
        self.flip = flip

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Return `{"out": scores}`: logarithms of the mean probabilities.

        Args:
            image: (B, 3, H, W), normalised.

        Returns:
            (B, K, H, W) float32. What a single scale of 1 says is returned as it is.
        """
        if self.scales == (1.0,) and not self.flip:
            return self.model(image)
        height, width = image.shape[-2:]
        total: Tensor | None = None
        for scale in self.scales:
            size = (max(1, round(scale * height)), max(1, round(scale * width)))
            scaled = _resized(image, size)
            for is_mirrored in (False, True) if self.flip else (False,):
                shown = scaled.flip(3) if is_mirrored else scaled
                shown = shown.contiguous(memory_format=torch.channels_last)
                probability = self.model(shown)["out"].float().softmax(1)
                if is_mirrored:
                    probability = probability.flip(3)
                probability = _resized(probability, (height, width))
                total = probability if total is None else total.add_(probability)
        assert total is not None
        count = len(self.scales) * (2 if self.flip else 1)
        return {"out": _log(total / count)}

    def extra_repr(self) -> str:
        """The scales, for repr."""
        return f"scales={self.scales}, flip={self.flip}"


class Windowed(nn.Module):
    """A model on one window of the image after the other: memory is that of a window.

    Args:
        model: (B, 3, H, W) -> {"out": (B, K, H, W)}, logits.
        window: (height, width) in pixels. A side that the image does not have is the image's.
        overlap: pixels, at least, that neighbouring windows share. There each counts the less the
            nearer its border is.

    Raises:
        ValueError: an empty window, or an overlap that is negative or not below both its sides.
    """

    def __init__(self, model: nn.Module, *, window: tuple[int, int], overlap: int) -> None:
        super().__init__()
        if min(window) < 1 or not 0 <= overlap < min(window):
            raise ValueError(
                f"Windowed: window={window[0]}x{window[1]} with overlap={overlap}; sides of at "
                "least one pixel, and an overlap of at least 0 and below both, are required; pass "
                "for example --window 512x1024 --overlap 64."
            )
        self.model = model
        self.window = (window[0], window[1])
        self.overlap = overlap

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Return `{"out": scores}`: logarithms of the weighted mean probabilities.

        Args:
            image: (B, 3, H, W), normalised.

        Returns:
            (B, K, H, W) float32. What is said of an image no larger than the window is returned as
            it is.
        """
        height, width = image.shape[-2:]
        window = (min(self.window[0], height), min(self.window[1], width))
        if window == (height, width):
            return self.model(image)
        total: Any = None  # a tensor, once the number of classes is known
        weights = torch.zeros(height, width, device=image.device)
        tent = self._tent(window[0])[:, None] * self._tent(window[1])
        tent = tent.to(image.device)
        for top in _starts(height, window[0], self.overlap):
            for left in _starts(width, window[1], self.overlap):
                at = (..., slice(top, top + window[0]), slice(left, left + window[1]))
                shown = image[at].contiguous(memory_format=torch.channels_last)
                probability = self.model(shown)["out"].float().softmax(1)
                if total is None:
                    total = probability.new_zeros(*probability.shape[:2], height, width)
                total[at] += tent * probability
                weights[at] += tent
        return {"out": _log(total / weights)}

    def _tent(self, length: int) -> Tensor:
        """Weights along a side: 1 inside, falling towards both ends over the overlap."""
        to_end = torch.arange(1, length + 1).minimum(torch.arange(length, 0, -1))
        return (to_end / (self.overlap + 1)).clamp(max=1.0)

    def extra_repr(self) -> str:
        """The window, for repr."""
        return f"window={self.window}, overlap={self.overlap}"


def _starts(length: int, window: int, overlap: int) -> list[int]:
    """Where windows begin along a side: as few as cover it, evenly spread."""
    if length <= window:
        return [0]
    count = -(-(length - overlap) // (window - overlap))
    return [round(i * (length - window) / (count - 1)) for i in range(count)]


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(x.shape[-2:]) == size:
        return x
    is_smaller = size[0] < x.shape[-2]
    return F.interpolate(
        x, size=size, mode="bilinear", align_corners=False, antialias=is_smaller and x.shape[1] == 3
    )


def _log(probability: Tensor) -> Tensor:
    return probability.clamp(min=torch.finfo(probability.dtype).tiny).log()


@dataclass(frozen=True, kw_only=True)
class DenseInference:
    """How a segmentation model is run on an image; flags of `sparsight evaluate` and `predict`.

    Attributes:
        scales: factors on the size of the input, over which probabilities are averaged.
        flip: each also mirrored.
        window: (height, width) in pixels of the windows that a scaled image is cut into; None for
            the whole at once.
        overlap: of neighbouring windows, in pixels.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    window: tuple[int, int] | None = None
    overlap: int = 64

    @property
    def is_plain(self) -> bool:
        """Whether the model is run as it is."""
        return self.scales == (1.0,) and not self.flip and self.window is None

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return `model` itself, or a module of the same contract around it.

        Raises:
            ValueError: bad scales or windows, see `Averaged` and `Windowed`.
        """
        if self.window is not None:
            model = Windowed(model, window=self.window, overlap=self.overlap)
        if self.scales != (1.0,) or self.flip:
            model = Averaged(model, scales=self.scales, flip=self.flip)
        return model.eval()

    def example(self, image: Any) -> Any:
        """Return what the model inside is given at most: the image, or its first window."""
        if self.window is None:
            return image
        shown = image[..., : self.window[0], : self.window[1]]
        return shown.contiguous(memory_format=torch.channels_last)

    def check_task(self, caller: str, task: str) -> None:
        """Refuse to be used for anything but segmentation.

        Raises:
            ValueError: another task, and not plain.
        """
        if task != "segmentation" and not self.is_plain:
            raise ValueError(
                f"{caller}: {self} for {task}; scales, mirror images and windows are averaged for "
                "segmentation only; leave --scales, --flip and --window out."
            )

    def to_json(self) -> dict[str, Any]:
        """Return plain values for `json.dumps`."""
        return asdict(self)
