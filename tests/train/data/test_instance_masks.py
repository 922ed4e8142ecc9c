"""Images with masks, flipped with them, in [0, 1], at a scale that is drawn."""

import torch

from sparsight.train.data import Coco, SeededView, write_synthetic_coco
from sparsight.train.data.instance_masks import collate_proposals, proposal_transform


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
