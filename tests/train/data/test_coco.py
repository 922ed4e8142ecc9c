import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from sparsight.train.average_precision import average_precision, to_coco
from sparsight.train.data.coco import Coco
from sparsight.train.data.mask_rle import decode_masks
from sparsight.train.data.synthetic_coco import write_synthetic_coco


@pytest.fixture
def root(tmp_path) -> Path:
    return write_synthetic_coco(tmp_path / "coco", num_images=8, size=(48, 64))


def annotations_of(root: Path) -> Path:
    return root / "annotations" / "instances_train2017.json"


def edit(root: Path, change) -> None:
    content = json.loads(annotations_of(root).read_text())
    change(content)
    annotations_of(root).write_text(json.dumps(content))


def test_an_item_is_an_image_with_its_boxes(root):
    dataset = Coco(root)
    assert len(dataset) == 8
    content = json.loads(annotations_of(root).read_text())
    image, target = dataset[3]
    record = content["images"][3]
    assert image.dtype == torch.uint8
    assert image.shape == (3, record["height"], record["width"])
    assert target["image_id"] == record["id"]
    real = [a for a in content["annotations"] if a["image_id"] == record["id"]]
    boxes = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in real)]
    assert target["boxes"].tolist() == boxes
    assert [dataset.category_of[i] for i in target["labels"].tolist()] == [
        a["category_id"] for a in real
    ]


def test_labels_are_numbered_in_a_row_or_are_the_category_ids(root):
    in_a_row, as_they_are = Coco(root), Coco(root, num_classes=4)
    assert in_a_row.category_of == {1: 1, 2: 3}
    assert in_a_row.classes == ["background", "person", "car"]
    assert in_a_row.num_classes == 3
    assert as_they_are.category_of == {1: 1, 3: 3}
    assert as_they_are.classes == ["background", "person", None, "car"]
    assert torch.equal(
        torch.where(in_a_row[0][1]["labels"] == 2, 3, 1), as_they_are[0][1]["labels"]
    )
    with pytest.raises(ValueError, match=r"num_classes=7.*2 categories with ids up to 3; 3 .*or 4"):
        Coco(root, num_classes=7)


def test_images_without_objects_are_kept_or_not(root):
    assert [len(target["boxes"]) for _, target in Coco(root)].count(0) == 2
    dataset = Coco(root, keeps_empty=False)
    assert len(dataset) == 6
    assert all(len(target["boxes"]) for _, target in dataset)
    _, target = Coco(root)[2]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].dtype == torch.int64


def test_crowd_regions_are_in_the_truth_and_not_in_the_items(root):
    dataset = Coco(root)
    truth = dataset.ground_truth()
    crowds = [a for a in truth["annotations"] if a["iscrowd"]]
    assert len(crowds) == 2
    in_items = sum(len(target["boxes"]) for _, target in dataset)
    assert in_items == len(truth["annotations"]) - 2
    edit(root, lambda c: [a.update(iscrowd=1) for a in c["annotations"]])
    assert len(Coco(root, keeps_empty=False)) == 0


def test_boxes_are_clipped_and_empty_ones_left_out(root):
    def change(content):
        first = [a for a in content["annotations"] if a["image_id"] == 100]
        first[0]["bbox"] = [-5, 40, 20, 30]
        first[1]["bbox"] = [10, 10, 0, 5]
        first[2]["bbox"] = [70, 10, 5, 5]

    before = len(Coco(root)[0][1]["boxes"])
    edit(root, change)
    boxes = Coco(root)[0][1]["boxes"]
    assert len(boxes) == before - 2
    assert boxes[0].tolist() == [0, 40, 15, 48]


def test_the_truth_found_exactly_scores_one(root):
    """The whole way: items as detections, label and box format back, into COCO's evaluator."""
    for num_classes in (3, 4):
        dataset = Coco(root, num_classes=num_classes)
        found = []
        for _, target in dataset:
            target["scores"] = torch.ones(len(target["boxes"]))
            found += to_coco(target, image_id=target["image_id"], category_of=dataset.category_of)
        score = average_precision(dataset.ground_truth(), found)
        assert score.ap == pytest.approx(1.0)
        assert set(score.class_ap) == {"person", "car"}


