import json

import numpy as np
from PIL import Image

from sparsight.train.data.synthetic_coco import write_synthetic_coco


def test_the_layout_is_cocos_and_what_is_awkward_in_it_is_there(tmp_path):
    root = write_synthetic_coco(tmp_path / "coco", num_images=8, split="val2017", size=(48, 64))
    content = json.loads((root / "annotations" / "instances_val2017.json").read_text())
    assert len(content["images"]) == 8
    for image in content["images"]:
        with Image.open(root / "val2017" / image["file_name"]) as file:
            assert file.size == (image["width"], image["height"])
    counts = {image["id"]: 0 for image in content["images"]}
    for annotation in content["annotations"]:
        counts[annotation["image_id"]] += 1
        x, y, w, h = annotation["bbox"]
        assert x >= 0 <= y
        assert w > 0 < h
        assert 0 < annotation["area"] < w * h
    assert sum(count == 0 for count in counts.values()) == 2
    assert {a["category_id"] for a in content["annotations"]} == {1, 3}
    assert sum(a["iscrowd"] for a in content["annotations"]) == 2
    assert {image["width"] for image in content["images"]} == {64, 56}
    assert len({a["id"] for a in content["annotations"]}) == len(content["annotations"])


def test_the_seed_decides_the_scenes_and_splits_lie_side_by_side(tmp_path):
    pictures = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        root = write_synthetic_coco(tmp_path / name, num_images=1, size=(32, 32), seed=seed)
        write_synthetic_coco(root, num_images=1, split="val2017", size=(32, 32), seed=7)
        with Image.open(root / "train2017" / "000000000100.jpg") as file:
            pictures.append(np.array(file))
        assert (root / "val2017" / "000000000100.jpg").is_file()
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])
