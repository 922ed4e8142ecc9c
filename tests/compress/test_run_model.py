"""Running a model to look at it leaves nothing behind."""

import torch
from torch import nn

from sparsight.compress.run_model import (
    call_with,
    has_channels,
    hooked,
    input_channels,
    tensors_in,
    traceable_copy,
)


def test_examples_are_positional_named_or_alone():
    class Sum(nn.Module):
        def forward(self, a: object, b: object = 0) -> object:
            return (a, b)

    assert call_with(Sum(), (1, 2)) == (1, 2)
    assert call_with(Sum(), {"a": 1, "b": 2}) == (1, 2)
    assert call_with(Sum(), [1, 2]) == ([1, 2], 0)


def test_copies_learn_everywhere_and_share_what_was_shared():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
    net[1].weight = net[0].weight
    copied = traceable_copy(net)
    assert copied[0].weight is copied[1].weight is not net[0].weight
    assert all(p.requires_grad for p in copied.parameters())
    assert not any(p.requires_grad for p in net.parameters())


def test_hooks_are_gone_after_an_error():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    seen = []

    def observe(name):
        return lambda module, args, output: seen.append(name)

    try:
        with hooked(net, has_channels, observe):
            net(torch.zeros(1, 3))
    except RuntimeError:
        pass
    with hooked(net, has_channels, observe):
        net(torch.zeros(1, 2))
    assert seen == ["0"]
    assert not any(module._forward_hooks for module in net.modules())


def test_tensors_are_found_wherever_they_are():
    a, b = torch.zeros(1), torch.ones(1)
    assert list(tensors_in([{"x": a, "n": 3}, (b, "text")])) == [a, b]


def test_channels_come_first():
    x = torch.arange(24.0).reshape(2, 3, 2, 2)
    assert torch.equal(input_channels(nn.Conv2d(3, 1, 1), x)[1], x[:, 1].flatten())
    assert torch.equal(input_channels(nn.Conv2d(3, 1, 1), x[0])[1], x[0, 1].flatten())
    assert torch.equal(input_channels(nn.Linear(2, 1), x)[1], x[..., 1].flatten())
