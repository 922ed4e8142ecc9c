import pytest
import torch
from torch import nn
from torchvision.models.resnet import Bottleneck

from sparsight.convert import sparsify
from sparsight.measure import count_macs
from sparsight.nn import (
    PerforatedSampler,
    ReLUGate,
    SampledConv2d,
    Sampler,
    ZeroFill,
    record_sampling,
    sampling_loss,
)
from sparsight.nn.budget import (
    BudgetController,
    SamplingPrice,
    SharePull,
    check_budget,
    mean_pull,
    sampler_levels,
    settle_on_budget,
    share_pull,
)
from sparsight.train.architecture import Architecture, Sampling, build_dense, convert


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.01, float("nan")])
def test_a_budget_outside_the_unit_interval_is_refused(budget):
    with pytest.raises(ValueError, match=r"BudgetController: budget=.*share.*in \(0, 1\].*0\.5"):
        BudgetController(budget)


def test_all_of_the_macs_is_a_budget():
    assert check_budget(1.0) == 1.0


def test_the_target_falls_linearly_to_the_budget():
    controller = BudgetController(0.4, ramp=0.5)
    assert [controller.target(p) for p in (0.0, 0.25, 0.5, 1.0)] == pytest.approx(
        [1.0, 0.7, 0.4, 0.4]
    )
    controller.calibrate(0.55, 0.5)
    assert controller.target(1.0) == pytest.approx(0.35)


def test_what_the_expected_share_leaves_out_is_averaged_over_the_measurements():
    controller = BudgetController(0.4, ramp=0.0)
    differences = [0.06, -0.02, 0.05, 0.0]
    for difference in differences:  # as many as 1 / (1 - memory): their mean
        controller.calibrate(0.5 + difference, 0.5, memory=0.75)
    mean = sum(differences) / 4
    assert controller.target(1.0) == pytest.approx(0.4 - mean)
    restored = BudgetController(0.4, ramp=0.0)
    restored.load_state_dict(controller.state_dict())
    for one in (controller, restored):
        one.calibrate(0.6, 0.5, memory=0.75)
    expected = 0.4 - (0.75 * mean + 0.25 * 0.1)
    assert controller.target(1.0) == restored.target(1.0) == pytest.approx(expected)
    controller.calibrate(0.6, 0.5)  # no memory: as it is
    assert controller.target(1.0) == pytest.approx(0.3)


def test_the_target_falls_from_where_a_sampled_model_starts():
    controller = BudgetController(0.4, ramp=0.5)
    controller.update([], SharePull(0.6, 0.1, 0.1), progress=0.0)
    controller.update([], SharePull(0.9, 0.1, 0.1), progress=0.01)  # only the first step counts
    assert [controller.target(p) for p in (0.0, 0.25, 0.5, 1.0)] == pytest.approx(
        [0.6, 0.5, 0.4, 0.4]
    )
    fresh = BudgetController(0.4, ramp=0.5)
    fresh.update([], SharePull(0.95, 0.1, 0.1), progress=0.0)
    assert fresh.target(0.0) == 1.0


def sampled_layers(count, *, bias=3.0):
    """A chain of 1x1 convolutions, sampled, with heads that read nothing: only levels count."""
    torch.manual_seed(0)
    return nn.ModuleList(
        SampledConv2d(4, 4, 1, sampler=Sampler(4, bias=bias), interpolation=ZeroFill())
        for _ in range(count)
    )


