"""Images of any form become a list of what the model takes."""

import pytest
import torch

from sparsight.compress.image_batches import read_batches


def test_a_tensor_is_split():
    images = torch.rand(10, 3, 8, 8)
    assert [len(batch) for batch in read_batches(images, 4)] == [4, 4, 2]
    assert torch.equal(torch.cat(read_batches(images, 4)), images)
    assert [len(batch) for batch in read_batches(torch.rand(5, 1, 512, 256), None)] == [2, 2, 1]


def test_iterables_are_read_once_and_lose_their_labels():
    images = torch.rand(4, 3, 8, 8)
    assert torch.equal(read_batches(iter([images]), None)[0], images)
    assert torch.equal(read_batches([(images, torch.zeros(4))], None)[0], images)
    assert torch.equal(read_batches([[images, torch.zeros(4)]], None)[0], images)
    pair = [torch.rand(3, 8, 8), torch.rand(3, 9, 7)]  # a detector's
    assert read_batches([pair], None)[0] is pair
    targets = tuple({} for _ in pair)
    assert [image.shape for image in read_batches([(tuple(pair), targets)], None)[0]] == [
        image.shape for image in pair
    ]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(3, 8, 8), r"shape \(3, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "dtype torch.uint8"),
        (torch.rand(0, 3, 8, 8), "no image"),
        ([], "no image"),
        ([torch.rand(0, 3, 8, 8)], "no image"),
        ([torch.full((1, 3, 2, 2), torch.nan)], "NaN"),
    ],
)
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message):
        read_batches(images, None)
