"""Classification of CIFAR-10 with the small ResNets, dense or sampled to a budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from sparsight.train.architecture import Architecture
from sparsight.train.classification_run import run_classification
from sparsight.train.data import (
    CIFAR10,
    SyntheticClasses,
    cifar10_evaluation_transform,
    cifar10_training_transform,
)
from sparsight.train.distillation import shared_flags
from sparsight.train.pooling import PoolingKind
from sparsight.train.recipe import Recipe
from sparsight.train.sampling import Layout, Noise


def cifar10(
    *,
    data: str | None = None,
    depth: Literal[8, 14, 20, 32, 44, 56, 110] = 56,
    pooling: PoolingKind = "own",
    pools_strides: bool = False,
    epochs: int = 20,
    batch_size: int = 64,
    accumulate: int = 1,
    lr: float = 5e-4,
    weight_decay: float = 1e-2,
    init: str | None = None,
    layout: Layout = "a",
    noise: Noise = "blue",
    grid_stride: int | None = None,
    window: int = 3,
    anneal_share: float = 0.6,
    seed: int = 0,
    out: str = "runs/cifar10",
    resume: bool = False,
    num_workers: int = 0,
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
    progress_bar: bool = True,
    quick: bool = False,
    **shared: Any,
) -> dict[str, Any]:
    """Train a ResNet on CIFAR-10, or fine-tune a trained one to compute less, and score it.

    Paper: Xie et al., ECCV 2020, arXiv 2003.08866 (classification there is on ImageNet; there are
    no published figures for CIFAR-10 with this method). The networks: He et al., CVPR 2016.
    Data: CIFAR-10, binary version, or a subset of it as one *.npz file (see
    `sparsight.train.data.CIFAR10`).
    Command: `sparsight train recipes/classification/cifar10.py --data DIR --init
    cifar10_resnet56.pt --teacher cifar10_resnet56.pt --budget 0.6 --out runs/cifar10-0.6`, with
    weights as published by akamaster/pytorch_resnet_cifar10.
    Expected score, one run (2026-11-22, commit f3c7d1d) on a subset, 5,085 images to train and
    1,017 to test: top-1 91.5 at a share of 0.607, dense 92.7; one standard error is 0.8; with norms
    measured again as all runs do now, 92.0 at 0.597 (2026-11-22-three-seeds.md). Hardware:
    one thread of a CPU with AVX-512 (AMD EPYC), three quarters of an hour beside other work. See
    docs/results/2026-11-22-budget.md. All 50,000 images, other depths and training from random
    weights: not run here.

    The defaults are for short fine-tuning on maps of 32x32 with few channels: blue noise, no grid
    (the paper's 11 leaves 9 points of such a map), a window of 3, whose interpolation costs a fifth
    of the paper's 7, and one mask a block, which needs half the heads of the paper's layout b.

    Args:
        data: folder with cifar-10-batches-bin/, or with one *.npz file. Needed unless `quick`.
        depth: of the network, 6n + 2.
        pooling: "max", "average" or "soft" with `pools_strides`; these networks have no pooling of
            their own but the global one, which stays.
        pools_strides: convolutions that step become ones of stride 1 with a pooling behind them.
        epochs: passes over the training images.
        batch_size: images per process and micro-batch.
        accumulate: micro-batches per optimiser step.
        lr: peak learning rate of AdamW.
        weight_decay: of weights of convolutions.
        init: weights to start from: a checkpoint of sparsight, or a state_dict saved with torch.
        layout: masks per residual block: "a" one, "b" or "c" one per convolution.
        noise: sampling noise: "white" (the paper), "blue", "none".
        grid_stride: spacing of the pixels that are always computed; None for no grid.
        window: side of the square of sites that a hole sees.
        anneal_share: part of the run in which the temperature falls, in (0, 1].
        seed: of weights, order, augmentation and noise.
        out: folder for the results: weights.safetensors, result.json, last.ckpt, log/metrics.csv.
        resume: go on from `out`/last.ckpt; repeat the other flags.
        num_workers: processes that read images; they are in memory.
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
        layout=layout,
        noise=noise,
        grid_stride=grid_stride,
        anneal_share=anneal_share,
        **shared,
    )
    if data is None and not quick:
        raise ValueError(
            "cifar10: no data folder was given; a folder with cifar-10-batches-bin/ or one *.npz "
            "file is required; pass --data DIR (https://www.cs.toronto.edu/~kriz/cifar.html, "
            "binary version), or --quick true to run on drawn stripes."
        )
    size = (32, 32)
    train_data: CIFAR10 | SyntheticClasses
    val_data: CIFAR10 | SyntheticClasses
    if data is not None:
        train_data, val_data = CIFAR10(data, "train"), CIFAR10(data, "test")
    else:
        train_data, val_data = (
            SyntheticClasses(8, size=size, seed=1),
            SyntheticClasses(4, size=size, seed=2),
        )
    if quick:
        epochs, batch_size, num_workers, accumulate = 2, min(batch_size, 2), 0, 1
    dense = Architecture(
        model="resnet_cifar",
        num_classes=len(train_data.classes),
        backbone=f"resnet{depth}",  # type: ignore[arg-type]  # one of those by its annotation
        fpn_channels=None,
        head_channels=None,
        size=size,
        pooling=pooling,
        pools_strides=pools_strides,
    )
    recipe = Recipe(
        train_data=train_data,
        train_transform=cifar10_training_transform(),
        val_data=val_data,
        val_transform=cifar10_evaluation_transform(),
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
        name="cifar10",
        dense=dense,
        flags=replace(flags, sampling=replace(flags.sampling, window=window)),
        init=init,
        distillation=distillation,
        lr=lr,
        weight_decay=weight_decay,
        resume=resume,
    )
