"""Cityscapes in its own layout: frames of two cities drawn on the spot."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import Cityscapes as Source

from sparsight.train.data import Cityscapes


def write(root, split="train", frames=("aachen/aachen_000001", "bonn/bonn_000000"), ids=None):
    for i, frame in enumerate(frames):
        picture = root / "leftImg8bit" / split / f"{frame}_000019_leftImg8bit.png"
        annotation = root / "gtFine" / split / f"{frame}_000019_gtFine_labelIds.png"
        for path in (picture, annotation):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 6, 3), 10 * i, dtype=np.uint8)).save(picture)
        label = np.arange(24, dtype=np.uint8).reshape(4, 6) + 10 if ids is None else ids
        Image.fromarray(label).save(annotation)
    return root


def test_label_ids_become_train_ids(tmp_path):
    data = Cityscapes(write(tmp_path), "train")
    image, labels = data[1]
    assert len(data) == 2 and image.shape == (3, 4, 6) and image.dtype == torch.uint8
    assert (image == 10).all()  # in the order of the names, whatever the file system's
    assert labels.shape == (4, 6) and labels.dtype == torch.int64
    by_id = {c.id: c for c in Source.classes}
    for label, source in zip(labels.flatten().tolist(), range(10, 34), strict=True):
        c = by_id[source]
        assert label == (255 if c.ignore_in_eval else c.train_id)
        assert c.ignore_in_eval or data.classes[label] == c.name
    assert len(data.classes) == 19 and data.classes[0] == "road" and data.classes[18] == "bicycle"


@pytest.mark.parametrize("missing", ["leftImg8bit", "gtFine"])
def test_a_missing_folder_is_named_with_where_to_get_it(tmp_path, missing):
    other = {"leftImg8bit": "gtFine", "gtFine": "leftImg8bit"}[missing]
    (tmp_path / other / "val" / "ulm").mkdir(parents=True)
    (tmp_path / other / "val" / "ulm" / "ulm_000000.png").touch()
    (tmp_path / missing / "val" / "ulm").mkdir(parents=True)  # a city without a picture is nothing
    with pytest.raises(
        FileNotFoundError, match=rf"no images in {missing}/val/.*cityscapes-dataset\.com"
    ):
        Cityscapes(tmp_path, "val")


def test_an_image_without_annotation_is_named(tmp_path):
    write(tmp_path)
    next((tmp_path / "gtFine").rglob("bonn*.png")).unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images.*bonn_000000.*labelIds\.png"):
        Cityscapes(tmp_path, "train")


def test_ids_that_are_not_defined_are_named(tmp_path):
    ids = np.full((4, 6), 200, dtype=np.uint8)
    with pytest.raises(ValueError, match=r"contains id 200; the data set's label ids"):
        Cityscapes(write(tmp_path, ids=ids), "train")[0]


@pytest.mark.parametrize("kind", ["leftImg8bit", "gtFine"])
def test_a_file_that_is_no_image_is_named(tmp_path, kind):
    data = Cityscapes(write(tmp_path), "train")
    for path in (tmp_path / kind).rglob("*.png"):
        path.write_bytes(b"no")
    with pytest.raises(ValueError, match=r"Cityscapes: '.*labelIds.*cannot be read.*fetch"):
        data[0]


def test_sizes_that_differ_are_named(tmp_path):
    ids = np.full((4, 5), 7, dtype=np.uint8)
    with pytest.raises(ValueError, match=r"has shape \(4, 5\).*\(4, 6\)"):
        Cityscapes(write(tmp_path, ids=ids), "train")[0]