def step_of(model, features):
    """One training forward: the record and the dense MACs it gates."""
    with record_sampling(model) as record:
        for layer in model:
            layer(features)
    return record, sum(decision.macs for decision in record.decisions)


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_the_budget_is_kept_and_the_price_found_whatever_the_loss_is_worth(budget, scale):
    """Two samplers of equal cost, the first worth more: the task pays for expected shares."""
    model = sampled_layers(2)
    levels = sampler_levels(model)
    controller = BudgetController(budget)
    optimizer = torch.optim.Adam(levels, lr=0.05)
    features = torch.zeros(1, 4, 8, 8)
    steps = 150
    shares = []
    for step in range(steps):
        record, total = step_of(model, features)
        first, second = (decision.probability.mean() for decision in record.decisions)
        task = -scale * (0.75 * first + 0.25 * second - 0.3 * first.square())
        share = controller.expected_share(record, total_macs=total)
        optimizer.zero_grad()
        (task + controller(share)).backward()
        controller.update(
            levels, share_pull(model, record, total_macs=total), progress=step / steps
        )
        optimizer.step()
        shares.append(float(share.detach()))
    assert shares[-20:] == pytest.approx([budget] * 20, abs=0.02)
    assert shares[-75:] == pytest.approx([budget] * 75, abs=0.06)
    first, second = (float(level.detach().sigmoid()) for level in levels)
    assert first > second + 0.05
    # What a share is worth lies between the worths of the two, 2 * scale * (0.75 - 0.6 * first)
    # and 2 * scale * 0.25, weighed by their slopes.
    ends = sorted([2 * scale * (0.75 - 0.6 * first), 2 * scale * 0.25])
    assert 0.9 * ends[0] <= float(controller.multiplier) <= 1.1 * ends[1]


def test_the_pull_is_the_derivative_by_a_common_shift():
    model = sampled_layers(2, bias=0.4)
    with torch.no_grad():
        model[0].sampler.head.bias.fill_(-1.0)
    features = torch.zeros(2, 4, 8, 8)
    record, total = step_of(model, features)
    pull = share_pull(model, record, total_macs=2 * total)
    with torch.no_grad():
        for level in sampler_levels(model):
            level += 1e-3
    shifted = share_pull(model, step_of(model, features)[0], total_macs=2 * total)
    assert (shifted.share - pull.share) / 1e-3 == pytest.approx(pull.slope, rel=1e-2)
    assert pull.price_slope == pull.slope


def test_the_price_of_gates_is_what_autograd_charges():
    torch.manual_seed(0)
    gate = ReLUGate(4)
    layer = SampledConv2d(4, 4, 1, sampler=gate, interpolation=ZeroFill())
    model = nn.ModuleList([layer])
    record, total = step_of(model, torch.randn(2, 4, 8, 8))
    pull = share_pull(model, record, total_macs=total)
    sampling_loss(record, total_macs=total).backward()
    assert pull.price_slope == pytest.approx(float(gate.level.grad.sum()), rel=1e-4)
    assert pull.slope == pytest.approx(pull.share * (1 - pull.share))


def test_the_price_is_never_negative_and_survives_a_skipped_step():
    level = nn.Parameter(torch.zeros(1))
    controller = BudgetController(0.5)
    level.grad = torch.tensor([3.0])  # computing less lowers the loss
    controller.update([level], SharePull(0.9, 0.1, 0.1), progress=0.5)
    assert float(controller.multiplier) == 0.0
    level.grad = torch.tensor([-1.0])
    controller.update([level], SharePull(0.5, 0.1, 0.1), progress=0.5)
    assert float(controller.multiplier) == pytest.approx(1.0)
    level.grad = torch.tensor([float("inf")])  # of a scaler whose factor was too large
    controller.update([level], SharePull(0.5, 0.1, 0.1), progress=0.5)
    assert float(controller.multiplier) == pytest.approx(1.0)


def test_levels_move_together_towards_the_target():
    levels = [nn.Parameter(torch.tensor([1.0])), torch.tensor([2.0])]
    controller = BudgetController(0.5)
    controller.update(levels, SharePull(0.6, 0.2, 0.2), progress=1.0)
    assert [float(level.detach()) for level in levels] == pytest.approx([0.9, 1.9])
    # Where nearly everything is decided, a step is bounded.
    controller.update(levels, SharePull(1.0, 0.0, 0.0), progress=1.0)
    assert [float(level.detach()) for level in levels] == pytest.approx([0.4, 1.4])


def test_the_mean_pull_is_taken_over_micro_batches():
    pulls = [SharePull(0.4, 0.1, 0.2), SharePull(0.6, 0.3, 0.4)]
    mean = mean_pull(pulls)
    assert (mean.share, mean.slope, mean.price_slope) == pytest.approx((0.5, 0.2, 0.3))


