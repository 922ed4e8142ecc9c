"""What is compared, in which order, and how it is summed up; never how long something takes."""

import pytest
import torch
from torch import nn

from sparsight.measure import latency as latency_module
from sparsight.measure import measure_latency


class Clock:
    """A clock that only moves when a candidate runs."""

    def __init__(self):
        self.now = 0.0

    def candidate(self, name, calls, durations_ms):
        durations = iter(durations_ms)

        def run(*args):
            calls.append((name, args, torch.is_inference_mode_enabled()))
            self.now += next(durations) / 1e3

        return run


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(latency_module.time, "perf_counter", lambda: clock.now)
    return clock


def test_candidates_take_turns_in_inference_mode(clock):
    calls = []
    candidates = {name: clock.candidate(name, calls, [1.0] * 6) for name in "AB"}
    comparison = measure_latency(candidates, "x", 2, repeats=4, warmup=1)
    assert [name for name, _, _ in calls] == list("AB" + "AB" + "BA" + "AB" + "BA")
    assert all(args == ("x", 2) and is_inference for _, args, is_inference in calls)
    assert [row.num_samples for row in comparison.rows] == [4, 4]


def test_median_spread_and_ratio(clock):
    calls = []
    candidates = {
        "dense": clock.candidate("dense", calls, [900.0, 10.0, 20.0, 30.0, 40.0, 500.0]),
        "ours": clock.candidate("ours", calls, [900.0, 5.0, 5.0, 15.0, 15.0, 25.0]),
    }
    comparison = measure_latency(candidates, repeats=5, warmup=1)
    dense, ours = comparison["dense"], comparison["ours"]
    assert dense.latency_ms == pytest.approx(30)
    assert dense.iqr_ms == pytest.approx(20)
    assert dense.fastest_ms == pytest.approx(10)
    assert ours.latency_ms == pytest.approx(15)
    assert (dense.ratio, ours.ratio) == (1.0, pytest.approx(0.5))
    text = str(comparison).splitlines()
    assert text[1].split() == ["dense", "30.000", "20.000", "10.000", "5", "1.000"]
    assert text[-1] == f"cpu, {torch.get_num_threads()} threads"
    with pytest.raises(KeyError):
        comparison["theirs"]


def test_min_time_goes_on_until_every_candidate_had_it(clock):
    calls = []
    candidates = {
        "slow": clock.candidate("slow", calls, [10.0] * 100),
        "fast": clock.candidate("fast", calls, [2.0] * 100),
    }
    comparison = measure_latency(candidates, repeats=2, warmup=0, min_time_s=0.0195)
    assert [row.num_samples for row in comparison.rows] == [10, 10]


def test_number_of_samples_may_follow_from_the_warm_up_and_is_spread_evenly(clock):
    calls = []
    candidates = {
        "slow": clock.candidate("slow", calls, [90.0, 30.0] + [30.0] * 2),
        "fast": clock.candidate("fast", calls, [9.0, 10.0] + [10.0] * 6),
    }
    # The fastest of the warm-up: 30 ms and 9 ms.
    comparison = measure_latency(candidates, repeats=lambda ms: 2 if ms > 20 else 6, warmup=2)
    assert [row.num_samples for row in comparison.rows] == [2, 6]
    # Rounds 3 and 6 of six; the sixth runs backwards.
    names = [name for name, *_ in calls[4:]]
    assert names == ["fast", "fast", "slow", "fast", "fast", "fast", "fast", "slow"]


def test_repeats_from_the_warm_up_need_one():
    with pytest.raises(ValueError, match=r"measure_latency: repeats .* warmup=0 .* required; pass"):
        measure_latency(torch.sin, torch.zeros(1), repeats=lambda ms: 3, warmup=0)


def test_lead_in_calls_precede_every_sample_and_are_not_counted(clock):
    calls = []
    # Warm-up, then twice: two lead-in calls and the sample.
    candidate = clock.candidate("A", calls, [9.0, 9.0, 9.0, 1.0, 9.0, 9.0, 3.0])
    comparison = measure_latency({"A": candidate}, repeats=2, warmup=1, lead_in=2)
    assert len(calls) == 7
    assert comparison["A"].num_samples == 2
    assert comparison["A"].latency_ms == pytest.approx(2)


def test_rest_precedes_the_lead_in_of_every_turn(clock, monkeypatch):
    events = []
    run = clock.candidate("", [], [1.0] * 4)
    monkeypatch.setattr(latency_module.time, "sleep", events.append)
    candidates = {
        "A": lambda: (events.append("A"), run()),
        "B": lambda: (events.append("B"), run()),
    }
    measure_latency(candidates, repeats=1, warmup=0, lead_in=1, rest_s=0.25)
    assert events == [0.25, "A", "A", 0.25, "B", "B"]


def test_a_single_callable(clock):
    def candidate():
        clock.now += 0.001

    comparison = measure_latency(candidate, repeats=1)
    assert [(row.name, row.ratio, row.iqr_ms) for row in comparison.rows] == [("candidate", 1, 0)]


@pytest.mark.parametrize(
    ("candidates", "options"),
    [
        ({}, {}),
        ({"a": print}, {"repeats": 0}),
        ({"a": print}, {"warmup": -1}),
        ({"a": print}, {"lead_in": -1}),
        ({"a": print}, {"rest_s": -0.1}),
    ],
)
def test_nothing_to_measure_is_refused(candidates, options):
    with pytest.raises(ValueError, match=r"measure_latency: got .* required; name what to measure"):
        measure_latency(candidates, **options)


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"candidate 'ours'\): the model is in training mode"):
        measure_latency({"sine": torch.sin, "ours": nn.Linear(2, 2)}, torch.zeros(2))
