"""RefineNet: its published counts, its structure by hand, any size, sampled and frozen."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import mobilenet_v2
from torchvision.models.resnet import BasicBlock, ResNet

import sparsight
from sparsight.models import light_weight_refinenet, load_backbone_weights, refinenet
from sparsight.models.refinenet import ChainedResidualPooling, RefineBlock
from sparsight.nn import ConvPair, Sampler

TOLERANCE = 1e-4  # relative to the largest output


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class Narrow(nn.Module):
    """Four maps of few channels, with a stem and one residual block a stage."""

    def __init__(self):
        super().__init__()
        self.maps = nn.ModuleList()
        width = 3
        for stride, out in ((4, 4), (2, 6), (2, 8), (2, 10)):
            down = nn.Conv2d(width, out, 3, stride=stride, padding=1, bias=False)
            self.maps.append(nn.Sequential(down, BasicBlock(out, out)))
            width = out

    def forward(self, x):
        found = []
        for stage in self.maps:
            x = stage(x)
            found.append(x)
        return found


def narrow(build=refinenet, **options) -> nn.Module:
    torch.manual_seed(0)
    model = build(5, **({"backbone": Narrow(), "channels": 6} | options))
    for module in model.blocks.modules():
        if isinstance(module, nn.Conv2d):  # N(0, 0.01) would leave nothing of so few channels
            nn.init.kaiming_normal_(module.weight)
    return model.eval()


def on_mobilenet() -> nn.Module:
    torch.manual_seed(0)
    backbone = mobilenet_v2(weights=None, width_mult=0.25)
    model = light_weight_refinenet(5, backbone=backbone, channels=6)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


# Of 21 classes: the whole network, and the light-weight one.
COUNTS = {
    "resnet50": (99_060_309, 27_357_525),
    "resnet101": (118_052_437, 46_349_653),
    "resnet152": (133_696_085, 61_993_301),
}


@pytest.mark.parametrize("backbone", COUNTS)
def test_parameters_are_the_published_ones(backbone):
    """RefineNet-101 is quoted at 118 M, the light-weight ones at 27, 46 and 62 M."""
    with torch.device("meta"):
        found = refinenet(21, backbone=backbone), light_weight_refinenet(21, backbone=backbone)
    assert tuple(num_parameters(model) for model in found) == COUNTS[backbone]


def test_parameters_on_a_mobilenet_are_the_published_ones():
    """Quoted at 3.3 M: the encoder, six reductions, four chains, three convolutions, classifier."""
    with torch.device("meta"):
        model = light_weight_refinenet(21, backbone="mobilenet_v2")
    reductions = (24 + 32 + 64 + 96 + 160 + 320) * 256
    decoder = reductions + (4 * 4 + 3) * 256**2 + 9 * 256 * 21 + 21
    assert num_parameters(model) == 1_811_712 + decoder == 3_283_477
    assert num_parameters(model.backbone) == 1_811_712


def test_on_a_mobilenet_stages_are_summed_as_they_are():
    """The decoder of the authors' code by hand."""
    torch.manual_seed(0)
    model = on_mobilenet().eval()
    image = torch.randn(1, 3, 72, 104)

    def reduced(x, weight):
        return F.conv2d(x, weight.weight)

    with torch.no_grad():
        maps = model.backbone(image)[::-1]
        x = None
        for block, group in zip(model.blocks, ((0, 1), (2, 3), (4,), (5,)), strict=True):
            paths = [
                reduced(maps[i], conv) for i, conv in zip(group, block.reductions, strict=True)
            ]
            if x is not None:
                up = F.interpolate(
                    reduced(x, block.fusions[-1]), size=paths[0].shape[2:], mode="bilinear"
                )
                paths.append(up)
            x = link = torch.stack(paths).sum(0).clamp(0, 6)
            for conv in block.pooling.convs:
                link = reduced(F.max_pool2d(link, 5, 1, 2), conv)
                x = x + link
        assert x is not None
        logits = F.conv2d(x, model.classifier.weight, model.classifier.bias, padding=1)
        expected = F.interpolate(logits, size=(72, 104), mode="bilinear")
        assert relative_error(model(image)["out"], expected) < TOLERANCE


def test_on_a_mobilenet_the_decoder_is_sampled_and_frozen():
    source, image = on_mobilenet().eval(), torch.randn(1, 3, 40, 56)
    full = sparsight.sparsify(source, sampler=partial(Sampler, bias=1e4), example=image).eval()
    convs = [n for n, m in source.blocks.named_modules(prefix="blocks") if type(m) is nn.Conv2d]
    assert set(full.sampling_report.sampled) == set(convs) and len(convs) == 6 + 3 + 16
    with torch.no_grad():
        assert relative_error(full(image)["out"], source(image)["out"]) < TOLERANCE
    make = partial(Sampler, bias=-0.5, grid_stride=5)
    model = sparsight.sparsify(source, sampler=make).eval()
    frozen = sparsight.freeze(model, example=image)
    with torch.no_grad():
        assert relative_error(frozen(image)["out"], model(image)["out"]) < TOLERANCE


