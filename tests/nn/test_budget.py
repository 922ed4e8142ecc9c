import pytest
import torch
from torch import nn

from sparsight.measure import count_macs
from sparsight.nn import Sampler
from sparsight.nn.budget import (
    BudgetController,
    SamplingPrice,
    check_budget,
    settle_on_budget,
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


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("worth", [0.0, 0.2, 1.5])
def test_the_controller_reaches_the_budget_whatever_computing_is_worth(budget, worth):
    """A toy model whose task loss falls by `worth` per unit of share, from density 0.95."""
    controller = BudgetController(budget)
    logit = nn.Parameter(torch.tensor(3.0))
    optimizer = torch.optim.AdamW([logit], lr=0.02, weight_decay=0.0)
    steps = 800
    for step in range(steps):
        progress = step / steps
        share = 0.15 + 0.85 * torch.sigmoid(logit)
        loss = -worth * share + controller(share, progress=progress)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        controller.update(share.item(), progress=progress, total_steps=steps)
    final = 0.15 + 0.85 * torch.sigmoid(logit)
    assert final.item() == pytest.approx(budget, abs=0.02)
    assert float(controller.multiplier) == pytest.approx(worth, abs=0.15)


def test_the_controllers_state_is_saved():
    controller = BudgetController(0.5)
    controller.update(0.9, progress=1.0, total_steps=100)
    controller.calibrate(0.6, 0.52)
    restored = BudgetController(0.5)
    restored.load_state_dict(controller.state_dict())
    assert float(restored.multiplier) == pytest.approx(20 * 0.4 / 10)
    assert restored.target(1.0) == pytest.approx(0.42)


def test_updating_does_not_disturb_a_gradient_under_way():
    controller = BudgetController(0.5)
    share = torch.tensor(0.9, requires_grad=True)
    loss = controller(share, progress=1.0)
    controller.update(0.9, progress=1.0, total_steps=100)
    loss.backward()
    assert float(share.grad) == pytest.approx(20 * 0.4)


def test_a_fixed_price_is_a_weight():
    price = SamplingPrice(0.2)
    share = torch.tensor(0.5, requires_grad=True)
    price.update(0.5, progress=0.5, total_steps=10)
    price.calibrate(0.5, 0.4)
    price(share, progress=0.5).backward()
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
