"""FrozenBlock and its parts: what is packed equals what it was packed from."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops.misc import FrozenBatchNorm2d

from sparsight.nn import (
    DeformableBlock,
    DeformableConv2d,
    RBFInterpolation,
    SampledBlock,
    SampledConv2d,
    Sampler,
    SamplingDecision,
    ZeroFill,
    record_sampling,
)
from sparsight.nn.frozen_block import (
    FrozenBlock,
    Measurement,
    fold_norm,
    refusal,
)


def randomise(norm: nn.Module) -> nn.Module:
    """Statistics and parameters that are nobody's defaults."""
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 3.0)
    if norm.weight is not None:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm.eval()


def make_block(
    cls=Bottleneck, layout="b", sampler=None, fill=RBFInterpolation, deform=None, **options
):
    torch.manual_seed(0)
    shortcut = nn.Sequential(
        nn.Conv2d(12, 8 * cls.expansion, 1, options.get("stride", 1)),
        nn.BatchNorm2d(8 * cls.expansion),
    )
    block = cls(12, 8, downsample=shortcut, **options)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            randomise(module)
    if deform is not None:
        block = deformed(block, **deform)

    def default(in_channels, *, stride):
        made = Sampler(in_channels, stride=stride, bias=0.2)
        nn.init.normal_(made.head.weight, std=0.2)
        return made

    sampler = sampler or default
    return SampledBlock(block.eval(), layout=layout, sampler=sampler, interpolation=fill)


def deformed(block, guided=True, **options):
    """The block with a conv2 whose taps move by a pixel or two."""
    if guided:
        block = DeformableBlock(block, **options)
    else:
        block.conv2 = DeformableConv2d.from_conv(block.conv2, **options)
    nn.init.normal_(block.conv2.offset.weight, std=0.1)
    nn.init.normal_(block.conv2.offset.bias)
    return block


def make_conv(sampler="own", fill=None, **options) -> SampledConv2d:
    torch.manual_seed(0)
    options = {"kernel_size": 3, "padding": 1, **options}
    if sampler == "own":
        sampler = Sampler(12, stride=options.get("stride", 1), bias=0.2)
        nn.init.normal_(sampler.head.weight, std=0.2)
    fill = fill or RBFInterpolation()
    return SampledConv2d(12, 10, **options, sampler=sampler, interpolation=fill).eval()


def random_decision(batch, height, width, density=0.4, seed=0) -> SamplingDecision:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, 1, height, width, generator=generator) < density
    return SamplingDecision(mask, mask.float(), None)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


