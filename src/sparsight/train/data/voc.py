"""Pascal VOC's objects with their masks, in VOC's own layout or that of SBD."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors

from sparsight.train.data.camvid import read_image
from sparsight.train.data.mask_rle import encode_masks

CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
_VOID = 255

_LAYOUT = (
    "expected VOC's layout, VOCdevkit/VOC2012/ (or its content) with JPEGImages/, "
    "SegmentationObject/, SegmentationClass/ and ImageSets/Segmentation/<split>.txt, or SBD's, "
    "img/, inst/ and <split>.txt"
)
_WHERE = (
    "VOC 2012 (Everingham et al., IJCV 2010) is VOCtrainval_11-May-2012.tar from "
    "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/, SBD (Hariharan et al., ICCV 2011) "
    "benchmark.tgz from http://home.bharathh.info/pubs/codes/SBD/download.html, whose folder is "
    "benchmark_RELEASE/dataset; train_noval.txt, SBD's images that are not in VOC's val, is "
    "described in torchvision.datasets.SBDataset"
)


class Voc(Dataset[tuple[tv_tensors.Image, dict[str, Any]]]):
    """Images with boxes, labels and masks of VOC 2012, annotated by VOC or, all of them, by SBD.

    Args:
        root: folder in VOC's layout (`VOCdevkit/VOC2012/...`, or that folder itself) or in SBD's
            (`img/`, `inst/`); of SBD also `benchmark_RELEASE/dataset` above them.
        split: name of the list of images: of VOC "train" (1,464), "val" (1,449) or "trainval", of
            SBD "train" (8,498), "val" (2,857) or "train_noval" (5,623 that are not in VOC's val).
        max_images: the first so many images only. Default None, all.

    Raises:
        FileNotFoundError: a folder, the list or a file in it is missing.

    Attributes:
        classes: names of the labels, from 0, "background".
        category_of: category id by label: the same number.

    An item is `(image, target)`: image uint8 (3, H, W) RGB; target {"boxes": (N, 4) float32 x0 y0
    x1 y1 around the masks, "labels": (N,) int64, "masks": (N, H, W) bool, "iscrowd": (N,) bool, all
    False, "image_id": int, the place in the split}. Void pixels are of no object. Reading an item
    raises ValueError for a file that cannot be read or has another size than its image.
    """

    name = "voc"

    def __init__(self, root: str | Path, split: str, *, max_images: int | None = None) -> None:
        self.is_sbd, folder, listing = _find(Path(root), split)
        names = listing.read_text(encoding="utf-8").split()[:max_images]
        parts = (
            ("img", "inst", ".mat")
            if self.is_sbd
            else (
                "JPEGImages",
                "SegmentationObject",
                ".png",
            )
        )
        self.items = [
            (folder / parts[0] / f"{name}.jpg", folder / parts[1] / f"{name}{parts[2]}")
            for name in names
        ]
        absent = [path for pair in self.items for path in pair if not path.is_file()]
        if absent or not names:
            found = f"{len(absent)} files of {listing.name} are not there, first {absent[:1]}"
            raise FileNotFoundError(
                f"Voc: root={str(root)!r}: {found if absent else f'{listing.name} is empty'}; "
                f"{_LAYOUT}; {_WHERE}; unpack them again."
            )
        self.classes: list[str | None] = ["background", *CLASSES]
        self.category_of = {label: label for label in range(1, len(self.classes))}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, dict[str, Any]]:
        index = range(len(self))[index]
        path, annotation = self.items[index]
        pixels = read_image(path, owner="Voc")
        masks, labels = self._objects(annotation)
        if masks.shape[1:] != pixels.shape[:2]:
            raise ValueError(
                f"Voc: image {str(path)!r} is {pixels.shape[0]}x{pixels.shape[1]} and its masks "
                f"are {masks.shape[1]}x{masks.shape[2]} (height x width); equal sizes are "
                "required; unpack both again."
            )
        return tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1).contiguous()), {
            "boxes": tv_tensors.BoundingBoxes(
                boxes_around(masks),
                format="XYXY",  # type: ignore[arg-type]  # a name of the enumeration will do
                canvas_size=(masks.shape[1], masks.shape[2]),
            ),
            "labels": labels,
            "masks": tv_tensors.Mask(masks),
            "iscrowd": torch.zeros(len(masks), dtype=torch.bool),
            "image_id": index,
        }

    def _objects(self, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks (N, H, W) bool and labels (N,) of an annotation."""
        if self.is_sbd:
            instances, categories = _read_mat(path)
            label_of = dict(enumerate(categories, start=1))
        else:
            instances = _read_map(path)
            classes = _read_map(path.parents[1] / "SegmentationClass" / path.name)
            label_of = {
                number: int(np.bincount(classes[instances == number]).argmax())
                for number in np.unique(instances).tolist()
            }
        numbers = [n for n in np.unique(instances).tolist() if n not in (0, _VOID)]
        masks = instances[None] == np.array(numbers, dtype=instances.dtype)[:, None, None]
        labels = torch.tensor([label_of[n] for n in numbers], dtype=torch.int64)
        return torch.from_numpy(masks.reshape(-1, *instances.shape)), labels

    def ground_truth(self, image_ids: Collection[int] | None = None) -> dict[str, Any]:
        """Return the annotations in COCO's form, for the evaluator.

        Args:
            image_ids: of the images that count. Default None, all.
        """
        chosen = range(len(self)) if image_ids is None else sorted(set(image_ids))
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in chosen:
            path, annotation = self.items[index]
            masks, labels = self._objects(annotation)
            height, width = masks.shape[1:]
            images.append({"id": index, "file_name": path.name, "height": height, "width": width})
            boxes = boxes_around(masks).tolist()
            for (x0, y0, x1, y1), label, mask, encoded in zip(
                boxes, labels.tolist(), masks, encode_masks(masks), strict=True
            ):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index,
                        "category_id": label,
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "area": int(mask.sum()),
                        "iscrowd": 0,
                        "segmentation": encoded,
                    }
                )
        categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]
        return {
            "info": {},
            "images": images,
            "annotations": annotations,
            "categories": categories,
        }


