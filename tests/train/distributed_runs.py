"""A recipe for `test_processes.py`: some runs, in one process or in two, and what each process saw.

sparsight train distributed_runs.py --out OUT --batch-size 2 --devices 2 --accelerator cpu
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from sparsight.compress import norms_behind
from sparsight.nn.budget import BudgetController
from sparsight.train import detection_task
from sparsight.train.architecture import (
    Architecture,
    DetectorArchitecture,
    Sampling,
    build_dense,
    convert,
)
from sparsight.train.classification_task import ClassificationTask
from sparsight.train.data import (
    Coco,
    SyntheticClasses,
    SyntheticScenes,
    cifar10_evaluation_transform,
    cifar10_training_transform,
    collate_detection,
    detection_transform,
    evaluation_transform,
    training_transform,
)
from sparsight.train.detection_task import DetectionTask
from sparsight.train.filter_pruning import FilterPruning
from sparsight.train.hardware import Hardware
from sparsight.train.recipe import Recipe
from sparsight.train.tasks import SegmentationTask

SIZE = (32, 48)


class FrozenNorms(L.Callback):
    """Batch norms are constants: those in training mode see the images of their process only."""

    def on_train_epoch_start(self, trainer, pl_module):
        for module in pl_module.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()


class Watch(L.Callback):
    """Keeps what every step had, noise drawn where the samplers draw theirs, and a norm's mean."""

    def __init__(self):
        self.seen = {"rank": 0, "loss": [], "multiplier": [], "noise": []}
        self.seen |= {"own_mean": [], "validated_mean": []}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with torch.random.fork_rng(devices=[]):
            self.seen["noise"].append(torch.rand(4).tolist())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen["rank"] = trainer.global_rank
        self.seen["loss"].append(float(outputs["loss"]))
        self.seen["multiplier"].append(float(pl_module.objective.multiplier))
        if trainer.is_last_batch:
            self.seen["own_mean"].append(first_mean(pl_module))

    def on_validation_end(self, trainer, pl_module):
        self.seen["validated_mean"].append(first_mean(pl_module))

    def on_train_end(self, trainer, pl_module):
        metrics = trainer.callback_metrics
        self.seen["metrics"] = {name: float(value) for name, value in metrics.items()}


def first_mean(module):
    return next(m for m in module.modules() if isinstance(m, nn.BatchNorm2d)).running_mean.tolist()


def segmentation(out, hardware, batch_size, *, noise, norms_are_frozen):
    """Three epochs of two steps; 5 validation images, so that the last batch is not full."""
    architecture = Architecture(
        num_classes=6, fpn_channels=8, head_channels=8, size=SIZE, sampling=Sampling(noise=noise)
    )
    torch.manual_seed(0)
    network = convert(build_dense(architecture), architecture)
    task = SegmentationTask(
        network, architecture, ignore_index=255, objective=BudgetController(0.6)
    )
    watch = Watch()
    recipe = Recipe(
        train_data=SyntheticScenes(10, size=SIZE, seed=1),
        train_transform=training_transform(SIZE, ignore_index=255),
        val_data=SyntheticScenes(5, size=SIZE, seed=2),
        val_transform=evaluation_transform(SIZE),
        out=out,
        epochs=3,
        batch_size=batch_size,
        shows_progress=False,
        callbacks=[watch, *([FrozenNorms()] if norms_are_frozen else [])],
        hardware=hardware,
    )
    goes_on = recipe.fit(task)
    return {
        **watch.seen,
        "goes_on": goes_on,
        "is_alone": not torch.distributed.is_initialized(),
        "state": task.state_dict(),
    }


def pruned_filters(out, hardware, batch_size, *, is_soft):
    """Two epochs of two steps; a third of the filters is chosen before, and after each of them."""
    architecture = Architecture(
        model="resnet_cifar",
        num_classes=4,
        backbone="resnet8",
        fpn_channels=None,
        head_channels=None,
        size=(32, 32),
    )
    torch.manual_seed(0)
    network = build_dense(architecture)
    task = ClassificationTask(network, architecture, lr=0.3)  # zeros outgrow others
    ratio = {"norm_ratio": 0.3} if is_soft else {"norm_ratio": 0.1, "distance_ratio": 0.2}
    norms = norms_behind(network.eval(), torch.zeros(1, 3, 32, 32))
    pruning = FilterPruning(**ratio, is_soft=is_soft, norms=norms)
    network.train()
    history = []
    choose = pruning.choose

    def keeping(model, **how):
        choose(model, **how)
        history.append({name: chosen.tolist() for name, chosen in pruning.chosen.items()})

    pruning.choose = keeping
    recipe = Recipe(
        train_data=SyntheticClasses(8, size=(32, 32), num_classes=4, seed=1),
        train_transform=cifar10_training_transform(),
        val_data=SyntheticClasses(4, size=(32, 32), num_classes=4, seed=2),
        val_transform=cifar10_evaluation_transform(),
        out=out,
        epochs=2,
        batch_size=batch_size,
        shows_progress=False,
        callbacks=[pruning],
        hardware=hardware,
    )
    recipe.fit(task)
    return {"history": history, "state": task.state_dict()}


def detection(out, hardware, batch_size):
    """No learning: what is validated, by image."""
    scored = []
    score = detection_task.average_precision

    def keeping(truth, detections):
        scored.append(([image["id"] for image in truth["images"]], len(detections)))
        return score(truth, detections)

    data = Coco(out / "data", "train2017")
    architecture = DetectorArchitecture(
        num_classes=data.num_classes,
        backbone="resnet18",
        fpn_channels=16,
        head_channels=16,
        size=(64, 96),
        sampling=Sampling(noise="none"),
    )
    torch.manual_seed(0)
    network = convert(build_dense(architecture), architecture)
    task = DetectionTask(
        network, architecture, val_data=data, objective=BudgetController(0.6), lr=0.0
    )
    recipe = Recipe(
        train_data=data,
        train_transform=detection_transform(is_training=True),
        val_data=data,
        val_transform=detection_transform(is_training=False),
        out=out,
        epochs=1,
        batch_size=batch_size,
        max_batches=2,
        collate_fn=collate_detection,
        shows_progress=False,
        hardware=hardware,
    )
    detection_task.average_precision = keeping
    try:
        recipe.fit(task)
    finally:
        detection_task.average_precision = score
    return {"scored": scored}


def distributed_runs(*, out: str, batch_size: int = 4, **hardware: Any) -> dict[str, Any]:
    """Make every run; what the processes saw lies in OUT/<rank>.pt.

    Args:
        out: folder, with a data set in OUT/data.
        batch_size: images per process and step.
        **hardware: flags of `sparsight.train.Hardware`.
    """
    torch.set_num_threads(1)
    folder = Path(out)
    plain = Hardware(**hardware)
    saving = replace(plain, checkpoint_activations=True)
    found = {
        "same": segmentation(
            folder / "same", plain, batch_size, noise="none", norms_are_frozen=True
        ),
        "noisy": segmentation(
            folder / "noisy", saving, batch_size, noise="white", norms_are_frozen=False
        ),
        "soft": pruned_filters(folder / "soft", plain, batch_size, is_soft=True),
        "hard": pruned_filters(folder / "hard", plain, batch_size, is_soft=False),
        "detection": detection(folder, plain, batch_size),
    }
    torch.save(found, folder / f"{found['same']['rank']}.pt")
    return found
