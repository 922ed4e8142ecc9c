"""Which maps go to the kernels of the GPU, and what runs where Triton or a GPU is missing."""

import importlib.util
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsight.ops import assemble, assemble_reference, assemble_windows, soft_pool2d, triton
from sparsight.ops import pool as door
from sparsight.ops import pool_reference as reference
from sparsight.ops.triton import missing_for

# Kernel size, stride, padding, dilation of two axes, and ceil_mode.
NUMBERS = ([3, 3], [2, 2], [1, 1], [1, 1], False)


def test_without_triton_plain_torch_runs_and_says_so_once(draw, monkeypatch):
    monkeypatch.setattr(door, "missing_for", lambda x: "triton is not installed")
    monkeypatch.setattr(door, "_warned", set())
    x = draw(7).normal(2, 3, 8, 8).half().contiguous(memory_format=torch.channels_last)
    with pytest.warns(UserWarning, match="soft_pool: triton is not installed; plain torch"):
        y = door._pool_cuda(x, *NUMBERS, False)
    truth = reference.soft_pool(x.double(), *NUMBERS)
    assert (y.dtype, y.stride()) == (x.dtype, F.max_pool2d(x, *NUMBERS).stride())
    torch.testing.assert_close(y.double(), truth, rtol=2**-10, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sent = door._backward_cuda(torch.ones_like(y), x, *NUMBERS, False)
    truth = reference.soft_pool_backward(torch.ones_like(truth), x.double(), *NUMBERS, False)
    assert (sent.dtype, sent.stride()) == (x.dtype, x.stride())
    torch.testing.assert_close(sent.double(), truth, rtol=2**-10, atol=1e-4)


def test_without_triton_windows_are_assembled_by_plain_torch_which_says_so_once(draw, monkeypatch):
    monkeypatch.setattr(assemble, "missing_for", lambda x: "triton is not installed")
    monkeypatch.setattr(assemble, "_warned", set())
    maps = draw(8).normal(2, 9, 6, 7).half().contiguous(memory_format=torch.channels_last)
    windows = torch.tensor([[0, -1, 2], [1, 3, 3]])
    with pytest.warns(UserWarning, match="assemble_windows: triton is not installed; plain torch"):
        made = assemble._assemble_cuda(maps, windows, 4, True)
    assert torch.equal(made, assemble_reference.assemble_windows(maps, windows, 4, True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sent = assemble._backward_cuda(made, windows, list(maps.shape), True, True)
    truth = assemble_reference.assemble_windows_backward(made.double(), windows, maps.shape, True)
    assert torch.equal(sent, truth.half()) and sent.stride() == maps.stride()


def test_what_the_kernels_need(monkeypatch):
    x = torch.empty(1)
    monkeypatch.setattr(triton, "_is_installed", True)
    for capability, dtype, words in (
        ((9, 0), torch.bfloat16, None),
        ((7, 0), torch.float16, None),
        ((7, 5), torch.bfloat16, r"capability is 7.5, and Triton needs 8.0 for torch.bfloat16"),
        ((6, 1), torch.float32, r"capability is 6.1, and Triton needs 7.0 for torch.float32"),
        ((9, 0), torch.float8_e5m2, "no kernels for torch.float8_e5m2"),
    ):
        monkeypatch.setattr(triton, "_capability", {x.device: capability})
        reason = missing_for(x.to(dtype))
        assert reason is None if words is None else words in str(reason)
    monkeypatch.setattr(triton, "_is_installed", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert missing_for(x) == "triton is not installed"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_traced_program_passes_cuda_maps_on_as_they_are(dtype):
    """Also where it is traced without a GPU: nothing of the graph depends on one."""
    with FakeTensorMode():
        x = torch.empty(2, 4, 9, 8, dtype=dtype, device="cuda")
        x = x.contiguous(memory_format=torch.channels_last)
        y = soft_pool2d(x, 3, stride=2, padding=1)
        # Not through autograd, which wants a device.
        sent = torch.ops.sparsight.soft_pool_backward(y, x, *NUMBERS, False)
    assert (y.shape, y.dtype, y.device.type) == ((2, 4, 5, 4), dtype, "cuda")
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert (sent.shape, sent.dtype, sent.stride()) == (x.shape, dtype, x.stride())


def test_a_traced_program_assembles_cuda_maps_without_a_gpu():
    with FakeTensorMode():
        maps = torch.empty(2, 9, 6, 7, dtype=torch.bfloat16, device="cuda")
        windows = torch.empty(5, 3, dtype=torch.int64, device="cuda")
        made = assemble_windows(maps, windows, size=4)
        sent = torch.ops.sparsight.assemble_windows_backward(
            made, windows, [2, 9, 6, 7], True, False
        )
    assert (made.shape, made.dtype, made.device.type) == ((5, 4, 4), maps.dtype, "cuda")
    assert (sent.shape, sent.dtype, sent.device.type) == (maps.shape, maps.dtype, "cuda")
    assert sent.is_contiguous(memory_format=torch.channels_last)
