"""Groups of channels: what is found, and that removing is the same as silencing."""

import copy
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from sparsight.compress import ChannelGroup, find_channel_groups, keep_channels
from sparsight.compress.channel_group import keep_all_channels
from sparsight.models import faster_rcnn, resnet_cifar, semantic_fpn
from sparsight.nn.deform_conv import DeformableConv2d

pytestmark = pytest.mark.usefixtures("narrow_resnet18")
IMAGE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def settled(model: nn.Module) -> nn.Module:
    """In eval mode, with norms that do something."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.bias, module.running_mean):
                value.data.copy_(torch.randn(value.shape, generator=generator))
    return model.eval()


def silence(model: nn.Module, group: ChannelGroup, keep: list[int]) -> nn.Module:
    """A copy whose consumers see zeros where the group loses units: removal, at full width."""
    silenced = copy.deepcopy(model)
    for member in group.members:
        layer = silenced.get_submodule(member.name)
        if member.side == "in" and member.name in group.consumers:
            gone = [c for u in range(group.channels) if u not in keep for c in member.units[u]]
            layer.weight.data[:, gone] = 0
    return silenced


def outputs(model: nn.Module, example: object) -> Tensor:
    with torch.no_grad():
        out = model(example)
    while not isinstance(out, Tensor):
        out = next(iter(out.values())) if isinstance(out, dict) else out[0]
    return out


class Concatenated(nn.Module):
    """Two branches of different width read as one, the second by a convolution of its own too."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(10)
        self.both = nn.Conv2d(10, 5, 1)
        self.alone = nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        b = self.b(x)
        return self.both(F.relu(self.norm(torch.cat([self.a(x), b], 1)))) + self.alone(b)


class Twice(nn.Module):
    """One convolution reads two maps."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)
        self.b = nn.Conv2d(3, 4, 1)
        self.shared = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(self.a(x)) + self.shared(self.b(x).relu())


def vgg() -> nn.Module:
    """As torchvision's, with pooling to 7x7 and a flattened map."""
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(inplace=True)]
    model = torchvision.models.VGG(nn.Sequential(*layers), init_weights=False)
    model.classifier = nn.Sequential(nn.Linear(6 * 49, 8), nn.ReLU(), nn.Linear(8, 3))
    return model


