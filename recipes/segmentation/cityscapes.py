"""Semantic segmentation of Cityscapes, dense or sampled: the setting of the sampling paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from sparsight.train.architecture import SegmentationModel, build_dense
from sparsight.train.data import Cityscapes, SyntheticScenes, evaluation_transform
from sparsight.train.distillation import shared_flags
from sparsight.train.initial_weights import with_widths_of
from sparsight.train.recipe import Recipe
from sparsight.train.segmentation_choices import (
    Augmentation,
    Loss,
    segmentation_architecture,
    segmentation_transform,
)
from sparsight.train.segmentation_run import train_segmentation


def cityscapes(
    *,
    data: str | None = None,
    model: SegmentationModel = "semantic_fpn",
    backbone: str = "resnet50",
    is_dilated: bool = True,
    is_deformable: bool = False,
    fpn_channels: int = 256,
    head_channels: int = 128,
    channels: int | None = None,
    size: tuple[int, int] = (1024, 2048),
    crop: tuple[int, int] = (512, 1024),
    epochs: int = 64,
    batch_size: int = 8,
    accumulate: int = 1,
    lr: float = 1e-3,
    loss: Loss = "cross_entropy",
    augmentation: Augmentation = "default",
    init: str | None = None,
    backbone_weights: str | None = None,
    seed: int = 0,
    out: str = "runs/cityscapes",
    resume: bool = False,
    num_workers: int = 2,
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
    progress_bar: bool = True,
    quick: bool = False,
    **shared: Any,
) -> dict[str, Any]:
    """Train a segmentation model on Cityscapes and score it on the validation images.

    Paper: Xie et al., ECCV 2020, arXiv 2003.08866: semantic FPN with a dilated (2, 4) ResNet-50,
    optionally deformable; loss weights .05, .1, .2 and .3; the dense network at shorter sides 1024,
    896, 736 and 512. Schedule, crop and learning rate of its segmentation runs are not published:
    those here are ours.
    Data: Cityscapes as torchvision reads it, 2,975 training and 500 validation images of 1024x2048,
    fine annotations; 19 classes, the others are not counted.
    Command: `sparsight train recipes/segmentation/cityscapes.py --data DIR --out runs/dense`, then
    `--init runs/dense/weights.safetensors --sampling-weight 0.1 --weights published --out
    runs/sampled` for each weight.
    Expected score, hours and hardware: not run here.

    Args:
        data: folder with leftImg8bit/ and gtFine/. Needed unless `quick`.
        model: architecture; torchvision's fcn and deeplabv3, the semantic FPN, FRRN-A or -B, or
            RefineNet and its light-weight form.
        backbone: of the semantic FPN and of RefineNet. The semantic FPN takes resnet18, resnet34,
            resnet50 and resnext50_32x4d; RefineNet these, resnet101, resnet152, and "timm:NAME",
            any of timm's that gives its features; the light-weight one mobilenet_v2 too.
        is_dilated: semantic FPN with dilation 2 and 4 in the last stages (bottlenecks only).
        is_deformable: semantic FPN with deformable stages 2 to 4 (resnet50 only).
        fpn_channels: width of the pyramid.
        head_channels: width of the segmentation branch.
        channels: width of FRRN's stem (48 as published, the default) or of RefineNet's decoder
            (256); of no other model.
        size: height and width of the images in pixels, as 1024x2048. Scores are counted at the
            annotations' own size.
        crop: height and width of what is cut from an image scaled by .75 to 1.75, for training.
        epochs: passes over the training images.
        batch_size: images per process and micro-batch.
        accumulate: micro-batches per optimiser step.
        lr: peak learning rate of AdamW.
        loss: "cross_entropy", or "bootstrapped", FRRN's: of the worst sixteenth of each image.
        augmentation: "default" scales by .75 to 1.75, crops and flips; "refinenet" scales by .7 to
            1.3; "frrn" translates and changes the gamma instead.
        init: checkpoint (*.safetensors) to start from; a dense one may start a sampled model, a
            pruned one stays as narrow as it is.
        backbone_weights: of the backbone, where there is no `init`: a file of torchvision's weights
            (*.pth, *.safetensors), or their name, as IMAGENET1K_V1, which torchvision fetches;
            default: random weights.
        seed: of weights, order, augmentation and noise.
        out: folder for the results: weights.safetensors, result.json, last.ckpt, log/metrics.csv.
        resume: go on from `out`/last.ckpt; repeat the other flags.
        num_workers: processes that read images.
        precision: of training; validation and evaluation of the final weights run in float32.
        progress_bar: draw it.
        quick: two epochs of two batches; on drawn scenes where no data is given. Proves that the
            recipe runs.
        **shared: flags of `sparsight.train.shared_flags`: sampling, teacher, processes, machines,
            memory.

    Returns:
        What is also written to result.json: mIoU, IoU per class, MACs, share. Empty in all
        processes of a distributed run but the first.

    Raises:
        ValueError: no data, flags that contradict each other (see `sparsight.train.plan`), or a
            checkpoint of another architecture, or weights that do not fit the backbone.
        FileNotFoundError: data folders, checkpoint or weights missing.
        ConnectionError: torchvision could not fetch the weights.
    """
    flags, distillation, hardware = shared_flags(**shared)
    if data is None and not quick:
        raise ValueError(
            "cityscapes: no data folder was given; a folder with leftImg8bit/ and gtFine/ is "
            "required; pass --data DIR (Cityscapes, from cityscapes-dataset.com after "
            "registration), or --quick true to run on drawn scenes."
        )
    if quick and data is None:
        size, crop = (64, 128), (64, 128)
    train_data: Cityscapes | SyntheticScenes
    val_data: Cityscapes | SyntheticScenes
    if data is not None:
        train_data, val_data = Cityscapes(data, "train"), Cityscapes(data, "val")
    else:
        train_data, val_data = (
            SyntheticScenes(8, size=size, seed=1),
            SyntheticScenes(4, size=size, seed=2),
        )
    if quick:
        epochs, batch_size, num_workers, accumulate = 2, min(batch_size, 2), 0, 1

    dense = with_widths_of(
        segmentation_architecture(
            model=model,
            num_classes=len(train_data.classes),
            size=size,
            backbone=backbone,
            is_dilated=is_dilated,
            is_deformable=is_deformable,
            fpn_channels=fpn_channels,
            head_channels=head_channels,
            channels=channels,
        ),
        init,
    )
    planned = flags.plan(size=size, dense=lambda: build_dense(dense))
    # A resized input is cropped in proportion, so that a crop shows as much of the scene.
    height, width = (max(1, c * p // s) for c, p, s in zip(crop, planned.size, size, strict=True))
    cropped = height, width
    recipe = Recipe(
        train_data=train_data,
        train_transform=segmentation_transform(
            augmentation,
            planned.size,
            model=model,
            crop=cropped,
            ignore_index=train_data.ignore_index,
        ),
        val_data=val_data,
        val_transform=evaluation_transform(planned.size),
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
    return train_segmentation(
        recipe,
        name="cityscapes segmentation",
        dense=dense,
        planned=planned,
        flags=flags,
        lr=lr,
        init=init,
        backbone_weights=backbone_weights,
        loss=loss,
        distillation=distillation,
        resume=resume,
        details={"loss": loss, "augmentation": augmentation},
    )
