"""A calibrated model keeps to its budget, and nothing but samplers and interpolations moved."""

import copy
import math
from functools import cache, partial

import pytest
import torch
from torch import nn

import sparsight
from sparsight.measure import calibrate, count_macs
from sparsight.nn import (
    RBFInterpolation,
    SampledConv2d,
    Sampler,
    SamplingDecision,
)
from sparsight.nn.budget import settle_on_budget


def scenes(count=24, seed=0):
    """Flat but for noise in the right half: the place where computing pays is plain."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, 1, 1, generator=generator).expand(count, 3, 16, 16).clone()
    images[..., 8:] += torch.randn(count, 3, 16, 8, generator=generator)
    return images


def network(num_layers=2):
    return copy.deepcopy(trained_network(num_layers))


@cache
def trained_network(num_layers):
    torch.manual_seed(3)
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    for _ in range(num_layers - 1):
        layers += [nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)]
    dense = nn.Sequential(*layers)
    with torch.no_grad():  # statistics as after training
        images = scenes()
        for _ in range(60):
            dense(images)
    return dense.eval()


def converted(dense=None, **keywords):
    dense = network() if dense is None else dense
    return sparsight.sparsify(
        dense,
        where=lambda name, module: isinstance(module, nn.Conv2d),
        sampler=partial(Sampler, noise="blue", grid_stride=None),
        interpolation=partial(RBFInterpolation, window=3, width=1.5),
        **keywords,
    )


@pytest.fixture(scope="module")
def fitted():
    """A model calibrated to 0.7 in 30 steps, its source, and what it was before."""
    torch.set_num_threads(1)
    dense = network()
    model = converted(dense).train()
    before = copy.deepcopy(model)
    same = calibrate(model, scenes(), budget=0.7, num_steps=30, batch_size=8)
    assert same is model
    return model, dense, before


def is_gate(name):
    return ".sampler." in name or ".interpolation." in name


def relative(a, b):
    return float((a - b).square().sum() / b.square().sum())


def features_and_outputs_error(model, images):
    """Relative squared error of the two sampled layers and the output against full masks."""

    def run(full):
        seen, handles = [], []
        for module in model.modules():
            if isinstance(module, SampledConv2d):
                handles.append(module.register_forward_hook(lambda m, a, out: seen.append(out)))
            if isinstance(module, Sampler) and full:
                handles.append(
                    module.register_forward_hook(
                        lambda m, a, d: SamplingDecision(
                            torch.ones_like(d.mask), d.probability, None
                        )
                    )
                )
        with torch.no_grad():
            out = model(images)
        for handle in handles:
            handle.remove()
        return seen, out

    (taught, target), (learnt, output) = run(True), run(False)
    errors = [relative(a, b) for a, b in zip(learnt, taught, strict=True)]
    return sum(errors) / len(errors), relative(output, target)


def test_the_budget_is_met_by_moving_samplers_and_interpolations_only(fitted):
    model, _, source = fitted
    before = source.state_dict()
    wanted = {name: p.requires_grad for name, p in source.named_parameters()}
    images = scenes()
    assert not any(module.training for module in model.modules())
    counted = count_macs(model, images)
    report = model.calibration_report
    assert abs(counted.total / counted.dense - 0.7) < 0.02
    assert report.share == pytest.approx(counted.total / counted.dense, abs=0.01)
    assert (report.budget, report.num_steps) == (0.7, 30)
    moved = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert {n for n in moved if not is_gate(n)} == set()
    assert {n for n in before if n.endswith(("head.weight", "head.bias", "width"))} == moved
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert all(p.grad is None for p in model.parameters())
    assert "of the dense multiply-adds (budget 0.700)" in str(report)


def test_it_computes_where_it_pays_and_beats_an_even_density():
    images = scenes()
    even = converted().eval()

    def share():
        counted = count_macs(even, images)
        return counted.total / counted.dense

    settle_on_budget(even, share, 0.65)
    fitted = calibrate(converted(), images, budget=0.65, num_steps=60, batch_size=8)
    report = fitted.calibration_report
    errors = features_and_outputs_error(fitted, images[:8])
    assert report.feature_error == pytest.approx(errors[0], rel=0.5)
    assert math.isfinite(report.output_error)
    assert errors[0] < 0.85 * features_and_outputs_error(even, images[:8])[0]
    with sparsight.record_sampling(fitted) as record, torch.no_grad():
        fitted(images)
    computed = record.decisions[1].mask.float().mean((0, 1, 2))
    assert computed[9:].mean() > computed[:6].mean() + 0.2


def test_full_masks_still_give_the_source(fitted):
    calibrated, dense, _ = fitted
    model = copy.deepcopy(calibrated)
    for module in model.modules():
        if isinstance(module, Sampler):
            nn.init.constant_(module.head.bias, 1e4)
    images = scenes(4, seed=5)
    with torch.no_grad():
        assert torch.allclose(model(images), dense(images), atol=1e-5)


def test_the_same_seed_gives_the_same_model_and_leaves_the_generator_alone():
    states = []
    for seed in (0, 0, 1):
        model = converted()
        torch.manual_seed(11)
        expected = torch.rand(3)
        torch.manual_seed(11)
        calibrate(model, scenes(8), budget=0.7, num_steps=3, batch_size=4, seed=seed)
        assert torch.equal(torch.rand(3), expected)
        states.append(model.state_dict())
    assert all(torch.equal(states[1][n], v) for n, v in states[0].items())
    assert any(not torch.equal(states[2][n], v) for n, v in states[0].items())


def test_measured_norms_bring_the_outputs_back():
    """Only running statistics move besides the gates, and the error falls."""
    dense = network(num_layers=5)
    errors = {}
    for remeasures in (False, True):
        model = converted(dense)
        before = copy.deepcopy(model.state_dict())
        calibrate(
            model,
            scenes(16),
            budget=0.5,
            num_steps=6,
            batch_size=8,
            remeasure_norms=remeasures,
        )
        report = model.calibration_report
        assert abs(report.share - 0.5) < 0.02
        errors[remeasures] = report.output_error
        moved = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
        others = {n for n in moved if not is_gate(n)}
        if remeasures:
            assert others and all("running" in n or "num_batches" in n for n in others)
            norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
            assert all(norm.momentum == 0.1 and not norm.training for norm in norms)
        else:
            assert others == set()
    assert errors[True] < errors[False]


class ListModel(nn.Module):
    """Takes a list of images and returns as many dictionaries, as torchvision's detectors do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, padding=1)

    def forward(self, images):
        maps = [self.conv(image[None]) for image in images]
        return [{"boxes": m.detach()[0, :2, :2].clone(), "labels": m[0].argmax(0)} for m in maps]


