"""Which layers of a bfloat16 network return bfloat16, and that nobody outside sees it."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import sparsight
from sparsight.convert import ConversionError
from sparsight.convert.map_dtypes import keep_maps_narrow
from sparsight.measure import count_macs
from sparsight.nn import (
    AdaptiveSoftPool2d,
    SampledBlock,
    Sampler,
    SoftPool1d,
    SoftPool2d,
    SoftPool3d,
)
from sparsight.nn.frozen_block import FrozenBlock
from sparsight.nn.frozen_conv import FrozenConv2d
from sparsight.ops import cpu, soft_pool2d

needs_instructions = pytest.mark.skipif(
    not cpu.has_bfloat16(), reason="this CPU or this build has no AVX-512 BF16 instructions"
)
NARROW = torch.bfloat16
freeze = partial(sparsight.freeze, dtype=NARROW)


def conv(in_channels=8, out_channels=8, kernel_size=3, **options) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size, padding="same", **options)


def narrow_names(model: nn.Module) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if getattr(module, "output_dtype", None) == NARROW
    }


class Net(nn.Module):
    """Four convolutions, a to d, and a forward that is passed in."""

    def __init__(self, run) -> None:
        super().__init__()
        self.run = run
        self.a, self.b, self.c, self.d = conv(3), conv(), conv(), conv(16)

    def forward(self, x):
        return self.run(self, x)


class Pair:
    """A result that torch's pytree does not know."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self.first, self.second = first, second


def keeps(net: Net, x: Tensor) -> Tensor:
    net.kept = net.a(x)
    return net.b(net.kept)


