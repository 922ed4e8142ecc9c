"""Street scenes drawn on the spot: no download, seeded, with class maps and boxes.

A scene is smooth where sampling may save (sky, road) and busy where it must not (facades with
windows, cars, people, poles), so that a sampling mask has something to find.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from sparsight.train.data.augment import mix_seed

CLASSES = ("Sky", "Building", "Road", "Pole", "Car", "Pedestrian")
SKY, BUILDING, ROAD, POLE, CAR, PEDESTRIAN = range(len(CLASSES))
IGNORE_INDEX = 255


@dataclass(frozen=True)
class Scene:
    """One drawn scene.

    Attributes:
        image: uint8 (3, H, W), RGB.
        class_map: int64 (H, W), values index `CLASSES`.
        boxes: float32 (N, 4), x0 y0 x1 y1 in pixels, of cars and pedestrians, nearest last.
        labels: int64 (N,), class of each box.
        instance_map: int64 (H, W), 1 plus the place in `boxes` of the object that is seen at each
            pixel; 0 where there is none.
    """

    image: Tensor
    class_map: Tensor
    boxes: Tensor
    labels: Tensor
    instance_map: Tensor


def draw_scene(size: tuple[int, int], *, seed: int) -> Scene:
    """Return a street scene; the same seed gives the same scene on any machine.

    Args:
        size: (height, width) in pixels, at least 16 each.
        seed: any integer.

    Raises:
        ValueError: a side below 16 pixels.
    """
    height, width = size
    if min(size) < 16:
        raise ValueError(
            f"draw_scene: size={size}; at least 16 pixels a side are required to hold the "
            "objects; ask for more."
        )
    rng = np.random.default_rng(mix_seed(seed))
    canvas = np.zeros((height, width, 3), dtype=np.float32)
    labels = np.zeros((height, width), dtype=np.int64)
    horizon = int(height * rng.uniform(0.45, 0.6))

    ramp = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    sky = np.array(
        [rng.uniform(90, 150), rng.uniform(140, 190), rng.uniform(200, 250)], dtype=np.float32
    )
    canvas[:] = sky + 60 * ramp
    road = rng.uniform(70, 110)
    canvas[horizon:] = road + 25 * (ramp[horizon:] - 0.5)
    labels[horizon:] = ROAD
    _draw_facades(canvas, labels, horizon, rng)
    _draw_poles(canvas, labels, horizon, rng)
    instances = np.zeros_like(labels)
    boxes, box_labels = _draw_objects(canvas, labels, instances, horizon, rng)

    canvas += rng.normal(0, 3, canvas.shape).astype(np.float32)  # sensor noise
    image = np.clip(canvas, 0, 255).astype(np.uint8)
    return Scene(
        image=torch.from_numpy(image).permute(2, 0, 1).contiguous(),
        class_map=torch.from_numpy(labels),
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor(box_labels, dtype=torch.int64),
        instance_map=torch.from_numpy(instances),
    )


def _draw_facades(
    canvas: np.ndarray, labels: np.ndarray, horizon: int, rng: np.random.Generator
) -> None:
    height, width = labels.shape
    left = 0
    while left < width:
        right = min(width, left + int(width * rng.uniform(0.12, 0.35)) + 2)
        if rng.random() < 0.75:
            top = int(horizon * rng.uniform(0.1, 0.75))
            colour = rng.uniform(60, 200, 3)
            canvas[top:horizon, left:right] = colour
            step = max(4, height // 16)
            window = colour * rng.uniform(0.3, 0.6)
            for y in range(top + 2, horizon - step // 2, step):
                for x in range(left + 2, right - step // 2, step):
                    canvas[y : y + step // 2, x : x + step // 2] = window + rng.uniform(0, 60)
            labels[top:horizon, left:right] = BUILDING
        left = right


def _draw_poles(
    canvas: np.ndarray, labels: np.ndarray, horizon: int, rng: np.random.Generator
) -> None:
    height, width = labels.shape
    thickness = max(1, width // 80)
    for _ in range(int(rng.integers(1, 4))):
        x = int(rng.integers(0, width - thickness))
        top = int(horizon * rng.uniform(0.1, 0.5))
        foot = min(height, horizon + int(height * rng.uniform(0.02, 0.12)) + 1)
        canvas[top:foot, x : x + thickness] = rng.uniform(30, 70)
        labels[top:foot, x : x + thickness] = POLE


def _draw_objects(
    canvas: np.ndarray,
    labels: np.ndarray,
    instances: np.ndarray,
    horizon: int,
    rng: np.random.Generator,
) -> tuple[list[tuple[int, int, int, int]], list[int]]:
    height, width = labels.shape
    boxes: list[tuple[int, int, int, int]] = []
    box_labels: list[int] = []
    feet = np.sort(
        rng.uniform(0.15, 0.95, int(rng.integers(3, 7)))
    )  # far ones first: near ones cover them
    for depth in feet:
        bottom = horizon + int((height - horizon) * depth)
        kind = CAR if rng.random() < 0.6 else PEDESTRIAN
        tall = max(4, int(height * (0.05 + 0.22 * depth)))
        box_height = tall if kind == PEDESTRIAN else max(4, int(0.7 * tall))
        box_width = max(2, int(0.35 * tall)) if kind == PEDESTRIAN else max(6, int(1.5 * tall))
        left = int(rng.integers(0, max(1, width - box_width)))
        top = max(0, bottom - box_height)
        right, bottom = min(width, left + box_width), min(height, bottom)
        ys, xs = np.mgrid[top:bottom, left:right]
        v = (ys - top + 0.5) / (bottom - top)
        u = (xs - left + 0.5) / (right - left)
        colour = rng.uniform(20, 255, 3)
        if kind == CAR:
            body = (v > 0.45) | (np.abs(u - 0.5) < 0.32)
            glass = (v > 0.08) & (v < 0.4) & (np.abs(u - 0.5) < 0.26)
            wheel = (v > 0.8) & (np.abs(np.abs(u - 0.5) - 0.3) < 0.1)
        else:
            body = ((v > 0.22) & (np.abs(u - 0.5) < 0.42)) | (
                np.hypot(u - 0.5, (v - 0.11) * 2.6) < 0.3
            )
            glass = (v > 0.6) & (np.abs(u - 0.5) < 0.08)
            wheel = np.zeros_like(body)
        region = (slice(top, bottom), slice(left, right))
        patch = canvas[region]
        patch[body] = colour + 35 * (0.5 - v[body])[:, None]
        patch[glass & body] = 0.4 * colour + 60
        patch[wheel & body] = 25
        labels[region][body] = kind
        instances[region][body] = len(boxes) + 1
        boxes.append((left, top, right, bottom))
        box_labels.append(kind)
    return boxes, box_labels


class SyntheticScenes(Dataset[tuple[tv_tensors.Image, tv_tensors.Mask]]):
    """A fixed number of drawn street scenes, as a segmentation dataset.

    Args:
        length: number of scenes.
        size: (height, width) in pixels, at least 16 each.
        seed: scene i of seed s is always the same; different seeds share no scene.

    An item is `(image, class map)`: uint8 (3, H, W) and int64 (H, W). `scene(index)` adds the
    boxes.
    """

    classes = CLASSES
    ignore_index = IGNORE_INDEX

    def __init__(self, length: int, *, size: tuple[int, int] = (128, 192), seed: int = 0) -> None:
        self.length = length
        self.size = size
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def scene(self, index: int) -> Scene:
        """Return scene `index` with its boxes; IndexError outside 0 to length - 1."""
        if not 0 <= index < self.length:
            raise IndexError(
                f"SyntheticScenes: index {index} of {self.length} scenes; 0 to {self.length - 1} "
                "is required; ask for a longer dataset."
            )
        return draw_scene(self.size, seed=mix_seed(self.seed, index))

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        scene = self.scene(index)
        return tv_tensors.Image(scene.image), tv_tensors.Mask(scene.class_map)
