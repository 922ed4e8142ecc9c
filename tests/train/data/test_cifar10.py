import os
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsight.train.data.augment import SeededView
from sparsight.train.data.cifar10 import (
    CIFAR10,
    CLASSES,
    cifar10_evaluation_transform,
    cifar10_training_transform,
)

RNG = np.random.default_rng(0)


def write_binary(folder: Path, count: int = 3, names=None):
    """As the binary version is described on its page: class, then red, green, blue, row by row."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in names or [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        content = b""
        for _ in range(count):
            label = int(RNG.integers(10))
            pixels = RNG.integers(0, 256, (3, 32, 32), dtype=np.uint8)
            content += bytes([label]) + b"".join(pixels[c].tobytes() for c in range(3))
            written.append((pixels, label))
        (folder / name).write_bytes(content)
    return written


def arrays(count=4):
    return {
        f"{split}_{kind}": value
        for split in ("train", "test")
        for kind, value in (
            ("images", RNG.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)),
            ("labels", RNG.integers(0, 10, count)),
        )
    }


@pytest.mark.parametrize("inside", [True, False])
def test_the_binary_version_is_read_in_order(tmp_path, inside):
    written = write_binary(tmp_path / "cifar-10-batches-bin")
    root = tmp_path if inside else tmp_path / "cifar-10-batches-bin"
    train, test = CIFAR10(root, "train"), CIFAR10(root, "test")
    assert (len(train), len(test)) == (15, 3)
    for (pixels, label), (image, number) in zip(written, [*train, *test], strict=True):
        assert image.dtype == torch.uint8
        assert np.array_equal(image.numpy(), pixels)
        assert number == label


@pytest.mark.parametrize("is_file", [True, False])
def test_arrays_are_read_with_channels_last(tmp_path, is_file):
    stored = arrays()
    np.savez(tmp_path / "some.npz", **stored)
    test = CIFAR10(tmp_path / "some.npz" if is_file else tmp_path, "test")
    assert [label for _, label in test] == stored["test_labels"].tolist()
    assert np.array_equal(test[2][0].permute(1, 2, 0).numpy(), stored["test_images"][2])


WHERE = r"expected.*CIFAR-10 \(Krizhevsky 2009\).*cifar-10-binary\.tar\.gz.*npz"


def test_a_missing_set_says_what_is_expected_and_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"CIFAR10: root='.*' holds 0 \*\.npz.*{WHERE}"):
        CIFAR10(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match=rf"nowhere' is no folder; {WHERE}"):
        CIFAR10(tmp_path / "nowhere", "train")


def test_the_pickled_version_is_not_touched(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    for root in (tmp_path, folder):
        with pytest.raises(
            FileNotFoundError, match=rf"python version, whose pickled files are not read; {WHERE}"
        ):
            CIFAR10(root, "train")


def test_a_missing_batch_is_named(tmp_path):
    write_binary(tmp_path, names=["data_batch_1.bin", "data_batch_2.bin"])
    with pytest.raises(FileNotFoundError, match=r"has no data_batch_3\.bin; expected"):
        CIFAR10(tmp_path, "train")


@pytest.mark.parametrize("content", [b"", b"x" * 3072, b"x" * 3074])
def test_a_cut_batch_is_named(tmp_path, content):
    (tmp_path / "test_batch.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"test_batch\.bin' has \d+ bytes; .* multiple of 3073"):
        CIFAR10(tmp_path, "test")


def test_a_label_outside_the_classes_is_named(tmp_path):
    (tmp_path / "test_batch.bin").write_bytes(b"\x0a" + b"\x00" * 3072)
    with pytest.raises(ValueError, match=r"has labels 10 to 10; 0 to 9 are required"):
        CIFAR10(tmp_path, "test")


def broken_arrays(how):
    stored = arrays()
    if how == "channels first":
        stored["test_images"] = stored["test_images"].transpose(0, 3, 1, 2)
    elif how == "floats":
        stored["test_images"] = stored["test_images"].astype(np.float32)
    elif how == "one label less":
        stored["test_labels"] = stored["test_labels"][:-1]
    elif how == "no labels":
        del stored["test_labels"]
    elif how == "objects":
        stored["test_labels"] = np.array([{"code": 1}] * 4)
    return stored


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("channels first", r"uint8 \(4, 3, 32, 32\)"),
        ("floats", r"float32 \(4, 32, 32, 3\)"),
        ("one label less", r"\(3,\); uint8 \(N, 32, 32, 3\) and integers"),
        ("no labels", r"has no test_labels"),
        ("objects", r"cannot be read as plain arrays"),
    ],
)
def test_other_arrays_are_refused(tmp_path, how, message):
    np.savez(tmp_path / "set.npz", **broken_arrays(how))
    with pytest.raises(ValueError, match=rf"CIFAR10: .*set\.npz' .*{message}"):
        CIFAR10(tmp_path, "test")


def test_a_file_that_is_no_archive_is_named(tmp_path):
    for content in (b"", b"no archive"):
        (tmp_path / "set.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"set\.npz' cannot be read as plain arrays"):
            CIFAR10(tmp_path, "test")


def test_transforms_keep_size_and_class_and_shift_at_most_the_padding(tmp_path):
    np.savez(tmp_path / "set.npz", **arrays())
    dataset = CIFAR10(tmp_path, "train")
    plain = SeededView(dataset, cifar10_evaluation_transform())
    shifted = SeededView(dataset, cifar10_training_transform(), seed=1)
    for i in range(len(dataset)):
        (image, label), (moved, same) = plain[i], shifted[i]
        assert type(image) is torch.Tensor and image.dtype == torch.float32
        assert image.shape == moved.shape == (3, 32, 32)
        assert label == same == dataset.labels[i]
        assert torch.allclose(image[0, 0, 0] * 0.229 + 0.485, dataset.images[i, 0, 0, 0] / 255)
        middle = moved[:, 12:20, 12:20]
        windows = [image, image.flip(-1)]
        found = any(
            torch.allclose(middle, window[:, y : y + 8, x : x + 8], atol=1e-6)
            for window in windows
            for y in range(8, 17)
            for x in range(8, 17)
        )
        assert found


def test_the_real_data_is_as_described():
    """Set SPARSIGHT_TEST_DATA to a folder that holds `cifar10` to run this."""
    root = os.environ.get("SPARSIGHT_TEST_DATA")
    if root is None or not (Path(root) / "cifar10").is_dir():
        pytest.skip("SPARSIGHT_TEST_DATA names no folder with cifar10/ in it")
    train, test = (CIFAR10(Path(root) / "cifar10", split) for split in ("train", "test"))
    assert len(train) > len(test) > 1000
    counts = torch.bincount(torch.tensor(test.labels), minlength=len(CLASSES))
    assert bool((counts > 0.08 * len(test)).all())
    assert 0.4 < float(test.images.float().mean() / 255) < 0.55
