"""FrozenSampler: its noise is the sampler's, whatever was kept before."""

import threading

import pytest
import torch

from sparsight.nn import Sampler
from sparsight.nn.frozen_sampler import FrozenSampler
from sparsight.nn.noise import sampling_noise


@pytest.mark.parametrize("noise", ["white", "blue", "none"])
def test_the_noise_is_the_samplers(noise):
    sampler = Sampler(4, noise=noise, seed=7, grid_stride=None)
    sampler.layer = 3
    frozen = FrozenSampler(sampler.eval(), inside=True)
    expected = sampling_noise(noise, seed=7, layer=3, batch=2, height=9, width=70)
    assert torch.equal(frozen.noise(2, 9, 70), expected)
    # And what the sampler itself does with it: its mask is the sign of logit plus noise.
    logits = torch.randn(2, 1, 9, 70)
    assert torch.equal(sampler.decide(logits).mask, logits + frozen.noise(2, 9, 70) >= 0)


def test_the_cache_of_noise_is_bounded_and_right_after_eviction():
    frozen = FrozenSampler(Sampler(4).eval(), inside=True)
    sizes = [(1, 5 + i, 6) for i in range(20)]
    first = {size: frozen.noise(*size).clone() for size in sizes}
    assert len(frozen._noise) == 8
    assert frozen.noise(*sizes[-1]) is frozen.noise(*sizes[-1])
    for size in sizes:
        assert torch.equal(frozen.noise(*size), first[size])
    assert len(frozen._noise) == 8


def test_the_cache_of_noise_serves_many_threads():
    frozen = FrozenSampler(Sampler(4).eval(), inside=True)
    sizes = [(1, 3 + i, 4) for i in range(12)]
    expected = {size: frozen._draw(*size) for size in sizes}
    wrong: list[object] = []

    def work(start: int) -> None:
        try:
            for i in range(200):
                size = sizes[(start + 5 * i) % len(sizes)]
                if not torch.equal(frozen.noise(*size), expected[size]):
                    wrong.append(size)
        except Exception as error:  # a thread's error would be printed and lost
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(frozen._noise) <= 8


def test_noise_that_was_kept_is_of_its_seed():
    frozen = FrozenSampler(Sampler(4, seed=7).eval(), inside=True)
    first = frozen.noise(1, 5, 6).clone()
    frozen.seed = 8
    second = frozen.noise(1, 5, 6)
    expected = sampling_noise("white", seed=8, layer=0, batch=1, height=5, width=6)
    assert torch.equal(second, expected) and not torch.equal(second, first)
    frozen.seed = 7
    assert torch.equal(frozen.noise(1, 5, 6), first)
