import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparsight.train.data.camvid import CLASSES, CamVid, read_image

SIZE = (12, 16)


def write_pair(root: Path, split: str, name: str, labels: np.ndarray | None = None, suffix=".png"):
    for folder in (root / split, root / f"{split}annot"):
        folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(name))
    pixels = rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / split / f"{name}{suffix}")
    if labels is None:
        labels = rng.integers(0, 12, SIZE, dtype=np.uint8)
    Image.fromarray(labels).save(root / f"{split}annot" / f"{name}.png")
    return pixels, labels


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_pairs_come_in_order_with_their_values(tmp_path, suffix):
    written = [write_pair(tmp_path, "train", name, suffix=suffix) for name in ("b", "aa")]
    dataset = CamVid(tmp_path, "train")
    assert len(dataset) == 2
    for (pixels, labels), (image, class_map) in zip(written[::-1], dataset, strict=False):
        assert image.shape == (3, *SIZE)
        assert image.dtype == torch.uint8
        assert class_map.dtype == torch.int64
        assert np.array_equal(class_map.numpy(), labels)
        if suffix == ".png":
            assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)


def test_a_palette_annotation_is_read_as_indices(tmp_path):
    _, labels = write_pair(tmp_path, "train", "a")
    picture = Image.fromarray(labels).convert("P")
    picture.putdata(labels.flatten().tolist())
    picture.putpalette([value for i in range(256) for value in (i, 255 - i, 0)])
    picture.save(tmp_path / "trainannot" / "a.png")
    assert np.array_equal(CamVid(tmp_path, "train")[0][1].numpy(), labels)


@pytest.mark.parametrize("missing", ["train", "trainannot"])
def test_a_missing_folder_says_what_is_expected_and_where_to_get_it(tmp_path, missing):
    write_pair(tmp_path, "train", "a")
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(
        FileNotFoundError,
        match=rf"CamVid: root='.*' has no folder '{missing}'; expected train/, trainannot/, val/ "
        r"and valannot/ in it; CamVid \(Brostow.*2009\) in the SegNet arrangement.*https://github\.com/",
    ):
        CamVid(tmp_path, "train")


def test_an_empty_folder_is_named(tmp_path):
    for name in ("val", "valannot"):
        (tmp_path / name).mkdir()
    with pytest.raises(FileNotFoundError, match=r"val' holds no image; expected PNG or JPEG"):
        CamVid(tmp_path, "val")


def test_an_image_without_annotation_is_named(tmp_path):
    for name in ("a", "b", "c"):
        write_pair(tmp_path, "train", name)
    (tmp_path / "trainannot" / "b.png").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"1 of 3 images in .* no annotation, first 'b\.png'; expected b\.png",
    ):
        CamVid(tmp_path, "train")


def test_a_label_outside_the_classes_is_named(tmp_path):
    labels = np.zeros(SIZE, dtype=np.uint8)
    labels[3, 4] = 12
    write_pair(tmp_path, "train", "a", labels)
    with pytest.raises(
        ValueError, match=r"a\.png' contains label 12; 0 to 10 .* or 11 for ignored"
    ):
        CamVid(tmp_path, "train")[0]


def test_different_sizes_are_named(tmp_path):
    write_pair(tmp_path, "train", "a", np.zeros((12, 15), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"a\.png' is 15x12 but its image is 16x12 .*equal sizes"):
        CamVid(tmp_path, "train")[0]


def test_a_coloured_annotation_is_refused(tmp_path):
    write_pair(tmp_path, "train", "a", np.zeros((*SIZE, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"a\.png' has 3 channels; a one-channel class map"):
        CamVid(tmp_path, "train")[0]


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n broken"])
def test_an_unreadable_image_is_named(tmp_path, content):
    write_pair(tmp_path, "train", "a")
    (tmp_path / "train" / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"CamVid: .*a\.png' cannot be read as an image"):
        CamVid(tmp_path, "train")[0]


def test_a_truncated_image_is_named(tmp_path):
    write_pair(tmp_path, "train", "a", suffix=".jpg")
    path = tmp_path / "train" / "a.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"a\.jpg' cannot be read as an image"):
        read_image(path)


def test_the_real_data_is_as_described():
    """Set SPARSIGHT_TEST_DATA to a folder that holds `camvid` to run this."""
    root = os.environ.get("SPARSIGHT_TEST_DATA")
    if root is None or not (Path(root) / "camvid").is_dir():
        pytest.skip("SPARSIGHT_TEST_DATA names no folder with camvid/ in it")
    train, val = (CamVid(Path(root) / "camvid", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (367, 101)
    counts = torch.zeros(len(CLASSES) + 1)
    for i in range(0, len(val), 10):
        image, labels = val[i]
        assert image.shape == (3, 360, 480)
        counts += torch.bincount(labels.flatten(), minlength=len(CLASSES) + 1)
    assert bool((counts > 0).all())
    assert counts.argmax() in (CLASSES.index("Road"), CLASSES.index("Building"))
