"""For all tests: one torch thread, unless a test asks for more.

On a shared machine torch's spinning pool makes tiny operators hundreds of times slower.
"""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
