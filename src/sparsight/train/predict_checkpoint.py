"""What a checkpoint says of pictures without annotations, as files."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from sparsight.convert import freeze
from sparsight.train.architecture import AnyArchitecture, at_size
from sparsight.train.average_precision import to_coco
from sparsight.train.average_recall import to_coco_masks
from sparsight.train.checkpoint import load_checkpoint, write_atomically
from sparsight.train.data.augment import normalised_picture
from sparsight.train.data.camvid import read_image
from sparsight.train.dense_inference import DenseInference
from sparsight.train.pictures import colour_classes, colour_of
from sparsight.train.proposal_pictures import blend_masks

_SUFFIXES = (".png", ".jpg", ".jpeg")
_LEAST_CONFIDENCE = 0.5  # of the boxes that are drawn; the JSON has all
_NUM_DRAWN = 10  # proposals
_MOST_CLASSES = 255  # that a one-byte label map can tell apart
# COCO numbers its 80 categories from 1 to 90 with gaps; a detector of 81 classes counts them.
_GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
_COCO_CATEGORIES = [number for number in range(1, 91) if number not in _GAPS]


def predict_checkpoint(
    checkpoint: str | Path,
    *,
    images: str | Path | Sequence[str | Path],
    out: str | Path = "predictions",
    size: tuple[int, int] | None = None,
    inference: DenseInference | None = None,
    frozen: bool = True,
    overlays: bool = True,
) -> list[Path]:
    """Write what a model for segmentation, detection or mask proposals says of pictures.

    Segmentation: NAME_labels.png, one byte a pixel, the class's number, at the picture's own size;
    and NAME_overlay.png, the picture half covered by the classes' colours.

    Detection: predictions.json, all detections in the form of COCO's results ([{"image_id",
    "category_id", "bbox": [x, y, width, height], "score"}]); images.json, which says the id, file
    name and size of each picture; and NAME_overlay.png with the boxes of confidence .5 or more. An
    id is the number that the file is named by, as COCO's are, if all of them are; else the place in
    the order of the names, from 1. Categories are numbered as COCO's for a detector of 81 or 91
    classes, and else by label.

    Mask proposals: the same files; each result also has its "segmentation", compressed run lengths,
    and category 1; the picture has the ten best masks.

    Args:
        checkpoint: a file that `save_checkpoint` wrote.
        images: a picture, a folder of pictures, or several of both; PNG or JPEG.
        out: folder for the files; those that exist are replaced. Each is written under a temporary
            name and renamed.
        size: of the input, see `at_size`; default: that of training.
        inference: scales, mirror images and windows of a segmentation model.
        frozen: freeze the model first.
        overlays: also write the pictures.

    Returns:
        The files written, in the order of the names of the pictures.

    Raises:
        FileNotFoundError: no checkpoint, no picture, or none in a folder.
        ValueError: two pictures of one name, a file that is no picture, or a model that classifies
            whole images.
    """
    inference = inference or DenseInference()
    model, stored = load_checkpoint(checkpoint)
    if stored.task == "classification":
        raise ValueError(
            f"predict_checkpoint: {str(checkpoint)!r} is a {stored.model}, which classifies whole "
            "images; a checkpoint for segmentation or detection is required; pass another one."
        )
    inference.check_task("predict_checkpoint", stored.task)
    paths = find_pictures(images)
    architecture = at_size(model.eval(), stored, size)
    run = _segment if stored.task == "segmentation" else _detect
    return run(model, architecture, paths, Path(out), inference, frozen, overlays)


def find_pictures(images: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the pictures that are named, and those in the folders that are, by name.

    Raises:
        FileNotFoundError: a path that is not there, or a folder without pictures.
        ValueError: nothing is named, or two pictures have the same name.
    """
    asked = [images] if isinstance(images, str | Path) else list(images)
    if not asked:
        raise ValueError(
            "predict_checkpoint: images is empty; a picture or a folder is required; pass --images."
        )
    found: dict[str, Path] = {}
    for path in map(Path, asked):
        inside = [path]
        if path.is_dir():
            inside = [p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES]
        elif not path.is_file():
            raise FileNotFoundError(
                f"predict_checkpoint: {str(path)!r} does not exist; a PNG or JPEG file, or a "
                "folder of them, is required; check the path."
            )
        if not inside:
            raise FileNotFoundError(
                f"predict_checkpoint: {str(path)!r} holds no picture; PNG or JPEG files are "
                "required; folders inside are not looked into: pass them one by one."
            )
        for picture in inside:
            other = found.setdefault(picture.stem, picture)
            if other.resolve() != picture.resolve():
                raise ValueError(
                    f"predict_checkpoint: {str(other)!r} and {str(picture)!r} have the same name, "
                    "and what is written is named after them; different names are required; pass "
                    "them one by one, with another --out."
                )
    return [found[stem] for stem in sorted(found)]


