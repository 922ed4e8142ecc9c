"""The frozen model computes what the converted model computes, and refuses what it cannot."""

import copy
import threading
from functools import partial

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import sparsight
from sparsight.convert import ConversionError
from sparsight.nn import (
    AveragePoolInterpolation,
    ConvInterpolation,
    DeformableBlock,
    DeformableConv2d,
    NearestInterpolation,
    RBFInterpolation,
    Sampler,
    ZeroFill,
)
from sparsight.nn.frozen_block import FrozenBlock
from sparsight.ops import sites_from_mask

# Relative to the largest output; the two paths round differently, layer by layer.
TOLERANCE = 1e-4


def randomise_norms(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


def set_bias(model: nn.Module, bias: float) -> None:
    for module in model.modules():
        if isinstance(module, Sampler):
            nn.init.constant_(module.head.bias, bias)


def tiny(block: type, **kwargs) -> nn.Module:
    """Two stages of a ResNet: strides, shortcuts of both kinds, and little to compute."""
    model = ResNet(block, [1, 2, 1, 1], **kwargs)
    model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(128 * block.expansion, 7)
    return randomise_norms(model)


def deformable(is_modulated: bool) -> nn.Module:
    """The tiny network with moving taps in its second stage, as the published ones."""
    model = tiny(Bottleneck)
    for name, block in list(model.layer2.named_children()):
        moving = DeformableBlock(block, is_modulated=is_modulated)
        nn.init.normal_(moving.conv2.offset.weight, std=0.03)
        nn.init.normal_(moving.conv2.offset.bias)
        setattr(model.layer2, name, moving)
    return model.eval()


def relative_error(frozen, converted) -> float:
    if isinstance(frozen, dict):
        assert frozen.keys() == converted.keys()
        return max(relative_error(frozen[k], converted[k]) for k in frozen)
    return ((frozen - converted).abs().max() / converted.abs().max()).item()


def assert_frozen_equals(converted: nn.Module, x) -> nn.Module:
    frozen = sparsight.freeze(converted, example=x)
    with torch.no_grad():
        assert relative_error(frozen(x), converted(x)) < TOLERANCE
        with sparsight.record_sampling(converted) as a:
            converted(x)
        with sparsight.record_sampling(frozen) as b:
            frozen(x)
    assert [d.name for d in a.decisions] == [d.name for d in b.decisions]
    assert [d.macs for d in a.decisions] == [d.macs for d in b.decisions]
    for da, db in zip(a.decisions, b.decisions, strict=True):
        assert torch.equal(da.mask, db.mask), da.name
        torch.testing.assert_close(da.probability, db.probability, atol=1e-5, rtol=1e-4)
    return frozen


def test_the_comparison_can_fail() -> None:
    assert relative_error(torch.ones(3), torch.tensor([1.0, 1.0, 2.0])) > TOLERANCE


# Every pair of layout, block and bias; blocks take turns.
DENSITIES = [
    (layout, (BasicBlock, Bottleneck)[(i + j) % 2], bias)
    for i, layout in enumerate("abc")
    for j, bias in enumerate((1e4, 0.0, -3.0, -1e4))
]


@pytest.mark.parametrize(("layout", "block", "bias"), DENSITIES)
def test_frozen_equals_converted_at_every_density(layout, block, bias) -> None:
    noise = {"a": "none", "b": "white", "c": "blue"}[layout]
    model = sparsight.sparsify(tiny(block), layout=layout, sampler=partial(Sampler, noise=noise))
    set_bias(model, bias)
    assert_frozen_equals(model.eval(), torch.randn(3, 3, 33, 25))


@pytest.mark.parametrize("is_modulated", [False, True])
@pytest.mark.parametrize("layout", ["a", "b", "c"])
def test_a_network_with_deformable_blocks_sparsifies_and_freezes(layout, is_modulated) -> None:
    source, x = deformable(is_modulated), torch.randn(2, 3, 65, 49)
    model = sparsight.sparsify(source, layout=layout, example=x).eval()
    assert [type(block).__name__ for block in model.layer2] == ["SampledBlock"] * 2
    set_bias(model, 1e4)
    with torch.no_grad():
        assert relative_error(model(x), source(x)) < TOLERANCE
    for bias in (1e4, -0.5, -1e4):
        set_bias(model, bias)
        frozen = assert_frozen_equals(model, x)
        assert all(isinstance(block, FrozenBlock) for block in frozen.layer2)


class AtSites(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = DeformableConv2d(3, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(x, sites=sites_from_mask(x[:, :1] > 0))


def test_a_deformable_convolution_at_given_sites_freezes() -> None:
    source, x = AtSites().eval(), torch.randn(1, 3, 9, 11)
    nn.init.normal_(source.conv.offset.weight, std=0.3)
    frozen = sparsight.freeze(source, example=x)
    with torch.no_grad():
        assert relative_error(frozen(x), source(x)) < TOLERANCE


def test_a_dense_network_with_deformable_blocks_freezes() -> None:
    source, x = deformable(True), torch.randn(1, 3, 65, 49)
    frozen = sparsight.freeze(source, example=x)
    with torch.no_grad():
        assert relative_error(frozen(x), source(x)) < TOLERANCE


@pytest.mark.parametrize(
    "interpolation",
    [
        partial(RBFInterpolation, width=0.7),
        partial(RBFInterpolation, eps=1e-5),
        partial(RBFInterpolation, window=3),
        partial(RBFInterpolation, window=9, width=0.3),
        ConvInterpolation,
        AveragePoolInterpolation,
        NearestInterpolation,
        ZeroFill,
    ],
)
def test_frozen_equals_converted_with_every_interpolation(interpolation) -> None:
    sampler = partial(Sampler, grid_stride=None, bias=-1.5)
    model = sparsight.sparsify(tiny(Bottleneck), interpolation=interpolation, sampler=sampler)
    assert_frozen_equals(model.eval(), torch.randn(2, 3, 40, 40))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"groups": 32, "width_per_group": 4},
        {"width_per_group": 128},
        {"replace_stride_with_dilation": [True, False, False]},
    ],
    ids=["resnext", "wide", "dilated"],
)
def test_frozen_equals_converted_for_the_family(kwargs) -> None:
    model = sparsight.sparsify(tiny(Bottleneck, **kwargs), sampler=partial(Sampler, bias=-0.5))
    assert_frozen_equals(model.eval(), torch.randn(1, 3, 37, 64))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_frozen_equals_converted_for_torchvision_classifiers(name) -> None:
    source = randomise_norms(getattr(torchvision.models, name)(weights=None))
    model = sparsight.sparsify(source, sampler=partial(Sampler, bias=0.0)).eval()
    assert_frozen_equals(model, torch.randn(1, 3, 65, 97))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50"])