def boxes_around(masks: torch.Tensor) -> torch.Tensor:
    """Return (N, 4) float32 x0 y0 x1 y1 around masks (N, H, W) that have a pixel each."""
    sides = []
    for axis in (1, 2):
        is_there = masks.any(axis).to(torch.int64)
        first = is_there.argmax(1)
        last = is_there.shape[1] - is_there.flip(1).argmax(1)
        sides.append((first, last))
    (left, right), (top, bottom) = sides
    return torch.stack([left, top, right, bottom], dim=1).float()


def _find(root: Path, split: str) -> tuple[bool, Path, Path]:
    """Whether a folder is SBD's, the folder that holds its parts, and the list of its images."""
    for folder in (root / "VOCdevkit" / "VOC2012", root / "VOC2012", root):
        listing = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
        if listing.is_file():
            return False, folder, listing
    for folder in (root, root / "dataset", root / "benchmark_RELEASE" / "dataset"):
        if (folder / "inst").is_dir() and (folder / f"{split}.txt").is_file():
            return True, folder, folder / f"{split}.txt"
    raise FileNotFoundError(
        f"Voc: root={str(root)!r} has no list of images for split {split!r}; {_LAYOUT}; {_WHERE}; "
        "pass the folder that holds them."
    )


def _read_map(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as file:
            return np.array(file)  # the indices of its palette
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"Voc: {str(path)!r} cannot be read as a map of objects ({error}); a PNG file with a "
            "palette is required; unpack it again."
        ) from error


def _read_mat(path: Path) -> tuple[np.ndarray, list[int]]:
    """The map of objects, from 1, and their categories."""
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Voc: SBD's annotations are Matlab's files, which scipy reads, and it is not "
            "installed; pip install scipy, or use the annotations of VOC."
        ) from error
    try:
        found = loadmat(path)["GTinst"][0]
        return found["Segmentation"][0], [int(c) for c in np.ravel(found["Categories"][0])]
    # What scipy raises for files that are no Matlab files, and for those of Matlab 7.3; and what
    # reading fields raises that are not there.
    except (MatReadError, LookupError, ValueError, TypeError, NotImplementedError) as error:
        raise ValueError(
            f"Voc: {str(path)!r} holds no objects ({error}); GTinst with Segmentation and "
            f"Categories is required; {_WHERE}."
        ) from error
