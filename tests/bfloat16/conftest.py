"""The fixtures of the ops tests, and the CPU that these need."""

import pytest

from sparsight.ops import cpu

from .rounding import shared

draw, layouts, is_intact = shared.draw, shared.layouts, shared.is_intact
rbf_log_kernel = shared.rbf_log_kernel


@pytest.fixture(autouse=True)
def needs_bfloat16() -> None:
    if not cpu.has_bfloat16():
        pytest.skip("this CPU or this build has no AVX-512 BF16 instructions")
