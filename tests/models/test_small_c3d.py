"""The small 3-D network: shapes, cost, and what its layers are."""

import pytest
import torch
from torch import nn

from sparsight.convert import freeze, replace_pooling
from sparsight.measure import count_macs
from sparsight.models import small_c3d
from sparsight.nn import SoftPool3d


@pytest.mark.parametrize(("frames", "height", "width"), [(4, 8, 8), (8, 32, 32), (5, 17, 11)])
def test_clips_become_logits(frames, height, width):
    model = small_c3d(num_classes=3, in_channels=2).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 2, frames, height, width)).shape == (2, 3)


def test_it_costs_what_it_says():
    counted = count_macs(small_c3d(num_classes=8).eval(), torch.zeros(1, 1, 8, 32, 32))
    assert counted.total == 49_545_728
    assert f"{counted.total / 1e6:.1f} million" in (small_c3d.__doc__ or "")


def test_only_the_first_pooling_keeps_all_frames():
    model = small_c3d(num_classes=2)
    pools = [module for module in model.modules() if isinstance(module, nn.MaxPool3d)]
    assert [pool.kernel_size for pool in pools] == [(1, 2, 2), (2, 2, 2), (2, 2, 2)]


@pytest.mark.parametrize("kind", ["soft", "average"])
def test_its_poolings_are_replaced_under_the_same_weights(kind):
    model, clip = small_c3d(num_classes=2).eval(), torch.randn(1, 1, 4, 8, 8)
    replaced = replace_pooling(model, kind=kind, example=clip)
    assert list(replaced.state_dict()) == list(model.state_dict())
    pools = [m for m in replaced.modules() if isinstance(m, SoftPool3d | nn.AvgPool3d)]
    assert len(pools) == 3
    with torch.no_grad():
        assert not torch.allclose(replaced(clip), model(clip))


def test_freezing_it_changes_nothing():
    """Its weights have five dimensions, which torch.channels_last does not take."""
    model, clip = small_c3d(num_classes=2).eval(), torch.randn(1, 1, 4, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(freeze(model, example=clip)(clip), model(clip))


@pytest.mark.parametrize("sizes", [{"num_classes": 0}, {"num_classes": 2, "in_channels": 0}])
def test_nothing_to_tell_apart_is_refused(sizes):
    with pytest.raises(
        ValueError, match=r"small_c3d: num_classes=.*at least 1 of each is required"
    ):
        small_c3d(**sizes)
