"""One classification run from its flags to its score: what the recipes have in common."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import lightning as L
import torch

from sparsight.compress import remove_zero_filters
from sparsight.measure import count_macs
from sparsight.train.architecture import Architecture, build_dense, pruned_architecture
from sparsight.train.checkpoint import save_checkpoint, write_atomically
from sparsight.train.classification_task import ClassificationTask
from sparsight.train.distillation import Distillation
from sparsight.train.evaluate_classification import score_classification
from sparsight.train.filter_pruning import plan_filter_pruning
from sparsight.train.initial_weights import initial_network, with_widths_of
from sparsight.train.recipe import Recipe
from sparsight.train.sampling_flags import SamplingFlags
from sparsight.train.settling import measure_norms_again, settle

_NUM_SETTLING_IMAGES = 512
_NUM_NORM_IMAGES = 4096


def run_classification(
    recipe: Recipe,
    *,
    name: str,
    dense: Architecture,
    flags: SamplingFlags,
    filter_ratio: float | None,
    filter_norm_ratio: float,
    init: str | None,
    distillation: Distillation,
    lr: float,
    weight_decay: float,
    resume: bool,
) -> dict[str, Any]:
    """Train, settle on the budget, save, and score on the validation images.

    Args:
        recipe: data, transforms and length of the run.
        name: of the run, for the result.
        dense: architecture of the dense model at full size.
        flags: what it is to compute, and at what price; of the methods one that keeps the size of
            the images.
        filter_ratio: of the methods "sfp" and "fpgm", see `plan_filter_pruning`.
        filter_norm_ratio: of "fpgm".
        init: weights to start from, see `initial_network`; of a pruned network the widths too.
        distillation: whom the network learns from beside the labels, and how.
        lr: peak learning rate.
        weight_decay: of weights of convolutions.
        resume: go on from the folder's last.ckpt.

    Returns:
        What is also written to `recipe.out`/result.json: score, MACs, share, architecture. Empty
        in all processes of a distributed run but the first, which alone does what follows training.

    Raises:
        ValueError: the flags contradict each other, or weights are of another architecture.
        ImportError: filters are to be pruned without the extra `sparsight[compress]`.
        FileNotFoundError: a file of weights is missing.
    """
    if flags.method == "resized":
        raise ValueError(
            f"{name}: method='resized'; the transforms of this recipe fix the size of the images; "
            "pass --size, with a dense model, instead."
        )
    full, dense = dense, with_widths_of(dense, init)
    prunes = flags.method in ("sfp", "fpgm")
    if (prunes and flags.sampling_weight is not None) or (not prunes and filter_ratio is not None):
        raise ValueError(
            f"{name}: method={flags.method!r} with sampling_weight={flags.sampling_weight} and "
            f"filter_ratio={filter_ratio}; what is pruned has no price, and what is sampled no "
            "filters to choose; drop one of them."
        )
    planned = flags.plan(size=dense.size, dense=lambda: build_dense(dense))
    architecture = dataclasses.replace(dense, sampling=planned.sampling)
    L.seed_everything(recipe.seed, verbose=False)
    network = initial_network(architecture, init)
    task = ClassificationTask(
        network,
        architecture,
        objective=planned.objective,
        distiller=distillation.distiller(network, full),
        lr=lr,
        weight_decay=weight_decay,
    )
    example = torch.zeros(1, 3, *dense.size)
    if flags.method == "sfp" or flags.method == "fpgm":
        pruning = plan_filter_pruning(
            flags.method,
            network,
            example,
            ratio=filter_ratio,
            norm_ratio=filter_norm_ratio,
            budget=flags.budget,
        )
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
    }
    measure_norms_again(network, recipe, num_images=_NUM_NORM_IMAGES)
    if planned.settles:
        assert flags.budget is not None
        result |= settle(network, recipe, flags.budget, num_images=_NUM_SETTLING_IMAGES)
    if prunes:
        macs = count_macs(network, example).total
        network = remove_zero_filters(network, example)
        architecture = pruned_architecture(architecture, network)
        assert isinstance(architecture, Architecture)
        result["pruned_share"] = count_macs(network, example).total / macs
    path = recipe.out / "weights.safetensors"
    dataset = getattr(recipe.val_data, "name", None)  # what is drawn has none
    save_checkpoint(path, network, architecture, dataset=dataset)
    scored = score_classification(
        network, recipe.validation_batches(), num_classes=dense.num_classes
    )
    result |= dataclasses.asdict(scored) | {"architecture": architecture.to_json()}
    write_atomically(Path(recipe.out) / "result.json", json.dumps(result, indent=2).encode())
    print(f"{scored}\nweights: {path}")
    return result
