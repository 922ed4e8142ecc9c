from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparsight.train.data.augment import SeededView
from sparsight.train.data.imagenet import (
    ImageFolders,
    imagenet_evaluation_transform,
    imagenet_training_transform,
)


def write(root: Path, split: str, name: str, count: int = 1, value: int = 0):
    folder = root / split / name
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.full((20 + i, 30, 3), value, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def test_classes_are_numbered_as_in_training(tmp_path):
    for name, value in (("n02", 20), ("n01", 10), ("n03", 30)):
        write(tmp_path, "train", name, count=2, value=value)
    write(tmp_path, "val", "n03", value=30)
    train, val = ImageFolders(tmp_path, "train"), ImageFolders(tmp_path, "val")
    assert train.classes == val.classes == ("n01", "n02", "n03")
    assert [(int(image[0, 0, 0]), label) for image, label in train] == [
        *[(10, 0)] * 2,
        *[(20, 1)] * 2,
        *[(30, 2)] * 2,
    ]
    image, label = val[0]
    assert (tuple(image.shape), image.dtype, label) == ((3, 20, 30), torch.uint8, 2)


@pytest.mark.parametrize("missing", ["train", "val"])
def test_a_missing_folder_says_what_is_expected_and_where_to_get_it(tmp_path, missing):
    write(tmp_path, "val" if missing == "train" else "train", "n01")
    with pytest.raises(
        FileNotFoundError,
        match=rf"ImageFolders: root='.*' has no folder of classes '{missing}'; expected "
        r"train/<class>/.*val/<class>/.*ILSVRC 2012.*image-net\.org.*pass the folder",
    ):
        ImageFolders(tmp_path, "train")


def test_an_unknown_class_in_validation_is_named(tmp_path):
    write(tmp_path, "train", "n01")
    write(tmp_path, "val", "n02")
    with pytest.raises(ValueError, match=r"1 classes that train has not, first 'n02'"):
        ImageFolders(tmp_path, "val")


def test_a_class_without_images_is_named(tmp_path):
    write(tmp_path, "train", "n01")
    write(tmp_path, "val", "n01")
    (tmp_path / "train" / "n02").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no image .*n02"):
        ImageFolders(tmp_path, "train")


def test_a_file_that_is_no_image_is_named(tmp_path):
    write(tmp_path, "train", "n01")
    write(tmp_path, "val", "n01")
    (tmp_path / "train" / "n01" / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"ImageFolders: .*0\.png' cannot be read as an image"):
        ImageFolders(tmp_path, "train")[0]


def test_transforms_make_the_size_and_keep_the_class(tmp_path):
    write(tmp_path, "train", "n01", value=128)
    write(tmp_path, "val", "n01", value=128)
    dataset = ImageFolders(tmp_path, "train")
    for transform in (
        imagenet_training_transform((16, 12)),
        imagenet_evaluation_transform((16, 12)),
    ):
        image, label = SeededView(dataset, transform)[0]
        assert type(image) is torch.Tensor
        assert (tuple(image.shape), image.dtype, label) == ((3, 16, 12), torch.float32, 0)
        assert torch.allclose(image[0], torch.full((16, 12), (128 / 255 - 0.485) / 0.229))


def test_evaluation_takes_the_middle(tmp_path):
    """At 256 of the shorter side, the middle 224: for a 40x80 image, 35 of 40 rows."""
    folder = tmp_path / "train" / "n01"
    folder.mkdir(parents=True)
    write(tmp_path, "val", "n01")
    pixels = np.zeros((64, 128, 3), dtype=np.uint8)
    pixels[4:60, 36:92] = 255
    Image.fromarray(pixels).save(folder / "a.png")
    transform = imagenet_evaluation_transform((56, 56))
    image, _ = SeededView(ImageFolders(tmp_path, "train"), transform)[0]
    assert torch.allclose(image[0], torch.tensor((1 - 0.485) / 0.229), atol=1e-3)
