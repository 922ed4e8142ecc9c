"""Clips drawn on the spot whose class is where something moves; a single frame does not show it.

Letters in shapes: T frames, H W height and width in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from sparsight.train.data.augment import mix_seed

DIRECTIONS = ("E", "SE", "S", "SW", "W", "NW", "N", "NE")
_NUM_CLIPS = {"train": 2048, "val": 1024}
_SPLIT_SEEDS = {"train": 1, "val": 2}


class MovingShapes(Dataset[tuple[Tensor, int]]):
    """Grey clips of a textured shape that moves over a texture that moves otherwise.

    Shape and background are noise of the same statistics, on a torus: in a single frame the shape
    cannot be seen, and where it is says nothing. Of clips that differ in the class alone the first
    frames are equal. Class k moves at 45 degrees times k, from east over south, by 0.75 to 1.5
    pixels a frame; the background by up to 1 pixel a frame in a direction of its own; noise is
    added to each pixel of each frame.

    Args:
        split: "train" or "val"; other clips of the same kind.
        length: number of clips; default 2048 to train and 1024 to validate.
        size: (H, W) in pixels.
        num_frames: T.

    An item is `(clip, class)`: clip uint8 (1, T, H, W), class i modulo 8, an int. Item i is a
    function of (split, i, size, num_frames). The clips are drawn at once and held in memory, T*H*W
    bytes each: 17 MB for the 2048.
    """

    name = "moving_shapes"
    classes = DIRECTIONS

    def __init__(
        self,
        split: Literal["train", "val"],
        *,
        length: int | None = None,
        size: tuple[int, int] = (32, 32),
        num_frames: int = 8,
    ) -> None:
        count = _NUM_CLIPS[split] if length is None else length
        self.labels = [i % len(DIRECTIONS) for i in range(count)]
        seeds = [mix_seed(_SPLIT_SEEDS[split], i) for i in range(count)]
        self.clips = [
            draw_clip(label, size=size, num_frames=num_frames, seed=seed)
            for label, seed in zip(self.labels, seeds, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.clips[index], self.labels[index]


def draw_clip(label: int, *, size: tuple[int, int], num_frames: int, seed: int) -> Tensor:
    """Return a clip, uint8 (1, T, H, W), of a shape that moves in direction `label` of the eight.

    Args:
        label: 0 to 7, 45 degrees each: east, south-east, south, and so on.
        size: (H, W) in pixels, at least 16 each.
        num_frames: T.
        seed: decides everything else; the first frame does not depend on `label`.

    Raises:
        ValueError: another label, or too small a size.
    """
    if not 0 <= label < len(DIRECTIONS) or min(size) < 16:
        raise ValueError(
            f"draw_clip: label={label} and size={size[0]}x{size[1]}; a label of 0 to "
            f"{len(DIRECTIONS) - 1} and at least 16x16 pixels are required; the labels are "
            f"{', '.join(DIRECTIONS)}."
        )
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(6, generator=generator).tolist()
    side, shape, speed = 5.0 + 3.0 * draw[0], int(3 * draw[1]), 0.75 + 0.75 * draw[2]
    wind, wind_speed, contrast = 2 * math.pi * draw[3], draw[4], 30.0 + 20.0 * draw[5]
    textures = _textures(2, size, generator)
    middle = torch.rand(2, generator=generator) * torch.tensor(size)
    noise = 12.0 * torch.randn(num_frames, *size, generator=generator)

    time = torch.arange(num_frames, dtype=torch.float32)[:, None]  # (T, 1)
    heading = _heading(2 * math.pi * label / len(DIRECTIONS))
    path = time * speed * heading  # (T, 2): rows, columns
    inside = _shape(shape, side, _distance(middle + path, size))
    moved = _moved(textures[0], path)
    behind = _moved(textures[1], time * wind_speed * _heading(wind))
    clip = torch.lerp(behind, moved, inside) * contrast + noise + 127.5
    return clip.clamp(0, 255).byte()[None]


def _heading(angle: float) -> Tensor:
    """Rows and columns a step of length 1 leads over, from east over south."""
    return torch.tensor([math.sin(angle), math.cos(angle)])


def _textures(count: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Smooth noise without seams, of mean 0 and deviation 1: (count, H, W)."""
    noise = torch.randn(count, 1, *size, generator=generator)
    smooth = F.avg_pool2d(F.pad(noise, (1, 1, 1, 1), mode="circular"), 3, 1)[:, 0]
    return (smooth - smooth.mean((1, 2), True)) / smooth.std((1, 2), keepdim=True)


def _distance(middles: Tensor, size: tuple[int, int]) -> Tensor:
    """Rows and columns from the middle of each frame to each pixel, the short way: (T, 2, H, W)."""
    rows, columns = (torch.arange(n, dtype=torch.float32) for n in size)
    pixels = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
    extent = torch.tensor(size, dtype=torch.float32)[:, None, None]
    return (pixels - middles[:, :, None, None] + extent / 2).remainder(extent) - extent / 2


def _shape(kind: int, side: float, distance: Tensor) -> Tensor:
    """How much of each pixel a disc, square or diamond covers, in [0, 1]: (T, H, W)."""
    away = distance.abs()
    if kind == 0:
        reach = distance.square().sum(1).sqrt()
    elif kind == 1:
        reach = away.amax(1) * 1.1
    else:
        reach = away.sum(1) * 0.8
    return (side + 0.5 - reach).clamp(0, 1)


def _moved(texture: Tensor, path: Tensor) -> Tensor:
    """A texture (H, W) on a torus, moved along a path (T, 2), bilinearly: (T, H, W)."""
    whole = path.floor()
    part = (path - whole)[:, :, None, None]
    height, width = texture.shape
    rows = (torch.arange(height) - whole[:, :1].long()) % height  # (T, H)
    columns = (torch.arange(width) - whole[:, 1:].long()) % width  # (T, W)

    def at(row_back: int, column_back: int) -> Tensor:
        r, c = (rows - row_back) % height, (columns - column_back) % width
        return texture[r[:, :, None], c[:, None, :]]

    near = torch.lerp(at(0, 0), at(0, 1), part[:, 1])
    return torch.lerp(near, torch.lerp(at(1, 0), at(1, 1), part[:, 1]), part[:, 0])


def clip_transform() -> Callable[..., tuple[Tensor, Any]]:
    """Return normalisation, (clip uint8, class) -> (float32 of mean about 0 and spread 1, class).

    Without augmentation: a mirrored clip is of another class.
    """

    def transform(clip: Tensor, label: int) -> tuple[Tensor, int]:
        return (clip.float() - 127.5) / 45.0, label

    return transform
