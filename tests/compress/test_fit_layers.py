"""One regression: targets behind shortcuts, joint choices, and errors as in the network."""

import pytest
import torch
from torch import nn

from sparsight.compress.fit_layers import Reader, TargetFit, make_reader, norm_scale
from sparsight.compress.observe_layers import LayerUse, Rows
from sparsight.compress.prune_targets import PruneTarget


def fit_of(*weights, units=6, scale=None, corrects=True):
    unit_of_channel = {f"reader{i}": torch.arange(units) for i in range(len(weights))}
    readers = [
        Reader(
            f"reader{i}",
            weight.double(),
            torch.arange(units),
            torch.ones(len(weight)).double() if scale is None else scale.double(),
            True,
        )
        for i, weight in enumerate(weights)
    ]
    target = PruneTarget("producer", None, units, units, unit_of_channel)
    return TargetFit(target, readers, corrects_shortcut=corrects)


def test_norm_scale_is_the_factor_of_the_norm():
    for norm in (nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False)):
        norm.running_var.copy_(torch.tensor([0.5, 1.0, 4.0]))
        if norm.affine:
            nn.init.uniform_(norm.weight, -1, 1)
        x = torch.randn(2, 3, 1, 1)
        factor = (norm.eval()(x) - norm(torch.zeros_like(x))) / x
        torch.testing.assert_close(norm_scale(norm).float(), factor[0, :, 0, 0])


def test_a_branch_makes_up_for_its_shortcut(net):
    """What the refitted layer and its norm return, plus the shortcut now, is the sum as it was."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 72, generator=g)
    reader = make_reader(net, LayerUse("a2", 2, 1, norm="a2_norm"), torch.arange(8))
    target = PruneTarget("a1", None, 8, 8, {"a2": torch.arange(8)})
    outputs = (x.double() @ reader.weight.T).float()
    shortcut = torch.randn(500, 8, generator=g)
    lost = x @ (0.1 * torch.randn(72, 8, generator=g))  # an error that the inputs can explain
    fit = TargetFit(target, [reader], corrects_shortcut=True)
    fit.add({"a2": [Rows(None, outputs, shortcut)]}, {"a2": [Rows(x, outputs, shortcut - lost)]})
    weight, bias = fit.solve(reader, torch.arange(8), refits=True)
    after = (x.double() @ weight.T + bias) * reader.scale + (shortcut - lost)
    before = outputs * reader.scale + shortcut
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    plain = TargetFit(target, [reader], corrects_shortcut=False)
    plain.add({"a2": [Rows(None, outputs, shortcut)]}, {"a2": [Rows(x, outputs, shortcut - lost)]})
    weight, _ = plain.solve(reader, torch.arange(8), refits=True)
    torch.testing.assert_close(weight, reader.weight, rtol=1e-3, atol=1e-3)


def test_one_choice_for_all_readers():
    """Each reader alone would drop the channel that only the other one needs."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(400, 6, generator=g)
    first, second = torch.rand(4, 6, generator=g) + 0.5, torch.rand(5, 6, generator=g) + 0.5
    first[:, 0], second[:, 1] = 0, 0
    first[:, 5], second[:, 5] = 0.2, 0.2  # little for both
    rows = {f"reader{i}": [Rows(x, x @ weight.T, None)] for i, weight in enumerate((first, second))}
    fit = fit_of(first, second)
    fit.add(rows, rows)
    assert fit.choose(5).tolist() == [0, 1, 2, 3, 4]
    only = fit_of(first)
    only.add(rows, rows)
    assert 0 not in only.choose(5).tolist()


def test_what_a_norm_switches_off_does_not_count():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(300, 6, generator=g)
    weight = torch.zeros(2, 6)
    weight[0] = torch.tensor([1, 1, 1, 0, 0, 0.5])
    weight[1] = torch.tensor([0, 0, 0, 9, 9, 0])
    rows = {"reader0": [Rows(x, x @ weight.T, None)]}
    for scale, expected in (([1, 1], [3, 4]), ([1, 0], [0, 1, 2])):
        fit = fit_of(weight, scale=torch.tensor(scale))
        fit.add(rows, rows)
        assert fit.choose(len(expected)).tolist() == expected


@pytest.mark.parametrize("where", ["inputs", "outputs"])
def test_values_that_are_not_finite(where):
    x, y = torch.ones(10, 6), torch.ones(10, 2)
    (x if where == "inputs" else y)[3, 1] = torch.inf
    fit = fit_of(torch.ones(2, 6))
    with pytest.raises(ValueError, match=r"'reader0' re.* NaN or infinite"):
        fit.add({"reader0": [Rows(None, y, None)]}, {"reader0": [Rows(x, y, None)]})


def test_fewer_rows_than_channels():
    fit = fit_of(torch.ones(2, 6))
    rows = {"reader0": [Rows(torch.rand(5, 6), torch.rand(5, 2), None)]}
    fit.add(rows, rows)
    with pytest.raises(ValueError, match=r"5 samples .* fewer than the 6 channels"):
        fit.check_rows()
    fit.add(rows, rows)
    fit.check_rows()


def test_no_correction_where_the_norm_is_closed():
    reader_scale = torch.tensor([0.0, 2.0])
    x = torch.randn(50, 6)
    weight = torch.randn(2, 6)
    y = x @ weight.T
    fit = fit_of(weight, scale=reader_scale)
    fit.add(
        {"reader0": [Rows(None, y, torch.ones(50, 2))]},
        {"reader0": [Rows(x, y, torch.zeros(50, 2))]},
    )
    moments = fit.moments["reader0"]
    torch.testing.assert_close(moments.y / 50, y.double().mean(0) + torch.tensor([0, 0.5]).double())
