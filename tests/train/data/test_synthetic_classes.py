import pytest
import torch

from sparsight.train.data import SyntheticClasses


def test_the_same_seed_draws_the_same_and_classes_take_turns():
    first, again, other = (
        SyntheticClasses(5, size=(8, 12), num_classes=4, seed=s) for s in (1, 1, 2)
    )
    assert [label for _, label in first] == [0, 1, 2, 3, 0]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], other[0][0])
    assert first[0][0].shape == (3, 8, 12) and first[0][0].dtype == torch.uint8


def test_stripes_have_the_direction_of_their_class():
    """Class 0 changes along rows only, the class at 90 degrees along columns only."""
    images = SyntheticClasses(4, size=(24, 24), num_classes=2, seed=0)
    for image, label in images:
        pixels = image[0].float()
        along = {0: pixels.mean(1).std(), 1: pixels.mean(0).std()}
        assert along[label] > 5 * along[1 - label]


def test_an_index_outside_is_refused():
    with pytest.raises(IndexError, match=r"SyntheticClasses: index 3 of 3 images"):
        SyntheticClasses(3, size=(8, 8))[3]
