"""Run lengths: there and back, and what COCO's annotations may hold."""

import json

import pytest
import torch
from pycocotools import mask as reference

from sparsight.train.data.mask_rle import compress_segmentation, decode_masks, encode_masks

# pycocotools hands numpy an old kind of array.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def decoded(counts: bytes, size) -> torch.Tensor:
    return decode_masks([{"size": list(size), "counts": counts}], size=size)[0]


def test_masks_come_back_as_they_were():
    torch.manual_seed(0)
    masks = torch.rand(3, 7, 5) > 0.5
    encoded = encode_masks(masks)
    json.dumps(encoded)
    assert encoded[0]["size"] == [7, 5]
    assert torch.equal(decode_masks(encoded, size=(7, 5)), masks)
    expected = torch.from_numpy(reference.decode(encoded[1])).bool()
    assert torch.equal(expected, masks[1])
    assert encode_masks(masks[:0]) == []
    assert decode_masks([], size=(7, 5)).shape == (0, 7, 5)


def test_polygons_and_run_lengths_of_both_kinds_are_read():
    polygons = [[2.0, 1, 8, 1, 8, 6, 2, 6], [12, 2, 15, 2, 15, 9]]
    found = decoded(compress_segmentation(polygons, size=(10, 20)), (10, 20))
    parts = reference.frPyObjects(polygons, 10, 20)
    assert torch.equal(found, torch.from_numpy(reference.decode(reference.merge(parts))).bool())
    plain = {"size": [3, 4], "counts": [2, 3, 7]}  # column by column
    found = decoded(compress_segmentation(plain, size=(3, 4)), (3, 4))
    assert found.int().tolist() == [[0, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]]
    (encoded,) = encode_masks(found[None])
    assert compress_segmentation(encoded, size=(3, 4)) == encoded["counts"].encode()
    assert not decoded(compress_segmentation([], size=(3, 4)), (3, 4)).any()


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, "neither polygons nor run lengths"),
        ([[1.0, 2, 3]], "neither polygons nor run lengths"),
        ({"counts": "abc"}, "neither polygons nor run lengths"),
        ({"size": [4, 3], "counts": [12]}, r"its mask is \[4, 3\], its image \[3, 4\]"),
    ],
)
def test_what_is_no_mask_is_refused(segmentation, message):
    with pytest.raises(ValueError, match=message):
        compress_segmentation(segmentation, size=(3, 4))
