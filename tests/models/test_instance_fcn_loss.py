"""Targets cut out of masks, and both losses as sums and as means."""

import pytest
import torch
import torch.nn.functional as F

from sparsight.models.instance_fcn_loss import LossSums, mask_cells
from sparsight.models.window_sampling import WindowSample


def test_a_cell_is_the_objects_if_half_of_it_is():
    masks = torch.zeros(2, 20, 30, dtype=torch.bool)
    masks[0, 0:8, 0:12] = True
    masks[1, 4:20, 27:30] = True
    cells = mask_cells(masks, size=(20, 30), map_size=(3, 4))
    assert cells.shape == (2, 3, 4)
    assert cells[0].tolist() == [[1, 1, 0, 0], [0] * 4, [0] * 4]
    # The last column has 6 of 8 pixels in the image and 3 in the object.
    assert not cells[1].any()
    masks[1, 0:20, 26:30] = True
    assert mask_cells(masks, size=(20, 30), map_size=(3, 4))[1].tolist() == [
        [0, 0, 0, 1],
        [0, 0, 0, 1],
        [0] * 4,  # 4 of 8 rows in the image: a quarter
    ]


def test_masks_are_resized_with_their_image():
    masks = torch.zeros(1, 10, 10, dtype=torch.bool)
    masks[0, :4, :4] = True
    cells = mask_cells(masks, size=(40, 80), map_size=(5, 10))
    assert torch.equal(cells[0, :2, :4], torch.ones(2, 4)) and cells.sum() == 8
    assert mask_cells(masks[:0], size=(40, 80), map_size=(5, 10)).shape == (0, 5, 10)


def sums_of(sample, score_maps, objectness, masks):
    sums = LossSums.nothing(objectness)
    sums.add(score_maps, objectness, sample, masks, size=(24, 32), window=3)
    return sums


@pytest.fixture
def case():
    """Two positive windows of two objects, one at the corner, and two negative ones."""
    torch.manual_seed(0)
    score_maps, objectness = torch.randn(9, 3, 4), torch.randn(3, 4)
    masks = torch.zeros(2, 24, 32, dtype=torch.bool)
    masks[0, :16, :16] = True
    masks[1, 8:, 8:24] = True
    sample = WindowSample(
        torch.tensor([[0, 0], [1, 2], [2, 3], [0, 3]]),
        torch.tensor([0, 1, -1, -1]),
        torch.tensor([2.0, 2.0, 1.0, 1.0]),
    )
    return sample, score_maps, objectness, masks


def test_losses_are_those_of_a_loop_over_windows_and_cells(case):
    sample, score_maps, objectness, masks = case
    cells = masks[:, 4::8, 4::8]
    expected_objectness = expected_mask = num_pixels = 0.0
    for (row, column), owner, weight in zip(
        sample.cells.tolist(), sample.owner.tolist(), sample.weight.tolist(), strict=True
    ):
        wanted = torch.tensor(float(owner >= 0))
        each = F.binary_cross_entropy_with_logits(objectness[row, column], wanted)
        expected_objectness += weight * float(each)
        for i in range(3):
            for j in range(3):
                y, x = row - 1 + i, column - 1 + j
                if owner < 0 or not (0 <= y < 3 and 0 <= x < 4):
                    continue
                found, wanted = score_maps[3 * i + j, y, x], cells[owner, y, x].float()
                each = F.binary_cross_entropy_with_logits(found, wanted)
                expected_mask += weight * float(each)
                num_pixels += weight
    sums = sums_of(*case)
    plain = sums.losses("none")
    assert float(plain["loss_objectness"]) == pytest.approx(expected_objectness, rel=1e-5)
    assert float(plain["loss_mask"]) == pytest.approx(expected_mask, rel=1e-5)
    means = sums.losses("pixels")
    assert float(means["loss_objectness"]) == pytest.approx(expected_objectness / 6, rel=1e-5)
    assert float(means["loss_mask"]) == pytest.approx(expected_mask / num_pixels, rel=1e-5)
    assert float(sums.losses("windows")["loss_mask"]) == pytest.approx(expected_mask / 4, rel=1e-5)


def test_negative_windows_have_no_mask_loss(case):
    sample, score_maps, objectness, masks = case
    chosen = ~sample.is_positive
    negative = WindowSample(sample.cells[chosen], sample.owner[chosen], sample.weight[chosen])
    sums = sums_of(negative, score_maps, objectness, masks)
    assert sums.mask == 0 and sums.windows == 2
    assert sums.losses("pixels")["loss_mask"] == 0
    nothing = WindowSample(sample.cells[:0], sample.owner[:0], sample.weight[:0])
    assert sums_of(nothing, score_maps, objectness, masks).losses("pixels") == {
        "loss_objectness": 0,
        "loss_mask": 0,
    }


def test_gradients_reach_both_branches(case):
    sample, score_maps, objectness, masks = case
    score_maps.requires_grad_()
    objectness.requires_grad_()
    losses = sums_of(sample, score_maps, objectness, masks).losses("pixels")
    torch.stack(list(losses.values())).sum().backward()
    assert (objectness.grad != 0).sum() == 4
    assert score_maps.grad[:, 1, 2].count_nonzero() == 1  # the centre reads one map only
    assert score_maps.grad.count_nonzero() > 8


def test_a_cell_may_be_told_how_much_of_it_is_the_objects():
    masks = torch.zeros(1, 16, 24, dtype=torch.bool)
    masks[0, 2:12, 4:16] = True
    share = mask_cells(masks, size=(16, 24), map_size=(2, 3), target="share")
    assert torch.allclose(share[0], torch.tensor([[3 / 8, 6 / 8, 0], [2 / 8, 4 / 8, 0]]))
    binary = mask_cells(masks, size=(16, 24), map_size=(2, 3))
    assert torch.equal(binary, (share >= 0.5).float())


def test_the_loss_is_least_at_the_targets_asked_for(case):
    sample, score_maps, objectness, masks = case
    masks = masks.clone()
    masks[0, :, 13:16] = False  # three of eight columns
    for target in ("binary", "share"):
        sums = LossSums.nothing(objectness)
        x = score_maps.clone().requires_grad_()
        sums.add(x, objectness, sample, masks, size=(24, 32), window=3, target=target)
        cells = mask_cells(masks, size=(24, 32), map_size=(3, 4), target=target)
        (grad,) = torch.autograd.grad(sums.mask, x)
        # Cell (0, 1) of the first window, right of its centre: k = m = 3, so one channel, bin 5.
        expected = 2 * (torch.sigmoid(score_maps[5, 0, 1]) - cells[0, 0, 1])
        assert torch.allclose(grad[5, 0, 1], expected, atol=1e-6)
