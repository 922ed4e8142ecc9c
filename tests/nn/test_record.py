"""record_sampling: sees every decision, changes nothing, cleans up."""

import pytest
import torch
from torch import nn
from torchvision.models.resnet import Bottleneck

from sparsight.nn import RBFInterpolation, SampledBlock, SampledConv2d, Sampler, record_sampling


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        block = Bottleneck(16, 4)
        self.block = SampledBlock(block, sampler=Sampler, interpolation=RBFInterpolation)
        self.head = SampledConv2d(
            16, 2, 3, sampler=Sampler(16, bias=0.0), interpolation=RBFInterpolation()
        )

    def forward(self, x):
        return self.head(self.block(x))


def num_hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("training", [False, True])
def test_decisions_are_named_and_hold_what_the_samplers_returned(training):
    model = Model().train(training)
    x = torch.randn(3, 16, 9, 10)
    with record_sampling(model) as record:
        model(x)
    names = ["block.samplers.0", "block.samplers.1", "head.sampler"]
    assert [d.name for d in record.decisions] == names
    assert [tuple(d.mask.shape) for d in record.decisions] == [(3, 1, 9, 10)] * 2 + [(3, 1, 7, 8)]
    macs = [16 * 4 * 90, (4 * 4 * 9 + 4 * 16) * 90, 16 * 2 * 9 * 56]
    assert [d.macs for d in record.decisions] == [3 * m for m in macs]
    for decision in record.decisions:
        assert decision.mask.dtype == torch.bool and decision.probability.requires_grad
        assert (decision.relaxed is not None) == training
    if not training:
        assert torch.equal(record.decisions[0].mask, model.block.samplers[0](x).mask)


@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_random_state_are_left_alone(training):
    model = Model().train(training)
    x = torch.randn(1, 16, 9, 10)
    torch.manual_seed(0)
    expected, state = model(x), torch.get_rng_state()
    torch.manual_seed(0)
    with record_sampling(model):
        assert torch.equal(model(x), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_calls_append_until_cleared():
    model = Model().eval()
    with record_sampling(model) as record:
        model(torch.randn(1, 16, 9, 10))
        model(torch.randn(1, 16, 5, 5))
        assert len(record.decisions) == 6
        record.clear()
        assert record.decisions == []
        model(torch.randn(1, 16, 5, 5))
    assert len(record.decisions) == 3


def test_nothing_is_recorded_after_the_block_or_an_exception():
    model = Model().eval()
    with record_sampling(model) as record:
        assert num_hooks(model) == 3
    with pytest.raises(RuntimeError, match="stop"), record_sampling(model):
        raise RuntimeError("stop")
    with pytest.raises(ValueError, match="NaN"), record_sampling(model):
        model(torch.full((1, 16, 5, 5), torch.nan))
    assert num_hooks(model) == 0
    model(torch.randn(1, 16, 5, 5))
    assert record.decisions == []


def test_records_nest():
    model = Model().eval()
    x = torch.randn(1, 16, 5, 5)
    with record_sampling(model) as outer:
        model(x)
        with record_sampling(model.block) as inner:
            model(x)
        model(x)
    assert len(outer.decisions) == 9
    assert [d.name for d in inner.decisions] == ["samplers.0", "samplers.1"]


def test_a_shared_module_is_recorded_once_per_call():
    model = Model().eval()
    twice = nn.Sequential(model.block, model.block)
    with record_sampling(twice) as record:
        twice(torch.randn(1, 16, 5, 5))
    assert [d.name for d in record.decisions] == ["0.samplers.0", "0.samplers.1"] * 2


def test_a_model_without_samplers_is_refused():
    with pytest.raises(ValueError, match=r"Linear has no samplers.*sparsight.sparsify\(model\)"):
        with record_sampling(nn.Linear(2, 2)):
            pass


def test_a_compiled_model_is_refused():
    with pytest.raises(ValueError, match=r"torch.compile.*_orig_mod"):
        with record_sampling(torch.compile(Model(), backend="eager")):
            pass