def test_frozen_equals_converted_for_torchvision_segmentation(name) -> None:
    build = getattr(torchvision.models.segmentation, name)
    source = randomise_norms(build(weights=None, weights_backbone=None, num_classes=5))
    model = sparsight.sparsify(source, sampler=partial(Sampler, bias=0.0)).eval()
    assert_frozen_equals(model, torch.randn(1, 3, 49, 65))


@pytest.mark.slow
def test_a_detector_keeps_its_contract() -> None:
    source = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=4, min_size=96, max_size=128
    )
    model = sparsight.sparsify(randomise_norms(source), sampler=partial(Sampler, bias=1.0)).eval()
    images = [torch.rand(3, 90, 120), torch.rand(3, 100, 80)]
    frozen = sparsight.freeze(model, example=images)
    with torch.no_grad():
        features, expected = frozen.backbone(images[0][None]), model.backbone(images[0][None])
        assert relative_error(features, expected) < TOLERANCE
        out = frozen(images)
    assert [set(o) for o in out] == [{"boxes", "labels", "scores"}] * 2


def test_sizes_down_to_one_pixel_and_other_batches() -> None:
    model = sparsight.sparsify(tiny(Bottleneck), sampler=partial(Sampler, bias=0.0)).eval()
    frozen = sparsight.freeze(model, example=torch.randn(1, 3, 32, 32))
    for shape in [(1, 3, 1, 1), (5, 3, 2, 3), (1, 3, 31, 7), (2, 3, 64, 48)]:
        x = torch.randn(shape)
        with torch.no_grad():
            assert relative_error(frozen(x), model(x)) < TOLERANCE, shape


