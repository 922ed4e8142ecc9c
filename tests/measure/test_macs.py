"""Whole models: published totals, and what counting must leave alone."""

import copy

import pytest
import torch
import torchvision
from torch import nn

import sparsight
from sparsight.measure import count_macs


def resnet_by_formula(block_convs, counts, expansion, classes=1000, size=224):
    """MACs of a ResNet from its layer table: 7x7 stem, four stages, shortcuts, classifier."""
    position = (size // 2) ** 2
    total = position * 64 * 3 * 49
    side, channels = size // 4, 64
    for stage, count in enumerate(counts):
        planes = 64 * 2**stage
        for index in range(count):
            stride = 2 if stage and not index else 1
            out = side // stride
            for kernel, cin, cout, at_input in block_convs(channels, planes):
                where = side if at_input else out
                total += where * where * kernel * kernel * cin * cout
            if stride > 1 or channels != planes * expansion:
                total += out * out * channels * planes * expansion
            side, channels = out, planes * expansion
    return total + channels * classes


def basic(channels, planes):
    return [(3, channels, planes, False), (3, planes, planes, False)]


def bottleneck(channels, planes):
    """torchvision's: the stride sits on the 3x3, so conv1 runs at the input's resolution."""
    return [
        (1, channels, planes, True),
        (3, planes, planes, False),
        (1, planes, planes * 4, False),
    ]


@pytest.mark.parametrize(
    ("name", "convs", "counts", "expansion", "published_g"),
    [
        ("resnet18", basic, (2, 2, 2, 2), 1, 1.814),
        ("resnet50", bottleneck, (3, 4, 6, 3), 4, 4.089),
    ],
)
def test_resnets(name, convs, counts, expansion, published_g):
    with torch.device("meta"):
        model = getattr(torchvision.models, name)().eval()
        count = count_macs(model, torch.zeros(1, 3, 224, 224))
    assert count.total == count.dense == resnet_by_formula(convs, counts, expansion)
    assert count.total / 1e9 == pytest.approx(published_g, abs=5e-4)
    assert sum(row.total for row in count.layers) == count.total
    names = dict(model.named_modules())
    assert all(isinstance(names[row.name], nn.Conv2d | nn.Linear) for row in count.layers)


def test_batch_counts_in_total():
    model = torchvision.models.resnet18(num_classes=4).eval()
    one, three = (count_macs(model, torch.zeros(b, 3, 33, 47)) for b in (1, 3))
    assert three.total == 3 * one.total


class Functional(nn.Module):
    """Multiplies in its own forward and in a child's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6, 3, 3, 3))
        self.child = nn.Sequential(nn.Conv2d(6, 2, 1))

    def forward(self, x, scale):
        y = torch.nn.functional.conv2d(x, self.weight)
        return self.child(y) * scale, x.flatten(1) @ torch.zeros(x[0].numel(), 5)


def test_functions_are_booked_on_the_module_that_calls_them():
    count = count_macs(Functional().eval(), (torch.zeros(1, 3, 6, 6), 2.0))
    rows = {(row.name, row.kind): row.total for row in count.layers}
    assert rows == {("", "Functional"): 16 * 6 * 27 + 108 * 5, ("child.0", "Conv2d"): 16 * 12}


def test_a_plain_function_is_counted():
    with torch.no_grad():
        count = count_macs(nn.Identity().eval(), torch.zeros(1))
    assert (count.total, count.layers) == (0, [])
    assert count.ratio != count.ratio  # nothing is no share of nothing


def test_counting_changes_nothing():
    model = sparsight.sparsify(torchvision.models.resnet18(num_classes=3)).eval()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        y = model(x)
    generator = torch.get_rng_state()
    count_macs(model, x)
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    with torch.no_grad():
        assert torch.equal(model(x), y)


def test_hooks_go_when_the_model_raises():
    model = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    with pytest.raises(RuntimeError):
        count_macs(model, torch.zeros(1, 5, 4, 4))
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks


def test_training_mode_is_refused():
    model = sparsight.sparsify(torchvision.models.resnet18(num_classes=3))
    with pytest.raises(ValueError, match=r"count_macs: the model is in training mode.*\.eval\(\)"):
        count_macs(model.train(), torch.zeros(1, 3, 32, 32))
    model.eval()
    model.layer1[0].samplers[0].train()
    with pytest.raises(ValueError, match=r"layer1\.0\.samplers\.0 is in training mode"):
        count_macs(model, torch.zeros(1, 3, 32, 32))


def with_bias(model, bias):
    for name, parameter in model.named_parameters():
        if name.endswith("head.bias") and "samplers" in name:
            nn.init.constant_(parameter, bias)
    return model


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50"])
def test_converted_segmentation_costs_its_source_and_the_heads_at_full_masks(name):
    source = getattr(torchvision.models.segmentation, name)(
        weights_backbone=None, num_classes=3
    ).eval()
    x = torch.randn(1, 3, 40, 56)
    model = with_bias(sparsight.sparsify(source), 40.0).eval()
    count, dense = count_macs(model, x), count_macs(source, x)
    assert count.dense == dense.total
    heads = sum(row.total for row in count.layers if row.kind == "Sampler")
    assert count.total == count.dense + heads
    assert 0 < heads < 0.05 * count.dense


def test_sampling_saves():
    """At bias 0 half of every gated convolution is left; the rest of the network stays."""
    source = torchvision.models.resnet50(num_classes=3).eval()
    model = with_bias(sparsight.sparsify(source), 0.0).eval()
    count = count_macs(model, torch.randn(1, 3, 96, 96))
    gated = [row for row in count.layers if row.positions and row.dense]
    share = sum(row.total for row in gated) / sum(row.dense for row in gated)
    assert share == pytest.approx(0.5, abs=0.05)
    assert 0.5 < count.ratio < 0.75


def test_table():
    model = with_bias(sparsight.sparsify(torchvision.models.resnet18(num_classes=3)), 0.0).eval()
    text = str(count_macs(model, torch.randn(1, 3, 64, 64)))
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "kind", "density", "dense", "MMACs", "MMACs"]
    assert any(line.startswith("layer2.0.downsample.0") for line in lines)
    assert lines[-1].startswith("all") and lines[-1].endswith("of dense)")


@pytest.mark.slow
def test_detector_takes_a_list_of_images():
    detector = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=96
    ).eval()
    images = [torch.rand(3, 60, 80), torch.rand(3, 70, 50)]
    count = count_macs(sparsight.sparsify(detector).eval(), images)
    assert {"rpn.head.conv.0.0", "backbone.body.layer1.0.conv1"} <= {r.name for r in count.layers}
    assert count.dense > 0