def test_the_controllers_state_is_saved():
    controller = BudgetController(0.5)
    level = nn.Parameter(torch.zeros(1))
    level.grad = torch.tensor([-1.0])
    controller.update([level], SharePull(0.5, 0.1, 0.1), progress=1.0)
    controller.calibrate(0.6, 0.52)
    restored = BudgetController(0.5)
    restored.load_state_dict(controller.state_dict())
    assert float(restored.multiplier) == pytest.approx(1.0)
    assert restored.target(1.0) == pytest.approx(0.42)


def test_updating_does_not_disturb_a_gradient_under_way():
    controller = BudgetController(0.5)
    controller.multiplier.fill_(2.0)
    share = torch.tensor(0.9, requires_grad=True)
    loss = controller(share)
    controller.multiplier.fill_(5.0)
    loss.backward()
    assert float(share.grad) == 2.0


def test_a_fixed_price_is_a_weight():
    price = SamplingPrice(0.2)
    share = torch.tensor(0.5, requires_grad=True)
    price.update([], SharePull(0.5, 0.1, 0.1), progress=0.5)
    price(share).backward()
    assert float(share.grad) == pytest.approx(0.2)


@pytest.mark.parametrize("budget", [0.45, 0.7, 0.95])
def test_settling_meets_the_budget_with_the_real_count(budget):
    architecture = Architecture(
        num_classes=3, fpn_channels=8, head_channels=8, size=(96, 96), sampling=Sampling()
    )
    torch.manual_seed(0)
    model = convert(build_dense(architecture), architecture).eval()
    image = torch.randn(1, 3, 96, 96)

    def measure() -> float:
        counted = count_macs(model, image)
        return counted.total / counted.dense

    shift, share = settle_on_budget(model, measure, budget)
    assert share == pytest.approx(budget, abs=0.02)
    assert share == measure()
    biases = {m.head.bias.item() for m in model.modules() if isinstance(m, Sampler)}
    assert len(biases) == 1
    assert biases.pop() == pytest.approx(3.0 + shift, abs=1e-5)


def test_settling_on_what_is_already_met_changes_nothing():
    model = nn.Sequential(Sampler(2))
    assert settle_on_budget(model, lambda: 0.5, 0.5) == (0.0, 0.5)
    assert model[0].head.bias.item() == 3.0


@pytest.mark.parametrize("weights", ["macs", "published", "uniform"])
def test_a_fixed_price_is_charged_on_what_was_asked_for(weights):
    torch.manual_seed(0)
    model = sparsify(torch.nn.Sequential(Bottleneck(16, 4)))
    biases = (0.3, -1.1)
    for sampler, bias in zip(model[0].samplers, biases, strict=True):
        torch.nn.init.constant_(sampler.head.bias, bias)
    p = [torch.tensor(bias).sigmoid().item() for bias in biases]
    with record_sampling(model) as record:
        model(torch.randn(1, 16, 8, 8))
        macs = [d.macs for d in record.decisions]
        total = 2 * sum(macs)
        share = SamplingPrice(0.1, weights=weights).expected_share(record, total_macs=total)
    expected = {
        "macs": 0.5 + (macs[0] * p[0] + macs[1] * p[1]) / total,
        "published": 0.25 * p[0] + 0.75 * p[1],
        "uniform": 0.5 * (p[0] + p[1]),
    }
    assert share.item() == pytest.approx(expected[weights], rel=1e-5)


def test_levels_of_samplers_and_gates_are_shifted_together():
    net = torch.nn.Sequential(Bottleneck(16, 4))
    sampled, gated = sparsify(net), sparsify(net, sampler=ReLUGate, interpolation=ZeroFill)
    fixed = sparsify(net, sampler=PerforatedSampler)
    assert [level.item() for level in sampler_levels(sampled)] == [3.0, 3.0]
    assert sampler_levels(gated) == [gate.norm.bias for gate in gated[0].samplers]
    assert sampler_levels(fixed) == sampler_levels(net) == []
