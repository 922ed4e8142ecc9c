import pytest
import torch
from torch import nn

from sparsight.nn.channels_last import channels_last, put_channels_last


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 4, 5, 6)])
def test_channels_come_to_lie_side_by_side(shape):
    x = torch.randn(shape)
    y = channels_last(x)
    assert torch.equal(x, y)
    assert y.stride(1) == 1


def test_weights_of_both_ranks_are_laid_out_and_stay_the_same_parameters():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv3d(3, 4, 3), nn.Linear(4, 5))
    before = dict(model.named_parameters())
    values = {name: parameter.detach().clone() for name, parameter in before.items()}
    put_channels_last(model)
    for name, parameter in model.named_parameters():
        assert parameter is before[name]
        assert torch.equal(parameter, values[name])
    assert model[0].weight.stride(1) == model[1].weight.stride(1) == 1
