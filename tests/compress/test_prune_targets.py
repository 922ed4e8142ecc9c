"""What can be pruned, who reads it, and what it costs."""

import pytest
import torch
from torch import nn

from sparsight.compress import find_channel_groups, keep_channels
from sparsight.compress.layer_widths import count_cost
from sparsight.compress.observe_layers import survey_layers
from sparsight.compress.prune_targets import find_targets, layer_costs, without_channels


def targets_of(model, example, *, num_rows=10**6, selects_inputs=False):
    uses = survey_layers(model, example)
    targets, reasons = find_targets(
        model,
        find_channel_groups(model, example),
        uses,
        num_images=len(example),
        num_rows=lambda use: num_rows,
        selects_inputs=selects_inputs,
    )
    return targets, reasons, uses


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def macs(model, example):
    """Multiply-adds of convolutions and linear layers, by what they return."""
    total = []

    def count(module, args, out):
        channels = out.shape[1]
        total.append(out.numel() // channels * module.weight.numel())

    hooks = [
        module.register_forward_hook(count)
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        model(example)
    for hook in hooks:
        hook.remove()
    return sum(total)


def test_the_stream_is_left_and_the_branches_are_not(net):
    targets, reasons, _ = targets_of(net, IMAGES)
    assert [target.name for target in targets] == ["a1", "b1", "b2"]
    assert set(reasons) == {"stem", "a2", "head"}
    assert "'stem', 'a2' produce together" in reasons["a2"]
    flattened = targets[2].unit_of_channel["head"]
    assert torch.equal(flattened, torch.arange(6).repeat_interleave(64))
    assert [target.refusal for target in targets] == [None] * 3


def test_too_few_rows_for_a_linear_layer_leave_it_out_by_default(net):
    targets, _, _ = targets_of(net, IMAGES, num_rows=5)
    assert [target.refusal for target in targets[:2]] == [None, None]
    assert targets[2].refusal == "'head' gives 5 rows for 6 channels"


def test_selections_of_the_stream(net):
    targets, _, _ = targets_of(net, IMAGES, selects_inputs=True)
    assert [target.name for target in targets] == ["a1:in", "a1", "b1:in", "b1", "b2"]
    assert targets[0].group is None
    assert targets[0].touched == ["a1"]


class Concatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1)
        self.wide = nn.Conv2d(6, 12, 1)
        self.depth = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.norm = nn.BatchNorm2d(16)
        self.both = nn.Conv2d(16, 5, 1)

    def forward(self, x):
        wide = self.depth(torch.relu(self.wide(self.b(x))))
        return self.both(self.norm(torch.cat([self.a(x), wide], 1)))


def test_cost_at_any_widths_is_that_of_the_smaller_model():
    model = Concatenated().eval()
    targets, _, uses = targets_of(model, IMAGES)
    assert {target.name for target in targets} == {"a", "b", "wide"}
    costs = layer_costs(model, uses, targets)
    widths = {target.name: target.units for target in targets}
    assert count_cost(costs, widths) == macs(model, IMAGES)
    todo = list(targets)
    while todo:
        target = todo.pop(0)
        kept = torch.arange(target.units)[1::2]
        keep_channels(model, target.group, kept)
        widths[target.name] = len(kept)
        assert count_cost(costs, widths) == macs(model, IMAGES)
        todo = [without_channels(other, target, kept) for other in todo]


def test_channels_that_moved_are_still_found():
    """Behind a concatenation, removing the first branch's channels moves the second one's."""
    model = Concatenated().eval()
    targets, _, _ = targets_of(model, IMAGES)
    by_name = {target.name: target for target in targets}
    kept = torch.tensor([0, 3])
    moved = without_channels(by_name["wide"], by_name["a"], kept)
    keep_channels(model, by_name["a"].group, kept)
    (again,) = (target for target in targets_of(model, IMAGES)[0] if target.name == "wide")
    assert torch.equal(moved.unit_of_channel["both"], again.unit_of_channel["both"])
    assert set(moved.group.members) == set(again.group.members)


@pytest.mark.parametrize("kind", ["transposed", "grouped", "objects"])
def test_readers_that_are_not_refitted(kind):
    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            if kind == "transposed":
                self.reader = nn.ConvTranspose2d(8, 4, 2)
            elif kind == "grouped":
                self.reader = nn.Conv2d(8, 4, 1, groups=2)
            else:
                self.reader = nn.Conv2d(8, 4, 1)
            self.last = nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.conv(x)
            if kind == "objects":  # three crops of every image
                x = torch.cat([x[..., :5, :5], x[..., 5:10, :5], x[..., 5:10, 5:10]])
            return self.last(self.reader(x))

    targets, reasons, _ = targets_of(Read().eval(), IMAGES)
    if kind == "grouped":  # taken along: the last layer reads what is left of it
        assert [target.name for target in targets] == ["conv"]
        assert list(targets[0].unit_of_channel) == ["last"]
        assert targets[0].units == 2
    else:
        assert "'reader' reads its channels, and" in reasons["conv"]
