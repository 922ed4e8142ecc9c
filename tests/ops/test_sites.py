"""Laws of the list of sites."""

import pytest
import torch

from sparsight.ops import Sites, reference, sites_from_mask

SIZES = [(1, 1), (1, 7), (7, 1), (15, 17), (32, 33)]
DENSITIES = [0.0, "one", 0.01, 0.5, 1.0]


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [1, 3])
def test_kernel_lists_the_same_sites_as_the_reference(draw, batch, size, density):
    mask = draw(0).mask(batch, *size, density)
    sites = sites_from_mask(mask)
    index, count = reference.sites_from_mask(mask)
    assert sites.index.dtype == sites.count.dtype == torch.int32
    assert torch.equal(sites.index, index)
    assert torch.equal(sites.count, count)
    assert (sites.height, sites.width) == size


@pytest.mark.parametrize("density", DENSITIES)
def test_to_mask_inverts_sites_from_mask(draw, density):
    mask = draw(1).mask(3, 9, 5, density)
    assert torch.equal(sites_from_mask(mask).to_mask(), mask)


def test_sites_come_first_and_ascend_then_holes_ascend(draw):
    mask = draw(2).mask(3, 8, 11, 0.3)
    sites = sites_from_mask(mask)
    for image in range(3):
        row, active = sites.index[image].tolist(), int(sites.count[image])
        flat = mask[image].flatten()
        assert row[:active] == flat.nonzero().flatten().tolist()
        assert row[active:] == (~flat).nonzero().flatten().tolist()


def test_shape_does_not_depend_on_the_number_of_sites(draw):
    shapes = {sites_from_mask(draw(3).mask(2, 6, 7, d)).index.shape for d in DENSITIES}
    assert shapes == {(2, 42)}


def test_strided_and_expanded_masks_are_read_right(draw):
    mask = draw(4).mask(1, 12, 10, 0.4)
    for view in (mask[:, :, ::2, 1::3], mask.transpose(2, 3), mask.expand(4, 1, 12, 10)):
        assert not view.is_contiguous()
        assert torch.equal(sites_from_mask(view).to_mask(), view)


def test_mask_that_is_not_bool_is_refused():
    with pytest.raises(TypeError, match=r"sites_from_mask: mask has dtype .*float32.*>= 0\.5"):
        sites_from_mask(torch.ones(1, 1, 4, 4))


@pytest.mark.parametrize("shape", [(4, 4), (1, 4, 4), (1, 2, 4, 4)])
def test_mask_of_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"sites_from_mask: mask has shape .*one channel"):
        sites_from_mask(torch.ones(shape, dtype=torch.bool))


def test_hand_made_sites_of_wrong_dtype_or_shape_are_refused():
    sites = sites_from_mask(torch.ones(2, 1, 3, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"Sites: index has dtype torch.int64.*sites_from_mask"):
        Sites(sites.index.long(), sites.count, 3, 3)
    with pytest.raises(TypeError, match=r"Sites: count has dtype torch.int64.*sites_from_mask"):
        Sites(sites.index, sites.count.long(), 3, 3)
    with pytest.raises(ValueError, match=r"Sites: index has shape \(2, 9\).*sites_from_mask"):
        Sites(sites.index, sites.count, 3, 4)
    with pytest.raises(ValueError, match=r"Sites: .*count \(1,\)"):
        Sites(sites.index, sites.count[:1], 3, 3)
