"""Masks drawn over a picture."""

import numpy as np
import torch

from sparsight.train.pictures import colour_of
from sparsight.train.proposal_pictures import blend_masks


def test_masks_cover_half_and_have_outlines_the_best_on_top():
    pixels = np.full((12, 12, 3), 100, dtype=np.uint8)
    masks = torch.zeros(2, 12, 12, dtype=torch.bool)
    masks[0, 2:8, 2:8] = True
    masks[1, 4:11, 4:11] = True
    drawn = blend_masks(pixels, masks)
    first, second = (np.array(colour_of(i)) for i in (0, 1))
    assert np.array_equal(drawn[3, 3], (100 + first) // 2)
    assert np.array_equal(drawn[6, 6], (100 + first) // 2)  # where both are
    assert np.array_equal(drawn[9, 9], (100 + second) // 2)
    assert np.array_equal(drawn[2, 5], first) and np.array_equal(drawn[10, 9], second)
    assert (drawn[0] == 100).all() and (pixels == 100).all()
    assert np.array_equal(blend_masks(pixels, masks[:0]), pixels)
