"""What launchers know of tensors, without a GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it comes with torch's CUDA wheels")

from sparsight.ops.triton.launch import is_int64, launch


def test_which_offsets_need_int64():
    small = torch.empty(2, 3, 4, 5, device="meta")
    assert not is_int64(small)
    many = torch.empty(2**16, 2**15, device="meta")
    assert is_int64(small, many)
    assert not is_int64(torch.empty(2**16, 2**15 - 1, device="meta"))
    # Few elements, far apart; many, all the same.
    assert is_int64(torch.empty_strided((2, 2), (2**31, 1), device="meta"))
    assert is_int64(torch.empty(1, device="meta").expand(2**31))


def test_no_program_runs_for_nothing():
    launch(None, 0, 128, torch.empty(0))
