"""Flags become a plan as if their values had been passed to it."""

import pytest

from sparsight.train.hardware import Hardware
from sparsight.train.sampling import Sampling
from sparsight.train.sampling_flags import sampling_flags


def no_dense():
    raise AssertionError("nothing has to be counted")


def test_the_flags_are_what_is_planned_and_the_rest_is_the_hardware():
    flags, hardware = sampling_flags(
        budget=0.4,
        layout="a",
        noise="blue",
        grid_stride=None,
        interpolation="conv",
        eps=1e-5,
        straight_through=True,
        anneal_share=0.6,
        devices=2,
        accelerator="cpu",
    )
    planned = flags.plan(size=(32, 48), dense=no_dense)
    assert planned.sampling == Sampling(
        layout="a",
        noise="blue",
        grid_stride=None,
        interpolation="conv",
        eps=1e-5,
        is_straight_through=True,
    )
    assert planned.settles and planned.size == (32, 48)
    assert planned.objective.budget == flags.budget == 0.4
    assert (flags.method, flags.anneal_share) == ("sampled", 0.6)
    assert hardware == Hardware(devices=2, accelerator="cpu")


def test_a_fixed_price_is_charged_on_what_was_asked_for():
    flags, _ = sampling_flags(sampling_weight=0.1, weights="published")
    objective = flags.plan(size=(32, 48), dense=no_dense).objective
    assert (objective.weight, objective.weights) == (0.1, "published")


def test_without_a_budget_and_a_price_the_model_is_dense():
    flags, _ = sampling_flags()
    assert flags.plan(size=(32, 48), dense=no_dense).sampling is None


def test_flags_that_contradict_each_other_are_refused():
    flags, _ = sampling_flags(budget=0.5, sampling_weight=0.1)
    with pytest.raises(ValueError, match=r"were both given"):
        flags.plan(size=(32, 48), dense=no_dense)
    with pytest.raises(ValueError, match=r"Hardware: devices=0"):
        sampling_flags(devices=0)
