"""Classification of ImageNet with torchvision's ResNets, dense or sampled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from sparsight.train.architecture import Architecture
from sparsight.train.classification_run import run_classification
from sparsight.train.data import (
    ImageFolders,
    SyntheticClasses,
    imagenet_evaluation_transform,
    imagenet_training_transform,
)
from sparsight.train.distillation import shared_flags
from sparsight.train.recipe import Recipe
from sparsight.train.sampling import ClassificationMethod


def imagenet(
    *,
    data: str | None = None,
    backbone: Literal["resnet18", "resnet34", "resnet50"] = "resnet34",
    size: tuple[int, int] = (224, 224),
    epochs: int = 30,
    batch_size: int = 256,
    accumulate: int = 1,
    lr: float = 1e-3,
    weight_decay: float = 1e-2,
    method: ClassificationMethod = "sampled",
    filter_ratio: float | None = None,
    filter_norm_ratio: float = 0.0,
    init: str | None = None,
    window: int = 7,
    seed: int = 0,
    out: str = "runs/imagenet",
    resume: bool = False,
    num_workers: int = 8,
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
    progress_bar: bool = True,
    quick: bool = False,
    **shared: Any,
) -> dict[str, Any]:
    """Train a ResNet on ImageNet, or fine-tune a trained one to compute less, and score it.

    Paper: Xie et al., ECCV 2020, arXiv 2003.08866: ResNet-34, loss weights .01 and .015
    (`--sampling-weight .01`), and the finding that on classification, unlike on detection and
    segmentation, removing the interpolation costs nothing (`--interpolation null`). Its scores
    could not be read here and are not repeated from memory.
    Data: ImageNet (ILSVRC 2012) in torchvision's arrangement, train/<class>/ and val/<class>/.
    Command: `sparsight train recipes/classification/imagenet.py --data DIR --init
    resnet34-b627a593.pth --teacher resnet34-b627a593.pth --sampling-weight .015 --epochs 30`.
    Score, hours and hardware: not run here. The schedule (AdamW, warm-up, half cosine) is ours; the
    paper's is not published as code.

    Args:
        data: folder with train/ and val/, each with one folder a class. Needed unless `quick`.
        backbone: torchvision's ResNet.
        size: height and width of the images in pixels, as 224x224.
        epochs: passes over the training images.
        batch_size: images per process and micro-batch.
        accumulate: micro-batches per optimiser step.
        lr: peak learning rate of AdamW.
        weight_decay: of weights of convolutions.
        method: "sampled" is the paper's, "relu_gate" and "perforated" are baselines; "sfp" and
            "fpgm" set filters to zero while they train and remove them at the end.
        filter_ratio: share of each layer's filters that "sfp" and "fpgm" take; or pass a budget.
        filter_norm_ratio: the part of it that "fpgm" takes by norm; 0.1 of 0.3 is published.
        init: weights to start from: a checkpoint of sparsight, or a state_dict saved with torch,
            such as torchvision's.
        window: side of the square of sites that a hole sees.
        seed: of weights, order, augmentation and noise.
        out: folder for the results: weights.safetensors, result.json, last.ckpt, log/metrics.csv.
        resume: go on from `out`/last.ckpt; repeat the other flags.
        num_workers: processes that read images.
        precision: of training; validation and evaluation of the final weights run in float32.
        progress_bar: draw it.
        quick: two epochs of two batches; on drawn stripes where no data is given. Proves that the
            recipe runs.
        **shared: flags of `sparsight.train.shared_flags`: sampling, teacher, processes, machines,
            memory.

    Returns:
        What is also written to result.json: top-1, top-5, MACs, share. Empty in all
        processes of a distributed run but the first.

    Raises:
        ValueError: no data, flags that contradict each other (see `sparsight.train.plan`), or
            weights of another architecture.
        FileNotFoundError: data or weights missing; says where to obtain them.
    """
    flags, distillation, hardware = shared_flags(
        method="sampled",  # this recipe's own flag knows more methods
        **shared,
    )
    if data is None and not quick:
        raise ValueError(
            "imagenet: no data folder was given; a folder with train/<class>/ and val/<class>/ is "
            "required; pass --data DIR (ImageNet from https://www.image-net.org/download, "
            "validation images sorted by class), or --quick true to run on drawn stripes."
        )
    train_data: ImageFolders | SyntheticClasses
    val_data: ImageFolders | SyntheticClasses
    if data is not None:
        train_data, val_data = ImageFolders(data, "train"), ImageFolders(data, "val")
    else:
        train_data, val_data = (
            SyntheticClasses(8, size=size, seed=1),
            SyntheticClasses(4, size=size, seed=2),
        )
    if quick:
        epochs, batch_size, num_workers, accumulate = 2, min(batch_size, 2), 0, 1
    dense = Architecture(
        model="resnet",
        num_classes=len(train_data.classes),
        backbone=backbone,
        fpn_channels=None,
        head_channels=None,
        size=size,
    )
    recipe = Recipe(
        train_data=train_data,
        train_transform=imagenet_training_transform(size),
        val_data=val_data,
        val_transform=imagenet_evaluation_transform(size),
        out=Path(out),
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        num_workers=num_workers,
        precision=precision,
        accumulate=accumulate,
        max_batches=2 if quick else None,
        shows_progress=progress_bar,
        anneal_share=flags.anneal_share,
        remeasures_norms=flags.remeasures_norms,
        hardware=hardware,
    )
    return run_classification(
        recipe,
        name="imagenet",
        dense=dense,
        flags=replace(flags, method=method, sampling=replace(flags.sampling, window=window)),
        filter_ratio=filter_ratio,
        filter_norm_ratio=filter_norm_ratio,
        init=init,
        distillation=distillation,
        lr=lr,
        weight_decay=weight_decay,
        resume=resume,
    )
