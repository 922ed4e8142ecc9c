"""Images drawn on the spot whose class is the direction of their stripes."""

from __future__ import annotations

import math

import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors

from sparsight.train.data.augment import mix_seed


class SyntheticClasses(Dataset[tuple[tv_tensors.Image, int]]):
    """Noisy stripes: a task for tests and for trying a recipe without data.

    Args:
        length: number of images.
        size: (height, width) in pixels.
        num_classes: number of directions K, spread over half a turn. A mirrored image has another
            direction, so that flips mix classes up: fewer classes, fewer mix-ups.
        seed: of the drawing; item i is a function of (seed, i).

    An item is `(image, class)`: image uint8 (3, H, W), class i modulo K, an int.
    """

    def __init__(
        self, length: int, *, size: tuple[int, int], num_classes: int = 10, seed: int = 0
    ) -> None:
        self.length = length
        self.size = size
        self.classes = tuple(f"{180 * k // num_classes} degrees" for k in range(num_classes))
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, int]:
        if not 0 <= index < self.length:
            raise IndexError(
                f"SyntheticClasses: index {index} of {self.length} images; 0 to {self.length - 1} "
                "is required; ask for a longer dataset."
            )
        label = index % len(self.classes)
        generator = torch.Generator().manual_seed(mix_seed(self.seed, index))
        phase, contrast, *colour = torch.rand(5, generator=generator).tolist()
        rows = torch.arange(self.size[0], dtype=torch.float32)[:, None]
        columns = torch.arange(self.size[1], dtype=torch.float32)[None, :]
        angle = math.pi * label / len(self.classes)
        across = rows * math.cos(angle) + columns * math.sin(angle)
        stripes = torch.sin(across * (2 * math.pi / 6) + 2 * math.pi * phase)
        picture = stripes * (40 + 50 * contrast) + torch.tensor(colour)[:, None, None] * 60 + 98
        picture = picture + 8 * torch.randn(picture.shape, generator=generator)
        return tv_tensors.Image(picture.clamp(0, 255).byte()), label
