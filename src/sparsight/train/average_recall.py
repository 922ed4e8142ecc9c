"""COCO's recall of mask proposals, whatever their class, by its evaluator in its compiled form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from sparsight.train.data.mask_rle import encode_masks

MOST_PROPOSALS: tuple[int, ...] = (10, 100, 1000)
_AREAS = ("all", "small", "medium", "large")  # in the evaluator's order
_CATEGORY = 1  # of every proposal: which object it is of is not said


@dataclass(frozen=True)
class AverageRecall:
    """Recall of objects by masks, in [0, 1]; None where no object is of that kind.

    The mean over the IoU thresholds .5, .55 to .95 of the share of the objects that a proposal
    covers so well, as COCO takes it; the paper integrates over the thresholds between .5 and 1.

    Attributes:
        ar10: with the 10 best proposals of each image.
        ar100: with the 100 best.
        ar1000: with the 1000 best.
        ar100_small: with the 100 best, of objects below 32x32 pixels of mask area.
        ar100_medium: of objects from there to 96x96.
        ar100_large: of objects above.
    """

    ar10: float | None
    ar100: float | None
    ar1000: float | None
    ar100_small: float | None
    ar100_medium: float | None
    ar100_large: float | None


def to_coco_masks(proposals: Mapping[str, Tensor], *, image_id: int) -> list[dict[str, Any]]:
    """Return one image's proposals in the form that COCO's evaluator and server take.

    Args:
        proposals: {"masks": (n, 1, H, W) bool, "boxes": (n, 4) x0 y0 x1 y1, "scores": (n,)}.
        image_id: of the image.

    Returns:
        {"image_id", "category_id": 1, "segmentation": compressed run lengths, "bbox": [x, y, width,
        height], "score"} each.
    """
    rows = zip(
        encode_masks(proposals["masks"][:, 0]),
        proposals["boxes"].tolist(),
        proposals["scores"].tolist(),
        strict=True,
    )
    return [
        {
            "image_id": image_id,
            "category_id": _CATEGORY,
            "segmentation": mask,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": score,
        }
        for mask, (x0, y0, x1, y1), score in rows
    ]


def average_recall(
    ground_truth: dict[str, Any], proposals: Sequence[dict[str, Any]]
) -> AverageRecall:
    """Return how well masks cover objects.

    Args:
        ground_truth: annotations with masks in COCO's form (`Coco.ground_truth()`), of all images
            that count. Crowd regions are neither found nor missed.
        proposals: of all images together, each as `to_coco_masks` returns it.

    Raises:
        ValueError: a proposal is of an image that the ground truth does not have, or the ground
            truth has no masks.

    Source: the evaluator of Lin et al., ECCV 2014, with `useCats=0`, `iouType="segm"` and
    `maxDets=[10, 100, 1000]`, in the reimplementation faster-coco-eval (Apache-2.0).
    """
    from faster_coco_eval import COCO, COCOeval_faster  # heavy: only for those who evaluate

    known = {image["id"] for image in ground_truth["images"]}
    strangers = sorted({p["image_id"] for p in proposals} - known)
    if strangers:
        raise ValueError(
            f"average_recall: proposals of {len(strangers)} images (first {strangers[0]}) arrived "
            f"that are not among the {len(known)} of the ground truth; only those are required; "
            "evaluate on the split that the ground truth is of."
        )
    if any("segmentation" not in annotation for annotation in ground_truth["annotations"]):
        raise ValueError(
            "average_recall: the ground truth has annotations without a segmentation; masks are "
            "required; open the data set with with_masks=True."
        )
    truth = COCO(ground_truth)
    # Of the whole mask the evaluator sees the run lengths, and it takes areas from boxes: they
    # would only sort proposals that match nothing, which recall does not count.
    rows = [{k: v for k, v in p.items() if k != "bbox"} for p in proposals]
    evaluator = COCOeval_faster(
        truth, truth.loadRes(rows), iouType="segm", print_function=_say_nothing
    )
    evaluator.params.useCats = 0
    evaluator.params.maxDets = list(MOST_PROPOSALS)
    evaluator.evaluate()
    evaluator.accumulate()
    # (thresholds, classes, areas, proposals)
    recall = np.asarray(evaluator.eval["recall"])[:, 0]

    def mean(area: str, most: int) -> float | None:
        values = recall[:, _AREAS.index(area), MOST_PROPOSALS.index(most)]
        return None if (values < 0).any() else float(values.mean())

    return AverageRecall(
        ar10=mean("all", 10),
        ar100=mean("all", 100),
        ar1000=mean("all", 1000),
        ar100_small=mean("small", 100),
        ar100_medium=mean("medium", 100),
        ar100_large=mean("large", 100),
    )


def _say_nothing(*_: Any) -> None:
    """The evaluator reports its progress; nobody asked."""