def sums_in_place(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    z = net.b(y)
    z += y
    return net.c(z.relu_())


def sum_read_by_two_kinds(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    z = y + net.b(y)
    return net.c(z) + z.sigmoid()


CASES = {
    "a chain": (lambda n, x: n.c(n.b(n.a(x))), {"a", "b"}),
    "activations": (lambda n, x: n.c(n.b(n.a(x).relu()).relu_()), {"a", "b"}),
    "another activation": (lambda n, x: n.c(F.gelu(n.b(n.a(x)))), {"a"}),
    "max pooling": (lambda n, x: n.b(F.max_pool2d(n.a(x), 3, 2, 1)), {"a"}),
    "average pooling": (lambda n, x: n.b(F.avg_pool2d(n.a(x), 2)), {"a"}),
    "soft pooling": (lambda n, x: n.b(soft_pool2d(n.a(x), 3, stride=2, padding=1)), {"a"}),
    "soft pooling returned": (
        lambda n, x: (lambda y: (soft_pool2d(y, 2), n.b(y)))(n.a(x)),
        set(),
    ),
    "widened by the model": (lambda n, x: n.b(n.a(x).to(torch.float32)), {"a"}),
    "widened and returned": (lambda n, x: (lambda y: (y.float(), n.b(y)))(n.a(x)), set()),
    "widened for a sigmoid": (lambda n, x: n.b(n.a(x).float().sigmoid()), set()),
    "global pooling": (lambda n, x: n.b(F.adaptive_avg_pool2d(n.a(x), 1)), set()),
    "mean": (lambda n, x: n.b(n.a(x)).mean((2, 3)), {"a"}),
    "concatenation": (lambda n, x: n.d(torch.cat([n.a(x), n.b(n.a(x))], 1)), {"a", "b"}),
    "concatenation with what is wide": (
        lambda n, x: n.d(torch.cat([n.a(x), n.b(n.a(x)).sigmoid()], 1)),
        {"a"},
    ),
    "concatenation with the input": (
        lambda n, x: n.d(torch.cat([n.a(x), x, x, x[:, :2]], 1)),
        {"a"},
    ),
    "a sum outside": (lambda n, x: n.c(n.a(x) + n.b(n.a(x))), {"a", "b"}),
    "a sum in place": (sums_in_place, {"a", "b"}),
    "a sum with what is wide": (lambda n, x: n.c(n.b(n.a(x)) + x.mean()), {"a", "b"}),
    "a sum read by two kinds": (sum_read_by_two_kinds, set()),
    "returned too": (lambda n, x: (lambda y: (y, n.b(y)))(n.a(x)), set()),
    "returned in a dict": (lambda n, x: (lambda y: {"y": y, "z": n.b(y)})(n.a(x)), set()),
    "returned in an object": (lambda n, x: (lambda y: Pair(y, n.b(y)))(n.a(x)), set()),
    "a pooled map returned": (lambda n, x: (lambda y: (F.max_pool2d(y, 2), n.b(y)))(n.a(x)), set()),
    "kept on the module": (keeps, set()),
    "resized": (lambda n, x: n.b(F.interpolate(n.a(x), scale_factor=2.0)), set()),
    "a sigmoid": (lambda n, x: n.b(n.a(x).sigmoid()), set()),
    "read by both kinds": (lambda n, x: (lambda y: n.b(y) * y.sigmoid())(n.a(x)), set()),
    "read by two layers": (lambda n, x: (lambda y: n.b(y) + n.c(y))(n.a(x)), {"a"}),
    "sliced": (lambda n, x: n.b(n.a(x)[..., ::2, ::2]), set()),
    "in two calls": (lambda n, x: n.c(n.b(n.b(n.a(x)))), {"a", "b"}),
    "the last of two calls returned": (lambda n, x: n.b(n.b(n.a(x))), {"a"}),
    "narrowed by the model": (lambda n, x: n.b(n.a(x).to(NARROW).float()), {"a"}),
    "read by nobody": (lambda n, x: (n.a(x), n.b(n.a(x)))[1], {"a"}),
    "called for nothing": (lambda n, x: (n.b(n.a(x)), n.c(n.a(x)))[1], {"a"}),
    "a list of images": (lambda n, x: [n.b(n.a(image[None])) for image in x], {"a"}),
    "compared": (lambda n, x: n.b(n.a(x)) if n.a(x).amax() > -1e9 else x, set()),
}


@needs_instructions
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_maps_are_narrow_where_only_frozen_layers_read_them(name, context) -> None:
    torch.manual_seed(0)
    run, expected = CASES[name]
    source, x = Net(run).eval(), torch.randn(2, 3, 12, 10)
    with context():
        frozen = freeze(source, example=x)
        assert narrow_names(frozen) == expected
    for other in (torch.no_grad, torch.inference_mode):
        with other():
            made, truth = leaves(frozen(x)), leaves(source(x))
        assert len(made) == len(truth)
        for one, two in zip(made, truth, strict=True):
            assert one.dtype == torch.float32
            assert (one - two).norm() < 0.02 * two.norm(), name
    if name == "kept on the module":
        assert frozen.kept.dtype == torch.float32


def leaves(result) -> list[Tensor]:
    result = (result.first, result.second) if isinstance(result, Pair) else result
    return pytree.tree_leaves(result)


@needs_instructions
def test_a_map_that_a_hook_keeps_stays_wide() -> None:
    net = Net(lambda n, x: n.c(n.b(n.a(x)).relu())).eval()
    pool, seen = nn.Identity(), []
    pool.register_forward_hook(lambda module, args, output: seen.append(output))
    net.pool = pool
    net.run = lambda n, x: n.c(n.pool(n.b(n.a(x))))
    frozen = freeze(net, example=torch.randn(1, 3, 9, 9))
    assert narrow_names(frozen) == {"a"}
    frozen(torch.randn(1, 3, 9, 9))
    assert all(map_.dtype == torch.float32 for map_ in seen)


class Flattened(nn.Module):
    """A pooling of one axis over the rows of a map without a batch, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = SoftPool1d(2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.pool(image)[None] for image in x.flatten(0, 1)]).unflatten(
            0, x.shape[:2]
        )


@needs_instructions
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("pool", "is_narrow"),
    [
        (SoftPool2d(3, stride=2, padding=1), True),
        (SoftPool2d(2, weights="shared"), True),
        (SoftPool3d((1, 2, 2)), True),  # (B, C, H, W) is (C, D, H, W) without a batch
        (AdaptiveSoftPool2d(4), True),
        (AdaptiveSoftPool2d((5, 7)), True),  # windows copied apart
        (nn.AdaptiveAvgPool2d(4), False),
        (Flattened(), False),  # for what is around the pooling: views
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_soft_pooling_module_passes_bfloat16_on(pool, is_narrow, context) -> None:
    torch.manual_seed(0)
    net, x = Net(lambda n, x: n.b(n.pool(n.a(x)))).eval(), torch.randn(2, 3, 12, 10)
    net.pool = pool
    with context():
        frozen = freeze(net, example=x)
        assert narrow_names(frozen) == ({"a"} if is_narrow else set())
        seen: list[torch.dtype] = []
        frozen.pool.register_forward_hook(
            lambda module, args, output: seen.extend([args[0].dtype, output.dtype])
        )
        assert (frozen(x) - net(x)).norm() < 0.02 * net(x).norm()
    assert seen == [NARROW if is_narrow else torch.float32] * 2
    assert not pool._forward_hooks and not pool._forward_pre_hooks


@needs_instructions
def test_a_soft_pooled_map_that_others_read_stays_wide() -> None:
    x = torch.randn(1, 3, 12, 10)
    for run, expected in (
        (lambda n, x: (lambda y: n.b(y) + y.sigmoid().mean())(n.pool(n.a(x))), set()),
        (lambda n, x: n.pool(n.b(n.a(x))), {"a"}),
        (lambda n, x: (n.pool(n.a(x)), n.b(x[:, :1].expand(-1, 8, -1, -1)))[1], {"a"}),
    ):
        net = Net(run).eval()
        net.pool = SoftPool2d(2)
        assert narrow_names(freeze(net, example=x)) == expected


@needs_instructions
def test_what_a_hook_of_a_soft_pooling_computes_counts() -> None:
    x, seen = torch.randn(1, 3, 12, 10), []
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        net = Net(lambda n, x: n.b(n.pool(n.a(x)))).eval()
        net.pool = SoftPool2d(2)
        getattr(net.pool, register)(lambda module, args, *output: seen.append(args[0].sigmoid()))
        assert narrow_names(freeze(net, example=x)) == set()
    net = Net(lambda n, x: n.b(n.pool(n.a(x)))).eval()
    net.pool = SoftPool2d(2)
    net.pool.register_forward_hook(lambda module, args, output: seen.append(output.sigmoid()))
    assert narrow_names(freeze(net, example=x)) == set()


@needs_instructions
def test_a_shared_layer_is_narrow_under_both_names() -> None:
    net = Net(lambda n, x: n.d(torch.cat([n.b(n.a(x)), n.c(n.a(x))], 1))).eval()
    net.c = net.b
    frozen = freeze(net, example=torch.randn(1, 3, 9, 9))
    assert frozen.b is frozen.c
    assert narrow_names(frozen) == {"a", "b"}  # named_modules names it once


@needs_instructions
def test_it_returns_the_names_and_leaves_no_hook() -> None:
    x = torch.randn(1, 3, 9, 9)
    frozen = freeze(Net(lambda n, x: n.c(n.b(n.a(x)))).eval(), example=x)
    for layer in (frozen.a, frozen.b):
        layer.output_dtype = torch.float32
    assert keep_maps_narrow(frozen, x) == ["a", "b"]
    assert not any(module._forward_hooks for module in frozen.modules())
    assert not vars(frozen(x))


@needs_instructions
def test_a_float32_network_stays_as_it_is() -> None:
    x = torch.randn(1, 3, 9, 9)
    frozen = sparsight.freeze(Net(lambda n, x: n.c(n.b(n.a(x)))).eval(), example=x)
    assert keep_maps_narrow(frozen, x) == []
    assert narrow_names(frozen) == set()


# Residual networks.


def randomise_norms(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


def tiny(block: type = Bottleneck, **options) -> nn.Module:
    torch.manual_seed(0)
    model = ResNet(block, [1, 2, 1, 1], **options)
    model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(128 * block.expansion, 7)
    return randomise_norms(model)


# Masks that rounding does not move: everything, every second position, or little.
MASKS = {
    "all": {"bias": 1e4},
    "half": {"bias": -1e4, "grid_stride": 2},
    "few": {"bias": -1e4, "grid_stride": 5},
}


def sampled(mask="half", block=Bottleneck, layout="b", **options) -> nn.Module:
    sampler = partial(Sampler, noise="none", **MASKS[mask])
    return sparsight.sparsify(tiny(block, **options), layout=layout, sampler=sampler).eval()


IMAGE = torch.randn(2, 3, 65, 49, generator=torch.Generator().manual_seed(0))


@needs_instructions
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_a_sampled_network_is_narrow_up_to_its_last_block(block) -> None:
    frozen = freeze(sampled(block=block), example=IMAGE)
    names = {"conv1", "layer1.0", "layer2.0", "layer2.0.downsample.0"}
    if block is Bottleneck:
        names.add("layer1.0.downsample.0")
    # The last block is read by the mean over the image.
    assert narrow_names(frozen) == names
    assert frozen.layer2[0].shortcut_dtype == NARROW
    with torch.no_grad():
        assert frozen(IMAGE).dtype == torch.float32


class Strided(nn.Module):
    """A shortcut that reads every second pixel: a slice is no frozen layer."""

    def __init__(self, source: nn.Sequential) -> None:
        super().__init__()
        self.conv, self.norm = source[0], source[1]
        self.conv.stride = (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x[..., ::2, ::2]))


class Pooled(Strided):
    """A shortcut of one's own that holds nothing but what passes bfloat16 on."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(F.max_pool2d(x, 1, 2)))


@needs_instructions
@pytest.mark.parametrize("kind", [Strided, Pooled])
def test_a_shortcut_of_ones_own_is_given_float32(kind) -> None:
    model = sampled()
    reference = freeze(model, example=IMAGE)
    seen: list[torch.dtype] = []
    model.layer2[0].downsample = kind(copy.deepcopy(model.layer2[0].downsample))
    frozen = freeze(model, example=IMAGE)
    assert ("layer1.0" in narrow_names(frozen)) == (kind is Pooled)
    block = frozen.layer2[0]
    assert block.shortcut_dtype == torch.float32
    block.downsample.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.no_grad():
        torch.testing.assert_close(frozen(IMAGE), reference(IMAGE), atol=0.02, rtol=0.02)
    assert seen == [torch.float32]


@needs_instructions
def test_an_average_pooled_shortcut_is_given_bfloat16() -> None:
    model = sampled()
    shortcut = model.layer2[0].downsample
    shortcut[0].stride = (1, 1)
    model.layer2[0].downsample = nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True), *shortcut)
    frozen = freeze(model, example=IMAGE)
    assert frozen.layer2[0].shortcut_dtype == NARROW
    with torch.no_grad():
        error = (frozen(IMAGE) - model(IMAGE)).norm() / model(IMAGE).norm()
    assert error < 0.02