@torch.inference_mode()
def _segment(
    model: Any,
    architecture: AnyArchitecture,
    paths: Sequence[Path],
    out: Path,
    inference: DenseInference,
    frozen: bool,
    overlays: bool,
) -> list[Path]:
    if architecture.num_classes > _MOST_CLASSES:
        raise ValueError(
            f"predict_checkpoint: the model has {architecture.num_classes} classes; at most "
            f"{_MOST_CLASSES} fit into the bytes of a label map; use the model from Python."
        )
    written = []
    runs: Any = None
    for path in paths:
        pixels = _read(path)
        shown = normalised_picture(torch.from_numpy(pixels).permute(2, 0, 1), architecture.size)
        batch = shown[None].contiguous(memory_format=torch.channels_last)
        if runs is None:
            part = inference.example(batch)
            runs = inference.wrap(freeze(model, example=part) if frozen else model)
        scores = runs(batch)["out"].float()
        scores = F.interpolate(scores, size=pixels.shape[:2], mode="bilinear", align_corners=False)
        labels = scores[0].argmax(0)
        written.append(out / f"{path.stem}_labels.png")
        _write_png(written[-1], labels.byte().cpu().numpy())
        if overlays:
            written.append(out / f"{path.stem}_overlay.png")
            colours = colour_classes(labels, num_classes=architecture.num_classes, ignore_index=-1)
            blended = (pixels.astype(np.uint16) + colours) // 2
            _write_png(written[-1], blended.astype(np.uint8))
    return written


@torch.inference_mode()
def _detect(
    model: Any,
    architecture: AnyArchitecture,
    paths: Sequence[Path],
    out: Path,
    inference: DenseInference,
    frozen: bool,
    overlays: bool,
) -> list[Path]:
    category_of = categories_of(architecture.num_classes)
    ids = _ids(paths)
    found: list[dict[str, Any]] = []
    listed: list[dict[str, Any]] = []
    written: list[Path] = []
    runs: Any = None
    for path, number in zip(paths, ids, strict=True):
        pixels = _read(path)
        image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
        if runs is None:
            runs = freeze(model, example=[image]) if frozen else model
        (detections,) = runs([image])
        if architecture.task == "proposals":
            found += to_coco_masks(detections, image_id=number)
        else:
            found += to_coco(detections, image_id=number, category_of=category_of)
        height, width = pixels.shape[:2]
        listed.append({"id": number, "file_name": path.name, "height": height, "width": width})
        if overlays:
            written.append(out / f"{path.stem}_overlay.png")
            _write_png(
                written[-1],
                blend_masks(pixels, detections["masks"][:_NUM_DRAWN, 0])
                if architecture.task == "proposals"
                else _with_boxes(pixels, detections),
            )
    for name, content in (("predictions.json", found), ("images.json", listed)):
        written.append(out / name)
        write_atomically(written[-1], json.dumps(content).encode())
    return written


def categories_of(num_classes: int) -> dict[int, int]:
    """Return the category id of each label of a detector with so many classes, the background 0."""
    if num_classes == len(_COCO_CATEGORIES) + 1:
        return dict(enumerate(_COCO_CATEGORIES, start=1))
    labels = range(1, num_classes)
    if num_classes == _COCO_CATEGORIES[-1] + 1:
        labels = _COCO_CATEGORIES  # labels without a category are of nothing
    return {label: label for label in labels}


def _ids(paths: Sequence[Path]) -> list[int]:
    if all(path.stem.isdecimal() for path in paths):
        numbers = [int(path.stem) for path in paths]
        if len(set(numbers)) == len(numbers):
            return numbers
    return list(range(1, len(paths) + 1))


def _with_boxes(pixels: np.ndarray, detections: dict[str, Tensor]) -> np.ndarray:
    picture = Image.fromarray(pixels)
    pen = ImageDraw.Draw(picture)
    for corners, label, score in zip(
        detections["boxes"].tolist(),
        detections["labels"].tolist(),
        detections["scores"].tolist(),
        strict=True,
    ):
        if score < _LEAST_CONFIDENCE:
            continue
        colour = colour_of(label)
        pen.rectangle(corners, outline=colour, width=2)
        pen.text((corners[0] + 3, corners[1] + 2), f"{label} {score:.2f}", fill=colour)
    return np.array(picture)


def _read(path: Path) -> np.ndarray:
    return read_image(path, owner="predict_checkpoint")


def _write_png(path: Path, pixels: np.ndarray) -> None:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG")
    write_atomically(path, content.getvalue())