def test_weights_of_torchvision_load_into_a_mobilenet(tmp_path):
    torch.manual_seed(1)
    state = mobilenet_v2(weights=None, width_mult=0.25).state_dict()
    torch.save(state, tmp_path / "w.pth")
    model = on_mobilenet()
    assert load_backbone_weights(model, tmp_path / "w.pth") == []
    own = model.backbone.state_dict()
    assert own and all(torch.equal(value, state[name]) for name, value in own.items())


def test_parameters_of_the_other_cascades():
    with torch.device("meta"):
        cascades = [refinenet(21, backbone="resnet50", num_cascades=n) for n in (1, 2)]
        two_scales = refinenet(21, backbone="resnet50", is_two_scale=True)
    assert [num_parameters(model) for model in cascades] == [62_488_149, 68_976_981]
    assert num_parameters(two_scales) == 159_139_989


def test_parameters_of_other_class_counts_and_of_fewer_poolings():
    with torch.device("meta"):
        assert num_parameters(refinenet(19)) == 118_047_827
        shorter = refinenet(21, backbone="resnet18", num_poolings=2)
    links = 2 * 9 * (512**2 + 3 * 256**2)
    decoder = num_parameters(shorter.blocks) + num_parameters(shorter.classifier)
    assert (
        decoder
        == 75_552_277
        - links
        - (2048 - 512) * 9 * 512
        - (1024 - 256 + 512 - 128 + 256 - 64) * 9 * 256
    )


def test_a_chain_adds_every_link_to_the_relu_of_its_input():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 7)
    for order in ("pool_conv", "conv_pool"):
        chain = ChainedResidualPooling(3, num_links=3, kernel_size=3, order=order)
        link = out = x.clamp(min=0)
        for conv in chain.convs:
            weight = conv.weight
            if order == "pool_conv":
                link = F.conv2d(F.max_pool2d(link, 5, 1, 2), weight, padding=1)
            else:
                link = F.max_pool2d(F.conv2d(link, weight, padding=1), 5, 1, 2)
            out = out + link
        assert torch.equal(chain(x), out)


def test_a_block_reduces_adapts_fuses_pools_and_adapts_again():
    """Paper, figure 3, with the units of the next block's adaptation at this one's output."""
    torch.manual_seed(0)
    block = RefineBlock(
        [5],
        [4],
        coarse_channels=3,
        kernel_size=3,
        num_units=(1, 1),
        num_links=1,
        order="pool_conv",
        align_corners=False,
    )

    def unit(x, pair):
        h = F.conv2d(x.clamp(min=0), pair.conv1.weight, pair.conv1.bias, padding=1)
        return x + F.conv2d(h.clamp(min=0), pair.conv2.weight, padding=1)

    stage, coarse = torch.randn(1, 5, 7, 9), torch.randn(1, 3, 4, 5)
    x = unit(F.conv2d(stage, block.reductions[0].weight, padding=1), block.adaptations[0][0])
    x = F.conv2d(x, block.fusions[0].weight, padding=1)
    y = F.conv2d(coarse, block.fusions[1].weight, padding=1)
    x = block.pooling(x + F.interpolate(y, size=(7, 9), mode="bilinear"))
    expected = unit(x, block.output[0])
    found = block([stage], coarse)
    assert found.shape == (1, 3, 7, 9) == (1, block.out_channels, 7, 9)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("size", [(64, 96), (33, 47), (31, 8), (1, 1)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_cascades": 2},
        {"num_cascades": 1, "pooling_order": "conv_pool"},
        {"is_two_scale": True, "align_corners": True},
        {"build": light_weight_refinenet},
    ],
    ids=["4", "2", "1", "two scales", "light"],
)
def test_logits_have_the_size_of_the_input(options, size):
    model = narrow(**options)
    with torch.no_grad():
        out = model(torch.randn(2, 3, *size))
    assert set(out) == {"out"}
    assert out["out"].shape == (2, 5, *size) and out["out"].isfinite().all()


def test_a_stage_enters_its_block():
    model = narrow(num_cascades=2)
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(
            lambda m, args: seen.append(([x.shape[1] for x in args[0]], args[1] is None))
        )
    model(torch.zeros(1, 3, 64, 64))
    assert seen == [([10, 8], True), ([6, 4], False)]


def test_two_scales_are_two_backbones_on_two_sizes():
    model = narrow(is_two_scale=True)
    seen = []
    for backbone in (model.backbone, model.other_backbone):
        backbone.register_forward_pre_hook(lambda m, args: seen.append(tuple(args[0].shape[-2:])))
    model(torch.zeros(1, 3, 50, 100))
    assert seen == [(30, 60), (60, 120)]
    a, b = (next(m.parameters()) for m in (model.backbone, model.other_backbone))
    assert a is not b


