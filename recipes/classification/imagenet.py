"""Classification of ImageNet with torchvision's ResNets, dense or sampled."""

from __future__ import annotations

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
from sparsight.train.hardware import Hardware
from sparsight.train.recipe import Recipe
from sparsight.train.sampling import (
    ClassificationMethod,
    InterpolationKind,
    Layout,
    Noise,
    Sampling,
)


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
    budget: float | None = None,
    sampling_weight: float | None = None,
    weights: Literal["macs", "published", "uniform"] = "macs",
    filter_ratio: float | None = None,
    filter_norm_ratio: float = 0.0,
    init: str | None = None,
    teacher: str | None = None,
    teacher_weight: float = 1.0,
    teacher_temperature: float = 4.0,
    layout: Layout = "b",
    noise: Noise = "white",
    grid_stride: int | None = 11,
    interpolation: InterpolationKind | None = "rbf",
    window: int = 7,
    eps: float | None = None,
    straight_through: bool = False,
    anneal_share: float = 1.0,
    seed: int = 0,
    out: str = "runs/imagenet",
    resume: bool = False,
    num_workers: int = 8,
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
    progress_bar: bool = True,
    quick: bool = False,
    **hardware: Any,
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
        budget: share of the dense model's MACs to compute, in (0, 1], everything counted. None: a
            dense model, unless `sampling_weight` is given.
        sampling_weight: fixed weight of the expected share instead of a budget: .01 or .015 as
            published.
        weights: what the fixed weight is charged on: "macs", "published" or "uniform".
        filter_ratio: share of each layer's filters that "sfp" and "fpgm" take; or pass a budget.
        filter_norm_ratio: the part of it that "fpgm" takes by norm; 0.1 of 0.3 is published.
        init: weights to start from: a checkpoint of sparsight, or a state_dict saved with torch,
            such as torchvision's.
        teacher: weights of a dense network of the same backbone to learn from; usually those of
            `init`. None for the labels alone.
        teacher_weight: of the divergence from the teacher, beside the cross-entropy's 1.
        teacher_temperature: of that divergence.
        layout: masks per residual block: "a" one, "b" (the paper's default) or "c".
        noise: sampling noise: "white" (the paper), "blue", "none".
        grid_stride: spacing of the pixels that are always computed; None for no grid.
        interpolation: what fills the holes: "rbf", "conv", "average", "nearest"; None leaves zeros
            (the paper's "zero fill").
        window: side of the square of sites that a hole sees.
        eps: added to the interpolation's denominator; 1e-5 is the published code's.
        straight_through: train with hard masks and soft gradients; wants an `eps`.
        anneal_share: part of the run in which the temperature falls, in (0, 1].
        seed: of weights, order, augmentation and noise.
        out: folder for the results: weights.safetensors, result.json, last.ckpt, log/metrics.csv.
        resume: go on from `out`/last.ckpt; repeat the other flags.
        num_workers: processes that read images.
        precision: of training; validation and evaluation of the final weights run in float32.
        progress_bar: draw it.
        quick: two epochs of two batches; on drawn stripes where no data is given. Proves that the
            recipe runs.
        **hardware: flags of `sparsight.train.Hardware`: processes, machines, memory.

    Returns:
        What is also written to result.json: top-1, top-5, MACs, share. Empty in all
        processes of a distributed run but the first.

    Raises:
        ValueError: no data, flags that contradict each other (see `sparsight.train.plan`), or
            weights of another architecture.
        FileNotFoundError: data or weights missing; says where to obtain them.
    """
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
        anneal_share=anneal_share,
        hardware=Hardware(**hardware),
    )
    return run_classification(
        recipe,
        name="imagenet",
        dense=dense,
        sampling=Sampling(
            layout=layout,
            noise=noise,
            grid_stride=grid_stride,
            interpolation=interpolation,
            window=window,
            eps=eps,
            is_straight_through=straight_through,
        ),
        method=method,
        budget=budget,
        sampling_weight=sampling_weight,
        weights=weights,
        filter_ratio=filter_ratio,
        filter_norm_ratio=filter_norm_ratio,
        init=init,
        teacher=teacher,
        teacher_weight=teacher_weight,
        teacher_temperature=teacher_temperature,
        lr=lr,
        weight_decay=weight_decay,
        resume=resume,
    )
