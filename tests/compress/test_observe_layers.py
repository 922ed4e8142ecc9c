"""What is read at sampled positions is what the layers computed, and only as far as needed."""

import pytest
import torch
from torch import nn

from sparsight.compress.observe_layers import read_rows, survey_layers
from sparsight.compress.sample_patches import draw_positions, gather_positions
from sparsight.models import resnet_cifar


@pytest.fixture
def images():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_survey(net, images):
    uses = survey_layers(net, images)
    assert list(uses) == ["stem", "a1", "a2", "b1", "b2", "head"]
    assert [use.order for use in uses.values()] == [0, 1, 2, 3, 4, 5]
    norms = {name: use.norm for name, use in uses.items()}
    assert norms == dict.fromkeys(norms) | {"stem": "norm", "a1": "a1_norm", "a2": "a2_norm"}
    assert {name for name, use in uses.items() if use.num_sums} == {"a2"}
    assert uses["stem"].positions == 3 * 256
    assert uses["b2"].positions == 3 * 64
    assert uses["head"].positions == 3
    assert uses["b1"].leading == [3]


def test_every_last_convolution_of_a_branch_is_known(images):
    uses = survey_layers(resnet_cifar(14).eval(), images)
    assert {name for name, use in uses.items() if use.num_sums} == {
        f"layer{stage}.{block}.conv2" for stage in (1, 2, 3) for block in (0, 1)
    }


def test_rows_are_outputs_and_their_shortcut(net, images):
    (shares,) = draw_positions([3], 7, seed=1)
    uses = survey_layers(net, images)
    kept = {}

    def keep(name):
        def hook(module, args, out):
            kept[name] = args[0].clone(), out.clone()

        return hook

    for name in ("a2", "a1", "head"):
        net.get_submodule(name).register_forward_hook(keep(name))
    with torch.no_grad():
        net(images)
    seen = read_rows(net, images, shares, [uses["a2"], uses["head"]], reads_inputs=True)
    (rows,) = seen["a2"]
    weight = net.a2.weight.flatten(1)
    torch.testing.assert_close(rows.inputs @ weight.T, rows.outputs)
    assert torch.equal(rows.outputs, gather_positions(kept["a2"][1], shares))
    assert torch.equal(rows.shortcut, gather_positions(kept["a1"][0], shares))
    (rows,) = seen["head"]
    assert torch.equal(rows.inputs, kept["head"][0])
    assert rows.shortcut is None


def test_the_rest_of_the_model_does_not_run(net, images):
    (shares,) = draw_positions([3], 2, seed=1)
    uses = survey_layers(net, images)
    called = []
    net.a2_norm.register_forward_hook(lambda *_: called.append("a2_norm"))
    net.b1.register_forward_hook(lambda *_: called.append("b1"))
    read_rows(net, images, shares, [uses["a1"]], reads_inputs=True)
    assert called == []
    read_rows(net, images, shares, [uses["a2"]], reads_inputs=False)
    assert called == ["a2_norm"]


def test_what_an_in_place_operation_changed_is_not_taken_for_the_layer(images):
    class Changed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            y = self.conv(x)
            y.relu_()
            return y + x

    assert survey_layers(Changed(), images)["conv"].num_sums == 0


def test_layers_that_run_twice_and_tokens():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.mix = nn.Linear(4, 6)

        def forward(self, x):
            y = self.conv(x) + self.conv(x.flip(3))
            return self.mix(y.permute(0, 2, 3, 1))

    model, images = Twice(), torch.randn(2, 3, 6, 5)
    uses = survey_layers(model, images)
    assert (uses["conv"].num_calls, uses["conv"].num_sums) == (2, 2)
    assert uses["mix"].positions == 60
    (shares,) = draw_positions([2], 9, seed=0)
    seen = read_rows(model, images, shares, uses.values(), reads_inputs=True)
    assert [len(rows.outputs) for rows in seen["conv"]] == [18, 18]
    (rows,) = seen["mix"]
    torch.testing.assert_close(model.mix(rows.inputs), rows.outputs)
    assert len(rows.inputs) == 18
