"""Semantic segmentation of CamVid street scenes, dense or sampled to a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from sparsight.models.refinenet import BackboneName
from sparsight.train.architecture import SegmentationModel, build_dense
from sparsight.train.data import CamVid, SyntheticScenes, evaluation_transform
from sparsight.train.hardware import Hardware
from sparsight.train.recipe import Recipe
from sparsight.train.sampling import InterpolationKind, Layout, Method, Noise, Sampling, plan
from sparsight.train.segmentation_choices import (
    Augmentation,
    Loss,
    segmentation_architecture,
    segmentation_transform,
)
from sparsight.train.segmentation_run import train_segmentation


def camvid(
    *,
    data: str | None = None,
    model: SegmentationModel = "semantic_fpn",
    backbone: BackboneName = "resnet18",
    is_dilated: bool = False,
    is_deformable: bool = False,
    fpn_channels: int = 48,
    head_channels: int = 48,
    channels: int | None = None,
    size: tuple[int, int] = (240, 320),
    epochs: int = 40,
    batch_size: int = 8,
    accumulate: int = 1,
    lr: float = 1e-3,
    loss: Loss = "cross_entropy",
    augmentation: Augmentation = "default",
    method: Method = "sampled",
    budget: float | None = None,
    sampling_weight: float | None = None,
    weights: Literal["macs", "published", "uniform"] = "macs",
    init: str | None = None,
    teacher: str | None = None,
    layout: Layout = "b",
    noise: Noise = "white",
    grid_stride: int | None = 11,
    interpolation: InterpolationKind | None = "rbf",
    eps: float | None = None,
    straight_through: bool = False,
    anneal_share: float = 1.0,
    seed: int = 0,
    out: str = "runs/camvid",
    resume: bool = False,
    num_workers: int = 2,
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
    progress_bar: bool = True,
    quick: bool = False,
    **hardware: Any,
) -> dict[str, Any]:
    """Train a segmentation model on CamVid and score it on the validation images.

    Paper: Xie et al., ECCV 2020, arXiv 2003.08866 (its segmentation table is on Cityscapes; there
    are no published figures for CamVid with this method).
    Data: CamVid in the SegNet arrangement, 367 training and 101 validation images of 480x360; no
    ImageNet weights.
    Command: `sparsight train recipes/segmentation/camvid.py --data DIR --precision bf16-mixed --out
    runs/dense`, then the same with `--init runs/dense/weights.safetensors --lr 5e-4 --epochs 20
    --out runs/sampled --budget 0.5`, and once more without `--budget` as the dense control with
    equally many epochs.
    Expected score, one run each (2026-11-22, commits 2d2b877 and 9210bb3): dense mIoU 60.9; sampled
    55.5 at a share of 0.499, 55.3 to 55.9 over three sampling seeds. The control and a band over
    training seeds were not run. Hardware: two AVX-512 cores (AMD EPYC), 24 GiB, no GPU; hours were
    not kept. See docs/results/2026-11-22-camvid.md, with the ablations at 120x160 beside it.

    Args:
        data: folder with train/, trainannot/, val/, valannot/. Needed unless `quick`.
        model: architecture; torchvision's fcn and deeplabv3, the semantic FPN, FRRN-A or -B, or
            RefineNet and its light-weight form.
        backbone: of the semantic FPN and of RefineNet, random weights. The semantic FPN takes
            resnet18, resnet34, resnet50 and resnext50_32x4d.
        is_dilated: semantic FPN with dilation 2 and 4 in the last stages (bottlenecks only).
        is_deformable: semantic FPN with deformable stages 2 to 4 (resnet50 only).
        fpn_channels: width of the pyramid. 48 keeps most MACs in a small backbone.
        head_channels: width of the segmentation branch.
        channels: width of FRRN's stem (48 as published, the default) or of RefineNet's decoder
            (256); of no other model.
        size: height and width of the images in pixels, as 240x320. Scores are counted at the
            annotations' own size.
        epochs: passes over the training images.
        batch_size: images per process and micro-batch.
        accumulate: micro-batches per optimiser step.
        lr: peak learning rate of AdamW.
        loss: "cross_entropy", or "bootstrapped", FRRN's: of the worst sixteenth of each image.
        augmentation: "default" scales by .75 to 1.75, crops and flips; "refinenet" scales by .7 to
            1.3; "frrn" translates and changes the gamma instead.
        method: "sampled", the paper's; or a baseline: "resized" (the dense model on an input that
            meets the budget; `size` is the full one), "relu_gate" (computed where an activation is
            positive, zeros elsewhere), "perforated" (fixed patterns; the paper behind it fills with
            `interpolation="nearest"`). The deterministic baseline is "sampled" with `noise="none"`.
        budget: share of the dense model's MACs to compute, in (0, 1], everything counted. None: a
            dense model, unless `sampling_weight` is given.
        sampling_weight: fixed weight of the expected share instead of a budget, as published.
        weights: what `sampling_weight` is charged on: share of MACs, the published mean of
            probabilities, or the plain mean over the masks.
        init: checkpoint (*.safetensors) to start from; a dense one may start a sampled model.
        teacher: checkpoint of a dense model that is learnt from beside the annotations; usually
            the one of `init`.
        layout: masks per residual block: "a", "b" (the paper's default) or "c".
        noise: sampling noise: "white" (the paper), "blue", "none".
        grid_stride: spacing of the pixels that are always computed; the paper's 11, its ablation's
            9 and 13, or None for no grid.
        interpolation: kernel that fills what is not computed: "rbf" (the paper's default), "conv",
            "average", "nearest"; None leaves zeros.
        eps: added to the interpolation's denominator, 1e-5 in the published code; None is exact.
        straight_through: train with hard masks and soft gradients; wants an `eps`.
        anneal_share: part of the run in which the temperature falls, in (0, 1].
        seed: of weights, order, augmentation and noise.
        out: folder for the results: weights.safetensors, result.json, last.ckpt, log/metrics.csv.
        resume: go on from `out`/last.ckpt; repeat the other flags.
        num_workers: processes that read images.
        precision: of training; validation and evaluation of the final weights run in float32.
        progress_bar: draw it.
        quick: two epochs of two batches; on drawn scenes where no data is given. Proves that the
            recipe runs.
        **hardware: flags of `sparsight.train.Hardware`: processes, machines, memory.

    Returns:
        What is also written to result.json: mIoU, IoU per class, MACs, share. Empty in all
        processes of a distributed run but the first.

    Raises:
        ValueError: no data, flags that contradict each other (see `sparsight.train.plan`), or a
            checkpoint of another architecture.
        FileNotFoundError: data folders or checkpoint missing.
    """
    if data is None and not quick:
        raise ValueError(
            "camvid: no data folder was given; a folder with train/, trainannot/, val/ and "
            "valannot/ is required; pass --data DIR (CamVid in the SegNet arrangement), or "
            "--quick true to run on drawn scenes."
        )
    train_data: CamVid | SyntheticScenes
    val_data: CamVid | SyntheticScenes
    if data is not None:
        train_data, val_data = CamVid(data, "train"), CamVid(data, "val")
    else:
        train_data, val_data = (
            SyntheticScenes(8, size=size, seed=1),
            SyntheticScenes(4, size=size, seed=2),
        )
    if quick:
        epochs, batch_size, num_workers, accumulate = 2, min(batch_size, 2), 0, 1

    dense = segmentation_architecture(
        model=model,
        num_classes=len(train_data.classes),
        size=size,
        backbone=backbone,
        is_dilated=is_dilated,
        is_deformable=is_deformable,
        fpn_channels=fpn_channels,
        head_channels=head_channels,
        channels=channels,
    )
    planned = plan(
        method=method,
        sampling=Sampling(
            layout=layout,
            noise=noise,
            grid_stride=grid_stride,
            interpolation=interpolation,
            eps=eps,
            is_straight_through=straight_through,
        ),
        size=size,
        budget=budget,
        sampling_weight=sampling_weight,
        weights=weights,
        dense=lambda: build_dense(dense),
    )
    recipe = Recipe(
        train_data=train_data,
        train_transform=segmentation_transform(
            augmentation, planned.size, model=model, ignore_index=train_data.ignore_index
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
        anneal_share=anneal_share,
        hardware=Hardware(**hardware),
    )
    return train_segmentation(
        recipe,
        name="camvid segmentation",
        dense=dense,
        planned=planned,
        budget=budget,
        lr=lr,
        init=init,
        loss=loss,
        teacher=teacher,
        resume=resume,
        details={"method": method, "loss": loss, "augmentation": augmentation},
    )
