"""sparsify: the converted model is its source with masks; nothing else changes."""

import copy
import functools
import io

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import detection, segmentation
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops.misc import FrozenBatchNorm2d

import sparsight
from sparsight.convert import ConversionError, sparsify
from sparsight.nn import (
    AveragePoolInterpolation,
    SampledBlock,
    SampledConv2d,
    Sampler,
    ZeroFill,
    record_sampling,
)

EVERYTHING = functools.partial(Sampler, grid_stride=1)
NOTHING = functools.partial(Sampler, bias=-1e4, grid_stride=None)
HALF = functools.partial(Sampler, bias=0.0)

NO_WEIGHTS = {"weights": None, "weights_backbone": None}
MODELS = {
    "resnet18": lambda: torchvision.models.resnet18(weights=None, num_classes=5),
    "resnet50": lambda: torchvision.models.resnet50(weights=None, num_classes=5),
    "resnext50_32x4d": lambda: torchvision.models.resnext50_32x4d(weights=None, num_classes=5),
    "wide_resnet": lambda: ResNet(Bottleneck, [1, 2, 1, 1], num_classes=5, width_per_group=128),
    "fcn_resnet50": lambda: segmentation.fcn_resnet50(num_classes=5, **NO_WEIGHTS),
    "deeplabv3_resnet50": lambda: segmentation.deeplabv3_resnet50(num_classes=5, **NO_WEIGHTS),
    "resnet18 frozen norm": lambda: torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d),
    "fasterrcnn_resnet50_fpn": lambda: detection.fasterrcnn_resnet50_fpn(
        num_classes=5, min_size=64, max_size=96, box_detections_per_img=5, **NO_WEIGHTS
    ),
}
NUM_BLOCKS = {"resnet18": 8, "resnet18 frozen norm": 8, "wide_resnet": 5}


def randomise(model):
    """Statistics and affine parameters that make an error in any layer visible, at a sane scale."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            nn.init.uniform_(module.weight, 0.4, 0.8)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


@functools.lru_cache(maxsize=2)  # resnet18 and another
def cached(name):
    torch.manual_seed(0)
    return randomise(MODELS[name]()).eval()


def inputs(name, height=33, width=47, batch=3):
    torch.manual_seed(1)
    if name.startswith("fasterrcnn"):
        return [torch.rand(3, height, width), torch.rand(3, width, height)]
    return torch.randn(batch, 3, height, width)


def leaves(output):
    return torch.utils._pytree.tree_leaves(output)


def assert_outputs_close(actual, expected):
    for a, e in zip(leaves(actual), leaves(expected), strict=True):
        assert e.numel() > 0, "nothing to compare"
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4 * e.abs().max().item())


@pytest.mark.parametrize("name", MODELS)
def test_every_model_of_the_family(name):
    """Full mask equals source; contract, class and state are kept; eval repeats itself."""
    source = cached(name)
    x = inputs(name)
    with torch.no_grad():
        expected = source(x)
        full = sparsify(source, sampler=EVERYTHING)
        assert_outputs_close(full(x), expected)
        assert type(full) is type(source)

        half = sparsify(source, sampler=HALF)
        with record_sampling(half) as record:
            first = half(x)
        second = half(x)
    for a, b in zip(leaves(first), leaves(second), strict=True):
        assert torch.equal(a, b)
    assert torch.utils._pytree.tree_structure(first) == torch.utils._pytree.tree_structure(expected)
    num_blocks = NUM_BLOCKS.get(name, 16)
    assert sum(isinstance(m, SampledBlock) for m in half.modules()) == num_blocks
    assert len(record.decisions) == 2 * num_blocks
    gated = [m for m in half.modules() if isinstance(m, SampledBlock)]
    assert [s.layer for m in gated for s in m.samplers] == list(range(2 * num_blocks))

    keys = half.load_state_dict(source.state_dict(), strict=False)
    assert keys.unexpected_keys == []
    assert keys.missing_keys
    assert all(".samplers." in k or ".interpolations." in k for k in keys.missing_keys)


@pytest.mark.parametrize("layout", ["a", "b", "c"])
@pytest.mark.parametrize("size", [(1, 1), (33, 47), (64, 31)])
def test_full_and_empty_masks_in_every_layout(layout, size):
    source = cached("resnet18")
    x = inputs("resnet18", *size)
    with torch.no_grad():
        full = sparsify(source, layout=layout, sampler=EVERYTHING)
        assert_outputs_close(full(x), source(x))
        empty = copy.deepcopy(source)
        for module in empty.modules():
            if isinstance(module, BasicBlock):  # only the shortcut is left
                nn.init.zeros_(module.bn2.weight)
                nn.init.zeros_(module.bn2.bias)
        assert_outputs_close(sparsify(source, layout=layout, sampler=NOTHING)(x), empty(x))


def test_density_is_sigmoid_of_the_bias_and_layers_differ():
    """Binomial bound of 5 sigma on the first block's masks, grid excluded."""
    model = sparsify(cached("resnet18"), sampler=functools.partial(HALF, grid_stride=None))
    with torch.no_grad(), record_sampling(model) as record:
        model(torch.randn(4, 3, 128, 128))
    first, second = record.decisions[0].mask, record.decisions[1].mask
    n = first.numel()
    assert abs(first.float().mean() - 0.5) < 5 * (0.25 / n) ** 0.5
    assert abs((first == second).float().mean() - 0.5) < 5 * (0.25 / n) ** 0.5