def resnext() -> nn.Module:
    block = torchvision.models.resnet.Bottleneck(16, 4, groups=4, base_width=64)
    stem = [nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    return nn.Sequential(*stem, block, nn.Conv2d(16, 3, 1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vgg": vgg,
    "resnet18": lambda: torchvision.models.resnet.resnet18(),
    "mobilenet": lambda: torchvision.models.mobilenet_v2(width_mult=0.25),
    "resnext": resnext,
    "cifar": lambda: resnet_cifar(8),
    "semantic_fpn": lambda: semantic_fpn(
        "resnet18", num_classes=3, fpn_channels=16, head_channels=16
    ),
    "concatenated": Concatenated,
    "twice": Twice,
    "transposed": lambda: nn.Sequential(
        nn.ConvTranspose2d(3, 6, 2, 2), nn.PReLU(6), nn.ConvTranspose2d(6, 4, 2, 2)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_removing_equals_silencing(name):
    """Consumers that see zeros compute what the smaller model computes: the indices are right."""
    torch.manual_seed(0)
    model = settled(MODELS[name]())
    groups = [group for group in find_channel_groups(model, IMAGE) if group.removable]
    assert groups
    for group in groups[:: max(1, len(groups) // 4)]:
        keep = list(range(0, group.channels, 2))
        smaller = copy.deepcopy(model)
        keep_channels(smaller, group, torch.tensor(keep))
        if any(isinstance(model.get_submodule(n), nn.ConvTranspose2d) for n in group.consumers):
            expected = copy.deepcopy(model)
            expected.get_submodule(group.consumers[0]).weight.data[1::2] = 0
        else:
            expected = silence(model, group, keep)
        torch.testing.assert_close(
            outputs(smaller, IMAGE), outputs(expected, IMAGE), rtol=1e-4, atol=1e-4
        )
        assert sum(p.numel() for p in smaller.parameters()) < sum(
            p.numel() for p in model.parameters()
        )


def found(model: nn.Module, example: object = IMAGE) -> dict[str, ChannelGroup]:
    return {group.name: group for group in find_channel_groups(model, example)}


def test_producers_are_disjoint_and_complete():
    for name in ("resnet18", "mobilenet", "semantic_fpn", "concatenated"):
        model = MODELS[name]()
        groups = find_channel_groups(model, IMAGE)
        layers = [n for g in groups for n in (*g.producers, *g.grouped)]
        assert sorted(layers) == sorted(
            n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)
        )


def test_the_residual_stream_is_one_group():
    groups = found(MODELS["resnet18"]())
    stream = groups["layer2.0.conv2"]
    assert stream.is_stream and stream.removable
    assert stream.producers == ("layer2.0.conv2", "layer2.0.downsample.0", "layer2.1.conv2")
    assert stream.consumers == ("layer2.1.conv1", "layer3.0.conv1", "layer3.0.downsample.0")
    assert stream.norms == ("layer2.0.bn2", "layer2.0.downsample.1", "layer2.1.bn2")
    inner = groups["layer2.1.conv1"]
    assert not inner.is_stream
    assert (inner.consumers, inner.norms) == (("layer2.1.conv2",), ("layer2.1.bn1",))


def test_padded_shortcuts_tie_channels_in_a_way_that_cannot_be_told():
    groups = found(MODELS["cifar"]())
    stream = groups["conv1"]
    assert not stream.removable and "padding" in stream.reason
    assert {"layer1.0.conv2", "layer2.0.conv2", "layer3.0.conv2"} < set(stream.producers)
    assert groups["layer2.0.conv1"].removable


def test_outputs_are_not_removable():
    groups = found(MODELS["vgg"]())
    assert not groups["classifier.2"].removable
    assert "output of the model" in groups["classifier.2"].reason
    assert groups["classifier.0"].removable


def test_features_that_are_returned_as_well_are_outputs():
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            a = self.a(x)
            return {"features": a, "out": self.b(a)}

    groups = found(Features())
    assert not groups["a"].removable and "output" in groups["a"].reason


def test_flattened_channels_are_runs_of_features():
    member = found(MODELS["vgg"]())["features.3"].of("classifier.0", "in")
    assert member.units[2] == tuple(range(98, 147))


def test_depthwise_convolutions_go_along():
    groups = found(MODELS["mobilenet"]())
    group = groups["features.2.conv.0.0"]
    assert group.producers == ("features.2.conv.0.0",)
    assert group.grouped == ("features.2.conv.1.0",)
    assert group.consumers == ("features.2.conv.2",)


def test_units_of_grouped_convolutions_are_their_groups():
    group = found(resnext())["3.conv1"]
    assert group.channels == 4 and group.grouped == ("3.conv2",)
    assert group.of("3.conv1", "out").units[1] == (4, 5, 6, 7)


def test_concatenated_groups_are_pruned_together():
    model = settled(Concatenated())
    groups = found(model)
    pairs = [(groups["a"], torch.tensor([0, 3])), (groups["b"], torch.tensor([1, 2, 5]))]
    expected = silence(silence(model, groups["a"], [0, 3]), groups["b"], [1, 2, 5])
    smaller = copy.deepcopy(model)
    keep_all_channels(smaller, pairs)
    assert smaller.both.in_channels == 5
    torch.testing.assert_close(outputs(smaller, IMAGE), outputs(expected, IMAGE))
    keep_channels(model, *pairs[0])
    with pytest.raises(ValueError, match="call find_channel_groups again"):
        keep_channels(model, *pairs[1])


def test_a_convolution_that_is_used_twice_ties_what_it_reads():
    groups = found(Twice())
    assert groups["a"].producers == ("a", "b")
    assert groups["a"].consumers == ("shared",)


def test_detectors_are_traced_with_a_list_of_images():
    model = faster_rcnn(
        "resnet18", num_classes=3, min_size=32, max_size=32, fpn_channels=8, head_channels=8
    )
    groups = found(model, [torch.rand(3, 32, 32)])
    assert groups["backbone.body.layer1.0.conv1"].removable
    assert groups["backbone.body.conv1"].is_stream
    assert not groups["rpn.head.cls_logits"].removable
    fpn = groups["backbone.fpn.layer_blocks.3.0"]  # the coarsest is called first
    assert sorted(fpn.producers) == [f"backbone.fpn.layer_blocks.{i}.0" for i in range(4)]
    assert {"rpn.head.conv.0.0", "roi_heads.box_head.fc6"} <= set(fpn.consumers)


def test_the_model_comes_back_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    model = model.to(torch.float64).to(memory_format=torch.channels_last).train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model(IMAGE.double()).sum().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradient = model[3].weight.grad.clone()
    group = find_channel_groups(model, IMAGE.double())[0]
    assert [module.training for module in model] == [True, False, True, True]
    assert torch.equal(model[3].weight.grad, gradient)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())

    keep_channels(model, group, torch.tensor([6, 1]))
    assert torch.equal(model[0].weight, before["0.weight"][[1, 6]])
    assert torch.equal(model[3].weight, before["3.weight"][:, [1, 6]])
    assert not model[0].weight.requires_grad and model[3].weight.requires_grad
    assert model[3].weight.grad is None
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[1].running_var.dtype == torch.float64
    assert [module.training for module in model] == [True, False, True, True]


def test_frozen_parameters_and_no_grad_are_no_obstacle():
    model = MODELS["resnet18"]().requires_grad_(False)
    with torch.no_grad():
        assert found(model)["layer1.0.conv1"].consumers == ("layer1.0.conv2",)


def test_models_without_values_are_traced():
    with torch.device("meta"):
        model, image = resnet_cifar(8), torch.zeros(1, 3, 32, 32)
    group = found(model, image)["layer1.0.conv1"]
    keep_channels(model, group, torch.arange(5))
    assert model.layer1[0].conv2.weight.shape == (16, 5, 3, 3)


def test_shared_and_computed_weights_are_refused():
    net = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(3)))
    net[1].weight = net[0].weight
    x = torch.zeros(1, 4, 2, 2)
    assert "share a parameter" in found(net, x)["0"].reason
    net = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(2)))
    nn.utils.parametrizations.weight_norm(net[1])
    assert "computed" in found(net, x)["0"].reason


