"""A segmentation run from the plan to the result: what every segmentation recipe does."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import lightning as L

from sparsight.train.architecture import Architecture, convert
from sparsight.train.checkpoint import load_checkpoint, save_checkpoint, write_atomically
from sparsight.train.distillation import Distillation
from sparsight.train.evaluate import score
from sparsight.train.filter_pruning import pruning_of, remove_pruned_filters
from sparsight.train.initial_weights import check_one_start, dense_network
from sparsight.train.recipe import Recipe
from sparsight.train.sampling import Plan
from sparsight.train.sampling_flags import SamplingFlags
from sparsight.train.segmentation_choices import Loss, pixel_loss
from sparsight.train.settling import measure_norms_again, settle
from sparsight.train.tasks import SegmentationTask

_NUM_SETTLING_IMAGES = 64
_NUM_NORM_IMAGES = 512


def train_segmentation(
    recipe: Recipe,
    *,
    name: str,
    dense: Architecture,
    planned: Plan,
    flags: SamplingFlags,
    lr: float,
    init: str | None = None,
    backbone_weights: str | None = None,
    distillation: Distillation | None = None,
    loss: Loss = "cross_entropy",
    resume: bool = False,
    details: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train, settle on the budget, save and score.

    Args:
        recipe: data, transforms, schedule and folder; its data sets have `classes` and
            `ignore_index`.
        name: of the task, for the result.
        dense: the dense architecture at its full size.
        planned: what `flags.plan` returned.
        flags: what the network is to compute, and at what price.
        lr: peak learning rate.
        init: checkpoint to start from.
        backbone_weights: of the backbone, where there is no `init`: a file, or the name of weights
            of torchvision, see `sparsight.models.load_backbone_weights`.
        distillation: whom the network learns from beside the annotations, and how; None for those
            alone.
        loss: over the pixels: "cross_entropy", or "bootstrapped", of the worst sixteenth of each
            image.
        resume: go on from the recipe's folder.
        details: further entries of the result.

    Returns:
        What is written to result.json: mIoU, IoU per class, MACs, share, architecture. Empty in
        all processes of a distributed run but the first, which alone does what follows training.

    Raises:
        ValueError: a checkpoint of another architecture, weights that do not fit, both at once, or
            flags that contradict each other.
        ImportError: filters are to be pruned without the extra `sparsight[compress]`.
        FileNotFoundError: a checkpoint, weights, or the state to resume, are missing.
        ConnectionError: torchvision could not fetch the weights.
    """
    check_one_start(f"train_segmentation ({name})", init=init, backbone_weights=backbone_weights)
    data: Any = recipe.val_data
    architecture = dataclasses.replace(dense, size=planned.size, sampling=planned.sampling)
    L.seed_everything(recipe.seed, verbose=False)
    if init is not None:
        network, _ = load_checkpoint(init, expected=architecture)
    else:
        network = convert(dense_network(architecture, backbone_weights), architecture)
    distiller = None if distillation is None else distillation.distiller(network, dense)
    task = SegmentationTask(
        network,
        architecture,
        ignore_index=data.ignore_index,
        pixel_loss=pixel_loss(loss, ignore_index=data.ignore_index),
        objective=planned.objective,
        lr=lr,
        distiller=distiller,
    )
    pruning = pruning_of(flags, network, architecture.size, name=name)
    if pruning is not None:
        recipe = dataclasses.replace(recipe, callbacks=[*recipe.callbacks, pruning])
    if not recipe.fit(task, resume=resume):
        return {}

    network.cpu().eval()
    result: dict[str, Any] = {
        "task": name,
        "seed": recipe.seed,
        "epochs": recipe.epochs,
        "method": flags.method,
        "budget": flags.budget,
        **(details or {}),
    }
    measure_norms_again(network, recipe, num_images=_NUM_NORM_IMAGES)
    if planned.settles:
        assert flags.budget is not None
        result |= settle(network, recipe, flags.budget, num_images=_NUM_SETTLING_IMAGES)
    if pruning is not None:
        network, architecture, share = remove_pruned_filters(network, architecture)
        result["pruned_share"] = share
    weights = recipe.out / "weights.safetensors"
    save_checkpoint(weights, network, architecture, dataset=getattr(data, "name", None))
    scored = score(
        network,
        recipe.validation_batches(),
        ignore_index=data.ignore_index,
        classes=data.classes,
    )
    result |= dataclasses.asdict(scored) | {"architecture": architecture.to_json()}
    write_atomically(recipe.out / "result.json", json.dumps(result, indent=2).encode())
    print(f"{scored}\nweights: {weights}")
    return result
