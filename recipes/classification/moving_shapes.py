"""Which way something moves: a small 3-D network on clips drawn on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsight.train.architecture import Architecture
from sparsight.train.classification_run import run_classification
from sparsight.train.data import MovingShapes, clip_transform
from sparsight.train.distillation import shared_flags
from sparsight.train.pooling import PoolingKind
from sparsight.train.recipe import Recipe


def moving_shapes(
    *,
    pooling: PoolingKind = "own",
    epochs: int = 6,
    batch_size: int = 32,
    lr: float = 2e-3,
    weight_decay: float = 1e-2,
    init: str | None = None,
    seed: int = 0,
    out: str = "runs/moving_shapes",
    resume: bool = False,
    num_workers: int = 0,
    progress_bar: bool = True,
    quick: bool = False,
    **shared: Any,
) -> dict[str, Any]:
    """Train a 3-D network with poolings of one kind on clips of moving shapes, and score it.

    Paper: Stergiou, Poppe, Kalliatakis, ICCV 2021, arXiv 2101.00440, whose 3-D networks are on
    Kinetics and UCF; there are no published figures for these clips.
    Data: none to fetch; 2,048 clips to train and 1,024 to test are drawn, see
    `sparsight.train.data.MovingShapes`. The class is one of eight directions; chance is 12.5.
    Command: `sparsight train recipes/classification/moving_shapes.py --pooling soft --out
    runs/soft`.
    Expected score, mean and standard deviation of three seeds (2026-11-22, commit 76c0033): top-1
    84.8 and 1.2 with max pooling, 80.3 and 1.9 with average, 89.4 and 0.6 with SoftPool. Hardware:
    one thread of a CPU with AVX-512, a minute and a half. See
    docs/results/2026-11-22-soft-pool-experiments.md.

    In float32: in bfloat16 on a CPU, torch 2.15 gives weights of 3-D convolutions that are
    channels-last gradients that are not finite.

    Args:
        pooling: of the three poolings inside the network: "max" as it was written ("own"),
            "average" or "soft". The global pooling before the classifier stays a mean.
        epochs: passes over the training clips.
        batch_size: clips per process and step.
        lr: peak learning rate of AdamW.
        weight_decay: of weights of convolutions.
        init: weights to start from: a checkpoint of sparsight, or a state_dict saved with torch.
        seed: of weights and order; the clips stay the same.
        out: folder for the results: weights.safetensors, result.json, last.ckpt, log/metrics.csv.
        resume: go on from `out`/last.ckpt; repeat the other flags.
        num_workers: processes that read clips; they are in memory.
        progress_bar: draw it.
        quick: two epochs of two batches, on fewer and smaller clips. Proves that the recipe runs.
        **shared: flags of `sparsight.train.shared_flags`: teacher, processes, machines, memory;
            those of sampling find no residual block here, and say so.

    Returns:
        What is also written to result.json: top-1, top-5, MACs. Empty in all processes of a
        distributed run but the first.

    Raises:
        ValueError: weights of another architecture.
        FileNotFoundError: weights missing.
    """
    flags, distillation, hardware = shared_flags(**shared)
    size = (16, 16) if quick else (32, 32)
    if quick:
        epochs, batch_size, num_workers = 2, min(batch_size, 2), 0
    dense = Architecture(
        model="small_c3d",
        num_classes=len(MovingShapes.classes),
        backbone=None,
        fpn_channels=None,
        head_channels=None,
        size=size,
        # Max poolings are what the network was written with.
        pooling="own" if pooling == "max" else pooling,
    )
    recipe = Recipe(
        train_data=MovingShapes("train", size=size, length=8 if quick else None),
        train_transform=clip_transform(),
        val_data=MovingShapes("val", size=size, length=4 if quick else None),
        val_transform=clip_transform(),
        out=Path(out),
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        num_workers=num_workers,
        max_batches=2 if quick else None,
        shows_progress=progress_bar,
        hardware=hardware,
    )
    return run_classification(
        recipe,
        name="moving_shapes",
        dense=dense,
        flags=flags,
        init=init,
        distillation=distillation,
        lr=lr,
        weight_decay=weight_decay,
        resume=resume,
    )