def test_the_source_is_not_changed():
    source = cached("resnet18")
    state = {k: v.clone() for k, v in source.state_dict().items()}
    kinds = [type(m) for m in source.modules()]
    model = sparsify(source)
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    assert [type(m) for m in source.modules()] == kinds
    assert all(torch.equal(v, state[k]) for k, v in source.state_dict().items())


def test_modes_gradients_dtype_are_kept():
    source = MODELS["resnet18"]().double().train()
    source.layer1[0].bn1.eval()
    source.layer2.requires_grad_(False)
    model = sparsify(source)
    assert model.training and model.layer1[0].training and model.layer1[0].samplers[0].training
    assert not model.layer1[0].bn1.training
    assert not model.layer2[0].conv1.weight.requires_grad
    assert model.layer2[0].samplers[0].head.weight.requires_grad
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    model.eval()(torch.randn(1, 3, 33, 33).double())


def test_meta_device_is_kept():
    with torch.device("meta"):
        source = MODELS["resnet18"]()
    assert {p.device.type for p in sparsify(source).parameters()} == {"meta"}


def test_gradients_reach_every_parameter():
    model = sparsify(cached("resnet18"), sampler=HALF).train()
    with record_sampling(model) as record:
        loss = model(torch.randn(2, 3, 64, 64)).square().mean()
    (loss + sparsight.sampling_loss(record)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def vgg_like():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same"),
        nn.ReLU(),
        nn.Conv2d(8, 8, 7, stride=2, padding=3, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 4, 2),
    ).eval()


def is_conv(name, module):
    return isinstance(module, nn.Conv2d)


def test_plain_convolutions():
    source = vgg_like()
    model = sparsify(source, where=is_conv, sampler=EVERYTHING)
    assert [isinstance(m, SampledConv2d) for m in model] == [True, False, True, False, True]
    x = torch.randn(2, 3, 17, 20)
    assert_outputs_close(model(x), source(x))
    sampled = sparsify(source, where=lambda name, module: name == "4", sampler=NOTHING)
    assert not sampled(x).any()


def test_a_head_and_a_block_together():
    source = cached("fcn_resnet50")
    model = sparsify(
        source,
        where=lambda name, m: name in ("backbone.layer4.2", "classifier.0", "classifier.4"),
    )
    assert isinstance(model.backbone.layer4[2], SampledBlock)
    assert isinstance(model.classifier[0], SampledConv2d)
    assert isinstance(model.classifier[4], SampledConv2d)
    assert model.backbone.layer4[1].__class__.__name__ == "Bottleneck"


def test_the_model_itself_may_be_the_layer():
    block = sparsify(BasicBlock(4, 4))
    assert isinstance(block, SampledBlock)
    conv = sparsify(nn.Conv2d(4, 4, 1), where=is_conv)
    assert isinstance(conv, SampledConv2d)


