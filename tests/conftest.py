"""For all tests: one torch thread, unless a test asks for more.

On a shared machine torch's spinning pool makes tiny operators hundreds of times slower.
"""

import sys
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """What one test compiled does not count towards the recompilation limit of the next."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
