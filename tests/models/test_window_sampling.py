"""Which windows are positive, negative or neither: DeepMask's rule, and what a step draws."""

import pytest
import torch

from sparsight.models.window_sampling import (
    WindowRule,
    corner_windows,
    draw_windows,
    label_windows,
)


def label(boxes, *, crowd=None, map_size=(40, 50), **options):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    crowd = torch.zeros(len(boxes), dtype=torch.bool) if crowd is None else torch.tensor(crowd)
    return label_windows(boxes, crowd, map_size=map_size, size=21, **options)


def centred(x, y, longer, shorter=40.0):
    return [x - longer / 2, y - shorter / 2, x + longer / 2, y + shorter / 2]


def by_hand(box, map_size=(40, 50)):
    """The rule of the specification in pixels: 96, 12 and 24 of a window of 168."""
    found = torch.full(map_size, -1)
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    octaves = abs(torch.tensor(max(box[2] - box[0], box[3] - box[1]) / 96).log2())
    for row in range(map_size[0]):
        for column in range(map_size[1]):
            off = max(abs(8 * row + 4 - y), abs(8 * column + 4 - x))
            if off <= 12 and octaves <= 0.3:
                found[row, column] = 0
            elif off < 24 and octaves < 1:
                found[row, column] = -2
    return found


@pytest.mark.parametrize("longer", [40, 47, 49, 77, 79, 96, 117, 119, 191, 193])
@pytest.mark.parametrize("place", [(200.0, 160.0), (203.0, 157.5), (5.0, 316.0)])
def test_windows_are_labelled_by_the_distance_in_place_and_scale(longer, place):
    box = centred(*place, longer)
    assert torch.equal(label([box]), by_hand(box))


def test_the_height_counts_as_the_width_does():
    wide, tall = centred(200.0, 160.0, 96), [180.0, 112.0, 220.0, 208.0]
    assert torch.equal(label([wide]), label([tall]))


def test_of_two_objects_the_better_centred_has_the_window():
    found = label([centred(196.0, 164.0, 96), centred(204.0, 164.0, 96)])
    assert found[20, 24] == 0 and found[20, 25] == 1
    assert found[20, 23] == 0 and found[20, 26] == 1


def test_tolerances_and_the_size_of_the_window_are_settings():
    box = centred(204.0, 164.0, 96)
    assert (label([box]) == 0).sum() == 9
    assert (label([box], rule=WindowRule(positive_shift=0.0)) == 0).sum() == 1
    small = label_windows(
        torch.tensor([centred(204.0, 164.0, 48)]),
        torch.zeros(1, dtype=torch.bool),
        map_size=(40, 50),
        size=11,
    )
    assert (small == 0).sum() == 1 and (small == -1).sum() == 40 * 50 - 9
    for options in ({"positive_shift": 0.2}, {"positive_octaves": 2.0}, {"negative_shift": -1.0}):
        with pytest.raises(ValueError, match="0 <= positive <= negative is required"):
            WindowRule(**options)
    with pytest.raises(ValueError, match=r"object_side=2; a share"):
        WindowRule(object_side=2)


def test_no_object_and_objects_of_a_pixel_leave_negatives_only():
    for boxes in ([], [[7.0, 7, 8, 8]], [[7.0, 7, 7, 7]]):
        assert (label(boxes) == -1).all()


def test_windows_in_a_crowd_are_neither():
    found = label([centred(200.0, 160.0, 96), [0.0, 0, 100, 100]], crowd=[False, True])
    assert (found[:12, :12] == -2).all() and (found[13:17, :12] == -1).all()
    assert found[20, 24] == 0
    both = label([centred(200.0, 160.0, 96), [100.0, 100, 300, 200]], crowd=[False, True])
    assert both[20, 24] == 0  # an object in front of a crowd is one
    assert (label([centred(200.0, 160.0, 96)], crowd=[True]) != 0).all()


def test_half_of_the_windows_are_positive_and_the_same_seed_draws_the_same():
    labels = label([centred(204.0, 164.0, 96)])
    torch.manual_seed(3)
    sample = draw_windows(labels, 256)
    positive = sample.is_positive
    assert positive.sum() == 9 and (~positive).sum() == 128
    assert sample.weight[positive].sum() == sample.weight[~positive].sum() == 128
    kinds = labels[sample.cells[:, 0], sample.cells[:, 1]]
    assert torch.equal(kinds, sample.owner) and set(kinds.tolist()) == {0, -1}
    assert len({tuple(cell) for cell in sample.cells.tolist()}) == len(sample.cells)
    torch.manual_seed(3)
    assert torch.equal(draw_windows(labels, 256).cells, sample.cells)
    assert not torch.equal(draw_windows(labels, 256).cells, sample.cells)


def test_more_positives_than_are_wanted_are_drawn_from():
    labels = torch.zeros(20, 20, dtype=torch.int64)
    labels[10:] = -1
    sample = draw_windows(labels, 16)
    assert sample.is_positive.sum() == 8 and (sample.weight == 1).all()


def test_without_positives_the_negatives_are_half():
    sample = draw_windows(torch.full((30, 30), -1), 256)
    assert not sample.is_positive.any() and sample.weight.sum() == len(sample.cells) == 128
    nothing = draw_windows(torch.full((3, 3), -2), 256)
    assert len(nothing.cells) == 0


def test_a_window_is_centred_at_its_cell():
    found = corner_windows(torch.tensor([[10, 20], [0, 3]]), 4, size=21)
    assert found.tolist() == [[4, 0, 10], [4, -10, -7]]
    found = corner_windows(torch.tensor([[1, 1]]), torch.tensor([2]), size=1)
    assert found.tolist() == [[2, 1, 1]]
