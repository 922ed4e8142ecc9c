"""Images with masks, flipped with them, in [0, 1], at a scale that is drawn."""

import pytest
import torch

from sparsight.train.data import Coco, SeededView, write_synthetic_coco
from sparsight.train.data.instance_masks import (
    collate_proposals,
    crop_around,
    proposal_transform,
)


def test_masks_flip_with_their_image_and_draws_are_a_function_of_the_seed(tmp_path):
    data = Coco(write_synthetic_coco(tmp_path, num_images=2, size=(32, 48)), with_masks=True)
    image, target = data[0]
    kept = SeededView(data, proposal_transform())[0]
    torch.testing.assert_close(kept[0], image.float() / 255)
    assert torch.equal(kept[1]["masks"], target["masks"]) and "scale" not in kept[1]
    view = SeededView(data, proposal_transform(is_training=True, scales=(0.5, 1.0, 2.0)))
    seen, scales = set(), set()
    for epoch in range(20):
        drawn, drawn_target = view[(epoch, 0)]
        is_flipped = not torch.equal(drawn, kept[0])
        wanted = target["masks"].flip(-1) if is_flipped else target["masks"]
        assert torch.equal(drawn_target["masks"], wanted)
        assert type(drawn_target["masks"]) is torch.Tensor
        seen.add(is_flipped)
        scales.add(drawn_target["scale"])
        assert view[(epoch, 0)][1]["scale"] == drawn_target["scale"]
    assert seen == {False, True} and scales == {0.5, 1.0, 2.0}
    straight = SeededView(
        data, proposal_transform(is_training=True, scales=(1.0,), is_flipped=False)
    )
    assert all(torch.equal(straight[(epoch, 0)][0], kept[0]) for epoch in range(8))


def test_a_batch_is_at_one_scale():
    items = [(torch.zeros(3, 4, 4), {"scale": scale}) for scale in (0.5, 2.0)]
    images, targets = collate_proposals(items)
    assert len(images) == 2 and [target["scale"] for target in targets] == [0.5, 0.5]
    assert items[1][1]["scale"] == 2.0
    assert collate_proposals([(torch.zeros(3, 4, 4), {"image_id": 3})])[1] == [{"image_id": 3}]


def scene():
    """Three objects and a crowd in 40 x 60 pixels: one fits a quarter, one a half, one neither."""
    masks = torch.zeros(4, 40, 60, dtype=torch.bool)
    boxes = torch.tensor([[3.0, 2, 9, 8], [20.5, 12, 44.5, 30], [0, 0, 60, 39], [50, 30, 58, 38]])
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.long().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    image = torch.arange(40 * 60.0).reshape(1, 40, 60).expand(3, -1, -1)
    crowds = torch.tensor([0, 0, 0, 1])
    return image, {"boxes": boxes, "masks": masks, "iscrowd": crowds, "image_id": 7}


def test_a_crop_holds_an_object_that_fits_and_what_it_cuts_is_a_crowd():
    torch.manual_seed(0)
    image, target = scene()
    whole = set()
    for _ in range(60):
        part, inside = crop_around(image, target, 0.5)
        assert part.shape == (3, 20, 30) and inside["masks"].shape[1:] == (20, 30)
        top, left = divmod(int(part[0, 0, 0]), 60)
        assert torch.equal(part, image[:, top : top + 20, left : left + 30])
        is_object = inside["iscrowd"] == 0
        assert is_object.any() and inside["image_id"] == 7
        for box, mask in zip(inside["boxes"][is_object], inside["masks"][is_object], strict=True):
            moved = box + torch.tensor([left, top, left, top])
            (which,) = (target["boxes"] == moved).all(1).nonzero().flatten().tolist()
            assert mask.sum() == target["masks"][which].sum()
            whole.add(which)
        assert (inside["boxes"] >= 0).all()
        assert (inside["boxes"] <= torch.tensor([30, 20, 30, 20])).all()
    assert whole == {0, 1}  # the third is always cut, the crowd stays one


def test_a_crop_without_an_object_that_fits_lies_anywhere():
    image, target = scene()
    corners = {int(crop_around(image, target, 0.1)[0][0, 0, 0]) for _ in range(60)}
    assert len(corners) > 30
    part, inside = crop_around(image, {**target, "boxes": target["boxes"][:0], "masks":
        target["masks"][:0], "iscrowd": target["iscrowd"][:0]}, 0.5)  # fmt: skip
    assert part.shape == (3, 20, 30) and inside["boxes"].shape == (0, 4)
    assert inside["masks"].shape == (0, 20, 30)


def test_large_scales_are_cropped_to_the_size_of_a_smaller_one(tmp_path):
    data = Coco(write_synthetic_coco(tmp_path, num_images=2, size=(32, 48)), with_masks=True)
    view = SeededView(
        data, proposal_transform(is_training=True, scales=(0.5, 1.0, 4.0), crop_scale=1.0)
    )
    sizes = {}
    for epoch in range(20):
        image, target = view[(epoch, 0)]
        # Pixels of the resized image for one of the image, and what the model is told.
        scale = target["scale"] / target["crop_share"]
        sizes.setdefault(scale, set()).add((tuple(image.shape[1:]), target["scale"]))
    assert sizes == {0.5: {((32, 48), 0.5)}, 1.0: {((32, 48), 1.0)}, 4.0: {((8, 12), 1.0)}}


@pytest.mark.parametrize("crop_scale", [0.0, -1.0, float("nan")])
def test_a_crop_of_nothing_is_refused(crop_scale):
    with pytest.raises(ValueError, match=r"crop_scale=.*above 0 is required"):
        proposal_transform(is_training=True, scales=(1.0,), crop_scale=crop_scale)


def test_crops_in_a_batch_have_the_pixels_of_one_scale():
    items = [
        (torch.zeros(3, 4, 4), {"scale": 1.0, "crop_share": 0.25}),
        (torch.zeros(3, 4, 4), {"scale": 0.5, "crop_share": 1.0}),
    ]
    _, targets = collate_proposals(items)
    assert [target["scale"] for target in targets] == [1.0, 4.0]
