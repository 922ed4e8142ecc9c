import pytest
import torch

from sparsight.train.data.synthetic import CAR, CLASSES, PEDESTRIAN, SyntheticScenes, draw_scene


def test_the_same_seed_draws_the_same_scene_and_another_does_not():
    first, again, other = (draw_scene((48, 64), seed=s) for s in (7, 7, 8))
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.class_map, again.class_map)
    assert not torch.equal(first.image, other.image)


@pytest.mark.parametrize("size", [(16, 16), (37, 91), (128, 192)])
def test_a_scene_has_the_form_it_promises(size):
    for seed in range(10):
        scene = draw_scene(size, seed=seed)
        height, width = size
        assert scene.image.shape == (3, height, width)
        assert scene.image.dtype == torch.uint8
        assert scene.class_map.shape == size
        assert scene.class_map.dtype == torch.int64
        assert 0 <= int(scene.class_map.min())
        assert int(scene.class_map.max()) < len(CLASSES)
        assert len(scene.boxes) == len(scene.labels) >= 1
        x0, y0, x1, y1 = scene.boxes.unbind(1)
        assert bool(((x0 >= 0) & (x0 < x1) & (x1 <= width)).all())
        assert bool(((y0 >= 0) & (y0 < y1) & (y1 <= height)).all())
        assert set(scene.labels.tolist()) <= {CAR, PEDESTRIAN}


def test_the_nearest_box_holds_its_class():
    scene = draw_scene((128, 192), seed=3)
    x0, y0, x1, y1 = scene.boxes[-1].int().tolist()
    inside = scene.class_map[y0:y1, x0:x1]
    assert (inside == scene.labels[-1]).float().mean() > 0.4


def test_every_class_occurs():
    scenes = SyntheticScenes(20, size=(64, 96), seed=0)
    seen = torch.cat([scenes[i][1].flatten() for i in range(20)]).unique()
    assert seen.tolist() == list(range(len(CLASSES)))


def test_data_sets_of_different_seeds_share_no_scene():
    a, b = SyntheticScenes(2, size=(32, 32), seed=1), SyntheticScenes(2, size=(32, 32), seed=2)
    assert not torch.equal(a[0][0], b[0][0])
    assert not torch.equal(a[0][0], a[1][0])


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"draw_scene: size=\(8, 64\); at least 16 pixels"):
        draw_scene((8, 64), seed=0)
    with pytest.raises(IndexError, match=r"SyntheticScenes: index 2 of 2 scenes; 0 to 1"):
        SyntheticScenes(2)[2]


def test_instances_are_numbered_as_their_boxes_and_covered_by_nearer_ones():
    for seed in range(5):
        scene = draw_scene((96, 128), seed=seed)
        numbers = scene.instance_map
        assert torch.equal(numbers > 0, (scene.class_map == CAR) | (scene.class_map == PEDESTRIAN))
        for i, (box, label) in enumerate(
            zip(scene.boxes.int().tolist(), scene.labels, strict=True)
        ):
            mask = numbers == i + 1
            x0, y0, x1, y1 = box
            assert mask.sum() == mask[y0:y1, x0:x1].sum()
            assert (scene.class_map[mask] == label).all()
        assert (numbers == len(scene.boxes)).any()  # the nearest is seen
