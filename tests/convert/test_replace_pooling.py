"""Laws of `replace_pooling`: shapes, state and call contract stay; what cannot be, is refused."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsight
from sparsight import convert
from sparsight.models import semantic_fpn
from sparsight.nn import AdaptiveSoftPool2d, Sampler, SoftPool1d, SoftPool2d, SoftPool3d
from sparsight.nn.pooling import PooledConv2d
from sparsight.ops import cpu

KINDS = ("soft", "max", "average")


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.MaxPool2d(3, 2, 1),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.AdaptiveAvgPool2d(1),
    )


@pytest.mark.parametrize(
    ("pool", "rank"),
    [
        (nn.MaxPool1d(3, 2, 1), 1),
        (nn.MaxPool2d((3, 2), (2, 1), (1, 0), ceil_mode=True), 2),
        (nn.MaxPool3d(2), 3),
        (nn.AvgPool1d(2), 1),
        (nn.AvgPool2d(3, 1, 1, count_include_pad=True), 2),
        (nn.AvgPool3d((1, 2, 3), ceil_mode=True), 3),
        (SoftPool2d(3, stride=2, padding=1), 2),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_every_pooling_keeps_its_shape(pool, rank, kind):
    net = nn.Sequential(nn.Identity(), pool)
    x = torch.randn(2, 3, *[9, 7, 8][:rank])
    try:
        converted = convert.replace_pooling(net, kind=kind, example=x)
    except convert.ConversionError as error:
        assert "holds no selected module" in str(error)  # it is of this kind already
        assert {"soft": "Soft", "max": "Max", "average": "Avg"}[kind] in type(pool).__name__
        return
    assert converted(x).shape == net(x).shape
    assert type(net[1]) is type(pool)
    assert type(converted[1]) is not type(pool)


def test_max_pools_become_soft_ones_with_their_numbers():
    made = convert.replace_pooling(small_net())
    assert repr(made[1]) == "SoftPool2d(kernel_size=3, stride=2, padding=1)"
    assert isinstance(made[2], SoftPool2d)
    assert made[2].ceil_mode
    assert isinstance(made[3], nn.AdaptiveAvgPool2d)
    for pool, cls in ((nn.MaxPool1d(2), SoftPool1d), (nn.MaxPool3d(2, dilation=2), SoftPool3d)):
        other = convert.replace_pooling(nn.Sequential(pool))[0]
        assert type(other) is cls
        assert other.dilation == pool.dilation


def test_an_average_that_is_put_in_leaves_the_padding_out():
    made = convert.replace_pooling(nn.Sequential(nn.MaxPool2d(3, 2, 1)), kind="average")
    assert torch.equal(made(torch.ones(1, 1, 5, 5)), torch.ones(1, 1, 3, 3))


def test_where_selects_and_reaches_adaptive_pools():
    net = small_net()
    made = convert.replace_pooling(net, where=lambda name, _: name in ("2", "3"))
    assert isinstance(made[1], nn.MaxPool2d)
    assert isinstance(made[2], SoftPool2d)
    assert isinstance(made[3], AdaptiveSoftPool2d)
    x = torch.randn(1, 3, 17, 16)
    assert made(x).shape == net(x).shape


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(16, 16), (17, 15), (5, 4)])
def test_a_strided_convolution_becomes_a_full_one_and_a_pooling(kind, size):
    conv = nn.Conv2d(
        3, 4, (3, 2), stride=(2, 3), padding=1, dilation=(1, 2), padding_mode="reflect"
    )
    net = nn.Sequential(conv)
    x = torch.randn(2, 3, *size)
    made = convert.replace_pooling(net, kind=kind, strided_convolutions=True, example=x)
    assert isinstance(made[0], PooledConv2d)
    full = nn.Sequential(conv)(x)
    assert made(x).shape == full.shape
    # The pooled windows start at the positions of the strided convolution.
    plain = made[0].pool
    made[0].pool = nn.Identity()
    assert torch.equal(made(x)[..., :: conv.stride[0], :: conv.stride[1]], full)
    made[0].pool = plain
    made.load_state_dict(net.state_dict())
    assert convert.replace_pooling(net, where=lambda *_: True, strided_convolutions=True)
    with pytest.raises(convert.ConversionError, match="holds no selected module"):
        convert.replace_pooling(net)


def test_the_source_is_left_alone_and_its_mode_kept():
    net = small_net().eval()
    keys, text = list(net.state_dict()), repr(net)
    made = convert.replace_pooling(net, strided_convolutions=True)
    assert repr(net) == text
    assert list(made.state_dict()) == keys
    assert not any(module.training for module in made.modules())
    with torch.no_grad():
        made[0].weight.zero_()
    assert net[0].weight.abs().sum() > 0


def test_a_shared_pooling_stays_shared():
    pool = nn.MaxPool2d(2)
    made = convert.replace_pooling(nn.Sequential(pool, nn.ReLU(), pool))
    assert made[0] is made[2]
    assert isinstance(made[0], SoftPool2d)


class OwnPool(nn.MaxPool2d):
    def forward(self, input):
        return super().forward(input) + 1


def hooked_pool() -> nn.MaxPool2d:
    pool = nn.MaxPool2d(2)
    pool.register_forward_hook(lambda *_: None)
    return pool


@pytest.mark.parametrize(
    ("pool", "kind", "words"),
    [
        (nn.MaxPool2d(2, return_indices=True), "soft", "returns indices"),
        (nn.AvgPool2d(2, divisor_override=1), "max", "divisor_override is 1"),
        (nn.MaxPool2d(2, dilation=2), "average", "dilation is 2"),
        (OwnPool(2), "soft", "OwnPool may have another forward"),
        (hooked_pool(), "soft", "hooks are registered"),
    ],
)
def test_what_cannot_be_replaced_is_refused_by_name_with_all_others(pool, kind, words):
    net = nn.Sequential(nn.Identity(), pool, nn.MaxPool1d(2, return_indices=True))
    with pytest.raises(convert.ConversionError, match=words) as caught:
        convert.replace_pooling(net, kind=kind)
    if kind != "max":
        assert [name for name, _ in caught.value.refused] == ["1", "2"]


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        return F.max_pool2d(self.pool(x), 2)


def test_functional_pools_are_reported():
    x = torch.randn(1, 3, 8, 8)
    net = nn.Sequential(nn.ReLU(), Functional())
    with pytest.raises(convert.ConversionError, match="outside of modules") as caught:
        convert.replace_pooling(net, example=x)
    assert caught.value.refused[0][0] == "1"
    # Who says what is to be replaced has seen the rest.
    made = convert.replace_pooling(net, where=lambda name, _: name == "1.pool", example=x)
    assert isinstance(made[1].pool, SoftPool2d)
    net[1].pool = nn.Identity()
    with pytest.raises(convert.ConversionError, match="functional pooling"):
        convert.replace_pooling(net)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="kind is 'hard'"):
        convert.replace_pooling(small_net(), kind="hard")
    with pytest.raises(TypeError, match="where is 'stem'"):
        convert.replace_pooling(small_net(), where="stem")
    with pytest.raises(TypeError, match="model is a int"):
        convert.replace_pooling(3)
    with pytest.raises(convert.ConversionError, match=r"replace_pooling: .* is compiled"):
        convert.replace_pooling(torch.compile(small_net()))


def test_gradients_reach_what_lies_before_the_pooling():
    made = convert.replace_pooling(small_net(), strided_convolutions=True)
    made(torch.randn(1, 3, 16, 16)).sum().backward()
    assert made[0].weight.grad.abs().sum() > 0


def soft_fpn(*, strided_convolutions: bool) -> nn.Module:
    """A sampled semantic FPN that pools softly in its stem, half of the positions computed."""
    torch.manual_seed(0)
    dense = semantic_fpn("resnet18", num_classes=3, fpn_channels=8, head_channels=8)
    soft = convert.replace_pooling(dense, strided_convolutions=strided_convolutions)
    assert isinstance(soft.backbone.maxpool, SoftPool2d)
    for module in soft.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
    return sparsight.sparsify(soft, sampler=partial(Sampler, noise="none", bias=0.0)).eval()


@pytest.mark.usefixtures("narrow_resnet18")
@pytest.mark.parametrize("strided_convolutions", [False, True])
def test_a_sampled_network_with_soft_poolings_freezes(strided_convolutions):
    model, x = soft_fpn(strided_convolutions=strided_convolutions), torch.randn(2, 3, 45, 64)
    frozen = sparsight.freeze(model, example=x)
    assert sum(isinstance(module, SoftPool2d) for module in frozen.modules()) == (
        8 if strided_convolutions else 1
    )
    with torch.no_grad():
        made, truth = frozen(x)["out"], model(x)["out"]
    assert (made - truth).abs().max() < 1e-4 * truth.abs().max()


@pytest.mark.usefixtures("narrow_resnet18")
@pytest.mark.skipif(not cpu.has_bfloat16(), reason="no AVX-512 BF16 in this CPU or this build")
def test_in_bfloat16_the_maps_around_a_soft_pooling_are_narrow():
    model, x = soft_fpn(strided_convolutions=False), torch.randn(2, 3, 45, 64)
    frozen = sparsight.freeze(model, example=x, dtype=torch.bfloat16)
    seen = []
    frozen.backbone.maxpool.register_forward_hook(
        lambda module, args, output: seen.extend([args[0].dtype, output.dtype])
    )
    with torch.no_grad():
        made, truth = frozen(x)["out"], model(x)["out"]
    assert seen == [torch.bfloat16, torch.bfloat16]
    assert (made - truth).norm() < 0.03 * truth.norm()


@pytest.mark.usefixtures("narrow_resnet18")
def test_a_frozen_network_with_a_soft_pooling_exports():
    model, x = soft_fpn(strided_convolutions=False), torch.randn(1, 3, 32, 32)
    frozen = sparsight.freeze(model, example=x)
    with torch.no_grad():
        program = torch.export.export(frozen, (x,))
        assert torch.equal(program.module()(x)["out"], frozen(x)["out"])
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "sparsight.soft_pool.default" in called
