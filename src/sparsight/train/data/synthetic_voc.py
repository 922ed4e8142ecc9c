"""Street scenes drawn into files in VOC's layout: a data set for tests and quick runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from sparsight.train.data.augment import mix_seed
from sparsight.train.data.synthetic import CAR, PEDESTRIAN, draw_scene
from sparsight.train.data.voc import CLASSES

_LABEL_OF = {CAR: 1 + CLASSES.index("car"), PEDESTRIAN: 1 + CLASSES.index("person")}
_VOID = 255


def write_synthetic_voc(
    root: str | Path,
    *,
    num_images: int = 8,
    split: str = "train",
    size: tuple[int, int] = (96, 128),
    seed: int = 0,
) -> Path:
    """Write drawn street scenes as VOC 2012; return the folder that holds `VOCdevkit`.

    As in VOC the outermost pixels of objects are void; every fourth image from the third has no
    object.

    Args:
        root: folder to write into.
        num_images: images of the split.
        split: name of the list of images.
        size: (height, width) in pixels, at least 16 each; every other image is narrower by an
            eighth.
        seed: the same one writes the same images on any machine, up to the JPEG encoder.
    """
    folder = Path(root) / "VOCdevkit" / "VOC2012"
    for part in ("JPEGImages", "SegmentationObject", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    names = []
    for index in range(num_images):
        height, width = size[0], size[1] - (size[1] // 8 if index % 2 else 0)
        scene = draw_scene((height, width), seed=mix_seed(seed, index))
        objects = scene.instance_map.numpy().astype(np.uint8)
        pixels = scene.image.permute(1, 2, 0).numpy()
        if index % 4 == 2:
            objects = np.zeros_like(objects)
            pixels = np.broadcast_to(pixels[:1], pixels.shape)  # its sky alone
        label_of = np.array([0, *(_LABEL_OF[label] for label in scene.labels.tolist())])
        classes = label_of[objects].astype(np.uint8)
        border = np.zeros_like(objects, dtype=bool)
        border[:, 1:] |= objects[:, 1:] != objects[:, :-1]
        border[1:] |= objects[1:] != objects[:-1]
        names.append(f"{split}_{index:06d}")
        picture = Image.fromarray(np.ascontiguousarray(pixels))
        picture.save(folder / "JPEGImages" / f"{names[-1]}.jpg", quality=95)
        for part, values in (("SegmentationObject", objects), ("SegmentationClass", classes)):
            drawn = Image.fromarray(np.where(border, np.uint8(_VOID), values))
            drawn.putpalette([channel for k in range(256) for channel in (k, 7 * k % 256, k)])
            drawn.save(folder / part / f"{names[-1]}.png")
    listing = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
    listing.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return Path(root)
