"""Flags become settings, settings become models: the paper's method and every baseline."""

from dataclasses import replace
from functools import partial

import pytest
import torch

import sparsight
from sparsight.measure import count_macs
from sparsight.models import semantic_fpn
from sparsight.nn import (
    AveragePoolInterpolation,
    ConvInterpolation,
    NearestInterpolation,
    PerforatedSampler,
    RBFInterpolation,
    ReLUGate,
    SampledBlock,
    Sampler,
    ZeroFill,
)
from sparsight.nn.budget import BudgetController, SamplingPrice
from sparsight.train.sampling import Sampling, apply_sampling, fitting_rate, plan, resized_size

pytestmark = pytest.mark.usefixtures("narrow_resnet18")

SIZE = (64, 96)


def dense():
    torch.manual_seed(0)
    return semantic_fpn("resnet18", num_classes=3, fpn_channels=8, head_channels=8).eval()


make_plan = partial(
    plan,
    method="sampled",
    sampling=Sampling(),
    size=SIZE,
    budget=None,
    sampling_weight=None,
    dense=dense,
)


def parts(sampling):
    blocks = [m for m in apply_sampling(dense(), sampling).modules() if isinstance(m, SampledBlock)]
    assert len(blocks) == 8
    return blocks[0].samplers[0], blocks[0].interpolations[0], blocks[0]


@pytest.mark.parametrize(
    ("kind", "cls"),
    [
        ("rbf", RBFInterpolation),
        ("conv", ConvInterpolation),
        ("average", AveragePoolInterpolation),
        ("nearest", NearestInterpolation),
        (None, ZeroFill),
    ],
)
def test_every_kernel_of_the_ablation(kind, cls):
    sampler, interpolation, _ = parts(Sampling(interpolation=kind))
    assert type(interpolation) is cls and type(sampler) is Sampler


def test_settings_reach_the_samplers():
    sampler, interpolation, block = parts(
        Sampling(noise="blue", grid_stride=9, layout="a", eps=1e-5, is_straight_through=True)
    )
    assert (sampler.noise, sampler.grid_stride, block.layout) == ("blue", 9, "a")
    assert sampler.straight_through and interpolation.eps == 1e-5
    sampler, interpolation, block = parts(
        Sampling(sampler="perforated", rate=0.3, interpolation="nearest", layout="c")
    )
    assert isinstance(sampler, PerforatedSampler) and sampler.rate == 0.3
    assert isinstance(interpolation, NearestInterpolation) and len(block.samplers) == 2
    sampler, interpolation, _ = parts(Sampling(sampler="relu_gate"))
    assert isinstance(sampler, ReLUGate) and isinstance(interpolation, ZeroFill)


def test_nothing_is_sampled_without_settings():
    model = dense()
    assert apply_sampling(model, None) is model


@pytest.mark.parametrize("kind", ["average", "nearest"])
def test_an_eps_without_a_denominator_is_refused(kind):
    with pytest.raises(ValueError, match=rf"eps=1e-05 with interpolation='{kind}'"):
        apply_sampling(dense(), Sampling(interpolation=kind, eps=1e-5))


def test_without_budget_and_weight_the_model_is_dense():
    planned = make_plan()
    assert planned.sampling is None and planned.objective is None and not planned.settles
    assert planned.size == SIZE


def test_a_budget_and_a_price_give_their_objectives():
    planned = make_plan(budget=0.5)
    assert isinstance(planned.objective, BudgetController) and planned.settles
    assert planned.sampling == Sampling()
    planned = make_plan(sampling_weight=0.1, weights="published")
    assert isinstance(planned.objective, SamplingPrice) and not planned.settles
    assert (planned.objective.weight, planned.objective.weights) == (0.1, "published")


@pytest.mark.parametrize("budget", [None, 0.5])
def test_gates_are_sampled_with_or_without_a_budget(budget):
    planned = make_plan(method="relu_gate", budget=budget)
    assert planned.sampling == Sampling(sampler="relu_gate", interpolation=None)
    assert (planned.objective is not None) == planned.settles == (budget is not None)


def test_a_perforated_network_meets_its_budget():
    sampling = Sampling(interpolation="nearest")
    planned = make_plan(method="perforated", budget=0.6, sampling=sampling)
    assert planned.objective is None and not planned.settles
    model = apply_sampling(dense(), planned.sampling).eval()
    counted = count_macs(model, torch.zeros(1, 3, *SIZE))
    # Whole rows and columns of small maps: the share moves in steps.
    assert 0.5 < counted.total / counted.dense <= 0.6
    more = fitting_rate(dense(), replace(sampling, sampler="perforated"), SIZE, 0.9)
    assert planned.sampling.rate < more


def test_a_resized_network_meets_its_budget():
    planned = make_plan(method="resized", budget=0.5, size=(240, 320))
    assert planned.sampling is None and all(side % 8 == 0 for side in planned.size)
    full, less = (
        count_macs(dense(), torch.zeros(1, 3, *size)).dense for size in ((240, 320), planned.size)
    )
    assert less / full == pytest.approx(0.5, abs=0.02)
    assert resized_size(dense(), SIZE, 1.0) == SIZE


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"budget": 1.5}, r"budget=1\.5; a share"),
        ({"budget": 0.5, "sampling_weight": 0.1}, "both given"),
        ({"budget": 0.5, "weights": "published"}, "at a fixed price only"),
        ({"method": "perforated", "sampling_weight": 0.1}, "nothing is there to be priced"),
        ({"method": "resized"}, "'resized' without a budget"),
        ({"method": "perforated", "budget": 0.05}, r"are needed even at rate 0\.01"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        make_plan(**keywords)


@pytest.mark.parametrize("sampler", ["relu_gate", "perforated"])
def test_baselines_freeze(sampler):
    model = apply_sampling(dense(), Sampling(sampler=sampler, interpolation="nearest", layout="c"))
    with torch.no_grad():
        model.train()(torch.randn(2, 3, *SIZE))  # statistics of the gates' norms
    x = torch.randn(1, 3, *SIZE)
    frozen = sparsight.freeze(model.eval(), example=x)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x)["out"], model(x)["out"], atol=1e-4, rtol=1e-4)
