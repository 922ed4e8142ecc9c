"""COCO's recall of masks, whatever their class, on cases made by hand."""

import pytest
import torch

from sparsight.train.average_recall import average_recall, to_coco_masks
from sparsight.train.data.mask_rle import encode_masks


def rectangle(y0, x0, y1, x1, size=(100, 100)):
    mask = torch.zeros(*size, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return mask


def truth_of(*masks, crowds=(), image_ids=None):
    encoded = encode_masks(torch.stack(masks))
    image_ids = image_ids or [1] * len(masks)
    return {
        "images": [{"id": i, "height": 100, "width": 100} for i in sorted(set(image_ids))],
        "categories": [{"id": 1, "name": "a"}, {"id": 7, "name": "b"}],
        "annotations": [
            {
                "id": i + 1,
                "image_id": image_ids[i],
                "category_id": 1 if i % 2 else 7,
                "segmentation": encoded[i],
                "area": int(mask.sum()),
                "bbox": [0, 0, 100, 100],
                "iscrowd": int(i in crowds),
            }
            for i, mask in enumerate(masks)
        ],
    }


def proposals(*masks, image_id=1, scores=None):
    scores = torch.arange(len(masks), 0, -1) / (len(masks) + 1) if scores is None else scores
    return to_coco_masks(
        {
            "masks": torch.stack(masks)[:, None],
            "boxes": torch.zeros(len(masks), 4),
            "scores": torch.as_tensor(scores),
        },
        image_id=image_id,
    )


A, B = rectangle(0, 0, 40, 50), rectangle(50, 50, 60, 60)


def test_found_is_what_a_mask_covers_whatever_the_class():
    score = average_recall(truth_of(A, B), proposals(A, B))
    assert (score.ar10, score.ar100, score.ar1000) == (1, 1, 1)
    assert (score.ar100_small, score.ar100_medium, score.ar100_large) == (1, 1, None)
    score = average_recall(truth_of(A, B), proposals(A))
    assert score.ar100 == 0.5 and (score.ar100_small, score.ar100_medium) == (0, 1)


def test_recall_is_the_mean_over_ten_thresholds():
    """An IoU of 0.72 passes .5, .55, .6, .65 and .7."""
    part = rectangle(0, 0, 40, 36)
    assert average_recall(truth_of(A), proposals(part)).ar100 == pytest.approx(0.5)
    assert average_recall(truth_of(A), proposals(rectangle(0, 0, 40, 24))).ar100 == 0


def test_only_the_best_proposals_of_an_image_count():
    wrong = [rectangle(90, i, 95, i + 2) for i in range(10)]
    score = average_recall(truth_of(A), proposals(*wrong, A))
    assert (score.ar10, score.ar100) == (0, 1)
    score = average_recall(truth_of(A), proposals(*wrong, A, scores=[0.1] * 10 + [0.9]))
    assert (score.ar10, score.ar100) == (1, 1)
    many = [rectangle(60 + i // 90, i % 90, 62 + i // 90, i % 90 + 2) for i in range(100)]
    score = average_recall(truth_of(A), proposals(*many, A))
    assert (score.ar10, score.ar100, score.ar1000) == (0, 0, 1)


def test_a_crowd_is_neither_found_nor_missed():
    score = average_recall(truth_of(A, B, crowds=(1,)), proposals(A))
    assert score.ar100 == 1
    assert average_recall(truth_of(A, crowds=(0,)), proposals(A)).ar100 is None


def test_images_without_proposals_are_missed_and_boxes_do_not_matter():
    truth = truth_of(A, A, image_ids=[1, 2])
    assert average_recall(truth, proposals(A)).ar100 == 0.5
    assert average_recall(truth, []).ar100 == 0


def test_what_coco_takes():
    (one,) = proposals(A)
    assert one["segmentation"]["size"] == [100, 100] and one["category_id"] == 1
    assert isinstance(one["segmentation"]["counts"], str)
    nothing = {"masks": torch.zeros(0, 1, 9, 9).bool(), "boxes": torch.zeros(0, 4)}
    assert to_coco_masks({**nothing, "scores": torch.zeros(0)}, image_id=3) == []


def test_it_is_the_reference_evaluators_number():
    """pycocotools, on random masks."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    generator = torch.Generator().manual_seed(0)

    def some(count):
        corners = torch.randint(0, 60, (count, 2), generator=generator).tolist()
        sides = torch.randint(5, 40, (count, 2), generator=generator).tolist()
        return [
            rectangle(y, x, y + h, x + w) for (y, x), (h, w) in zip(corners, sides, strict=True)
        ]

    truth = truth_of(*some(12), image_ids=[1, 2] * 6)
    found = proposals(*some(60)) + proposals(*some(60), image_id=2)
    score = average_recall(truth, found)
    reference = COCO()
    reference.dataset = {**truth, "info": {}}
    reference.createIndex()
    rows = [{k: v for k, v in row.items() if k != "bbox"} for row in found]
    evaluator = COCOeval(reference, reference.loadRes(rows), "segm")
    evaluator.params.useCats = 0
    evaluator.params.maxDets = [10, 100, 1000]
    evaluator.evaluate()
    evaluator.accumulate()
    recall = evaluator.eval["recall"][:, 0, 0].mean(0)
    assert 0 < score.ar10 < score.ar100
    assert [score.ar10, score.ar100, score.ar1000] == pytest.approx(recall.tolist(), abs=1e-9)


def test_strangers_and_truth_without_masks_are_refused():
    with pytest.raises(ValueError, match=r"proposals of 1 images \(first 4\) arrived"):
        average_recall(truth_of(A), proposals(A, image_id=4))
    truth = truth_of(A)
    del truth["annotations"][0]["segmentation"]
    with pytest.raises(ValueError, match="with_masks=True"):
        average_recall(truth, proposals(A))
