"""sampling_loss: an expected share of multiply-adds."""

import pytest
import torch

from sparsight.nn import RecordedDecision, SamplingRecord, sampling_loss


def decision(probability, macs, requires_grad=True):
    p = torch.full((2, 1, 4, 5), probability, requires_grad=requires_grad)
    return RecordedDecision("layer.sampler", p.detach() >= 0.5, p, None, macs)


def test_share_is_weighted_by_macs():
    decisions = [decision(0.2, 300), decision(0.8, 100)]
    loss = sampling_loss(decisions)
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx((0.2 * 300 + 0.8 * 100) / 400)
    assert sampling_loss(SamplingRecord(decisions)).item() == loss.item()
    assert sampling_loss(decisions, weights="uniform").item() == pytest.approx(0.5)


def test_share_of_the_whole_model_counts_what_is_not_gated():
    loss = sampling_loss([decision(0.2, 300), decision(0.8, 100)], total_macs=1000)
    assert loss.item() == pytest.approx((600 + 0.2 * 300 + 0.8 * 100) / 1000)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_bounds(probability):
    assert sampling_loss([decision(probability, 7), decision(probability, 5)]) == probability


@pytest.mark.parametrize(("probability", "sign"), [(0.9, 1), (0.1, -1)])
def test_budget_pulls_from_both_sides(probability, sign):
    recorded = decision(probability, 10)
    loss = sampling_loss([recorded], budget=0.4)
    assert loss.item() == pytest.approx((probability - 0.4) ** 2)
    loss.backward()
    assert (recorded.probability.grad * sign > 0).all()


def test_budget_met_costs_nothing():
    assert sampling_loss([decision(0.25, 10)], budget=0.625, total_macs=20).item() < 1e-12


def test_gradient_is_the_share_of_each_position():
    decisions = [decision(0.2, 300), decision(0.8, 100)]
    sampling_loss(decisions).backward()
    for recorded, share in zip(decisions, (0.75, 0.25), strict=True):
        expected = torch.full((2, 1, 4, 5), share / 40)
        assert torch.allclose(recorded.probability.grad, expected)


def test_evaluates_without_gradients():
    with torch.no_grad():
        assert sampling_loss([decision(0.5, 3, requires_grad=False)]).item() == 0.5


@pytest.mark.parametrize(
    ("decisions", "options", "message"),
    [
        ([], {}, r"record is empty.*with record_sampling\(model\)"),
        ([decision(0.5, 3, False)], {}, r"has a gradient.*not the frozen.*torch.no_grad\(\)"),
        ([decision(0.5, 3)], {"budget": 0.0}, r"budget is 0.0.*0.4"),
        ([decision(0.5, 3)], {"budget": 40}, r"budget is 40.*0.4"),
        ([decision(0.5, 3)], {"total_macs": 2}, r"total_macs is 2.*alone gate 3.*clear"),
        ([decision(0.5, 3)], {"budget": 0.5, "total_macs": 10}, r"0.700 of .* not gated.*more"),
        ([decision(0.5, 3)], {"weights": "flops"}, r"weights is 'flops'.*pass 'macs'"),
        ([decision(0.5, 3)], {"weights": "uniform", "total_macs": 9}, r"drop one of the two"),
        ([decision(0.5, 0)], {}, r"gate 0 multiply-adds.*weights='uniform'"),
    ],
)
def test_bad_arguments_are_refused(decisions, options, message):
    with pytest.raises(ValueError, match=message):
        sampling_loss(decisions, **options)
