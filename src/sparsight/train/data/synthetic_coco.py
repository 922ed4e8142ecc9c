"""Street scenes drawn into files in COCO's layout: a data set for tests and quick runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sparsight.train.data.augment import mix_seed
from sparsight.train.data.mask_rle import encode_masks
from sparsight.train.data.synthetic import CAR, PEDESTRIAN, draw_scene

# COCO's own ids: not in a row, and not in the order of the scenes' classes.
_CATEGORIES = [
    {"id": 1, "name": "person", "supercategory": "person"},
    {"id": 3, "name": "car", "supercategory": "vehicle"},
]
_CATEGORY_OF = {PEDESTRIAN: 1, CAR: 3}


def write_synthetic_coco(
    root: str | Path,
    *,
    num_images: int = 8,
    split: str = "train2017",
    size: tuple[int, int] = (96, 128),
    seed: int = 0,
) -> Path:
    """Write drawn street scenes as a COCO data set; return its folder.

    What is awkward in COCO is in it: every fourth image from the third has no object, in every
    fourth from the second the farthest one is a crowd region, widths alternate, category ids have
    gaps, objects are covered by others, some wholly: their masks are empty.

    Args:
        root: folder to write `annotations/instances_<split>.json` and `<split>/` into.
        num_images: images of the split.
        split: name of the split.
        size: (height, width) in pixels, at least 16 each; every other image is narrower by an
            eighth.
        seed: the same one writes the same images on any machine, up to the JPEG encoder.
    """
    root = Path(root)
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(num_images):
        height, width = size[0], size[1] - (size[1] // 8 if index % 2 else 0)
        scene = draw_scene((height, width), seed=mix_seed(seed, index))
        pixels = scene.image.permute(1, 2, 0).numpy()
        image_id = 100 + 7 * index
        has_objects = index % 4 != 2
        if not has_objects:
            pixels = np.broadcast_to(pixels[:1], pixels.shape)  # its sky alone
        name = f"{image_id:012d}.jpg"
        Image.fromarray(np.ascontiguousarray(pixels)).save(root / split / name, quality=95)
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        pairs = zip(scene.boxes.tolist(), scene.labels.tolist(), strict=True)
        numbers = torch.arange(1, len(scene.boxes) + 1)[:, None, None]
        masks = encode_masks(scene.instance_map == numbers)
        for order, ((x0, y0, x1, y1), label) in enumerate(pairs if has_objects else ()):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": _CATEGORY_OF[label],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": 0.8 * (x1 - x0) * (y1 - y0),  # of the whole mask, covered or not
                    "iscrowd": int(index % 4 == 1 and order == 0),
                    "segmentation": masks[order],
                }
            )
    content = {
        "info": {"description": "street scenes drawn by sparsight"},
        "images": images,
        "annotations": annotations,
        "categories": _CATEGORIES,
    }
    path = root / "annotations" / f"instances_{split}.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return root