@needs_instructions
def test_around_a_layer_that_stays_unfrozen_maps_are_float32() -> None:
    net = nn.Sequential(conv(3), conv(kernel_size=13), conv(), conv())
    model = sparsight.sparsify(net, where=lambda name, module: name == "1").eval()
    x = torch.randn(1, 3, 20, 20)
    with pytest.warns(UserWarning, match=r"layer 1 stays unfrozen.*more than 128 taps"):
        frozen = freeze(model, example=x)
    assert narrow_names(frozen) == {"2"}
    with torch.no_grad():
        assert (frozen(x) - model(x)).norm() < 0.02 * model(x).norm()


@needs_instructions
def test_a_sampled_block_that_stays_unfrozen_reads_float32() -> None:
    model = sampled()
    model.layer2[0].bn1.register_forward_hook(lambda *args: None)
    with pytest.warns(UserWarning, match=r"layer2.0 stays unfrozen.*hooks"):
        frozen = freeze(model, example=IMAGE)
    assert isinstance(frozen.layer2[0], SampledBlock)
    assert "layer1.0" not in narrow_names(frozen)
    assert "conv1" in narrow_names(frozen)
    with torch.no_grad():
        assert (frozen(IMAGE) - model(IMAGE)).norm() < 0.02 * model(IMAGE).norm()


