"""recompute_activations: less is kept, nothing else is different."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from sparsight import sparsify
from sparsight.models import resnet_cifar
from sparsight.nn import SampledBlock, record_sampling, sampling_loss
from sparsight.nn.recompute import recompute_activations


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return sparsify(resnet_cifar(20)).train()


def blocks_of(model):
    return [module for module in model.modules() if isinstance(module, SampledBlock)]


def step(model, *, recomputes):
    """A training step with white noise; the backward pass runs inside the record."""
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(1)
    with recompute_activations(blocks_of(model) if recomputes else []):
        with record_sampling(model) as record:
            loss = model(x).square().mean() + sampling_loss(record)
            loss.backward()
    return loss, [d.name for d in record.decisions], torch.get_rng_state()


def test_gradients_buffers_noise_and_record_are_those_of_ordinary_training(model):
    plain, saving = copy.deepcopy(model), copy.deepcopy(model)
    expected, found = step(plain, recomputes=False), step(saving, recomputes=True)
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1] and len(found[1]) == 18
    assert torch.equal(found[2], expected[2])
    for (name, parameter), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.equal(other.grad, parameter.grad), name
    for (name, buffer), other in zip(plain.named_buffers(), saving.buffers(), strict=True):
        assert torch.equal(other, buffer), name
    assert any(
        not torch.equal(a, b) for a, b in zip(saving.buffers(), model.buffers(), strict=True)
    )


def test_blocks_keep_their_inputs_only():
    block = nn.Sequential(*[nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Sigmoid())] * 5)
    x = torch.randn(1, 4, 32, 32, requires_grad=True)

    def kept(blocks):
        shapes = []
        with (
            saved_tensors_hooks(lambda t: (shapes.append(t.shape), t)[1], lambda t: t),
            recompute_activations(blocks),
        ):
            block(x).sum().backward()
        return shapes.count(x.shape)

    assert kept([]) == 10  # the input and the output of each layer's sigmoid
    # torch hands what the second pass needs again past hooks from outside.
    assert kept([block]) <= 1


def test_a_graph_kept_is_differentiated_twice(model):
    model = copy.deepcopy(model)
    with recompute_activations(blocks_of(model)):
        loss = model(torch.randn(1, 3, 16, 16)).square().mean()
    (first,) = torch.autograd.grad(loss, [model.conv1.weight], retain_graph=True)
    (second,) = torch.autograd.grad(loss, [model.conv1.weight])
    assert torch.equal(first, second)


def test_modules_are_as_before_afterwards(model):
    model = copy.deepcopy(model)
    block = blocks_of(model)[0]
    own = block.forward = lambda x: x + 1
    with pytest.raises(RuntimeError, match="in the middle"):
        with recompute_activations(blocks_of(model)):
            assert block.forward is not own
            raise RuntimeError("in the middle")
    assert block.forward is own
    assert all("forward" not in vars(other) for other in blocks_of(model)[1:])


def test_without_gradient_nothing_is_wrapped(model, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("must not be called")

    monkeypatch.setattr("sparsight.nn.recompute.checkpoint", forbidden)
    with torch.no_grad(), recompute_activations(blocks_of(model)):
        copy.deepcopy(model).eval()(torch.randn(1, 3, 16, 16))
