"""CIFAR-10, read from a folder without unpickling anything."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from sparsight.train.data.augment import Transform, image_only, normalise

CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
SIDE = 32
_RECORD_BYTES = 1 + 3 * SIDE * SIDE
_BINARY_FOLDER = "cifar-10-batches-bin"
_BATCHES = {
    "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    "test": ("test_batch.bin",),
}
_WHERE = (
    "CIFAR-10 (Krizhevsky 2009), 'CIFAR-10 binary version', cifar-10-binary.tar.gz from "
    "https://www.cs.toronto.edu/~kriz/cifar.html, unpacked; or one *.npz file with uint8 arrays "
    "train_images, test_images (N, 32, 32, 3) and integer arrays train_labels, test_labels (N,)"
)


class CIFAR10(Dataset[tuple[tv_tensors.Image, int]]):
    """Images of 32x32 pixels in ten classes, held in memory (154 MB for the 50,000).

    Args:
        root: folder that holds `cifar-10-batches-bin/` (or is that folder), the binary version with
            data_batch_1.bin to data_batch_5.bin and test_batch.bin; or one *.npz file, or the
            folder with that one file, with uint8 train_images and test_images (N, 32, 32, 3) and
            integer train_labels and test_labels (N,). The python version is pickled and is not
            read.
        split: "train" (50,000 images in the standard set) or "test" (10,000).

    Raises:
        FileNotFoundError: none of that is there; says where to obtain it.
        ValueError: a file is damaged or of another form, or a label is outside 0 to 9.

    An item is `(image, class)`: image uint8 (3, 32, 32) RGB, class an int.

    Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """

    name = "cifar10"
    classes = CLASSES

    def __init__(self, root: str | Path, split: Literal["train", "test"]) -> None:
        root = Path(root)
        folders = [root / _BINARY_FOLDER, root]
        folder = next((f for f in folders if (f / _BATCHES[split][0]).is_file()), None)
        archives = [root] if root.is_file() else sorted(root.glob("*.npz"))
        if folder is not None:
            images, labels = _read_binary(folder, split)
        elif len(archives) == 1:
            images, labels = _read_archive(archives[0], split)
        else:
            found = f"holds {len(archives)} *.npz files and no {_BINARY_FOLDER}/"
            if any((f / "data_batch_1").is_file() for f in (root, root / "cifar-10-batches-py")):
                found = "holds the python version, whose pickled files are not read"
            elif not root.is_dir():
                found = "is no folder"
            raise FileNotFoundError(
                f"CIFAR10: root={str(root)!r} {found}; expected {_BINARY_FOLDER}/ with "
                f"{', '.join(_BATCHES[split])} in it, or one *.npz file; {_WHERE}."
            )
        self.images: Tensor = torch.from_numpy(images)
        self.labels: list[int] = labels.astype(np.int64).tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, int]:
        return tv_tensors.Image(self.images[index]), self.labels[index]


def _read_binary(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Records of one byte for the class and 3072 for the pixels, colour by colour, row by row."""
    parts = []
    for name in _BATCHES[split]:
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(
                f"CIFAR10: {str(folder)!r} has no {name}; expected {', '.join(_BATCHES[split])}; "
                f"{_WHERE}."
            )
        content = np.fromfile(path, dtype=np.uint8)
        if content.size == 0 or content.size % _RECORD_BYTES:
            raise ValueError(
                f"CIFAR10: {str(path)!r} has {content.size} bytes; a positive multiple of "
                f"{_RECORD_BYTES} (class and 3x32x32 pixels) is required; fetch it again: {_WHERE}."
            )
        parts.append(content.reshape(-1, _RECORD_BYTES))
    records = np.concatenate(parts)
    labels = _checked_labels(records[:, 0], folder)
    return np.ascontiguousarray(records[:, 1:]).reshape(-1, 3, SIDE, SIDE), labels


def _read_archive(path: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    names = (f"{split}_images", f"{split}_labels")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in names if name not in archive]
            arrays = [] if missing else [archive[name] for name in names]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise ValueError(
            f"CIFAR10: {str(path)!r} cannot be read as plain arrays ({error}); expected: {_WHERE}."
        ) from error
    if missing:
        raise ValueError(f"CIFAR10: {str(path)!r} has no {', '.join(missing)}; expected: {_WHERE}.")
    images, labels = arrays
    is_image = images.dtype == np.uint8 and images.shape[1:] == (SIDE, SIDE, 3)
    if not is_image or labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(
            f"CIFAR10: {str(path)!r} holds {names[0]} {images.dtype} {images.shape} and {names[1]} "
            f"{labels.dtype} {labels.shape}; uint8 (N, 32, 32, 3) and integers (N,) are required; "
            f"expected: {_WHERE}."
        )
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), _checked_labels(labels, path)


def _checked_labels(labels: np.ndarray, path: Path) -> np.ndarray:
    if labels.size == 0 or labels.min() < 0 or labels.max() >= len(CLASSES):
        found = "no label" if labels.size == 0 else f"labels {labels.min()} to {labels.max()}"
        raise ValueError(
            f"CIFAR10: {str(path)!r} has {found}; 0 to {len(CLASSES) - 1} are required; "
            f"expected: {_WHERE}."
        )
    return labels


def cifar10_training_transform(*, padding: int = 4) -> Transform:
    """Return random shift (crop of the padded image), horizontal flip, normalisation.

    Args:
        padding: zeros on each side before the crop, in pixels; 4 in the source.

    Returns:
        A callable (image, class) -> (float32 (3, H, W), class).

    Source: He, Zhang, Ren, Sun, CVPR 2016, arXiv 1512.03385, section 4.2.
    """
    crop = v2.RandomCrop(SIDE, padding=padding)
    return image_only([crop, v2.RandomHorizontalFlip(), *normalise()])


def cifar10_evaluation_transform() -> Transform:
    """Return normalisation of the whole image, (image, class) -> (float32 (3, H, W), class)."""
    return image_only(normalise())
