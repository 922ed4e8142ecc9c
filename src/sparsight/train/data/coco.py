"""COCO's images with their boxes or masks, read from the folders as they are distributed."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision import tv_tensors

from sparsight.train.data.mask_rle import compress_segmentation, decode_masks

_LAYOUT = (
    "expected annotations/instances_<split>.json and the images in <split>/, with splits train2017 "
    "and val2017"
)
_WHERE = (
    "COCO 2017 (Lin et al., 'Microsoft COCO', ECCV 2014): train2017.zip, val2017.zip and "
    "annotations_trainval2017.zip from https://cocodataset.org/#download, unpacked into one folder"
)

Target = dict[str, Any]


class Coco(Dataset[tuple[tv_tensors.Image, Target]]):
    """Images with boxes and labels, from COCO's own layout.

    Args:
        root: folder with `annotations/instances_<split>.json` and the folder `<split>` of images.
        split: "train2017" or "val2017", or any other name of that layout.
        keeps_empty: also yield images without an object, as evaluation must. Default True; the
            published training leaves them out (117,266 of 118,287 remain).
        num_classes: classes of the detector, background included. Labels are 1 to K in the order of
            the category ids if it is K + 1 (default: 81 for COCO), and the category ids themselves
            if it is the largest one plus 1 (91 for COCO: torchvision's weights).
        max_images: the first so many images only. Default None, all.
        with_masks: also yield the objects' masks, and crowd regions, marked as such.

    Raises:
        FileNotFoundError: a folder, the annotation file or an image is missing.
        ValueError: the file is no instance annotation, `num_classes` fits neither numbering, or
            masks are wanted and an annotation has none.

    Attributes:
        num_classes: see above.
        classes: name of each label, from 0, "background"; None for a label without a category.
        category_of: category id by label.

    An item is `(image, target)`: image uint8 (3, H, W) RGB; target {"boxes": (N, 4) float32 x0 y0
    x1 y1 in pixels, "labels": (N,) int64, "image_id": int}. Crowd regions are no boxes to learn;
    `ground_truth` has them, because detections in them do not count as wrong. Boxes are clipped to
    the image, and empty ones left out. With masks, the target also has {"masks": (N, H, W) bool,
    "iscrowd": (N,) bool}, crowd regions are among the N, and objects of no pixel are not. Reading
    an item raises ValueError for a file that is no image, or one of another size than the
    annotations say.

    Source: Lin et al., ECCV 2014, arXiv 1405.0312.
    """

    name = "coco"

    def __init__(
        self,
        root: str | Path,
        split: str = "train2017",
        *,
        keeps_empty: bool = True,
        num_classes: int | None = None,
        max_images: int | None = None,
        with_masks: bool = False,
    ) -> None:
        self.with_masks = with_masks
        annotation_file = Path(root) / "annotations" / f"instances_{split}.json"
        self.image_dir = Path(root) / split
        for path, is_there in (
            (annotation_file, annotation_file.is_file()),
            (self.image_dir, self.image_dir.is_dir()),
        ):
            if not is_there:
                raise FileNotFoundError(
                    f"Coco: root={str(root)!r} has no {path.relative_to(root).as_posix()}; "
                    f"{_LAYOUT}; {_WHERE}; pass the folder that holds them."
                )
        content = _read_annotations(annotation_file)
        self.categories: list[dict[str, Any]] = sorted(content["categories"], key=lambda c: c["id"])
        self.category_of = _number([c["id"] for c in self.categories], num_classes)
        self._label_of = {category: label for label, category in self.category_of.items()}
        self.num_classes = 1 + max(self.category_of)
        names = {c["id"]: str(c["name"]) for c in self.categories}
        self.classes: list[str | None] = ["background"] + [
            names.get(self.category_of.get(label, -1)) for label in range(1, self.num_classes)
        ]
        self._collect(content, keeps_empty=keeps_empty, max_images=max_images)
        there = {entry.name for entry in os.scandir(self.image_dir)}
        absent = [name for name in self.file_names if name not in there]
        if absent:
            raise FileNotFoundError(
                f"Coco: {len(absent)} of {len(self.file_names)} annotated images are not in "
                f"{str(self.image_dir)!r}, first {absent[0]!r}; {_LAYOUT}; unpack {split}.zip "
                "again, or remove them from the annotations."
            )

    def _collect(
        self, content: dict[str, Any], *, keeps_empty: bool, max_images: int | None
    ) -> None:
        """Keep what is needed in arrays: a worker process shares them, dictionaries it copies."""
        by_image: dict[int, list[dict[str, Any]]] = {}
        for annotation in content["annotations"]:
            by_image.setdefault(annotation["image_id"], []).append(annotation)
        images = sorted(content["images"], key=lambda image: image["id"])
        if not keeps_empty:
            # As items see it: crowd regions, and boxes of no area, are no objects.
            images = [
                image
                for image in images
                if any(
                    not a.get("iscrowd", 0) and _area(_clip(a["bbox"], image)) > 0
                    for a in by_image.get(image["id"], ())
                )
            ]
        images = images[:max_images]
        self.image_ids = np.array([image["id"] for image in images], dtype=np.int64)
        self.file_names = [str(image["file_name"]) for image in images]
        self.sizes = np.array([(i["height"], i["width"]) for i in images], dtype=np.int64)
        kept = [by_image.get(image["id"], []) for image in images]
        self._starts = np.cumsum([0, *(len(annotations) for annotations in kept)])
        rows = [annotation for annotations in kept for annotation in annotations]
        self._boxes = np.array([a["bbox"] for a in rows], dtype=np.float64).reshape(-1, 4)
        self._categories = np.array([a["category_id"] for a in rows], dtype=np.int64)
        self._areas = np.array([a["area"] for a in rows], dtype=np.float64)
        self._crowds = np.array([bool(a.get("iscrowd", 0)) for a in rows], dtype=bool)
        if self.with_masks:
            sizes = np.repeat(self.sizes, np.diff(self._starts), axis=0).tolist()
            counts = [_compressed(a, size) for a, size in zip(rows, sizes, strict=True)]
            self._mask_starts = np.cumsum([0, *map(len, counts)])
            self._masks = np.frombuffer(b"".join(counts), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.file_names)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, Target]:
        index = range(len(self))[index]
        path = self.image_dir / self.file_names[index]
        pixels = _read_image(path)
        height, width = (int(side) for side in self.sizes[index])
        if pixels.shape[:2] != (height, width):
            raise ValueError(
                f"Coco: image {str(path)!r} is {pixels.shape[1]}x{pixels.shape[0]} but its "
                f"annotations are for {width}x{height} (width x height); equal sizes are required, "
                "or boxes would be elsewhere; fetch the image again."
            )
        rows = slice(int(self._starts[index]), int(self._starts[index + 1]))
        x, y, w, h = self._boxes[rows].T
        boxes = np.stack([x, y, x + w, y + h], axis=1)
        boxes = boxes.clip(0, [width, height, width, height])
        is_object = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        masks: dict[str, Any] = {}
        if self.with_masks:
            each = decode_masks(self._segmentations(rows, (height, width)), size=(height, width))
            is_object &= each.flatten(1).any(1).numpy()
            masks = {
                "masks": tv_tensors.Mask(each[torch.from_numpy(is_object)]),
                "iscrowd": torch.from_numpy(self._crowds[rows][is_object]),
            }
        else:
            is_object &= ~self._crowds[rows]
        labels = [self._label_of[int(c)] for c in self._categories[rows][is_object]]
        return tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1).contiguous()), {
            "boxes": tv_tensors.BoundingBoxes(
                torch.from_numpy(boxes[is_object].astype(np.float32)),
                format="XYXY",  # type: ignore[arg-type]  # a name of the enumeration will do
                canvas_size=(height, width),
            ),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "image_id": int(self.image_ids[index]),
            **masks,
        }

    def _segmentations(self, rows: slice, size: tuple[int, int]) -> list[dict[str, Any]]:
        """The masks of some annotations of one image, compressed."""
        starts = self._mask_starts[rows.start : rows.stop + 1].tolist()
        return [
            {"size": list(size), "counts": self._masks[first:last].tobytes()}
            for first, last in itertools.pairwise(starts)
        ]

    def ground_truth(self, image_ids: Collection[int] | None = None) -> dict[str, Any]:
        """Return the annotations in COCO's form, for the evaluator.

        Args:
            image_ids: of the images that count. Default None, all of this data set.

        Everything is as it was read (boxes x y w h, crowd regions, areas of the masks), but for the
        ids of annotations, and for the masks, which are compressed; without `with_masks` they are
        left out, as detectors are not held against them.
        """
        counted = self.image_ids if image_ids is None else np.array(sorted(set(image_ids)))
        owners = np.repeat(self.image_ids, np.diff(self._starts))
        rows = np.isin(owners, counted)
        is_counted = np.isin(self.image_ids, counted).tolist()
        return {
            "info": {},
            "images": [
                {"id": image_id, "file_name": name, "height": height, "width": width}
                for image_id, name, (height, width), counts in zip(
                    self.image_ids.tolist(),
                    self.file_names,
                    self.sizes.tolist(),
                    is_counted,
                    strict=True,
                )
                if counts
            ],
            "annotations": [
                # From 1: the evaluator takes an id of 0 for "no match".
                {
                    "id": i + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": box,
                    "area": area,
                    "iscrowd": int(is_crowd),
                    **self._segmentation(row),
                }
                for i, (row, image_id, category, box, area, is_crowd) in enumerate(
                    zip(
                        rows.nonzero()[0].tolist(),
                        owners[rows].tolist(),
                        self._categories[rows].tolist(),
                        self._boxes[rows].tolist(),
                        self._areas[rows].tolist(),
                        self._crowds[rows].tolist(),
                        strict=True,
                    )
                )
            ],
            "categories": [{"id": c["id"], "name": c["name"]} for c in self.categories],
        }

    def _segmentation(self, row: int) -> dict[str, Any]:
        """What an annotation says of its mask, as an evaluator reads it; nothing without masks."""
        if not self.with_masks:
            return {}
        index = int(np.searchsorted(self._starts, row, side="right")) - 1
        size = tuple(int(side) for side in self.sizes[index])
        (encoded,) = self._segmentations(slice(row, row + 1), (size[0], size[1]))
        return {"segmentation": {**encoded, "counts": encoded["counts"].decode("ascii")}}


def _compressed(annotation: dict[str, Any], size: Sequence[int]) -> bytes:
    try:
        return compress_segmentation(
            annotation.get("segmentation"), size=(int(size[0]), int(size[1]))
        )
    except ValueError as error:
        raise ValueError(
            f"Coco: annotation {annotation.get('id')} of image {annotation['image_id']} has no "
            f"mask that can be read: {error}; polygons or run lengths are required; {_WHERE}."
        ) from error


def _number(category_ids: Sequence[int], num_classes: int | None) -> dict[int, int]:
    """Category id by label."""
    if num_classes is None or num_classes == len(category_ids) + 1:
        return dict(enumerate(category_ids, start=1))
    if num_classes == max(category_ids, default=0) + 1:
        return {category: category for category in category_ids}
    raise ValueError(
        f"Coco: num_classes={num_classes}, but the annotations have {len(category_ids)} categories "
        f"with ids up to {max(category_ids, default=0)}; {len(category_ids) + 1} (labels in a row, "
        f"background first) or {max(category_ids, default=0) + 1} (labels are category ids) is "
        "required; use a detector of that many classes."
    )


def _clip(box: Sequence[float], image: dict[str, Any]) -> tuple[float, float, float, float]:
    x, y, w, h = box
    width, height = image["width"], image["height"]
    return max(0.0, x), max(0.0, y), min(width, x + w), min(height, y + h)


def _area(corners: tuple[float, float, float, float]) -> float:
    x0, y0, x1, y1 = corners
    return max(0.0, x1 - x0) * max(0.0, y1 - y0)


def _read_annotations(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"Coco: {str(path)!r} is no JSON ({error}); {_WHERE}; unpack it again."
        ) from error
    missing = {"images", "annotations", "categories"} - set(content)
    if missing:
        raise ValueError(
            f"Coco: {str(path)!r} has no {', '.join(sorted(missing))}; instance annotations, with "
            f"images, annotations and categories, are required; {_WHERE}."
        )
    return content


def _read_image(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as file:
            return np.array(file.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(
            f"Coco: {str(path)!r} cannot be read as an image ({error}); a JPEG or PNG file is "
            "required; fetch it again."
        ) from error