def test_one_site_alone() -> None:
    # The grid of a stride larger than every map leaves position (0, 0) of each.
    sampler = partial(Sampler, bias=-1e4, grid_stride=1000)
    model = sparsight.sparsify(tiny(Bottleneck), sampler=sampler).eval()
    frozen = assert_frozen_equals(model, torch.randn(1, 3, 48, 48))
    with torch.no_grad(), sparsight.record_sampling(frozen) as record:
        frozen(torch.randn(1, 3, 48, 48))
    assert all(d.mask.sum() == 1 for d in record.decisions)


def test_an_empty_mask_leaves_the_shortcut() -> None:
    sampler = partial(Sampler, bias=-1e4, grid_stride=None)
    model = sparsight.sparsify(tiny(Bottleneck), sampler=sampler).eval()
    frozen = sparsight.freeze(model, example=torch.randn(1, 3, 32, 32))
    block, x = frozen.layer2[1], torch.randn(1, 512, 6, 5)
    assert isinstance(block, FrozenBlock)
    torch.testing.assert_close(block(x), x.relu(), rtol=0, atol=0)


def test_one_thread_equals_two_bit_for_bit() -> None:
    model = sparsight.sparsify(tiny(Bottleneck), sampler=partial(Sampler, bias=-0.5)).eval()
    x = torch.randn(2, 3, 57, 41)
    frozen = sparsight.freeze(model, example=x)
    # The dense layers are torch's own, which makes no such promise: the sampled ones do.
    block, features = frozen.layer1[0], torch.randn(2, 64, 29, 21)
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            shortcut = copy.deepcopy(block)
            shortcut.downsample = None
            shortcut.has_shortcut = False
            results.append(shortcut(features))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_many_python_threads_share_a_frozen_model() -> None:
    model = sparsight.sparsify(tiny(BasicBlock), sampler=partial(Sampler, bias=0.0)).eval()
    x = torch.randn(1, 3, 40, 56)
    frozen = sparsight.freeze(model, example=x)
    block, features = frozen.layer1[0], torch.randn(1, 64, 20, 28)
    expected, wrong = block(features), []

    def work() -> None:
        for _ in range(20):
            if not torch.equal(block(features), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_two_calls_give_the_same_output() -> None:
    model = sparsight.sparsify(tiny(Bottleneck), sampler=partial(Sampler, bias=0.0)).eval()
    x = torch.randn(2, 3, 33, 33)
    frozen = sparsight.freeze(model, example=x)
    assert torch.equal(frozen(x), frozen(x))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(6, 10, 3, padding=1),
        nn.Conv2d(6, 10, 1, bias=False),
        nn.Conv2d(6, 10, 3, stride=2, padding=1),
        nn.Conv2d(6, 10, 7, stride=2, padding=3),
        nn.Conv2d(6, 12, 3, padding=2, dilation=2, groups=3),
        nn.Conv2d(6, 6, 3, padding="same", groups=6),
        nn.Conv2d(6, 10, 2),
        nn.Conv2d(6, 10, (1, 5), padding=(0, 2)),
        nn.Conv2d(6, 10, 3, padding="valid"),
    ],
    ids=str,
)
def test_single_convolutions_freeze(conv) -> None:
    torch.manual_seed(1)
    source = nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU())
    model = sparsight.sparsify(
        randomise_norms(source),
        where=lambda name, module: name == "0",
        sampler=partial(Sampler, bias=-0.5, grid_stride=5),
    ).eval()
    frozen = assert_frozen_equals(model, torch.randn(2, 6, 17, 23))
    assert isinstance(frozen[0], FrozenBlock)


