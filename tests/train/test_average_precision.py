import contextlib
import io

import pytest
import torch
from pycocotools import coco, cocoeval

from sparsight.train.average_precision import average_precision, to_coco

CATEGORY_OF = {1: 1, 2: 3}
BOX = [10.0, 10.0, 50.0, 40.0]


def truth(annotations, num_images=2):
    return {
        "info": {},
        "images": [
            {"id": i, "height": 200, "width": 200, "file_name": ""} for i in range(num_images)
        ],
        "annotations": [
            {"id": n + 1, "area": box[2] * box[3], "iscrowd": crowd, "bbox": box}
            | {"image_id": image, "category_id": category}
            for n, (image, category, box, crowd) in enumerate(annotations)
        ],
        "categories": [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}],
    }


def found(*rows):
    keys = ("image_id", "category_id", "bbox", "score")
    return [dict(zip(keys, row, strict=True)) for row in rows]


def test_labels_become_categories_and_corners_become_sizes():
    detections = {
        "boxes": torch.tensor([[1.0, 2.0, 11.0, 22.0], [0.0, 0.0, 1.0, 1.0]]),
        "labels": torch.tensor([2, 7]),
        "scores": torch.tensor([0.5, 0.9]),
    }
    assert to_coco(detections, image_id=4, category_of=CATEGORY_OF) == [
        {"image_id": 4, "category_id": 3, "bbox": [1.0, 2.0, 10.0, 20.0], "score": 0.5}
    ]


def test_what_is_found_exactly_scores_one_and_absent_kinds_do_not_count():
    score = average_precision(truth([(0, 1, BOX, 0)]), found((0, 1, BOX, 0.9)))
    assert score.ap == score.ap50 == score.ap75 == score.ar1 == score.ap_medium == pytest.approx(1)
    assert score.ap_small is None
    assert score.ap_large is None
    assert score.class_ap == {"person": pytest.approx(1)}


def test_nothing_found_scores_zero_and_nothing_to_find_has_no_score():
    assert average_precision(truth([(0, 1, BOX, 0)]), []).ap == 0.0
    assert average_precision(truth([]), found((0, 1, BOX, 0.9))).ap is None


def test_a_shifted_box_counts_at_the_lower_thresholds_only():
    """IoU 0.75 exactly passes 6 of the 10 thresholds .5, .55, ..., .95."""
    shifted = [10.0, 10.0, 50.0, 30.0]
    score = average_precision(truth([(0, 1, BOX, 0)]), found((0, 1, shifted, 0.9)))
    assert score.ap50 == pytest.approx(1)
    assert score.ap == pytest.approx(0.6)


def test_a_crowd_region_is_neither_found_nor_missed_nor_a_mistake():
    crowd = (1, 1, [0.0, 0.0, 200.0, 200.0], 1)
    hit = (0, 1, BOX, 0.5)
    inside = (1, 1, [20.0, 20.0, 40.0, 40.0], 0.9)
    assert average_precision(truth([(0, 1, BOX, 0), crowd]), found(hit)).ap == pytest.approx(1)
    assert average_precision(
        truth([(0, 1, BOX, 0), crowd]), found(hit, inside)
    ).ap == pytest.approx(1)
    # Without the crowd region, the better scored one is wrong.
    assert average_precision(truth([(0, 1, BOX, 0)]), found(hit, inside)).ap == pytest.approx(0.5)


def test_an_image_of_another_set_is_refused():
    with pytest.raises(ValueError, match=r"detections of 1 images \(first 9\).*2 of the ground"):
        average_precision(truth([(0, 1, BOX, 0)]), found((9, 1, BOX, 0.9)))


def test_arguments_are_left_as_they_were():
    detections = found((0, 1, BOX, 0.9))
    average_precision(truth([(0, 1, BOX, 0)]), detections)
    assert detections == found((0, 1, BOX, 0.9))


def test_the_numbers_are_those_of_pycocotools():
    """The reference evaluator on random boxes."""
    generator = torch.Generator().manual_seed(0)

    def boxes(count, low, high):
        corner = torch.rand(count, 2, generator=generator) * 90
        side = low + torch.rand(count, 2, generator=generator) * (high - low)
        return torch.cat([corner, side], 1).tolist()

    real = [
        (n % 5, 1 if n % 3 else 3, box, int(n % 11 == 0)) for n, box in enumerate(boxes(60, 5, 110))
    ]
    ground_truth = truth(real, num_images=6)
    detections = found(
        *(
            (n % 6, 1 if n % 4 else 3, box, float(n * 37 % 101) / 101)
            for n, box in enumerate(boxes(80, 5, 110))
        ),
        *((image, category, [box[0] + 2, *box[1:]], 0.6) for image, category, box, _ in real[::2]),
    )
    with contextlib.redirect_stdout(io.StringIO()):
        reference = coco.COCO()
        reference.dataset = truth(real, num_images=6)
        reference.createIndex()
        evaluator = cocoeval.COCOeval(reference, reference.loadRes(detections), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    score = average_precision(ground_truth, detections)
    arrived = [value for value in list(vars(score).values())[:12]]
    assert arrived == pytest.approx(evaluator.stats.tolist(), abs=1e-9)
    assert 0.05 < arrived[0] < 0.95