def test_layer_norm_is_refused_by_name():
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    assert "LayerNorm" in found(net, torch.zeros(1, 4))["0"].reason


def test_channels_read_by_a_deformable_convolution_can_go():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), DeformableConv2d(6, 4, 3, padding=1))
    group = found(net)["0"]
    assert group.removable and group.consumers == ("1.offset", "1")
    nn.init.normal_(net[1].offset.weight, std=0.1)
    expected = outputs(silence(net, group, [0, 2]), IMAGE)
    keep_channels(net, group, torch.tensor([0, 2]))
    torch.testing.assert_close(outputs(net, IMAGE), expected)


def test_models_that_cannot_be_traced_are_refused():
    with pytest.raises(TypeError, match=r"a torch\.nn\.Module is required"):
        find_channel_groups("resnet18", IMAGE)
    with pytest.raises(ValueError, match="no convolution"):
        find_channel_groups(nn.ReLU(), IMAGE)


def test_a_model_that_cannot_be_followed_is_refused(monkeypatch):
    """Torch-Pruning divides by zero at ShuffleNet's views; a wrong example is not blamed on it."""
    from torch_pruning.dependency import index_mapping

    def fail(graph: object) -> None:
        raise ZeroDivisionError("integer division or modulo by zero")

    monkeypatch.setattr(index_mapping, "update_index_mapping", fail)
    with pytest.raises(ValueError, match=r"cannot follow Conv2d \(ZeroDivisionError"):
        find_channel_groups(nn.Conv2d(3, 2, 1), IMAGE)
    with pytest.raises(RuntimeError, match="channels"):
        find_channel_groups(nn.Conv2d(4, 2, 1), IMAGE)


def test_a_missing_library_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"pip install \"sparsight\[compress\]\""):
        find_channel_groups(nn.Conv2d(3, 2, 1), IMAGE)