def test_shared_modules_stay_shared():
    block = BasicBlock(4, 4)
    model = sparsify(nn.ModuleDict({"a": block, "b": nn.Sequential(block)}))
    assert isinstance(model["a"], SampledBlock) and model["a"] is model["b"][0]
    tied = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    tied[1].weight = tied[0].weight
    model = sparsify(tied, where=is_conv)
    assert model[0].weight is model[1].weight


def test_interpolation_is_copied_or_called():
    for given in (AveragePoolInterpolation(window=5), lambda: AveragePoolInterpolation(window=5)):
        model = sparsify(cached("resnet18"), interpolation=given)
        found = [m for m in model.modules() if isinstance(m, AveragePoolInterpolation)]
        assert len(found) == 16 and all(m.window == 5 for m in found)


def test_repr_says_what_was_sampled_and_what_was_left_dense():
    source = MODELS["resnet18"]()
    source.layer3[1].relu = nn.GELU()
    model = sparsify(source, sampler=functools.partial(Sampler, noise="blue", grid_stride=7))
    text = repr(model)
    assert "sampled 7 layers: layer1.0, layer1.1" in text
    assert "left dense layer3.1: its activation is GELU" in text
    assert "layout='b'" in text and "noise='blue', grid_stride=7" in text
    assert repr(source).count("left dense") == 0
    assert model.sampling_report.left_dense[0][0] == "layer3.1"
    assert "left dense" not in repr(type(model)(BasicBlock, [1, 1, 1, 1]))


def test_copies_and_saves():
    model = sparsify(cached("resnet18"), sampler=HALF)
    x = inputs("resnet18")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        for other in (copy.deepcopy(model), loaded):
            assert torch.equal(other(x), model(x))
            assert repr(other) == repr(model)
            assert other.sampling_report == model.sampling_report
    fresh = sparsify(MODELS["resnet18"](), sampler=HALF).eval()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))


def test_converting_twice_is_refused():
    with pytest.raises(ConversionError, match=r"converted already.*one call"):
        sparsify(sparsify(cached("resnet18")))


def test_example_runs_and_leaves_modes_alone():
    source = cached("fasterrcnn_resnet50_fpn")
    model = sparsify(source, sampler=HALF, example=inputs("fasterrcnn_resnet50_fpn"))
    assert not model.training
    source = MODELS["resnet18"]().train()
    statistics = source.bn1.running_mean.clone()
    model = sparsify(source, example=inputs("resnet18"))
    assert model.training and source.training
    assert torch.equal(source.bn1.running_mean, statistics)
    assert torch.equal(model.bn1.running_mean, statistics)
    assert all(not m._forward_hooks for m in model.modules())


class WrongSize(nn.Module):
    """A sampler that ignores the stride it is given."""

    def __init__(self, in_channels, *, stride):
        super().__init__()
        self.inner = Sampler(in_channels)

    def forward(self, x):
        return self.inner(x)


def test_example_reports_a_broken_contract():
    with pytest.raises(ConversionError, match=r"source runs on the example but .* mask"):
        sparsify(cached("resnet18"), sampler=WrongSize, example=inputs("resnet18"))


class ChecksItsChildren(nn.Module):
    """Returns another structure when its child is not what it was."""

    def __init__(self):
        super().__init__()
        self.block = BasicBlock(4, 4)

    def forward(self, x):
        y = self.block(x)
        return y if type(self.block) is BasicBlock else {"out": y}


def test_example_reports_another_structure():
    with pytest.raises(ConversionError, match=r"returns .* but the source"):
        sparsify(ChecksItsChildren(), example=torch.randn(1, 4, 8, 8))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layout": "d"}, ValueError, r"layout is 'd'.*pass 'b'"),
        ({"sampler": "white"}, TypeError, r"sampler is 'white'.*returns a new sampler"),
        ({"interpolation": 7}, TypeError, r"interpolation is 7.*returns a new interpolation"),
        ({"where": "layer4"}, TypeError, r"where is 'layer4'"),
    ],
)
def test_bad_arguments_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        sparsify(cached("resnet18"), **options)
    with pytest.raises(TypeError, match=r"model is a str"):
        sparsify("resnet18")


def test_zero_fill_converts_too():
    model = sparsify(cached("resnet18"), sampler=EVERYTHING, interpolation=ZeroFill)
    x = inputs("resnet18")
    with torch.no_grad():
        assert_outputs_close(model(x), cached("resnet18")(x))