def test_a_model_that_takes_lists_is_fitted_by_its_features():
    torch.manual_seed(0)
    model = sparsight.sparsify(
        ListModel(),
        where=lambda name, module: name == "conv",
        interpolation=partial(RBFInterpolation, window=3),
    )
    batches = ([image, image[:, :12]] for image in scenes(6))
    calibrate(model, batches, budget=0.7, num_steps=8)
    report = model.calibration_report
    assert abs(report.share - 0.7) < 0.02
    assert 0 < report.feature_error < 1


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.2, float("nan")])
def test_a_budget_that_is_no_share_is_refused(budget):
    with pytest.raises(ValueError, match=r"calibrate: budget=.*in \(0, 1\]"):
        calibrate(converted(), scenes(), budget=budget)


def test_a_budget_below_what_runs_anyway_is_refused_and_the_biases_come_back():
    model = converted()
    with pytest.raises(
        ValueError, match=r"calibrate: budget=0\.01, but 0\.\d+ of the multiply-adds remain"
    ):
        calibrate(model, scenes(), budget=0.01)
    assert all(m.head.bias.item() == 3.0 for m in model.modules() if isinstance(m, Sampler))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_that_are_not_finite_are_refused(value):
    images = scenes()
    images[17, 0, 3, 3] = value
    with pytest.raises(ValueError, match=r"calibrate: batch 2 of the images holds NaN or infinite"):
        calibrate(converted(), images, budget=0.7, batch_size=8)


def test_weights_that_are_not_finite_are_found_and_the_mode_comes_back():
    model = converted().train()
    last = model[-1]
    assert isinstance(last, nn.Linear)
    nn.init.constant_(last.bias, float("nan"))
    wanted = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=r"calibrate: the outputs of batch .* differ by nan"):
        calibrate(model, scenes(), budget=0.7, num_steps=2)
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == wanted


def test_other_models_are_refused():
    with pytest.raises(TypeError, match=r"calibrate: model is a str"):
        calibrate("model", scenes(), budget=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Sequential has no sparsight\.nn\.Sampler.*sparsify"):
        calibrate(network(), scenes(), budget=0.5)
    frozen = sparsight.freeze(converted(), example=scenes(1))
    with pytest.raises(ValueError, match=r"calibrate: the model is frozen"):
        calibrate(frozen, scenes(), budget=0.5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 16, 16), r"shape \(3, 16, 16\), but \(N, C, H, W\)"),
        (torch.zeros(0, 3, 16, 16), r"N >= 1"),
        ([], r"the iterable of images is empty"),
        (["a.png"], r"batch 0 is a str without a tensor"),
    ],
)
def test_other_images_are_refused(images, message):
    with pytest.raises(ValueError, match=rf"calibrate: .*{message}"):
        calibrate(converted(), images, budget=0.5)


@pytest.mark.parametrize("name", ["num_steps", "batch_size"])
def test_no_steps_are_refused(name):
    with pytest.raises(ValueError, match=rf"calibrate: {name}=0; at least 1"):
        calibrate(converted(), scenes(), budget=0.5, **{name: 0})


def test_progress_is_shown_on_request(capsys):
    calibrate(converted(), scenes(8), budget=0.8, num_steps=2, shows_progress=True)
    assert "calibrate 2/2: expected share" in capsys.readouterr().err
    calibrate(converted(), scenes(8), budget=0.8, num_steps=2)
    assert capsys.readouterr().err == ""
