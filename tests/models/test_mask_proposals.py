"""Masks of windows as masks of an image: tight boxes, suppression, pasting."""

import pytest
import torch
import torch.nn.functional as F

from sparsight.models.mask_proposals import WindowMasks, keep_distinct, paste_masks


def windows(cells, boxes, scores=None, inside=None) -> WindowMasks:
    """Windows whose logits are 4 in the cells given and -4 elsewhere."""
    cells = torch.as_tensor(cells, dtype=torch.float32)
    scores = torch.arange(len(cells), 0, -1).float() if scores is None else torch.tensor(scores)
    inside = torch.ones_like(cells, dtype=torch.bool) if inside is None else inside
    return WindowMasks(8 * cells - 4, inside, torch.tensor(boxes, dtype=torch.float32), scores)


def square(size, top, left, bottom, right):
    cells = torch.zeros(size, size)
    cells[top:bottom, left:right] = 1
    return cells


def test_boxes_are_around_the_positive_cells():
    found = windows(
        torch.stack([square(5, 1, 2, 4, 5), square(5, 0, 0, 1, 1), torch.zeros(5, 5)]),
        [[0, 0, 40, 40], [-10, 20, 40, 70], [0, 0, 40, 40]],
    )
    assert found.tight_boxes().tolist() == [[16, 8, 40, 32], [-10, 20, 0, 30], [0, 0, 0, 0]]


def test_cells_outside_of_the_image_are_background():
    inside = torch.ones(1, 5, 5, dtype=torch.bool)
    inside[:, :, :3] = False
    found = windows(torch.ones(1, 5, 5), [[-24, 0, 16, 40]], inside=inside)
    assert found.tight_boxes().tolist() == [[0, 0, 16, 40]]


def test_suppression_goes_by_the_boxes_of_the_masks_and_keeps_the_best():
    cells = torch.stack(
        [square(5, 0, 0, 4, 4), square(5, 0, 0, 4, 4), square(5, 0, 0, 3, 4), torch.zeros(5, 5)]
    )
    found = windows(cells, [[0, 0, 50, 50]] * 4, scores=[1.0, 3.0, 2.0, 9.0])
    kept = keep_distinct(found, size=(50, 50), threshold=0.8, most=10)
    assert kept.scores.tolist() == [3.0, 2.0]  # an IoU of .75; the empty one is none
    kept = keep_distinct(found, size=(50, 50), threshold=0.7, most=10)
    assert kept.scores.tolist() == [3.0]
    assert len(keep_distinct(found, size=(50, 50), threshold=0.8, most=1)) == 1


def test_boxes_of_what_is_seen_are_compared():
    """Two windows that differ beyond the image only are one proposal."""
    cells = torch.stack([square(5, 0, 0, 5, 5), square(5, 0, 0, 5, 5)])
    found = windows(cells, [[-30, 0, 20, 50], [-5, 0, 20, 50]])
    assert len(keep_distinct(found, size=(50, 50), threshold=0.8, most=10)) == 1


@pytest.mark.parametrize("corner", [(3, 2), (-13, -9), (30, 25)])
def test_a_pasted_mask_is_the_interpolated_probability_cut_at_a_half(corner):
    """A window of whole pixels, against torch's own bilinear interpolation."""
    torch.manual_seed(0)
    logits = torch.randn(1, 7, 7)
    x, y = corner
    box = torch.tensor([[x, y, x + 28, y + 21]], dtype=torch.float32)
    inside = torch.ones(1, 7, 7, dtype=torch.bool)
    found = WindowMasks(logits, inside, box, torch.zeros(1))
    masks, boxes, kept = paste_masks(found, (40, 45))
    patch = F.interpolate(logits.sigmoid()[None], size=(21, 28), mode="bilinear")[0, 0] > 0.5
    canvas = torch.zeros(120, 120, dtype=torch.bool)
    canvas[40 + y : 61 + y, 40 + x : 68 + x] = patch
    expected = canvas[40:80, 40:85]
    assert torch.equal(masks[0], expected) and kept.tolist() == [0]
    rows, columns = expected.any(1).nonzero().flatten(), expected.any(0).nonzero().flatten()
    around = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    assert boxes[0].tolist() == [float(end) for end in around]


def test_cells_outside_of_the_image_do_not_fade_what_is_inside():
    inside = torch.ones(1, 5, 5, dtype=torch.bool)
    inside[:, :, :2] = False
    found = WindowMasks(
        torch.where(inside, 1.0, -9.0),
        inside,
        torch.tensor([[-16.0, 0, 24, 40]]),
        torch.zeros(1),
    )
    masks, _, _ = paste_masks(found, (40, 60))
    assert masks[0, :, :24].all() and not masks[0, :, 24:].any()


def test_masks_of_no_pixel_are_left_out():
    cells = torch.stack([square(5, 0, 0, 1, 1), square(5, 1, 1, 4, 4), torch.zeros(5, 5)])
    found = windows(cells, [[-50.0, -50, -10, -10], [0, 0, 20, 20], [0, 0, 20, 20]])
    masks, boxes, kept = paste_masks(found, (30, 30))
    assert masks.shape == (1, 30, 30) and boxes.shape == (1, 4) and kept.tolist() == [1]
    masks, boxes, kept = paste_masks(found[torch.tensor([2])], (30, 30))
    assert masks.shape == (0, 30, 30) and boxes.shape == (0, 4) and kept.shape == (0,)


def test_parts_are_concatenated_in_their_order():
    a, b = (windows(torch.rand(n, 3, 3), [[0, 0, 9, 9]] * n) for n in (2, 1))
    both = WindowMasks.concatenate([a, b])
    assert len(both) == 3 and torch.equal(both.logits[2], b.logits[0])
    assert torch.equal(both[both.scores > 1.5].scores, a.scores[:1])
