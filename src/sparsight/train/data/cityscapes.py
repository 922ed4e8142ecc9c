"""Cityscapes through torchvision's data set, with the 19 classes that are scored."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import datasets, tv_tensors

# (train id, name) of the scored classes, in the order of their ids.
_SCORED = sorted((c.train_id, c.name) for c in datasets.Cityscapes.classes if not c.ignore_in_eval)
CLASSES = tuple(name for _, name in _SCORED)
IGNORE_INDEX = 255

_WHERE = (
    "Cityscapes (Cordts et al., CVPR 2016) comes from https://www.cityscapes-dataset.com after "
    "registration, as leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip; unpack both into "
    "one folder"
)


class Cityscapes(Dataset[tuple[tv_tensors.Image, tv_tensors.Mask]]):
    """Street scenes with a class map each, fine annotations.

    Args:
        root: folder that holds `leftImg8bit/<split>/<city>/<frame>_leftImg8bit.png` and
            `gtFine/<split>/<city>/<frame>_gtFine_labelIds.png`, as they are unpacked.
        split: "train" (2,975 images) or "val" (500).

    Raises:
        FileNotFoundError: a folder is missing or empty, or an image has no annotation.

    An item is `(image, class map)`: image uint8 (3, H, W) RGB, class map int64 (H, W) with values 0
    to 18 for `CLASSES` and 255 for pixels that do not count: the data set's label ids become its
    train ids on the way. Reading an item raises ValueError for an id that the data set does not
    define.

    Source: Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR
    2016, arXiv 1604.01685.
    """

    name = "cityscapes"
    classes = CLASSES
    ignore_index = IGNORE_INDEX

    def __init__(self, root: str | Path, split: Literal["train", "val"]) -> None:
        for name in ("leftImg8bit", "gtFine"):
            if not any((Path(root) / name / split).glob("*/*.png")):
                raise FileNotFoundError(
                    f"Cityscapes: root={str(root)!r} has no images in {name}/{split}/<city>/; "
                    f"expected leftImg8bit/ and gtFine/, each with train/ and val/; {_WHERE} and "
                    "pass that folder."
                )
        self.source = datasets.Cityscapes(
            str(root), split=split, mode="fine", target_type="semantic"
        )
        # torchvision lists folders in the file system's order, which is another on every machine.
        pairs = zip(self.source.images, self.source.targets, strict=True)
        self.items = sorted((Path(image), Path(target[0])) for image, target in pairs)
        self.source.images = [str(image) for image, _ in self.items]
        self.source.targets = [[str(target)] for _, target in self.items]
        orphans = [image.name for image, target in self.items if not target.is_file()]
        if orphans:
            raise FileNotFoundError(
                f"Cityscapes: {len(orphans)} of {len(self.items)} images in {split!r} have no "
                f"annotation, first {orphans[0]!r}; expected <frame>_gtFine_labelIds.png beside "
                f"the others of its city in gtFine/{split}/; {_WHERE}."
            )
        self._train_ids = np.full(256, -1, dtype=np.int64)
        for c in datasets.Cityscapes.classes:
            if c.id >= 0:
                self._train_ids[c.id] = IGNORE_INDEX if c.ignore_in_eval else c.train_id

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        path = str(self.items[index][1])
        try:
            picture, annotation = self.source[index]
        except (OSError, SyntaxError) as error:  # PIL: SyntaxError for a broken PNG chunk
            raise ValueError(
                f"Cityscapes: {path!r} or its image cannot be read ({error}); two PNG files are "
                "required; fetch the pair again."
            ) from error
        image, ids = np.array(picture), np.array(annotation)
        if ids.ndim != 2 or ids.shape != image.shape[:2]:
            raise ValueError(
                f"Cityscapes: annotation {path!r} has shape {ids.shape}; one channel of the "
                f"image's {image.shape[:2]} is required; fetch the pair again."
            )
        labels = self._train_ids[ids]
        if (labels < 0).any():
            unknown = int(ids[labels < 0].flat[0])
            raise ValueError(
                f"Cityscapes: annotation {path!r} contains id {unknown}; the data set's label ids, "
                "0 to 33, are required; pass *_labelIds.png as they were published, not train ids."
            )
        return (
            tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1).contiguous()),
            tv_tensors.Mask(torch.from_numpy(labels)),
        )
