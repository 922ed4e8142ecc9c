"""One classification run from its flags to its score: what the recipes have in common."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Subset

from sparsight.compress import remove_zero_filters
from sparsight.measure import count_macs
from sparsight.nn.budget import settle_on_budget
from sparsight.train.architecture import Architecture, build_dense, pruned_architecture
from sparsight.train.checkpoint import save_checkpoint, write_atomically
from sparsight.train.classification_task import ClassificationTask
from sparsight.train.data.augment import SeededView
from sparsight.train.evaluate import measured_share
from sparsight.train.evaluate_classification import score_classification
from sparsight.train.filter_pruning import plan_filter_pruning
from sparsight.train.initial_weights import initial_network, with_widths_of
from sparsight.train.recipe import Recipe
from sparsight.train.sampling import (
    ClassificationMethod,
    Plan,
    Sampling,
    ShareWeights,
    plan,
)

_NUM_SETTLING_IMAGES = 512


def run_classification(
    recipe: Recipe,
    *,
    name: str,
    dense: Architecture,
    sampling: Sampling,
    method: ClassificationMethod,
    budget: float | None,
    sampling_weight: float | None,
    weights: ShareWeights,
    filter_ratio: float | None,
    filter_norm_ratio: float,
    init: str | None,
    teacher: str | None,
    teacher_weight: float,
    teacher_temperature: float,
    lr: float,
    weight_decay: float,
    resume: bool,
) -> dict[str, Any]:
    """Train, settle on the budget, save, and score on the validation images.

    Args:
        recipe: data, transforms and length of the run.
        name: of the run, for the result.
        dense: architecture of the dense model at full size.
        sampling: how it would be converted.
        method: the paper's, or a baseline that keeps the size of the images; see `plan`.
        budget: share of the dense MACs.
        sampling_weight: fixed price instead.
        weights: what the fixed price is charged on.
        filter_ratio: of the methods "sfp" and "fpgm", see `plan_filter_pruning`.
        filter_norm_ratio: of "fpgm".
        init: weights to start from, see `initial_network`; of a pruned network the widths too.
        teacher: weights of a dense network to learn from; None for the labels alone.
        teacher_weight: see `ClassificationTask`.
        teacher_temperature: see `ClassificationTask`.
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
    if method == "resized":
        raise ValueError(
            f"{name}: method='resized'; the transforms of this recipe fix the size of the images; "
            "pass --size, with a dense model, instead."
        )
    full, dense = dense, with_widths_of(dense, init)
    prunes = method in ("sfp", "fpgm")
    if (prunes and sampling_weight is not None) or (not prunes and filter_ratio is not None):
        raise ValueError(
            f"{name}: method={method!r} with sampling_weight={sampling_weight} and "
            f"filter_ratio={filter_ratio}; what is pruned has no price, and what is sampled no "
            "filters to choose; drop one of them."
        )
    if method == "sfp" or method == "fpgm":
        planned = Plan(sampling=None, objective=None, size=dense.size, settles=False)
    else:
        planned = plan(
            method=method,
            sampling=sampling,
            size=dense.size,
            budget=budget,
            sampling_weight=sampling_weight,
            weights=weights,
            dense=lambda: build_dense(dense),
        )
    architecture = dataclasses.replace(dense, sampling=planned.sampling)
    L.seed_everything(recipe.seed, verbose=False)
    network = initial_network(architecture, init)
    task = ClassificationTask(
        network,
        architecture,
        objective=planned.objective,
        teacher=None if teacher is None else initial_network(full, teacher),
        teacher_weight=teacher_weight,
        teacher_temperature=teacher_temperature,
        lr=lr,
        weight_decay=weight_decay,
    )
    example = torch.zeros(1, 3, *dense.size)
    if method == "sfp" or method == "fpgm":
        pruning = plan_filter_pruning(
            method,
            network,
            example,
            ratio=filter_ratio,
            norm_ratio=filter_norm_ratio,
            budget=budget,
        )
        recipe = dataclasses.replace(recipe, callbacks=[*recipe.callbacks, pruning])
    if not recipe.fit(task, resume=resume):
        return {}

    network.cpu().eval()
    result: dict[str, Any] = {
        "task": name,
        "seed": recipe.seed,
        "epochs": recipe.epochs,
        "method": method,
        "budget": budget,
    }
    if planned.settles:
        assert budget is not None
        # On training images: the validation images are for the score alone.
        view = SeededView(recipe.train_data, recipe.val_transform)
        indices = torch.linspace(0, len(view) - 1, min(_NUM_SETTLING_IMAGES, len(view))).int()
        loader = DataLoader(Subset(view, indices.tolist()), batch_size=recipe.batch_size)
        batches = [images for images, _ in loader]
        shift, share = settle_on_budget(network, lambda: measured_share(network, batches), budget)
        result |= {"settling_shift": shift, "settled_share": share}
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
