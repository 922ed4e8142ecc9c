"""What a sampled model is charged for computing: a fixed price, or one that finds a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sparsight.nn.objective import sampling_loss
from sparsight.nn.record import SamplingRecord

ShareWeights = Literal["macs", "published", "uniform"]

_LEAST_SLOPE = 0.02
_NEARLY_DENSE = 0.9
_LARGEST_SHIFT = 0.5


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


@dataclass(frozen=True)
class SharePull:
    """How the expected share of a step answers to a common shift of all levels, in logits.

    Attributes:
        share: expected share of the dense MACs, in [0, 1].
        slope: its derivative by the shift.
        price_slope: the same as autograd sees it. It differs from `slope` for gates, whose gradient
            is that of what they let through.
    """

    share: float
    slope: float
    price_slope: float


@torch.no_grad()
def share_pull(model: nn.Module, record: SamplingRecord, *, total_macs: int) -> SharePull:
    """Return how the expected share of what was recorded answers to a shift of all levels.

    Args:
        model: that was recorded.
        record: of a forward in training mode.
        total_macs: dense MACs of the whole model for its images.
    """
    share = float(sampling_loss(record, total_macs=total_macs))
    slope, price_slope = 0.0, 0.0
    for decision in record.decisions:
        sampler = model.get_submodule(decision.name)
        if getattr(sampler, "level", None) is None:
            continue  # a fixed pattern
        weight = decision.macs / total_macs
        p = decision.probability
        if getattr(sampler, "scales", False):
            # A gate. Its probability is 0 or 1; where it is 1, the price's gradient passes.
            density = float(p.mean())
            slope += weight * density * (1 - density)
            price_slope += weight * density
        else:
            own = float((p * (1 - p)).mean())
            slope += weight * own
            price_slope += weight * own
    return SharePull(share, slope, price_slope)


def mean_pull(pulls: Sequence[SharePull]) -> SharePull:
    """Return the mean over micro-batches or processes; at least one is required."""
    rows = torch.tensor([[p.share, p.slope, p.price_slope] for p in pulls], dtype=torch.float64)
    share, slope, price_slope = rows.mean(0).tolist()
    return SharePull(share, slope, price_slope)


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

    def forward(self, expected_share: Tensor) -> Tensor:
        """Return the price of `expected_share`, a scalar in [0, 1]."""
        return self.weight * expected_share

    def update(self, levels: Sequence[Tensor], pull: SharePull, *, progress: float) -> None:
        """Nothing to learn: the price is fixed."""


class BudgetController(nn.Module):
    """Holds a model to its budget and finds the price of computing; nothing is to be tuned.

    Two things happen at each optimiser step, between backward and step, see :meth:`update`:

    - The **level**, one number added to all logits (see `sampler_levels`), takes a damped Newton
      step on `expected share - target`. It alone keeps the budget.
    - The **price** of a share of MACs decides who computes: the loss holds `multiplier * expected
      share`, and the multiplier follows, as a moving average, the value at which the gradients of
      all levels add up to zero, which is what one more share of MACs lowers the task loss by. At
      this price a sampler's level rises only if a MAC is worth more there than elsewhere. It scales
      with the task loss by itself and is never negative.

    The target falls linearly to the budget over the first part of the run, so that training is not
    shocked; from 1, or from the first step's share where the model starts below, for example from a
    calibrated one. The expected share is smooth and differentiable, but it leaves out the grid of
    forced samples, the sampler heads and the interpolation, and it is that of augmented images
    under the norms of training. `calibrate` compares it with a share measured as at inference and
    moves the target by the difference.

    Args:
        budget: share of the dense model's MACs in (0, 1], everything counted.
        ramp: share of the run over which the target falls to the budget.
        rate: of the Newton step, in (0, 1]; 0.2 leaves a lag of a few steps behind the target.
        memory: of the price's moving average, in [0, 1).

    State: `multiplier`, `offset`, `num_calls` (of `calibrate`) and `start` are buffers, saved and
    restored with the weights.

    Source: ours; gradient projection onto a constraint, Rosen, "The Gradient Projection Method for
    Nonlinear Programming", SIAM Journal 1960, in the one direction of the common level. The
    sampling paper has a fixed weight instead (`SamplingPrice`). A multiplier that integrates the
    error (the method of multipliers) was our first: it lags behind by a tenth of the dense MACs in
    runs of a few hundred steps, as its gain has no measure for the size of the task loss.
    """

    multiplier: Tensor
    offset: Tensor
    num_calls: Tensor
    start: Tensor

    def __init__(
        self, budget: float, *, ramp: float = 0.3, rate: float = 0.2, memory: float = 0.9
    ) -> None:
        super().__init__()
        self.budget = check_budget(budget, name="BudgetController")
        self.ramp = ramp
        self.rate = rate
        self.memory = memory
        self.register_buffer("multiplier", torch.zeros(()))
        self.register_buffer("offset", torch.zeros(()))
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("start", torch.full((), math.nan))

    def expected_share(self, record: SamplingRecord, *, total_macs: int) -> Tensor:
        """Return the expected share of the dense MACs; arguments as for `SamplingPrice`."""
        return sampling_loss(record, total_macs=total_macs)

    def target(self, progress: float) -> float:
        """Return the expected share to aim for, at `progress` in [0, 1] of the run."""
        done = min(1.0, progress / self.ramp) if self.ramp > 0 else 1.0
        end = max(0.0, self.budget - float(self.offset))
        start = 1.0 if math.isnan(float(self.start)) else float(self.start)
        return start + done * (end - start)

    def forward(self, expected_share: Tensor) -> Tensor:
        """Return the scalar to add to the task loss.

        Args:
            expected_share: scalar in [0, 1], `sparsight.sampling_loss(record, total_macs=...)`.

        Gradient: through `expected_share`.
        """
        return self.multiplier.detach().clone() * expected_share

    @torch.no_grad()
    def update(self, levels: Sequence[Tensor], pull: SharePull, *, progress: float) -> None:
        """Move price and levels; call between backward and the optimiser's step.

        Args:
            levels: `sampler_levels(model)`, with the gradients of the step. Changed in place. Those
                without a gradient move with the rest and have no say in the price.
            pull: `share_pull(model, record, total_macs=...)` of the step; over micro-batches and
                processes the mean.
            progress: share of the run that is done, in [0, 1].
        """
        if math.isnan(float(self.start)):
            # A model that was never sampled starts at sigmoid(3): it is taken for a dense one.
            self.start.fill_(1.0 if pull.share > _NEARLY_DENSE else pull.share)
        gradients = [level.grad for level in levels if level.grad is not None]
        if gradients and pull.price_slope > 0:
            total = float(torch.stack([g.double().sum() for g in gradients]).sum())
            if math.isfinite(total):  # a scaler of mixed precision skips such a step
                worth = float(self.multiplier) - total / pull.price_slope
                self.multiplier.lerp_(self.multiplier.new_tensor(max(0.0, worth)), 1 - self.memory)
        error = pull.share - self.target(progress)
        # Far from the target, where the slope is small, a step of the logits is bounded.
        shift = -self.rate * error / max(pull.slope, _LEAST_SLOPE)
        shift = max(-_LARGEST_SHIFT, min(_LARGEST_SHIFT, shift))
        for level in levels:
            level += shift

    def calibrate(
        self, measured_share: float, expected_share: float, *, memory: float = 0.0
    ) -> None:
        """Take `measured_share - expected_share` as what the expected share leaves out.

        Args:
            measured_share: `count_macs(model, x).total / .dense` in eval mode.
            expected_share: what the objective saw in training, with the same weights.
            memory: of a moving average over the calls, in [0, 1), which starts as their plain mean;
                0 takes the last difference as it is. Norms in eval mode run after the weights, and
                at a high learning rate the share swings with them: a single difference is off by
                some hundredths of the dense MACs.
        """
        self.num_calls += 1
        weight = max(1.0 - memory, 1.0 / int(self.num_calls))  # at first the plain mean
        self.offset.lerp_(self.offset.new_tensor(measured_share - expected_share), weight)


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
