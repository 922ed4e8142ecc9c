"""What a sampled model is charged for computing: a fixed price, or one that finds a budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsight.nn.objective import sampling_loss
from sparsight.nn.record import SamplingRecord

ShareWeights = Literal["macs", "published", "uniform"]


def check_budget(budget: float, *, name: str = "budget") -> float:
    """Return `budget` if it is a share of the dense MACs, in (0, 1].

    Raises:
        ValueError: outside (0, 1].
    """
    if not 0.0 < budget <= 1.0:
        raise ValueError(
            f"{name}: budget={budget}; a share of the dense model's MACs in (0, 1] is required; "
            "pass 0.5 for half of them, or leave it out to train the dense model."
        )
    return budget


class SamplingPrice(nn.Module):
    """A fixed price on computing: `weight * expected share`, the published objective.

    Args:
        weight: price of computing everything, in units of the task loss; published values are .05
            to .3 for segmentation, .02 to .2 for detection, .01 and .015 for classification.
        weights: what the share is a mean of, see `sparsight.sampling_loss`: "macs" (default) is the
            share of the whole model's MACs, "published" the published code's mean of
            probabilities, "uniform" the plain mean over the masks.
    """

    def __init__(self, weight: float, *, weights: ShareWeights = "macs") -> None:
        super().__init__()
        self.weight = weight
        self.weights: ShareWeights = weights

    def expected_share(self, record: SamplingRecord, *, total_macs: int) -> Tensor:
        """Return what the price is charged on, a scalar in [0, 1], for the decisions of a step.

        Args:
            record: of the step's forward.
            total_macs: dense MACs of the whole model for the step's batch.
        """
        if self.weights == "macs":
            return sampling_loss(record, total_macs=total_macs)
        return sampling_loss(record, weights=self.weights)

    def forward(self, expected_share: Tensor, *, progress: float) -> Tensor:
        """Return the price of `expected_share`, a scalar in [0, 1]; `progress` plays no part."""
        return self.weight * expected_share

    def update(self, expected_share: float, *, progress: float, total_steps: int) -> None:
        """Nothing to learn: the price is fixed."""

    def calibrate(self, measured_share: float, expected_share: float) -> None:
        """Nothing to calibrate: no budget was asked for."""


class BudgetController(nn.Module):
    """A price on computing that rises until the model stays within its budget.

    An augmented Lagrangian on `error = expected share - target`: the loss is `multiplier * error +
    gain / 2 * error^2` and after each optimiser step `multiplier += gain * error / settling steps`
    (dual ascent). The target falls linearly from 1 to the budget over the first part of the run, so
    that training is not shocked. The expected share is smooth and differentiable but leaves out the
    grid of forced samples, the sampler heads and the interpolation; `calibrate` compares it with a
    measured share and moves the target by the difference. The multiplier may go below zero: a model
    that computes less than it was granted is paid for computing more.

    Args:
        budget: share of the dense model's MACs in (0, 1], everything counted.
        ramp: share of the run over which the target falls from 1 to the budget.
        gain: weight of the squared error; 20 makes an error of 0.02 weigh 0.4 in the gradient, more
            than the cross-entropy of a fitted segmentation model weighs against the share.
        settling: share of the run over which the multiplier takes over a standing error.

    State: `multiplier` and `offset` are buffers, saved and restored with the weights.

    Source: the method of multipliers, Bertsekas, "Constrained Optimization and Lagrange Multiplier
    Methods", 1982, chapter 2. The sampling paper has a fixed weight instead (`SamplingPrice`).
    """

    multiplier: Tensor
    offset: Tensor

    def __init__(
        self, budget: float, *, ramp: float = 0.3, gain: float = 20.0, settling: float = 0.1
    ) -> None:
        super().__init__()
        self.budget = check_budget(budget, name="BudgetController")
        self.ramp = ramp
        self.gain = gain
        self.settling = settling
        self.register_buffer("multiplier", torch.zeros(()))
        self.register_buffer("offset", torch.zeros(()))

    def expected_share(self, record: SamplingRecord, *, total_macs: int) -> Tensor:
        """Return the expected share of the dense MACs; arguments as for `SamplingPrice`."""
        return sampling_loss(record, total_macs=total_macs)

    def target(self, progress: float) -> float:
        """Return the expected share to aim for, at `progress` in [0, 1] of the run."""
        done = min(1.0, progress / self.ramp) if self.ramp > 0 else 1.0
        return max(0.0, 1.0 + done * (self.budget - float(self.offset) - 1.0))

    def forward(self, expected_share: Tensor, *, progress: float) -> Tensor:
        """Return the scalar to add to the task loss.

        Args:
            expected_share: scalar in [0, 1], `sparsight.sampling_loss(record, total_macs=...)`.
            progress: share of the run that is done, in [0, 1].

        Gradient: through `expected_share`.
        """
        error = expected_share - self.target(progress)
        return self.multiplier.detach().clone() * error + 0.5 * self.gain * error.square()

    def update(self, expected_share: float, *, progress: float, total_steps: int) -> None:
        """Move the multiplier by one step of dual ascent; call once per optimiser step.

        Nothing moves while the target falls: the share lags behind it, and a multiplier that took
        the lag for a standing error would overshoot the budget afterwards.
        """
        if progress < self.ramp:
            return
        settling_steps = max(1.0, self.settling * total_steps)
        self.multiplier += self.gain * (expected_share - self.target(progress)) / settling_steps

    def calibrate(self, measured_share: float, expected_share: float) -> None:
        """Take `measured_share - expected_share` as what the expected share leaves out.

        Args:
            measured_share: `count_macs(model, x).total / .dense` in eval mode.
            expected_share: what the objective saw lately in training.
        """
        self.offset.fill_(measured_share - expected_share)


@torch.no_grad()
def settle_on_budget(
    model: nn.Module,
    measure: Callable[[], float],
    budget: float,
    *,
    tolerance: float = 0.003,
    max_shift: float = 8.0,
) -> tuple[float, float]:
    """Shift every sampler's level by one common number until the measured share meets the budget.

    The level of a sampler is its head's bias, that of a ReLU gate its norm's.

    Training leaves the share within a few per cent; this takes away the rest. The share rises with
    the shift because the sampling noise is a function of the seed only, so bisection finds it.

    Args:
        model: a sparsified model; changed in place.
        measure: returns the measured share of the dense MACs on some fixed images.
        budget: the share to meet, in (0, 1].
        tolerance: largest accepted distance to the budget, as a share of the dense MACs.
        max_shift: largest shift of the logits that is tried, either way.

    Returns:
        The shift in logits and the share that is then measured. Where no shift within `max_shift`
        meets the budget (heads and ungated layers alone may exceed it), the nearest end.

    Cost: about ten calls of `measure`.
    """
    levels = sampler_levels(model)
    applied = 0.0

    def share_at(shift: float) -> float:
        nonlocal applied
        for level in levels:
            level += shift - applied
        applied = shift
        return measure()

    share = share_at(0.0)
    low, high = (-max_shift, 0.0) if share > budget else (0.0, max_shift)
    for _ in range(12):
        if abs(share - budget) <= tolerance:
            break
        if share > budget:
            high = applied
        else:
            low = applied
        share = share_at(0.5 * (low + high))
    return applied, share


def sampler_levels(model: nn.Module) -> list[Tensor]:
    """Return what moves the density of each sampler as a whole; those that learn nothing have none.

    Args:
        model: a sparsified model.
    """
    found: dict[int, Tensor] = {}
    for owner in model.modules():
        named = getattr(owner, "samplers_named", None)
        for _, sampler in named() if named is not None else ():
            level = getattr(sampler, "level", None)
            if level is not None:
                found[id(level)] = level
    return list(found.values())


def distillation(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return the Kullback-Leibler divergence of the student's classes from the teacher's.

    Args:
        student: (B, K, ...) logits.
        teacher: logits of the same shape; no gradient flows to them.
        temperature: both are divided by it and the result is multiplied by its square, so that the
            gradient keeps its size; 1 as default.

    Returns:
        Scalar, the mean over positions; 0 where both agree.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv
    1503.02531, section 2.
    """
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher.detach() / temperature, dim=1)
    divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(1)
    return temperature**2 * divergence.mean()
