"""Street scenes drawn into VOC's layout."""

import numpy as np
from PIL import Image

from sparsight.train.data import Voc, write_synthetic_voc


def test_what_is_written_is_read_and_the_same_each_time(tmp_path):
    for name in "ab":
        write_synthetic_voc(tmp_path / name, num_images=3, split="val", size=(40, 48), seed=5)
    first, second = (Voc(tmp_path / name, "val") for name in "ab")
    assert len(first) == 3
    for i in range(3):
        for a, b in zip(first[i][1].values(), second[i][1].values(), strict=True):
            assert np.array_equal(np.asarray(a), np.asarray(b))
    assert {tuple(first[i][0].shape) for i in range(3)} == {(3, 40, 48), (3, 40, 42)}


def test_objects_have_a_void_border(tmp_path):
    data = Voc(write_synthetic_voc(tmp_path, num_images=1), "train")
    with Image.open(data.items[0][1]) as file:
        assert file.mode == "P"
        objects = np.array(file)
    left, right = objects[:, :-1], objects[:, 1:]
    assert (objects == 255).any()
    assert ((left == right) | (left == 255) | (right == 255)).all()