def test_a_decision_made_elsewhere_is_used() -> None:
    conv = nn.Conv2d(4, 5, 3, padding=1)
    model = sparsight.sparsify(nn.Sequential(conv), where=lambda n, m: n == "0").eval()
    x = torch.randn(1, 4, 9, 9)
    frozen = sparsight.freeze(model, example=x)
    mask = torch.rand(1, 1, 9, 9) < 0.3
    decision = sparsight.nn.SamplingDecision(mask, mask.float(), None)
    with torch.no_grad():
        torch.testing.assert_close(
            frozen[0](x, decision), model[0](x, decision), atol=1e-5, rtol=1e-5
        )
        with pytest.raises(ValueError, match="build the mask at output resolution"):
            frozen[0](x, sparsight.nn.SamplingDecision(mask[..., :5], mask[..., :5].float(), None))


def test_the_source_is_not_changed() -> None:
    model = sparsight.sparsify(tiny(BasicBlock)).eval()
    before = copy.deepcopy(model.state_dict())
    sparsight.freeze(model, example=torch.randn(1, 3, 32, 32))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert isinstance(model.bn1, nn.BatchNorm2d)


def test_the_state_of_a_frozen_model_loads_into_another() -> None:
    x = torch.randn(1, 3, 32, 32)
    first = sparsight.freeze(sparsight.sparsify(tiny(BasicBlock)).eval(), example=x)
    other = sparsight.sparsify(tiny(BasicBlock)).eval()
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    second = sparsight.freeze(other, example=x)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


def test_frozen_blocks_compile_without_a_graph_break() -> None:
    model = sparsight.sparsify(tiny(BasicBlock), sampler=partial(Sampler, bias=0.0)).eval()
    frozen = sparsight.freeze(model, example=torch.randn(1, 3, 32, 32))
    block, x = frozen.layer1[0], torch.randn(1, 64, 9, 11)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), block(x))
        program = torch.export.export(block, (x,))
        assert torch.equal(program.module()(x), block(x))


def test_training_and_gradients_are_refused() -> None:
    x = torch.randn(1, 3, 32, 32)
    frozen = sparsight.freeze(sparsight.sparsify(tiny(BasicBlock)).eval(), example=x)
    with pytest.raises(RuntimeError, match="for inference only"):
        frozen.train()
    with pytest.raises(RuntimeError, match="a gradient is asked for"):
        frozen(x.requires_grad_())


