import pytest
import torch
from torch import nn
from torchvision.models import resnet

from sparsight.convert import freeze, sparsify
from sparsight.measure import count_macs, count_published_macs, published_size
from sparsight.models import faster_rcnn, semantic_fpn
from sparsight.nn import record_sampling


@pytest.fixture(scope="module")
def detectors() -> dict[str, nn.Module]:
    with torch.device("meta"):
        return {
            name: faster_rcnn(name, num_classes=81, deformable=True)
            for name in ("resnet50", "resnet101")
        }


@pytest.fixture(scope="module")
def sampled(detectors) -> dict[str, nn.Module]:
    with torch.device("meta"):
        return {name: sparsify(detector) for name, detector in detectors.items()}


@pytest.mark.parametrize(
    ("backbone", "shorter_side", "published"),
    [
        # The four dense rows of the paper's table 4 (289.5, 184.1, 100.2, 70.0), as the authors'
        # counter prints them; the others as it prints them for ResNet-50 and for a classifier.
        ("resnet101", 1000, 289.47),
        ("resnet101", 800, 184.06),
        ("resnet101", 600, 100.20),
        ("resnet101", 500, 70.03),
        ("resnet101", 224, 8.80),
        ("resnet50", 1000, 149.17),
        ("resnet50", 800, 94.85),
        ("resnet50", 600, 51.63),
        ("resnet50", 500, 36.09),
        ("resnet50", 224, 4.53),
    ],
)
def test_dense_backbones_cost_what_is_published(
    detectors, sampled, backbone, shorter_side, published
):
    counted = count_published_macs(detectors[backbone], shorter_side=shorter_side)
    assert f"{counted.total / 1e9:.2f}" == f"{published:.2f}"
    assert counted.dense == counted.total
    assert count_published_macs(sampled[backbone], shorter_side=shorter_side).dense == counted.dense


@pytest.mark.parametrize(
    ("backbone", "density", "published"),
    [
        ("resnet101", 1.0, 294.51),
        ("resnet101", 0.5, 162.34),
        ("resnet101", 0.3, 106.84),
        ("resnet101", 0.2, 78.52),
        ("resnet101", 0.0, 20.75),
        ("resnet50", 1.0, 152.18),
        ("resnet50", 0.5, 88.45),
        ("resnet50", 0.3, 61.28),
        ("resnet50", 0.2, 47.34),
        ("resnet50", 0.0, 18.73),
    ],
)
def test_sampled_backbones_cost_what_the_authors_counter_prints(
    sampled, backbone, density, published
):
    """Computed with their formulas at a uniform density: the tables' densities are unknown."""
    counted = count_published_macs(sampled[backbone], density=density)
    assert f"{counted.total / 1e9:.2f}" == f"{published:.2f}"


def test_heads_add_less_than_two_percent(sampled):
    counted = count_published_macs(sampled["resnet101"])
    heads = sum(row.total for row in counted.layers if row.kind == "Sampler")
    assert heads / counted.dense == pytest.approx(0.017, abs=5e-4)


@pytest.mark.parametrize("backbone", ["resnet18", "resnext50_32x4d"])
def test_a_dense_backbone_counts_as_count_macs_counts_it(backbone):
    body = faster_rcnn(backbone, num_classes=2, deformable=True, fpn_channels=8).backbone.body
    for size in (published_size(64), (33, 70)):
        counted = count_macs(body.eval(), torch.zeros(1, 3, *size))
        assert count_published_macs(body, size=size).total == counted.total


@pytest.mark.slow
def test_the_published_number_is_that_of_a_real_pass():
    body = faster_rcnn("resnet101", num_classes=2, deformable=True).backbone.body.eval()
    counted = count_macs(body, torch.zeros(1, 3, *published_size(224)))
    assert f"{counted.total / 1e9:.2f}" == "8.80"


def tiny() -> nn.Module:
    return resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], width_per_group=8)


def test_a_sampled_backbone_differs_from_count_macs_in_its_interpolation_alone():
    torch.manual_seed(0)
    model = sparsify(tiny()).eval()
    for block in (model.layer1[0], model.layer2[0], model.layer3[0], model.layer4[0]):
        for sampler in block.samplers:
            nn.init.constant_(sampler.head.bias, -0.5)
    image = torch.randn(1, 3, *published_size(96))
    with record_sampling(model) as record, torch.no_grad():
        model(image)
    density = {d.name: float(d.mask.float().mean()) for d in record.decisions}
    rows = {
        (row.name, row.kind): row.total
        for row in count_published_macs(model, shorter_side=96, density=density).layers
    }
    filled = 0
    for row in count_macs(model, image).layers:
        if row.name == "fc":
            continue
        if row.kind == "RBFInterpolation":
            # Theirs knows no border, which takes most of a window at the small maps, and fills
            # all that conv1 leaves out.
            assert 0 < row.total < 1.1 * rows[row.name, row.kind], row.name
            if row.name == "layer1.0.interpolations.1":  # 24x40 positions
                assert row.total > 0.7 * rows[row.name, row.kind]
            filled += 1
        else:
            assert row.total == pytest.approx(rows[row.name, row.kind], abs=1), row.name
    assert filled == 8


def test_the_resnet_is_found_where_models_keep_it():
    inner = tiny()
    expected = count_published_macs(inner, shorter_side=64).total
    model = semantic_fpn(inner, num_classes=2, fpn_channels=8, head_channels=8)
    counted = count_published_macs(model, shorter_side=64)
    assert counted.total == expected
    assert counted.layers[0].name == "backbone.conv1"


def test_sizes_are_the_authors():
    sizes = {1000: (992, 1664), 800: (800, 1312), 600: (576, 992), 500: (480, 832)}
    assert {side: published_size(side) for side in sizes} == sizes
    assert published_size(224) == (224, 224)


def test_bad_arguments_are_named():
    model = sparsify(tiny())
    with pytest.raises(ValueError, match=r"no entry for layer1\.0\.samplers\.0; one per sampler"):
        count_published_macs(model, density={})
    with pytest.raises(ValueError, match=r"density is 1\.5; a share of positions in \[0, 1\]"):
        count_published_macs(model, density=1.5)
    with pytest.raises(ValueError, match=r"shorter_side=31; at least 32 pixels"):
        count_published_macs(model, shorter_side=31)
    with pytest.raises(ValueError, match=r"Linear holds no ResNet; conv1 and layer1 to layer4"):
        count_published_macs(nn.Linear(1, 1))
    frozen = freeze(model.eval(), example=torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"conv1 is a FrozenConv2d.*before it was frozen"):
        count_published_macs(frozen)
