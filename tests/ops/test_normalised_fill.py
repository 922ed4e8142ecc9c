"""normalised_fill: batch norm, ReLU and fill as they are one by one, with less kept."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from sparsight.ops import interpolate
from sparsight.ops.normalised_fill import normalised_fill

NAMES = ("x", "weight", "bias", "mask", "log_kernel")


def arguments(dtype=torch.float32, *, size=(2, 5, 6, 7), window=3):
    generator = torch.Generator().manual_seed(0)
    channels = size[1]
    at_least_float32 = torch.promote_types(dtype, torch.float32)
    x = torch.randn(size, generator=generator).to(dtype).to(memory_format=torch.channels_last)
    mask = torch.rand(size[0], 1, *size[2:], generator=generator).to(at_least_float32)
    mask[0, 0, :3] = 0.0
    mask[-1, 0, :, :2] = 1.0
    tensors = {
        "x": x,
        "mask": mask,
        "log_kernel": torch.randn(window, window, generator=generator).to(at_least_float32),
        "weight": torch.rand(channels, generator=generator).to(at_least_float32) + 0.5,
        "bias": torch.randn(channels, generator=generator).to(at_least_float32),
    }
    running = {
        "running_mean": torch.randn(channels, generator=generator).to(at_least_float32),
        "running_var": torch.rand(channels, generator=generator).to(at_least_float32) + 0.5,
    }
    return {name: value.requires_grad_() for name, value in tensors.items()}, running


def one_by_one(x, mask, log_kernel, *, weight, bias, relu, training, eps, momentum=0.1, **running):
    y = F.batch_norm(
        x, running["running_mean"], running["running_var"], weight, bias, training, momentum
    )
    return interpolate(F.relu(y) if relu else y, mask, log_kernel, eps=eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("eps", [None, 1e-3])
def test_the_result_gradients_and_statistics_are_those_of_one_after_the_other(
    dtype, relu, training, eps
):
    found = []
    for function in (one_by_one, normalised_fill):
        tensors, running = arguments(dtype)
        settings = {"relu": relu, "training": training, "eps": eps}
        out = function(**tensors, **running, **settings)
        out.float().pow(3).sum().backward()
        grads = [tensors[name].grad for name in NAMES]
        assert all(g.dtype == tensors[n].dtype for g, n in zip(grads, NAMES, strict=True))
        found.append([out.detach(), *grads, *running.values()])
    assert found[0][0].is_contiguous(memory_format=torch.channels_last)
    for expected, value in zip(*found, strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_in_float64(relu, training):
    tensors, running = arguments(torch.float64, size=(2, 3, 3, 4))
    mask = (0.8 * tensors["mask"] + 0.1).detach().requires_grad_()

    def function(x, weight, bias, mask, log_kernel):
        settings = {"relu": relu, "training": training, "weight": weight, "bias": bias}
        return normalised_fill(x, mask, log_kernel, **settings, **running)

    inputs = (tensors["x"], tensors["weight"], tensors["bias"], mask, tensors["log_kernel"])
    assert torch.autograd.gradcheck(function, inputs)


def test_of_the_maps_only_the_input_is_kept():
    def kept(function):
        tensors, running = arguments(size=(1, 4, 8, 8))
        storages = set()

        def keep(tensor):
            if tensor.shape == tensors["x"].shape:
                storages.add(tensor.untyped_storage().data_ptr())
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            out = function(**tensors, **running, relu=True, training=True, eps=None)
        # What is only alive for a moment may give its address to another: all are alive here.
        return len(storages), out

    assert kept(one_by_one)[0] == 2
    assert kept(normalised_fill)[0] == 1


def test_without_gradient_and_with_a_hard_mask_it_is_the_same():
    tensors, running = arguments()
    hard = tensors["mask"].detach() > 0.5
    settings = {"relu": True, "training": False, "eps": None, **running}
    inputs = {**tensors, "mask": hard}
    expected = one_by_one(**inputs, **settings)
    assert torch.equal(normalised_fill(**inputs, **settings), expected)
    with torch.no_grad():
        assert torch.equal(normalised_fill(**inputs, **settings), expected)
    normalised_fill(**inputs, **settings).sum().backward()
    assert tensors["mask"].grad is None and tensors["x"].grad is not None
