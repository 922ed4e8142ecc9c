"""ImageNet, or any set of images in one folder a class."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from sparsight.train.data.augment import Transform, image_only, normalise
from sparsight.train.data.camvid import read_image

_WHERE = (
    "ImageNet (ILSVRC 2012) is available after registration at https://www.image-net.org/download; "
    "its 50,000 validation images must first be sorted into one folder a class"
)


class ImageFolders(Dataset[tuple[tv_tensors.Image, int]]):
    """Images in `root/<split>/<class>/`, as torchvision's ImageFolder arranges ImageNet.

    Args:
        root: folder that holds `train` and `val`, each with one folder a class (n01440764, ...), in
            it JPEG or PNG images. Classes are numbered in the order of the names of train's
            folders.
        split: "train" or "val".

    Raises:
        FileNotFoundError: a folder is missing, or a class has no image; says what is expected and
            where to obtain it.
        ValueError: `val` has classes that `train` has not.

    An item is `(image, class)`: image uint8 (3, H, W) RGB of any size, class an int. Reading an
    item raises ValueError for a file that is no image.
    """

    name = "imagenet"

    def __init__(self, root: str | Path, split: Literal["train", "val"]) -> None:
        folders = {name: Path(root) / name for name in ("train", "val")}
        found = {
            name: sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
            for name, folder in folders.items()
        }
        lacking = [name for name in ("train", "val") if not found[name]]
        if lacking:
            raise FileNotFoundError(
                f"ImageFolders: root={str(root)!r} has no folder of classes {lacking[0]!r}; "
                f"expected train/<class>/*.JPEG and val/<class>/*.JPEG in it; {_WHERE}; pass the "
                "folder that holds both."
            )
        unknown = sorted(set(found["val"]) - set(found["train"]))
        if unknown:
            raise ValueError(
                f"ImageFolders: {str(folders['val'])!r} has {len(unknown)} classes that train has "
                f"not, first {unknown[0]!r}; the same classes are required; rename or remove them."
            )
        self.classes = tuple(found["train"])
        try:
            listed = ImageFolder(str(folders[split]))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"ImageFolders: a class in {str(folders[split])!r} holds no image ({error}); "
                f"{_WHERE}."
            ) from error
        number = {name: i for i, name in enumerate(self.classes)}
        self.items = [(Path(path), number[listed.classes[k]]) for path, k in listed.samples]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, int]:
        path, label = self.items[index]
        pixels = (
            torch.from_numpy(read_image(path, owner="ImageFolders")).permute(2, 0, 1).contiguous()
        )
        return tv_tensors.Image(pixels), label


def imagenet_training_transform(size: tuple[int, int]) -> Transform:
    """Return random resized crop to `size`, horizontal flip, normalisation.

    Args:
        size: (height, width) in pixels; 224x224 in the source.

    Returns:
        A callable (image, class) -> (float32 (3, *size), class).

    Source: Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, arXiv 1409.4842, as in
    torchvision's reference training.
    """
    crop = v2.RandomResizedCrop(size, antialias=True)
    return image_only([crop, v2.RandomHorizontalFlip(), *normalise()])


def imagenet_evaluation_transform(size: tuple[int, int]) -> Transform:
    """Return the centre of the image at 8/7 of the scale, normalised.

    Args:
        size: (height, width) in pixels; for 224 the shorter side becomes 256 first, as usual.

    Returns:
        A callable (image, class) -> (float32 (3, *size), class).
    """
    resize = v2.Resize(round(max(size) * 8 / 7), antialias=True)
    return image_only([resize, v2.CenterCrop(size), *normalise()])