def test_bad_features_are_named() -> None:
    x = torch.randn(1, 3, 32, 32)
    frozen = sparsight.freeze(sparsight.sparsify(tiny(BasicBlock)).eval(), example=x)
    block = frozen.layer1[0]
    with pytest.raises(ValueError, match=r"\(B, 64, height, width\) is needed"):
        block(torch.randn(64, 8, 8))
    with pytest.raises(ValueError, match=r"\(B, 64, height, width\) is needed"):
        block(torch.randn(1, 63, 8, 8))
    with pytest.raises(TypeError, match=r"convert the input with x.float\(\)"):
        block(torch.randn(1, 64, 8, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"logits of image 1 hold NaN.*not finite"):
        bad = torch.randn(2, 64, 8, 8)
        bad[1, 3, 2, 2] = torch.nan
        block(bad)


def test_what_cannot_be_frozen_is_said() -> None:
    x = torch.randn(1, 3, 32, 32)
    model = sparsight.sparsify(tiny(BasicBlock)).eval()
    frozen = sparsight.freeze(model, example=x)
    with pytest.raises(ConversionError, match="frozen already"):
        sparsight.freeze(frozen, example=x)
    with pytest.raises(ConversionError, match=r"call model.float\(\).cpu\(\) first"):
        sparsight.freeze(copy.deepcopy(model).double(), example=x.double())
    with pytest.raises(ConversionError, match=r"dtype is torch.float16"):
        sparsight.freeze(model, example=x, dtype=torch.float16)
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module"):
        sparsight.freeze("resnet18", example=x)


def test_a_layer_outside_the_kernels_stays_and_is_named() -> None:
    model = sparsight.sparsify(nn.Sequential(nn.Conv2d(2, 3, 13)), where=lambda n, m: n == "0")
    x = torch.randn(1, 2, 16, 16)
    with pytest.warns(UserWarning, match=r"layer 0 stays unfrozen.*more than 128 taps"):
        frozen = sparsight.freeze(model.eval(), example=x)
    torch.testing.assert_close(frozen(x), model(x))


def test_a_dense_model_freezes_too() -> None:
    model = tiny(Bottleneck)
    x = torch.randn(1, 3, 32, 32)
    frozen = sparsight.freeze(model, example=x)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())
    with torch.no_grad():
        assert relative_error(frozen(x), model(x)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d"])
def test_a_whole_frozen_network_is_the_same_in_one_thread_and_two(name) -> None:
    source = randomise_norms(getattr(torchvision.models, name)(weights=None))
    source.fc = nn.Identity()  # torch's own matrix product makes no such promise
    x = torch.randn(2, 3, 65, 97)
    frozen = sparsight.freeze(
        sparsight.sparsify(source, sampler=partial(Sampler, bias=0.0)).eval(), example=x
    )
    results = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        results.append(frozen(x))
    torch.set_num_threads(1)
    assert torch.equal(results[0], results[1])


class TwoLayerSampler(nn.Module):
    """A sampler of one's own: its head holds a convolution and an activation."""

    def __init__(self, in_channels, *, stride=1) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(in_channels, 8, 3, stride, 1), nn.ReLU(), nn.Conv2d(8, 1, 1)
        )

    def forward(self, x):
        logits = self.net(x)
        return sparsight.nn.SamplingDecision(logits >= 0, torch.sigmoid(logits), None)


def test_a_sampler_of_ones_own_keeps_its_activation() -> None:
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1))
    model = sparsight.sparsify(conv, where=lambda n, m: n == "0", sampler=TwoLayerSampler).eval()
    frozen = assert_frozen_equals(model, torch.randn(1, 3, 20, 20))
    assert isinstance(frozen[0], FrozenBlock)
    assert any(isinstance(m, nn.ReLU) for m in frozen.modules())


def test_hooks_of_the_source_still_run() -> None:
    for hooked in (0, 1, 2):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
        calls = []
        net[hooked].register_forward_hook(lambda *args, calls=calls: calls.append(1))
        x = torch.randn(1, 3, 9, 9)
        frozen = sparsight.freeze(net, example=x)
        before = len(calls)
        with torch.no_grad():
            torch.testing.assert_close(frozen(x), net(x), atol=1e-5, rtol=1e-5)
        assert len(calls) == before + 2, hooked
    model = sparsight.sparsify(tiny(BasicBlock)).eval()
    model.layer1[0].bn1.register_forward_hook(lambda *args: None)
    with pytest.warns(UserWarning, match=r"layer1.0 stays unfrozen.*hooks are registered"):
        sparsight.freeze(model, example=torch.randn(1, 3, 32, 32))


def test_a_relaxed_mask_is_refused() -> None:
    conv = nn.Sequential(nn.Conv2d(3, 4, 1))
    model = sparsight.sparsify(conv, where=lambda n, m: n == "0").eval()
    x, mask = torch.randn(1, 3, 5, 5), torch.ones(1, 1, 5, 5)
    frozen = sparsight.freeze(model, example=x)
    with pytest.raises(TypeError, match=r"torch\.bool is needed"):
        frozen[0](x, sparsight.nn.SamplingDecision(mask, mask, None))