class Detector(nn.Module):
    """Images of several sizes in, boxes out; the number of boxes depends on the images."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3), nn.ReLU(), conv(), nn.ReLU(), conv())
        self.score, self.box = conv(8, 1, 1), conv(8, 4, 1)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        results = []
        for image in images:
            features = self.body(image[None])
            scores, boxes = self.score(features)[0, 0], self.box(features)[0]
            chosen = scores > scores.mean()
            results.append({"scores": scores[chosen], "boxes": boxes[:, chosen].T})
        return results


@needs_instructions
def test_a_detector_with_list_input_keeps_its_contract() -> None:
    torch.manual_seed(0)
    source = Detector().eval()
    images = [torch.randn(3, 20, 31), torch.randn(3, 9, 14)]
    frozen = freeze(source, example=images)
    assert narrow_names(frozen) == {"body.0", "body.2", "body.4"}
    for result in frozen(images):
        assert set(result) == {"scores", "boxes"}
        assert all(value.dtype == torch.float32 for value in result.values())
        assert result["boxes"].shape == (*result["scores"].shape, 4)


@needs_instructions
@pytest.mark.slow
def test_a_detector_of_torchvision_keeps_its_contract() -> None:
    source = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=4, min_size=96, max_size=128
    )
    model = sparsight.sparsify(randomise_norms(source), sampler=partial(Sampler, bias=1.0)).eval()
    images = [torch.rand(3, 90, 120), torch.rand(3, 100, 80)]
    frozen = freeze(model, example=images)
    assert "backbone.body.layer2.1" in narrow_names(frozen)
    with torch.no_grad():
        out = frozen(images)
    assert [set(o) for o in out] == [{"boxes", "labels", "scores"}] * 2
    assert all(o["boxes"].dtype == o["scores"].dtype == torch.float32 for o in out)


# Against torch's own bfloat16.


@needs_instructions
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("block", "layout", "options"),
    [
        (BasicBlock, "a", {}),
        (Bottleneck, "b", {}),
        (Bottleneck, "c", {"replace_stride_with_dilation": [True, False, False]}),
        (Bottleneck, "b", {"groups": 32, "width_per_group": 4}),
    ],
)
def test_the_error_is_that_of_autocast(mask, block, layout, options) -> None:
    """No larger than 1.5 of it: autocast rounds every result, here some are left in float32."""
    model = sampled(mask, block, layout, **options)
    model.avgpool, model.fc = nn.Identity(), nn.Identity()
    with torch.no_grad():
        truth = model(IMAGE)
        frozen = freeze(model, example=IMAGE)
        made = frozen(IMAGE)
        with torch.autocast("cpu", dtype=NARROW):
            twin = model(IMAGE).float()
    assert made.dtype == torch.float32 and made.shape == truth.shape
    own, theirs = ((y - truth).norm() / truth.norm() for y in (made, twin))
    assert 0 < own <= 1.5 * theirs


@needs_instructions
def test_a_dense_network_is_as_near_as_autocast() -> None:
    model = tiny()
    with torch.no_grad():
        truth, made = model(IMAGE), freeze(model, example=IMAGE)(IMAGE)
        with torch.autocast("cpu", dtype=NARROW):
            twin = model(IMAGE).float()
    assert 0 < (made - truth).norm() <= 1.5 * (twin - truth).norm()


# The rest of the contract.


def test_a_cpu_without_the_instructions_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(cpu, "has_bfloat16", lambda: False)
    with pytest.raises(ConversionError, match=r"no AVX-512 BF16 instructions; leave dtype out"):
        freeze(Net(lambda n, x: n.a(x)).eval(), example=torch.randn(1, 3, 9, 9))


def test_another_dtype_is_refused() -> None:
    with pytest.raises(ConversionError, match=r"dtype is torch\.float16.*pass one of them"):
        sparsight.freeze(nn.Identity(), example=torch.randn(1, 3, 9, 9), dtype=torch.float16)


@needs_instructions
def test_a_frozen_model_is_not_frozen_again() -> None:
    x = torch.randn(1, 3, 9, 9)
    frozen = freeze(Net(lambda n, x: n.a(x)).eval(), example=x)
    assert isinstance(frozen.a, FrozenConv2d)
    with pytest.raises(ConversionError, match="frozen already"):
        freeze(frozen, example=x)


@needs_instructions
@pytest.mark.parametrize("dtype", [torch.float32, NARROW])
def test_layers_take_float32_and_their_own_dtype_only(dtype) -> None:
    block = FrozenBlock(sampled().layer1[0], dtype=dtype)
    layers = {"FrozenConv2d": FrozenConv2d(conv(64), dtype=dtype), "FrozenBlock": block}
    for name, layer in layers.items():
        x = torch.randn(1, 64, 7, 6)
        assert layer(x).dtype == torch.float32
        wrong = [torch.float64, torch.float16] + [NARROW] * (dtype == torch.float32)
        for other in wrong:
            with pytest.raises(TypeError, match=rf"{name}: features have dtype {other}.*x.float"):
                layer(x.to(other))
        if dtype == NARROW:
            # A dense shortcut, which is float32, is given what it can read.
            torch.testing.assert_close(layer(x.to(NARROW)), layer(x.to(NARROW).float()))


@needs_instructions
def test_a_converted_dtype_is_refused_not_misread() -> None:
    frozen = freeze(sampled(), example=IMAGE).to(NARROW)
    with pytest.raises(TypeError, match=r"params torch.bfloat16.*no frozen model with .to\(dtype"):
        frozen(IMAGE)


@needs_instructions
def test_repr_says_what_is_computed_in_and_returned() -> None:
    frozen = freeze(sampled(), example=IMAGE)
    assert "dtype=torch.bfloat16, output_dtype=torch.bfloat16" in repr(frozen.conv1)
    assert "dtype=torch.bfloat16, output_dtype=torch.bfloat16" in repr(frozen.layer1[0])
    assert "output_dtype=torch.float32" in repr(frozen.layer2[1])
    assert "dtype" not in repr(sparsight.freeze(sampled(), example=IMAGE).conv1)


@needs_instructions
def test_the_state_goes_through_a_file_bit_for_bit(tmp_path) -> None:
    """Two bfloat16 in a float are any bits at all, those of signalling NaNs among them."""
    safetensors = pytest.importorskip("safetensors.torch")
    first = freeze(sampled(), example=IMAGE)
    other = sampled()
    for parameter in other.parameters():
        nn.init.normal_(parameter, std=0.1)
    second = freeze(other, example=IMAGE)
    state = first.state_dict()
    safetensors.save_file(state, tmp_path / "state.safetensors")
    torch.save(state, tmp_path / "state.pt")
    for loaded in (
        safetensors.load_file(tmp_path / "state.safetensors"),
        torch.load(tmp_path / "state.pt", weights_only=True),
    ):
        second.load_state_dict(loaded)
        for name, value in second.state_dict().items():
            if value.dtype == torch.float32:
                assert torch.equal(value.view(torch.int32), state[name].view(torch.int32)), name
        with torch.no_grad():
            assert torch.equal(second(IMAGE), first(IMAGE))
    copied = copy.deepcopy(first)
    assert narrow_names(copied) == narrow_names(first)
    with torch.no_grad():
        assert torch.equal(copied(IMAGE), first(IMAGE))


@needs_instructions
def test_decisions_and_costs_are_counted_as_of_float32() -> None:
    model = sampled("half")
    narrow, wide = freeze(model, example=IMAGE), sparsight.freeze(model, example=IMAGE)
    with torch.no_grad():
        with sparsight.record_sampling(wide) as a:
            wide(IMAGE)
        with sparsight.record_sampling(narrow) as b:
            narrow(IMAGE)
        counts = [count_macs(frozen, IMAGE) for frozen in (wide, narrow)]
    assert [d.name for d in a.decisions] == [d.name for d in b.decisions]
    assert [d.macs for d in a.decisions] == [d.macs for d in b.decisions]
    for one, two in zip(a.decisions, b.decisions, strict=True):
        assert torch.equal(one.mask, two.mask)
        assert two.probability.dtype == torch.float32
    assert str(counts[0]) == str(counts[1])


@needs_instructions
def test_a_frozen_network_compiles_and_exports() -> None:
    model = sampled("half", BasicBlock)
    model.fc = nn.Identity()
    frozen = freeze(model, example=IMAGE)
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = frozen(IMAGE)
        assert torch.equal(compiled(IMAGE), expected)
        program = torch.export.export(frozen, (IMAGE,))
        assert torch.equal(program.module()(IMAGE), expected)
