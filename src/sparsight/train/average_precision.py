"""COCO's box metrics, by its own evaluator in the compiled form of faster-coco-eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

# In the order of COCO's summary.
_NAMES = (
    "ap",
    "ap50",
    "ap75",
    "ap_small",
    "ap_medium",
    "ap_large",
    "ar1",
    "ar10",
    "ar100",
    "ar_small",
    "ar_medium",
    "ar_large",
)


@dataclass(frozen=True)
class AveragePrecision:
    """COCO's summary of detections, in [0, 1]; None where no object is of that kind.

    Attributes:
        ap: mean over IoU thresholds .5 to .95 and classes ("mAP", "AP").
        ap50: at IoU .5.
        ap75: at IoU .75.
        ap_small: of objects below 32x32 pixels of mask area.
        ap_medium: of objects from there to 96x96.
        ap_large: of objects above.
        ar1: mean recall with at most 1 detection an image.
        ar10: with at most 10.
        ar100: with at most 100.
        ar_small: with at most 100, of small objects.
        ar_medium: of medium ones.
        ar_large: of large ones.
        class_ap: `ap` per class name; classes without objects are left out.
    """

    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    ar1: float | None
    ar10: float | None
    ar100: float | None
    ar_small: float | None
    ar_medium: float | None
    ar_large: float | None
    class_ap: dict[str, float]


def to_coco(
    detections: Mapping[str, Tensor], *, image_id: int, category_of: Mapping[int, int]
) -> list[dict[str, Any]]:
    """Return one image's detections in the form that COCO's evaluator and server take.

    Args:
        detections: {"boxes": (N, 4) x0 y0 x1 y1, "labels": (N,), "scores": (N,)}.
        image_id: of the image.
        category_of: category id by label; detections of other labels are left out (a detector of
            91 classes has labels without a category).
    """
    rows = zip(
        detections["boxes"].tolist(),
        detections["labels"].tolist(),
        detections["scores"].tolist(),
        strict=True,
    )
    return [
        {
            "image_id": image_id,
            "category_id": category_of[label],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": score,
        }
        for (x0, y0, x1, y1), label, score in rows
        if label in category_of
    ]


def average_precision(
    ground_truth: dict[str, Any], detections: Sequence[dict[str, Any]]
) -> AveragePrecision:
    """Return COCO's box metrics.

    Args:
        ground_truth: annotations in COCO's form (`Coco.ground_truth()`), of all images that count:
            one without detections counts as missed, one without objects makes each detection a
            wrong one. Crowd regions are neither found nor missed.
        detections: of all images together, each as `to_coco` returns it.

    Raises:
        ValueError: a detection is of an image that the ground truth does not have.

    Source: the evaluator of Lin et al., ECCV 2014 (pycocotools), in the reimplementation
    faster-coco-eval (Apache-2.0), whose numbers are the same.
    """
    from faster_coco_eval import COCO, COCOeval_faster  # heavy: only for those who evaluate

    known = {image["id"] for image in ground_truth["images"]}
    strangers = sorted({d["image_id"] for d in detections} - known)
    if strangers:
        raise ValueError(
            f"average_precision: detections of {len(strangers)} images (first {strangers[0]}) "
            f"arrived that are not among the {len(known)} of the ground truth; only those are "
            "required; evaluate on the split that the ground truth is of."
        )
    truth = COCO(ground_truth)
    evaluator = COCOeval_faster(
        truth,
        truth.loadRes([dict(d) for d in detections]),
        iouType="bbox",
        print_function=_say_nothing,
    )
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    values = [None if value < 0 else float(value) for value in np.asarray(evaluator.stats)[:12]]
    # (thresholds, recalls, classes, areas, detections): all areas, 100 detections.
    precision = np.asarray(evaluator.eval["precision"])[:, :, :, 0, -1]
    names = {c["id"]: str(c["name"]) for c in ground_truth["categories"]}
    class_ap = {
        names[category]: float(precision[:, :, k].mean())
        for k, category in enumerate(evaluator.params.catIds)
        if (precision[:, :, k] > -1).all()
    }
    return AveragePrecision(**dict(zip(_NAMES, values, strict=True)), class_ap=class_ap)


def _say_nothing(*_: Any) -> None:
    """The evaluator reports its progress; nobody asked."""
