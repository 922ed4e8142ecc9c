"""Random scale, crop and flip, drawn from (seed, epoch, index) and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import v2

# The statistics every torchvision classification weight was trained with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

Transform = Callable[..., Any]


def training_transform(
    size: tuple[int, int],
    *,
    ignore_index: int,
    scale: tuple[float, float] = (0.75, 1.75),
    crop: tuple[int, int] | None = None,
) -> Transform:
    """Return random scale, random crop, horizontal flip, normalisation.

    Args:
        size: (height, width) in pixels that the image is fitted into at scale 1, its aspect ratio
            kept.
        ignore_index: class of the pixels added where a small image had to be padded.
        scale: range of the factor on that, drawn uniformly.
        crop: (height, width) of what is cut out; None: `size`.

    Returns:
        A callable (image, class map) -> (float32 (3, *crop), int64 crop).
    """
    fill: dict[Any, Any] = {
        tv_tensors.Image: [round(255 * m) for m in MEAN],
        tv_tensors.Mask: ignore_index,
    }
    return v2.Compose(
        [
            _random_scale(size, scale),
            v2.RandomCrop(crop or size, pad_if_needed=True, fill=fill),
            v2.RandomHorizontalFlip(),
            *normalise(),
        ]
    )


def _random_scale(size: tuple[int, int], scale: tuple[float, float]) -> Transform:
    # Not v2.ScaleJitter, which divides the target's width by the image's height and the other way
    # round (torchvision 0.29): at 4:3 all scales came out as three quarters of what was asked for.
    resize = v2.functional.resize

    def transform(image: tv_tensors.Image, labels: tv_tensors.Mask) -> tuple[Any, Any]:
        height, width = image.shape[-2:]
        factor = float(torch.empty(()).uniform_(*scale)) * min(size[0] / height, size[1] / width)
        scaled = [max(1, round(factor * length)) for length in (height, width)]
        # The kind of tensor decides: bilinear for the image, the nearest class for the class map.
        return resize(image, scaled), resize(labels, scaled)

    return transform


def evaluation_transform(size: tuple[int, int]) -> Transform:
    """Return resizing of the image and normalisation; the class map keeps its own size.

    Scores are counted on the annotation as it was drawn, so runs at different sizes can be
    compared.

    Args:
        size: (height, width) of the image in pixels.
    """

    def transform(image: tv_tensors.Image, labels: tv_tensors.Mask) -> tuple[Any, Any]:
        return tv_tensors.Image(normalised_picture(image, size)), labels

    return transform


def normalised_picture(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return uint8 pixels (3, h, w) as what models take: float32 (3, *size), normalised."""
    resize = v2.Compose([v2.Resize(size, antialias=True), *normalise()])
    return resize(tv_tensors.Image(pixels)).as_subclass(torch.Tensor)


def normalise() -> list[Transform]:
    """Return the steps from a uint8 image to float32, normalised; annotations stay as they are."""
    return [
        v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
        v2.Normalize(MEAN, STD),
    ]


def image_only(steps: list[Transform]) -> Transform:
    """Return a transform of (image, class) pairs that sends the image through `steps`."""
    composed = v2.Compose(steps)

    def transform(image: tv_tensors.Image, label: int) -> tuple[Any, int]:
        return composed(image), label

    return transform


class SeededView(Dataset[Any]):
    """A dataset seen through a random transform that draws from (seed, epoch, index) only.

    Args:
        dataset: yields (image, annotation); a class map, a class, or a detector's target.
        transform: applied to the pair; may draw from torch's global generator.
        seed: first part of what decides the draws.

    Indexed by `(epoch, index)`, as `EpochSampler` yields it, or by `index` alone (epoch 0). The
    state of the global generator is the same before and after. Tensors come out plain, at any
    depth: a tv_tensor would drag its wrapping through the model.
    """

    def __init__(self, dataset: Dataset[Any], transform: Transform, *, seed: int = 0) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # torch's Dataset declares no __len__

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Any, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix_seed(self.seed, epoch, index))
            image, annotation = self.transform(*self.dataset[index])
        return _plain(image), _plain(annotation)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.as_subclass(torch.Tensor)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields `(epoch, index)` in an order that depends on (seed, epoch) only.

    The training loop calls `set_epoch` before each epoch (Lightning does so by itself). Of several
    processes each takes its part of every step: together they see, step by step and in the order
    of their ranks, what a single one with as many times the batch size sees.

    Args:
        length: number of items.
        seed: decides the order together with the epoch.
        batch_size: items that one process takes a step. Images that make no full step of all
            processes are left out, in another epoch others.
        rank: which of the processes this one is, from 0.
        num_processes: that share the items.
    """

    def __init__(
        self,
        length: int,
        *,
        seed: int = 0,
        batch_size: int = 1,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.length = length
        self.seed = seed
        self.batch_size = batch_size
        self.rank = rank
        self.num_processes = num_processes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // (self.batch_size * self.num_processes) * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch, -1))
        order = torch.randperm(self.length, generator=generator).tolist()
        own = items_of_process(order, self.batch_size, self.rank, self.num_processes)
        for index in own[: len(self)]:
            yield self.epoch, index


def items_of_process(
    order: Sequence[int], batch_size: int, rank: int, num_processes: int
) -> list[int]:
    """Return what one of several processes takes of items that they go through together.

    Args:
        order: the items, in the order in which a single process would take them.
        batch_size: items that one process takes at once.
        rank: which of the processes, from 0.
        num_processes: that share the items.

    Returns:
        Of every `num_processes * batch_size` items the rank-th `batch_size` ones, of a last,
        smaller lot what is left of them: each item is taken once.
    """
    start, step = rank * batch_size, num_processes * batch_size
    lots = (order[first : first + batch_size] for first in range(start, len(order), step))
    return [item for lot in lots for item in lot]


def mix_seed(*parts: int) -> int:
    """Return a 63-bit seed from several integers; neighbouring integers give unrelated seeds.

    Source: the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
    """
    state = 0
    for part in parts:
        state = (state + 0x9E3779B97F4A7C15 + (part & 0xFFFFFFFFFFFFFFFF)) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1
