"""FRRN: its published counts, the two streams as published, any size, sampled and frozen."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsight
from sparsight.models import frrn_a, frrn_b
from sparsight.nn import ConvPair, SampledBlock, Sampler

TOLERANCE = 1e-4  # relative to the largest output


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def drawn(build=frrn_a, **options) -> nn.Module:
    """A narrow network whose norms do something, in eval mode."""
    torch.manual_seed(0)
    model = build(5, **({"channels": 4, "residual_channels": 3} | options))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize(("build", "total"), [(frrn_a, 17_746_803), (frrn_b, 24_755_699)])
def test_parameters_are_the_published_ones(build, total):
    """The paper says 17.7 M and 24.8 M; the parts were counted from its table 1."""
    with torch.device("meta"):
        model = build(19)
    assert num_parameters(model) == total
    assert num_parameters(model.stem) == 3_696
    assert num_parameters(model.entry) == 124_992
    assert num_parameters(model.split) == 1_600
    encoder = [549_600, 2_737_280, 4_893_760, 5_557_312, 5_557_312]
    assert [num_parameters(s) for s in model.encoder] == encoder[: len(model.encoder)]
    decoder = [1_783_360, 1_451_584, 476_992]
    if build is frrn_b:
        decoder.insert(1, 1_451_584)
    assert [num_parameters(s) for s in model.decoder] == decoder
    assert num_parameters(model.exit) == 82_368 + 83_328
    assert num_parameters(model.classifier) == 931


def as_published(model, image):
    """The network with its residual stream at full resolution, unit by unit (paper, figure 2)."""
    y = model.stem(image)
    for unit in model.entry:
        y = unit(y)
    z = model.split(y)
    scale = 1

    def run(stage, y, z):
        for unit in stage:
            u = torch.cat([y, F.max_pool2d(z, scale)], 1)
            pair = unit.body
            y = F.relu(pair.bn1(pair.conv1(u)))
            y = F.relu(pair.bn2(pair.conv2(y)))
            z = z + unit.residual(y).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
        return y, z

    for stage in model.encoder:
        y, scale = F.max_pool2d(y, 2), 2 * scale
        y, z = run(stage, y, z)
    for stage in model.decoder:
        y, scale = F.interpolate(y, scale_factor=2, mode="bilinear"), scale // 2
        y, z = run(stage, y, z)
    y = torch.cat([F.interpolate(y, scale_factor=2, mode="bilinear"), z], 1)
    for unit in model.exit:
        y = unit(y)
    return model.classifier(y)


@pytest.mark.parametrize("build", [frrn_a, frrn_b])
def test_the_pooled_streams_are_the_published_full_resolution_stream(build):
    """In float64, where the order of the sums is not seen; gradients too."""
    model = drawn(build).double()
    image = torch.randn(2, 3, 64, 96, dtype=torch.float64, requires_grad=True)
    found, expected = model(image)["out"], as_published(model, image)
    assert relative_error(found, expected) < 1e-12
    weights = torch.randn_like(found)
    gradients = [
        torch.autograd.grad((out * weights).sum(), [image, model.split[0].weight])
        for out in (found, expected)
    ]
    for a, b in zip(*gradients, strict=True):
        assert relative_error(a, b) < 1e-10


@pytest.mark.parametrize("size", [(32, 48), (33, 47), (1, 1), (50, 16)])
@pytest.mark.parametrize("build", [frrn_a, frrn_b])
def test_logits_have_the_size_of_the_input(build, size):
    model = drawn(build)
    with torch.no_grad():
        out = model(torch.randn(2, 3, *size))
    assert set(out) == {"out"}
    assert out["out"].shape == (2, 5, *size) and out["out"].isfinite().all()


def test_what_is_missing_to_a_multiple_repeats_the_last_row_and_column():
    model, image = drawn(), torch.randn(1, 3, 30, 17)
    padded = F.pad(image, (0, 15, 0, 2), mode="replicate")
    with torch.no_grad():
        whole = model(padded)["out"]
        assert torch.equal(model(image)["out"], whole[..., :30, :17])


def test_unpooling_has_the_grid_that_was_asked_for():
    from sparsight.models.frrn import _unpool_as_theano

    x = torch.tensor([[[[1.0, 2.0], [3.0, 7.0]]]])
    # out[2i] = x[i], out[2i + 1] = (x[i] + x[i + 1]) / 2, the last one repeated
    expected = [[1, 1.5, 2, 2], [2, 3.25, 4.5, 4.5], [3, 5, 7, 7], [3, 5, 7, 7]]
    assert torch.equal(_unpool_as_theano(x)[0, 0], torch.tensor(expected))
    merged = frrn_a(2, channels=2).merge(x, torch.zeros(1, 1, 4, 4))
    assert merged[0, 0, 0].tolist() == [1, 1.25, 1.75, 2]
    image = torch.randn(1, 3, 32, 32)
    half, theano = drawn(), drawn(unpooling="theano")
    with torch.no_grad():
        assert relative_error(theano(image)["out"], half(image)["out"]) > 0.01


def test_weights_are_he_uniform_and_biases_zero():
    conv = frrn_a(5, channels=16).encoder[1][1].body.conv2
    bound = (6 / (9 * conv.in_channels)) ** 0.5
    assert 0.95 * bound < float(conv.weight.detach().abs().max()) <= bound
    assert not frrn_a(5, channels=4).classifier.bias.any()
    assert {m.eps for m in drawn().modules() if isinstance(m, nn.BatchNorm2d)} == {1e-4}


@pytest.mark.parametrize("build", [frrn_a, frrn_b])
def test_sampled_everywhere_it_is_its_source(build):
    source, image = drawn(build), torch.randn(1, 3, 33, 40)
    model = sparsight.sparsify(source, sampler=partial(Sampler, bias=1e4), example=image).eval()
    pairs = [name for name, m in source.named_modules() if isinstance(m, ConvPair)]
    assert list(model.sampling_report.sampled) == pairs and not model.sampling_report.left_dense
    assert sum(isinstance(m, SampledBlock) for m in model.modules()) == len(pairs)
    unexpected = model.load_state_dict(source.state_dict(), strict=False).unexpected_keys
    assert not unexpected
    with torch.no_grad():
        assert relative_error(model(image)["out"], source(image)["out"]) < TOLERANCE


def test_frozen_it_is_what_it_was_trained_to_be():
    make = partial(Sampler, bias=-1.0, grid_stride=5)
    model = sparsight.sparsify(drawn(), sampler=make).eval()
    image = torch.randn(2, 3, 40, 40)
    frozen = sparsight.freeze(model, example=image)
    with torch.no_grad():
        assert relative_error(frozen(image)["out"], model(image)["out"]) < TOLERANCE
    counted, expected = (sparsight.measure.count_macs(m, image) for m in (frozen, model))
    assert (counted.total, counted.dense) == (expected.total, expected.dense)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())


def test_nearly_all_its_multiply_adds_can_be_sampled():
    """As the docstring says."""
    source = drawn(channels=48, residual_channels=32)
    model = sparsight.sparsify(source).eval()
    image = torch.zeros(1, 3, 16, 32)
    with torch.no_grad(), sparsight.record_sampling(model) as record:
        model(image)
    total = sparsight.measure.count_macs(source, image).total
    assert 0.975 < sum(d.macs for d in record.decisions) / total < 0.985


def test_it_learns_one_image():
    torch.manual_seed(0)
    model = frrn_a(2, channels=4, residual_channels=4)
    image = torch.randn(1, 3, 32, 32)
    labels = (image[:, 0] > 0).long()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(model(image)["out"], labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "frrn_a: num_classes=0; at least 1 is required"),
        ({"num_classes": 2, "channels": 0}, "frrn_a: channels=0"),
        ({"num_classes": 2, "unpooling": "nearest"}, "unpooling='nearest'; 'half_pixel' or"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        frrn_a(**arguments)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 3, 0, 32)])
def test_what_is_no_image_is_refused(shape):
    with pytest.raises(ValueError, match=r"FRRN: the image has shape .* \(B, 3, H, W\)"):
        drawn()(torch.zeros(*shape))
