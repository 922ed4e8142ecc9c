"""Groups that autograd's graph does not show as they are, are refused."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from sparsight.compress import ChannelGroup, find_channel_groups
from sparsight.compress.check_groups import refuse_stray_marks, refuse_what_fails

IMAGE = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def found(model: nn.Module, example: object = IMAGE) -> dict[str, ChannelGroup]:
    return {group.name: group for group in find_channel_groups(model, example)}


def test_rearranged_channels_are_refused():
    class Shuffled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = self[0](x)
            b, c, h, w = x.shape
            x = x.reshape(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
            return self[1](x)

    group = found(Shuffled(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)))["0"]
    assert not group.removable and "arrive" in group.reason


def test_a_width_written_into_forward_is_noticed():
    class Rigid(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](self[0](x) + x)  # the image has 3 channels, whatever the model has

    group = found(Rigid(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)))["0"]
    assert not group.removable and "does not run" in group.reason


def test_a_group_with_wrong_indices_does_not_pass():
    """The check itself: a correct group passes, one whose indices are shifted does not."""
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1))
    group = found(net)["0"]
    assert refuse_stray_marks(net, IMAGE, [group]) == [group]
    assert refuse_what_fails(net, IMAGE, [group]) == [group]
    reader = group.of("1", "in")
    units = (*reader.units[1:], reader.units[0])
    wrong = replace(
        group, members=tuple(replace(m, units=units) if m is reader else m for m in group.members)
    )
    assert "another order" in (refuse_stray_marks(net, IMAGE, [wrong])[0].reason or "")
    missing = replace(group, members=tuple(m for m in group.members if m is not reader))
    assert not refuse_what_fails(net, IMAGE, [missing])[0].removable


def test_groups_that_are_taken_for_each_other_are_told_apart():
    """All groups are marked in one pass: exchanged ones must not hide each other."""

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.both = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(16, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.both(torch.cat([self.a(x), self.b(x)], 1))

    net = Joined()
    a, b = found(net)["a"], found(net)["b"]
    assert refuse_stray_marks(net, IMAGE, [a, b]) == [a, b]
    exchanged = [
        replace(
            group,
            members=tuple(other.of("both", "in") if m.side == "in" else m for m in group.members),
        )
        for group, other in ((a, b), (b, a))
    ]
    assert not any(group.removable for group in refuse_stray_marks(net, IMAGE, exchanged))
