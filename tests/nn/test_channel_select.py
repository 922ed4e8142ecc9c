"""ChannelSelect passes on the channels it was made with, in the map's memory format."""

import pytest
import torch

from sparsight.nn import ChannelSelect


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_channels_and_memory_format(memory_format):
    x = torch.randn(2, 7, 5, 3).contiguous(memory_format=memory_format)
    out = ChannelSelect([5, 0, 2])(x)
    assert torch.equal(out, x[:, [5, 0, 2]])
    assert out.is_contiguous(memory_format=memory_format)


def test_the_state_dict_records_which():
    select = ChannelSelect([0, 1, 2])
    select.load_state_dict(ChannelSelect(torch.tensor([4, 6, 1])).state_dict())
    assert select.channels.tolist() == [4, 6, 1]
    assert "3 channels" in repr(select)


def test_gradient_reaches_the_selected_channels_only():
    x = torch.randn(1, 4, 2, 2, requires_grad=True)
    ChannelSelect([3, 1])(x).sum().backward()
    assert x.grad.sum((0, 2, 3)).tolist() == [0, 4, 0, 4]
