"""Temperature and learning rate as pure functions of the step, and the callback for the first."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L

from sparsight.nn import Sampler

FINAL_TEMPERATURE = 0.03


def published_temperature(step: int, *, rate: float = 0.99998) -> float:
    """Return the temperature of the source's schedule, `rate ** step`.

    Args:
        step: optimiser steps taken so far, from 0.
        rate: factor per step. The default gives 1.0 at step 0 and 0.0297 after the 175,899 steps of
            12 COCO epochs with 8 images a step; it is far too slow for short runs.

    Source: Xie et al., ECCV 2020, arXiv 2003.08866. We count optimiser steps, not forwards, so
    accumulating gradients or recomputing activations does not cool the samplers faster.
    """
    return rate ** _checked(step, "published_temperature")


def geometric_temperature(
    step: int, *, total_steps: int, start: float = 1.0, end: float = FINAL_TEMPERATURE
) -> float:
    """Return the temperature that falls by equal factors from `start` to `end`.

    Args:
        step: optimiser steps taken so far, from 0; later than the last step it stays at `end`.
        total_steps: steps of the whole run, at least 1.
        start: temperature before the first step; 1.0 as published.
        end: temperature of the last step; 0.03, where the published schedule ends and its tests
            run.
    """
    if total_steps < 1:
        raise ValueError(
            f"geometric_temperature: total_steps={total_steps}; at least 1 is required; pass the "
            "steps of the run."
        )
    progress = min(1.0, _checked(step, "geometric_temperature") / max(1, total_steps - 1))
    return start * (end / start) ** progress


def warmup_cosine(step: int, *, total_steps: int, warmup_steps: int) -> float:
    """Return the learning rate's factor: linear warm-up, then a half cosine down to 0.

    Args:
        step: optimiser steps taken so far, from 0.
        total_steps: steps of the whole run.
        warmup_steps: steps until the full learning rate; less than `total_steps`.

    Source: Loshchilov, Hutter, "SGDR", ICLR 2017, arXiv 1608.03983, equation 5 without restarts.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 0.5 * (1 + math.cos(math.pi * progress))


def warmup_steps_down(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int = 500,
    warmup_start: float = 1 / 3,
    milestones: Sequence[float] = (8 / 12, 11 / 12),
    factor: float = 0.1,
) -> float:
    """Return the learning rate's factor: linear warm-up, then a tenth less at each milestone.

    Args:
        step: optimiser steps taken so far, from 0.
        total_steps: steps of the whole run.
        warmup_steps: steps until the full learning rate; 500 as published.
        warmup_start: factor before the first step; 1/3 as published.
        milestones: shares of the run after which the rate falls; as published after epochs 8 and 11
            of 12.
        factor: by which it falls each time; 0.1 as published.

    Source: the detector's schedule of Xie et al., ECCV 2020, arXiv 2003.08866.
    """
    if step < warmup_steps:
        return warmup_start + (1 - warmup_start) * step / warmup_steps
    # Against rounding: 8/12 of 1,200 steps are 800.
    return factor ** sum(step >= round(share * total_steps) for share in milestones)


def _checked(step: int, name: str) -> int:
    if step < 0:
        raise ValueError(
            f"{name}: step={step}; 0 or more is required; pass the optimiser's step count."
        )
    return step


class TemperatureAnnealing(L.Callback):
    """Sets the temperature of every `sparsight.nn.Sampler` before each training batch.

    Stateless: the temperature follows from `trainer.global_step`, so neither resuming nor
    accumulating gradients changes it. Logged as `temperature`.

    Args:
        schedule: optimiser step -> temperature. None: `geometric_temperature` over the first
            `share` of the run's steps.
        share: in (0, 1]; at its end the last temperature is reached, and the rest of the run trains
            with the masks that inference has. Default 1.

    Raises:
        ValueError: `share` is outside (0, 1].
    """

    def __init__(
        self, schedule: Callable[[int], float] | None = None, *, share: float = 1.0
    ) -> None:
        if not 0 < share <= 1:
            raise ValueError(
                f"TemperatureAnnealing: share={share}; the part of the run in which the "
                "temperature falls, in (0, 1], is required; pass 1.0 for the whole run."
            )
        self.schedule = schedule
        self.share = share

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the temperature that belongs to the coming optimiser step."""
        samplers = [module for module in pl_module.modules() if isinstance(module, Sampler)]
        if not samplers:
            return
        step = trainer.global_step
        if self.schedule is not None:
            temperature = self.schedule(step)
        else:
            steps = max(1, round(self.share * int(trainer.estimated_stepping_batches)))
            temperature = geometric_temperature(step, total_steps=steps)
        for sampler in samplers:
            sampler.temperature = temperature
        pl_module.log("temperature", temperature)