NORMS = {
    "BatchNorm2d": lambda: randomise(nn.BatchNorm2d(6)),
    "BatchNorm2d, other eps": lambda: randomise(nn.BatchNorm2d(6, eps=0.1)),
    "BatchNorm2d, not affine": lambda: randomise(nn.BatchNorm2d(6, affine=False)),
    "FrozenBatchNorm2d": lambda: randomise(FrozenBatchNorm2d(6)),
    "Identity": nn.Identity,
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_fold_norm_equals_the_convolution_then_the_norm(name, bias, groups):
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(4, 6, 3, groups=groups, bias=bias).double(), NORMS[name]().double()
    x = torch.randn(2, 4, 7, 5, dtype=torch.float64)
    weight, shift = fold_norm(conv.weight, conv.bias, norm)
    with torch.no_grad():
        folded = nn.functional.conv2d(x, weight, shift, groups=groups)
        torch.testing.assert_close(folded, norm(conv(x)), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", NORMS)
def test_fold_norm_rounds_once(name):
    """A float32 convolution is folded in float64: the nearest float32 to the exact value."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(4, 6, 3), NORMS[name]()
    folded = fold_norm(conv.weight, conv.bias, norm)
    exact = fold_norm(conv.weight.double(), conv.bias.double(), norm)
    for made, truth in zip(folded, exact, strict=True):
        assert made.dtype == torch.float32
        assert torch.equal(made, truth.float())


def test_fold_norm_changes_nothing_that_it_is_given():
    conv, norm = nn.Conv2d(4, 6, 3), randomise(nn.BatchNorm2d(6))
    before = copy.deepcopy((conv.state_dict(), norm.state_dict()))
    weight, shift = fold_norm(conv.weight, conv.bias, nn.Identity())
    weight.zero_(), shift.zero_()
    fold_norm(conv.weight, conv.bias, norm)
    for state, kept in zip((conv.state_dict(), norm.state_dict()), before, strict=True):
        assert all(torch.equal(state[k], kept[k]) for k in kept)


class OwnFill(nn.Module):
    """An interpolation that the kernels cannot know."""

    def forward(self, features, mask):
        return features * mask


class WideFill(OwnFill):
    window = 99

    def log_kernel(self):
        return torch.zeros(99, 99)


def with_norm(norm):
    block = make_block()
    block.bn2 = norm
    return block


def with_offsets(guided=True, **changes):
    """A deformable block whose convolution of offsets has been tampered with."""
    block = make_block(deform={"guided": guided})
    for name, value in changes.items():
        setattr(block.conv2.offset, name, value)
    return block


def with_made_offsets(offset):
    block = make_block(deform={})
    block.conv2.offset = offset
    return block


def with_stride_before_a_guided_convolution():
    block = make_block(deform={})
    block.conv1.stride = (2, 2)
    return block


def with_activation(activation):
    block = make_block()
    block.relu = activation
    return block


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (make_block(), None),
        (make_block(BasicBlock, fill=ZeroFill), None),
        (make_conv(), None),
        (make_conv(sampler=None), None),
        (with_norm(nn.Identity()), None),
        (make_block().double(), r"weights are torch.float64 and the kernels are float32"),
        (make_conv().bfloat16(), r"weights are torch.bfloat16"),
        (make_conv().to("meta"), r"on meta and the kernels run on the CPU"),
        (make_conv(kernel_size=13), r"kernel \(13, 13\) has more than 128 taps"),
        (make_conv(kernel_size=4, padding="same"), r"even kernel pads one side more"),
        (make_conv(fill=OwnFill()), r"interpolation OwnFill has no log_kernel"),
        (make_block(fill=OwnFill()), r"interpolation OwnFill has no log_kernel"),
        (make_conv(fill=WideFill()), r"interpolation window exceeds"),
        (with_norm(nn.GroupNorm(2, 8)), r"norm GroupNorm has no running statistics"),
        (with_norm(nn.BatchNorm2d(8, track_running_stats=False)), r"BatchNorm2d has no running"),
        (with_activation(nn.SiLU()), r"activation is SiLU and the kernels know ReLU"),
        (make_block(deform={}), None),
        (with_offsets(bias=None), None),
        (with_made_offsets(nn.Identity()), r"offsets are made by a Identity and the kernels know"),
        (with_offsets(dilation=(2, 2)), r"that makes its offsets has other numbers"),
        (
            with_offsets(padding_mode="reflect"),
            r"'reflect' .* \(the convolution that makes its off",
        ),
        (with_stride_before_a_guided_convolution(), r"a stride comes before a deformable"),
    ],
)
def test_refusal_gives_the_reason_and_frozen_block_raises_it(source, reason):
    if reason is None:
        assert refusal(source) is None
        FrozenBlock(source)
        return
    with pytest.raises(ValueError, match=rf"cannot be frozen because .*{reason}.*; keep it"):
        FrozenBlock(source)


@pytest.mark.parametrize("layout", ["a", "b", "c"])
@pytest.mark.parametrize("cls", [BasicBlock, Bottleneck])
def test_a_block_equals_its_source(cls, layout):
    source = make_block(cls, layout)
    frozen = FrozenBlock(source)
    x = torch.randn(3, 12, 13, 10)
    with torch.no_grad(), record_sampling(source) as a, record_sampling(frozen) as b:
        assert_close(frozen(x), source(x))
    assert [d.name for d in a.decisions] == [d.name for d in b.decisions]
    assert all(torch.equal(d.mask, e.mask) for d, e in zip(a.decisions, b.decisions, strict=True))
    assert 0.1 < a.decisions[0].mask.float().mean() < 0.9


DEFORMABLE = {
    "v1": (Bottleneck, {"deform": {}}),
    "v1, own input": (Bottleneck, {"deform": {"guided": False}, "dilation": 2}),
    "v1, strided": (Bottleneck, {"deform": {"offset_groups": 2}, "stride": 2}),
    "v2": (Bottleneck, {"deform": {"is_modulated": True, "offset_groups": 4}}),
    "v2, grouped": (
        Bottleneck,
        {"deform": {"is_modulated": True}, "groups": 2, "base_width": 64, "stride": 2},
    ),
    "v2, own input": (
        Bottleneck,
        {"deform": {"is_modulated": True, "guided": False}, "groups": 4, "base_width": 64},
    ),
    "v1, basic": (BasicBlock, {"deform": {}}),
    "v2, basic, strided": (
        BasicBlock,
        {"deform": {"is_modulated": True, "guided": False}, "stride": 2},
    ),
}


@pytest.mark.parametrize("layout", ["a", "b", "c"])
@pytest.mark.parametrize("kind", DEFORMABLE)
def test_a_deformable_block_equals_its_source_at_every_density(kind, layout):
    cls, options = DEFORMABLE[kind]
    source = make_block(cls, layout, **options)
    for bias in (-1e4, -0.5, 0.3, 1e4):
        for sampler in source.samplers:
            sampler.grid_stride = None
            nn.init.constant_(sampler.head.bias, bias)
        frozen = FrozenBlock(source)
        x = torch.randn(2, 12, 13, 10)
        with torch.no_grad(), record_sampling(source) as a, record_sampling(frozen) as b:
            assert_close(frozen(x), source(x))
        assert [d.macs for d in a.decisions] == [d.macs for d in b.decisions]
        for d, e in zip(a.decisions, b.decisions, strict=True):
            assert torch.equal(d.mask, e.mask)
            assert d.mask.float().mean() in (0, 1) or abs(bias) < 1


def test_a_deformable_block_is_one_operator_call():
    class Calls(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "sparsight" or "conv" in func.name():
                self.names.append(func.name())
            return func(*args, **(kwargs or {}))

    source = make_block(deform={"is_modulated": True})
    source.downsample = None
    source.bn3, source.conv3 = nn.Identity(), nn.Conv2d(8, 12, 1)
    frozen, x = FrozenBlock(source), torch.randn(1, 12, 9, 9)
    with torch.no_grad(), Calls() as calls:
        frozen(x)
    assert calls.names == ["sparsight::sampled_block"]
    with torch.no_grad(), Calls() as calls:
        source(x)
    assert "sparsight::sampled_deform_conv2d" in calls.names


@pytest.mark.parametrize("is_modulated", [False, True])
def test_a_deformable_block_compiles_and_exports(is_modulated):
    frozen = FrozenBlock(make_block(deform={"is_modulated": is_modulated}))
    x = torch.randn(2, 12, 9, 11)
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), frozen(x))
        program = torch.export.export(frozen, (x,))
        assert torch.equal(program.module()(x), frozen(x))


class Threshold(nn.Module):
    """A sampler of another class than Sampler: its head stays outside the kernel."""

    def forward(self, x):
        logits = x.mean(1, keepdim=True)
        return SamplingDecision(logits > 0, logits.sigmoid(), None)


def test_a_sampler_of_another_class_runs_outside_the_kernel():
    source = make_block(sampler=lambda in_channels, *, stride: Threshold())
    frozen = FrozenBlock(source)
    assert not any(sampler.inside for sampler in frozen.samplers)
    x = torch.randn(2, 12, 9, 9)
    with torch.no_grad():
        assert_close(frozen(x), source(x))


def with_full_masks(source):
    source = copy.deepcopy(source)
    for sampler in source.modules():
        if isinstance(sampler, Sampler):
            nn.init.constant_(sampler.head.bias, 1e4)
    return source


@pytest.mark.parametrize("layout", ["a", "b", "c"])
@pytest.mark.parametrize("cls", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_dense_block_equals_its_source_with_full_masks(cls, layout, stride):
    source = make_block(cls, layout, stride=stride)
    source.downsample[0].stride = (stride, stride)
    full = with_full_masks(source)
    frozen = FrozenBlock(source, computed="dense")
    x = torch.randn(3, 12, 13, 10)
    with torch.no_grad():
        assert_close(frozen(x), full(x))
        assert torch.equal(frozen(x), FrozenBlock(full)(x))
        assert not torch.allclose(frozen(x), source(x), atol=1e-2)


@pytest.mark.parametrize("layout", ["a", "b", "c"])
def test_a_dense_block_shows_that_it_computes_everything(layout):
    source = make_block(layout=layout, stride=2)
    source.downsample[0].stride = (2, 2)
    frozen = FrozenBlock(source, computed="dense")
    x = torch.randn(2, 12, 13, 10)
    with torch.no_grad(), record_sampling(source) as a, record_sampling(frozen) as b:
        source(x), frozen(x)
    assert [(d.name, d.macs) for d in a.decisions] == [(d.name, d.macs) for d in b.decisions]
    for before, after in zip(a.decisions, b.decisions, strict=True):
        assert not before.mask.all() and after.mask.shape == before.mask.shape
        assert after.mask.dtype == torch.bool and after.mask.all()
        assert torch.equal(after.probability, torch.ones(before.probability.shape))
        assert after.relaxed is None


def test_a_dense_layer_has_no_head_that_could_refuse_features():
    frozen = FrozenBlock(make_block(), computed="dense")
    x = torch.randn(2, 12, 9, 9)
    x[1, 3, 2, 2] = torch.nan
    with torch.no_grad():
        assert torch.equal(frozen(x).isnan().flatten(1).any(1), torch.tensor([False, True]))


def test_a_dense_layer_takes_no_decision():
    frozen = FrozenBlock(make_conv(), computed="dense")
    x = torch.randn(1, 12, 5, 5)
    with pytest.raises(ValueError, match=r"decision is passed.*choose=\{its name: 'sampled'\}"):
        frozen(x, random_decision(1, 5, 5))
    with pytest.raises(ValueError, match=r"decision is passed"):
        frozen(x, decision=random_decision(1, 5, 5))


@pytest.mark.parametrize("computed", ["dense", "sampled"])
def test_an_input_smaller_than_the_kernel_is_named(computed):
    frozen = FrozenBlock(make_conv(kernel_size=(3, 5), padding=(1, 0)), computed=computed)
    if computed == "sampled":
        frozen = FrozenBlock(make_conv(sampler=None, kernel_size=(3, 5), padding=(1, 0)))
    with pytest.raises(ValueError, match=r"a 9x4 input is smaller than the kernel \(3, 5\)"):
        frozen(torch.randn(1, 12, 9, 4))


@pytest.mark.parametrize("make", [make_block, make_conv])
def test_a_dense_layer_compiles_exports_copies_and_loads(make):
    frozen = FrozenBlock(make(), computed="dense")
    x = torch.randn(2, 12, 9, 11)
    with torch.no_grad():
        expected = frozen(x)
        compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), expected)
        assert torch.equal(torch.export.export(frozen, (x,)).module()(x), expected)
        assert torch.equal(copy.deepcopy(frozen)(x), expected)
        other = make()
        for parameter in other.parameters():
            nn.init.normal_(parameter)
        other = FrozenBlock(other, computed="dense")
        other.load_state_dict(frozen.state_dict())
        assert torch.equal(other(x), expected)
    with pytest.raises(RuntimeError, match="size mismatch for params"):
        FrozenBlock(make()).load_state_dict(frozen.state_dict())


@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2}, {"kernel_size": (1, 3), "padding": (0, 1), "bias": False}],
    ids=str,
)
def test_a_convolution_without_a_sampler_takes_decisions(options):
    source = make_conv(sampler=None, **options)
    frozen = FrozenBlock(source)
    x = torch.randn(2, 12, 11, 8)
    height, width = nn.functional.conv2d(
        x, source.weight, None, source.stride, source.padding
    ).shape[2:]
    for density in (0.0, 0.3, 1.0):
        decision = random_decision(2, height, width, density)
        with torch.no_grad():
            assert_close(frozen(x, decision), source(x, decision))
    assert frozen.samplers_named() == source.samplers_named() == []
    assert frozen.gated_macs(0, height, width) == source.gated_macs(0, height, width)


def test_a_convolution_without_a_sampler_asks_for_a_decision():
    frozen = FrozenBlock(make_conv(sampler=None))
    x = torch.randn(1, 12, 5, 5)
    with pytest.raises(ValueError, match=r"no sampler.*pass decision=sampler\(features\)"):
        frozen(x)
    with pytest.raises(ValueError, match=r"\(1, 1, 5, 5\) is needed; build the mask at output"):
        frozen(x, random_decision(1, 5, 4))


def test_making_one_leaves_the_source_alone():
    source = make_block(sampler=lambda in_channels, *, stride: Threshold()).train()
    before = copy.deepcopy(source.state_dict())
    frozen = FrozenBlock(source)
    assert all(module.training for module in source.modules())
    assert not any(module.training for module in frozen.modules())
    assert all(torch.equal(value, before[key]) for key, value in source.state_dict().items())
    shared = {id(module) for module in source.modules()} & {id(m) for m in frozen.modules()}
    assert not shared


def test_a_deep_copy_equals_and_owns_its_weights():
    frozen = FrozenBlock(make_block())
    x = torch.randn(1, 12, 9, 9)
    expected = frozen(x)
    other = copy.deepcopy(frozen)
    assert torch.equal(other(x), expected)
    other.params.zero_()
    assert torch.equal(frozen(x), expected)
    assert not torch.equal(other(x), expected)


@pytest.mark.parametrize("make", [make_block, make_conv])
def test_the_state_makes_another_one_equal(make):
    first = make()
    second = copy.deepcopy(first)
    for parameter in second.parameters():
        nn.init.normal_(parameter)
    first, second = FrozenBlock(first), FrozenBlock(second)
    x = torch.randn(2, 12, 9, 9)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(copy.deepcopy(first.state_dict()), strict=True)
    assert torch.equal(first(x), second(x))


def test_the_state_survives_a_file(tmp_path):
    frozen = FrozenBlock(make_block())
    torch.save(frozen.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert set(state) == set(frozen.state_dict())
    assert all(torch.equal(state[key], value) for key, value in frozen.state_dict().items())


def test_repr_says_what_was_packed():
    block, conv = FrozenBlock(make_block(layout="c")), FrozenBlock(make_conv())
    assert "FrozenBlock(" in repr(block)
    assert f"layout='c', params={block.params.numel()}" in repr(block)
    assert "(samplers): ModuleList" in repr(block)
    assert "noise='white', grid_stride=11, seed=0, layer=0" in repr(block)
    assert "RBFInterpolation" in repr(block)
    assert (
        f"12, 10, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), params={conv.params.numel()}"
        in repr(conv)
    )
    assert "computed=" not in repr(block)


def test_repr_says_what_is_dense_and_what_was_measured():
    dense, block = FrozenBlock(make_block(), computed="dense"), FrozenBlock(make_block())
    assert f"params={dense.params.numel()}, computed=dense\n" in repr(dense)
    assert "noise=" not in repr(dense) and "ComputedEverywhere()" in repr(dense)
    dense.measured = block.measured = Measurement(dense_ms=3.1, sampled_ms=4.0, density=0.968)
    shown = "(dense: 3.1 ms, sampled: 4 ms at density 0.97)"
    assert f"computed=dense {shown}\n" in repr(dense)
    assert f"computed=sampled {shown}\n" in repr(block)


def test_only_eval_mode_without_gradients_exists():
    frozen = FrozenBlock(make_block())
    assert frozen.eval() is frozen
    with pytest.raises(RuntimeError, match="for inference only"):
        frozen.train()
    with pytest.raises(RuntimeError, match="a gradient is asked for"):
        frozen(torch.randn(1, 12, 5, 5, requires_grad=True))
    with torch.no_grad():
        frozen(torch.randn(1, 12, 5, 5, requires_grad=True))


@pytest.mark.parametrize("layout", ["a", "b", "c"])
@pytest.mark.parametrize("deform", [None, {}, {"is_modulated": True}])
def test_gated_macs_are_the_sources(layout, deform):
    source = make_block(layout=layout, stride=1, deform=deform)
    frozen = FrozenBlock(source)
    for i in range(len(source.samplers)):
        assert frozen.gated_macs(i, 13, 10) == source.gated_macs(i, 13, 10)