def test_the_first_images_alone(root):
    dataset = Coco(root, max_images=3)
    assert len(dataset) == len(dataset.ground_truth()["images"]) == 3
    with pytest.raises(IndexError):
        dataset[3]


def test_what_is_missing_is_named_with_the_layout_and_the_source(root):
    for split, path in (("val2017", r"annotations/instances_val2017\.json"), (None, "train2017")):
        if split is None:
            (root / "train2017").rename(root / "elsewhere")
        with pytest.raises(
            FileNotFoundError,
            match=rf"Coco: root='.*' has no {path}; expected annotations/instances_<split>\.json "
            r"and the images in <split>/.*cocodataset\.org.*; pass the folder",
        ):
            Coco(root, split or "train2017")


def test_absent_images_are_counted(root):
    (root / "train2017" / "000000000107.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 8 annotated images.*first '000000000107"):
        Coco(root)


def test_broken_files_are_named(root):
    Image.new("RGB", (9, 9)).save(root / "train2017" / "000000000100.jpg")
    (root / "train2017" / "000000000107.jpg").write_bytes(b"no image")
    dataset = Coco(root)
    with pytest.raises(ValueError, match=r"is 9x9 but its annotations are for 64x48"):
        dataset[0]
    with pytest.raises(ValueError, match=r"000000000107\.jpg' cannot be read as an image"):
        dataset[1]
    annotations_of(root).write_text("{}")
    with pytest.raises(ValueError, match=r"has no annotations, categories, images; instance"):
        Coco(root)
    annotations_of(root).write_text("{")
    with pytest.raises(ValueError, match=r"is no JSON"):
        Coco(root)


def test_the_real_data_is_as_described():
    """Set SPARSIGHT_TEST_DATA to a folder that holds `coco` to run this."""
    folder = os.environ.get("SPARSIGHT_TEST_DATA")
    if folder is None or not (Path(folder) / "coco").is_dir():
        pytest.skip("SPARSIGHT_TEST_DATA names no folder with coco/ in it")
    train = Coco(Path(folder) / "coco", "train2017", keeps_empty=False)
    val = Coco(Path(folder) / "coco", "val2017", num_classes=91)
    assert train.num_classes == 81
    assert val.category_of[90] == 90
    for dataset, count in ((train, 746), (val, 294)):
        truth = dataset.ground_truth()
        assert len(truth["annotations"]) == count
        crowds = sum(a["iscrowd"] for a in truth["annotations"])
        in_items = sum(len(dataset[i][1]["boxes"]) for i in range(len(dataset)))
        assert in_items == count - crowds


def test_masks_come_with_their_crowds_and_without_what_is_not_seen(root):
    dataset, plain = Coco(root, with_masks=True), Coco(root)
    truth = dataset.ground_truth()
    assert len(truth["annotations"]) == len(plain.ground_truth()["annotations"])
    json.dumps(truth)
    num_crowds = 0
    for i in range(len(dataset)):
        image, target = dataset[i]
        own = [a for a in truth["annotations"] if a["image_id"] == target["image_id"]]
        masks = decode_masks([a["segmentation"] for a in own], size=tuple(image.shape[1:]))
        seen = masks.flatten(1).any(1)
        assert torch.equal(target["masks"], masks[seen])
        crowds = torch.tensor([bool(a["iscrowd"]) for a in own], dtype=torch.bool)
        assert torch.equal(target["iscrowd"], crowds[seen])
        assert len(target["boxes"]) == len(target["labels"]) == int(seen.sum())
        num_crowds += int(target["iscrowd"].sum())
    assert num_crowds == 2
    assert (
        "masks" not in plain[0][1] and "segmentation" not in plain.ground_truth()["annotations"][0]
    )
    part = dataset.ground_truth([int(dataset.image_ids[3])])
    wanted = [a for a in truth["annotations"] if a["image_id"] == int(dataset.image_ids[3])]
    assert [a["segmentation"] for a in part["annotations"]] == [a["segmentation"] for a in wanted]


def test_annotations_without_masks_are_refused_where_masks_are_wanted(root):
    edit(root, lambda c: c["annotations"][2].pop("segmentation"))
    Coco(root)
    with pytest.raises(ValueError, match=r"annotation 3 of image \d+ has no mask that can be read"):
        Coco(root, with_masks=True)
