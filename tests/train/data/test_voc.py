"""Pascal VOC's objects, in its own layout and in that of SBD."""

import numpy as np
import pytest
import torch
from PIL import Image

from sparsight.train.average_recall import average_recall, to_coco_masks
from sparsight.train.data import write_synthetic_voc
from sparsight.train.data.voc import CLASSES, Voc, boxes_around


@pytest.fixture
def root(tmp_path):
    return write_synthetic_voc(tmp_path / "voc", num_images=4, size=(48, 64))


def write_sbd(root, *, shape=(20, 30)):
    savemat = pytest.importorskip("scipy.io").savemat
    for part in ("img", "inst"):
        (root / part).mkdir(parents=True)
    objects = np.zeros((20, 30), dtype=np.uint8)
    objects[2:8, 3:9] = 1
    objects[10:15, 20:30] = 2
    Image.new("RGB", shape[::-1]).save(root / "img" / "2008_1.jpg")
    categories = np.array([[7], [15]], dtype=np.uint8)
    savemat(
        root / "inst" / "2008_1.mat",
        {"GTinst": {"Segmentation": objects, "Categories": categories}},
    )
    (root / "train_noval.txt").write_text("2008_1\n")
    return root


@pytest.mark.parametrize("folder", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_objects_are_those_of_the_map_and_void_is_of_none(root, folder):
    data = Voc(root / folder, "train")
    assert len(data) == 4 and data.classes[7] == "car" and len(data.classes) == 21
    image, target = data[1]
    annotation = data.items[1][1]
    objects = np.array(Image.open(annotation))
    classes = np.array(Image.open(annotation.parents[1] / "SegmentationClass" / annotation.name))
    numbers = sorted(set(objects.ravel().tolist()) - {0, 255})
    assert image.shape[1:] == objects.shape and len(target["masks"]) == len(numbers) > 1
    for mask, label, number in zip(target["masks"], target["labels"], numbers, strict=True):
        assert torch.equal(mask, torch.from_numpy(objects == number))
        assert set(classes[objects == number].tolist()) == {int(label)}
    assert not target["iscrowd"].any() and target["image_id"] == 1
    assert torch.equal(target["boxes"], boxes_around(target["masks"]))
    assert len(data[2][1]["masks"]) == 0 and data[2][1]["boxes"].shape == (0, 4)


def test_boxes_are_around_the_masks():
    masks = torch.zeros(2, 5, 7, dtype=torch.bool)
    masks[0, 1:3, 2:6] = True
    masks[1, 4, 6] = True
    assert boxes_around(masks).tolist() == [[2, 1, 6, 3], [6, 4, 7, 5]]


def test_the_truth_is_that_of_the_items(root):
    data = Voc(root, "train")
    truth = data.ground_truth([0, 1, 2])
    assert [image["id"] for image in truth["images"]] == [0, 1, 2]
    found = []
    for index in range(3):
        _, target = data[index]
        scores = torch.ones(len(target["masks"]))
        found += to_coco_masks(
            {**target, "masks": target["masks"][:, None], "scores": scores}, image_id=index
        )
    assert len(found) == len(truth["annotations"])
    assert average_recall(truth, found).ar100 == 1
    assert average_recall(data.ground_truth(), found).ar100 < 1


def test_sbd_is_read_too(tmp_path):
    for where in (tmp_path / "a", tmp_path / "b" / "benchmark_RELEASE" / "dataset"):
        write_sbd(where)
    for root in (tmp_path / "a", tmp_path / "b"):
        data = Voc(root, "train_noval")
        image, target = data[0]
        assert image.shape == (3, 20, 30) and data.is_sbd
        assert target["labels"].tolist() == [7, 15]
        assert target["boxes"].tolist() == [[3, 2, 9, 8], [20, 10, 30, 15]]
        assert target["masks"].sum((1, 2)).tolist() == [36, 50]
    assert CLASSES[7 - 1] == "car"


def test_broken_data_are_refused(root, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no list of images for split 'test'; expected"):
        Voc(root, "test")
    write_sbd(tmp_path / "sbd", shape=(10, 30))
    with pytest.raises(ValueError, match=r"is 10x30 and its masks are 20x30 \(height x width\)"):
        Voc(tmp_path / "sbd", "train_noval")[0]
    (tmp_path / "sbd" / "inst" / "2008_1.mat").write_bytes(b"no matrix")
    with pytest.raises(ValueError, match=r"2008_1.mat' holds no objects"):
        Voc(tmp_path / "sbd", "train_noval")[0]
    _, annotation = Voc(root, "train").items[0]
    annotation.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"cannot be read as a map of objects"):
        Voc(root, "train")[0]
    annotation.unlink()
    with pytest.raises(FileNotFoundError, match=r"1 files of train.txt are not there, first"):
        Voc(root, "train")
    listing = root / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation" / "train.txt"
    listing.write_text("")
    with pytest.raises(FileNotFoundError, match=r"train.txt is empty; expected"):
        Voc(root, "train")
