import math
from itertools import pairwise

import lightning as L
import pytest

from sparsight.nn import Sampler
from sparsight.train.annealing import (
    TemperatureAnnealing,
    geometric_temperature,
    published_temperature,
    warmup_cosine,
    warmup_steps_down,
)


def test_the_published_schedule_ends_where_the_paper_ends():
    """12 epochs of COCO, 117,266 images, 8 a step: 175,899 steps, T = 0.0297."""
    assert published_temperature(0) == 1.0
    assert published_temperature(175_899) == pytest.approx(0.0297, abs=1e-4)


def test_the_geometric_schedule_goes_from_start_to_end_by_equal_factors():
    values = [geometric_temperature(step, total_steps=11) for step in range(11)]
    assert values[0] == 1.0
    assert values[-1] == pytest.approx(0.03)
    factors = [b / a for a, b in pairwise(values)]
    assert factors == pytest.approx([factors[0]] * 10)


def test_after_the_last_step_the_temperature_stays():
    assert geometric_temperature(500, total_steps=11) == pytest.approx(0.03)


def test_one_step_is_annealing_at_step_zero():
    assert geometric_temperature(0, total_steps=1) == 1.0


@pytest.mark.parametrize("schedule", [published_temperature, geometric_temperature])
def test_a_negative_step_is_refused(schedule):
    keywords = {"total_steps": 5} if schedule is geometric_temperature else {}
    with pytest.raises(ValueError, match=rf"{schedule.__name__}: step=-1; 0 or more is required"):
        schedule(-1, **keywords)


def test_no_steps_at_all_are_refused():
    with pytest.raises(ValueError, match=r"total_steps=0; at least 1 is required"):
        geometric_temperature(0, total_steps=0)


def test_the_learning_rate_rises_then_falls_to_zero():
    factors = [warmup_cosine(s, total_steps=100, warmup_steps=10) for s in range(101)]
    assert 0 < factors[0] < factors[9] < factors[10] == 1.0
    assert all(b < a for a, b in pairwise(factors[10:]))
    assert factors[55] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.5)))
    assert factors[100] == pytest.approx(0.0)


def test_annealing_may_end_before_the_run_does():
    class Trainer:
        estimated_stepping_batches = 100
        global_step = 0

    module = L.LightningModule()
    module.sampler = Sampler(4)
    module.log = lambda *args: None
    callback = TemperatureAnnealing(share=0.6)
    seen = []
    for Trainer.global_step in (0, 30, 59, 60, 99):
        callback.on_train_batch_start(Trainer(), module, None, 0)
        seen.append(module.sampler.temperature)
    assert seen[0] == 1.0 and seen[2:] == pytest.approx([0.03] * 3)
    assert seen[1] == geometric_temperature(30, total_steps=60)


@pytest.mark.parametrize("share", [0.0, 1.2])
def test_a_part_that_is_no_part_is_refused(share):
    with pytest.raises(ValueError, match=r"TemperatureAnnealing: share=.*\(0, 1\]"):
        TemperatureAnnealing(share=share)


def test_the_detectors_rate_rises_from_a_third_and_falls_twice():
    """12 epochs of 100 steps: down after the 8th and the 11th."""
    values = [warmup_steps_down(step, total_steps=1200) for step in range(1200)]
    assert values[0] == pytest.approx(1 / 3)
    assert values[250] == pytest.approx(2 / 3)
    assert values[500:800] == [1.0] * 300
    assert values[800:1100] == pytest.approx([0.1] * 300)
    assert values[1100:] == pytest.approx([0.01] * 100)
    assert max(b - a for a, b in pairwise(values)) == pytest.approx(2 / 3 / 500)
