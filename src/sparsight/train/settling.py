"""The last step of a run with a budget: the samplers' levels, shifted until it is met."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from sparsight.nn.budget import settle_on_budget
from sparsight.train.evaluate import measured_share
from sparsight.train.recipe import Recipe


def settle(
    network: nn.Module,
    recipe: Recipe,
    budget: float,
    *,
    num_images: int,
    measure: Callable[[nn.Module, Iterable[Any]], float] = measured_share,
) -> dict[str, float]:
    """Shift the levels of a trained network onto its budget, and return what a result says of that.

    On training images with the validation's transform: the validation images are for the score
    alone. What they need may differ from the budget by as much as they differ from the others.

    Args:
        network: in eval mode, on the CPU; its samplers' levels are changed in place.
        recipe: of the run.
        budget: share of the dense MACs to meet, in (0, 1].
        num_images: about so many are measured on, see `Recipe.measured_batches`.
        measure: share of the dense MACs that a model computes for some batches of images.

    Returns:
        `settling_shift` in logits and `settled_share`, what is measured then.

    Cost: about ten passes over the images.
    """
    batches = [images for images, _ in recipe.measured_batches(num_images)]
    shift, share = settle_on_budget(network, lambda: measure(network, batches), budget)
    return {"settling_shift": shift, "settled_share": share}