def test_weights_of_torchvision_load_into_the_backbone():
    source = ResNet(BasicBlock, [2, 2, 2, 2])
    model = refinenet(3, backbone="resnet18", channels=4)
    result = model.backbone.load_state_dict(source.state_dict(), strict=False)
    assert result.missing_keys == [] and set(result.unexpected_keys) == {"fc.weight", "fc.bias"}
    passed = refinenet(3, backbone=source, channels=4)
    assert passed.backbone.layer1[0].conv1.weight is source.layer1[0].conv1.weight


def test_features_of_timm_are_a_backbone():
    timm = pytest.importorskip("timm")
    features = timm.create_model("resnet10t", features_only=True, pretrained=False)
    model = refinenet(3, backbone=features, channels=4).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 40, 50))["out"].shape == (1, 3, 40, 50)


def test_dropout_is_where_the_authors_have_it():
    with torch.device("meta"):
        model, light = refinenet(3, backbone="resnet50"), light_weight_refinenet(3)
        small = refinenet(3, backbone="resnet18")
    kinds = [[type(drop).__name__ for drop in m.drops] for m in (model, light, small)]
    wide = ["Dropout", "Dropout", "Identity", "Identity"]
    assert kinds == [wide, wide, ["Identity"] * 4]
    assert (model.drop.p, light.drop.p) == (0.5, 0.0)


def test_norms_of_the_backbone_may_be_constants():
    with torch.device("meta"):
        model = refinenet(3, backbone="resnet18", is_norm_frozen=True)
    norms = {type(m).__name__ for m in model.backbone.modules() if "Norm" in type(m).__name__}
    assert norms == {"FrozenBatchNorm2d"}


def test_weights_of_the_decoder_are_small_and_normal():
    model = refinenet(3, backbone="resnet18", channels=16)
    weight = model.blocks[0].pooling.convs[0].weight.detach()
    assert float(weight.std()) == pytest.approx(0.01, rel=0.1)
    assert not model.blocks[0].output[0].conv1.bias.any()


@pytest.mark.parametrize("build", [refinenet, light_weight_refinenet])
def test_sampled_everywhere_it_is_its_source(build):
    source, image = narrow(build), torch.randn(1, 3, 40, 56)
    model = sparsight.sparsify(source, sampler=partial(Sampler, bias=1e4), example=image).eval()
    sampled = set(model.sampling_report.sampled)
    inside = {n for n, m in source.named_modules() if isinstance(m, ConvPair | BasicBlock)}
    convs = {
        name
        for name, m in source.blocks.named_modules(prefix="blocks")
        if isinstance(m, nn.Conv2d) and not any(name.startswith(f"{unit}.") for unit in inside)
    }
    assert sampled == inside | convs and not model.sampling_report.left_dense
    assert not model.load_state_dict(source.state_dict(), strict=False).unexpected_keys
    with torch.no_grad():
        assert relative_error(model(image)["out"], source(image)["out"]) < TOLERANCE


@pytest.mark.parametrize("build", [refinenet, light_weight_refinenet])
def test_frozen_it_is_what_it_was_trained_to_be(build):
    make = partial(Sampler, bias=-0.5, grid_stride=5)
    model = sparsight.sparsify(narrow(build), sampler=make).eval()
    image = torch.randn(2, 3, 40, 56)
    frozen = sparsight.freeze(model, example=image)
    with torch.no_grad():
        assert relative_error(frozen(image)["out"], model(image)["out"]) < TOLERANCE
    counted, expected = (sparsight.measure.count_macs(m, image) for m in (frozen, model))
    assert (counted.total, counted.dense) == (expected.total, expected.dense)


def test_it_learns_one_image():
    model = narrow().train()
    image = torch.randn(2, 3, 32, 32)
    labels = (
        F.avg_pool2d(image[:, 0], 8).repeat_interleave(8, 1).repeat_interleave(8, 2) > 0
    ).long()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = F.cross_entropy(model(image)["out"], labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


class OneMap(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return [self.conv(x)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "refinenet: num_classes=0; at least 1"),
        ({"num_poolings": 0}, "num_poolings=0; at least 1"),
        ({"num_cascades": 3}, "num_cascades=3; 1, 2 or 4 is required"),
        ({"pooling_order": "both"}, "pooling_order='both'; 'pool_conv' or 'conv_pool'"),
        ({"backbone": "vgg16"}, "backbone='vgg16'; one of 'resnet18'.*or a module"),
        ({"backbone": OneMap()}, "OneMap returns maps of strides .1.*at least four maps"),
        ({"backbone": nn.Identity()}, "Identity does not return a list of maps"),
        ({"backbone": Narrow(), "is_norm_frozen": True}, "came with a backbone module"),
        ({"backbone": "timm:a", "is_norm_frozen": True}, "came with a backbone module, or timm's"),
        ({"backbone": "mobilenet_v2"}, "refinenet: backbone='mobilenet_v2'; one of"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        refinenet(**({"num_classes": 2} | arguments))


def test_what_is_no_image_is_refused():
    with pytest.raises(ValueError, match=r"RefineNet: the image has shape \(3, 32, 32\)"):
        narrow()(torch.zeros(3, 32, 32))
