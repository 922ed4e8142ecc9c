"""A trained CIFAR ResNet, pruned, then sampled to a budget, learning from what it was."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
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
from sparsight.train.evaluate_classification import score_classification
from sparsight.train.prune_and_sample import DENSE_FILE, ChainSettings, prune_and_sample
from sparsight.train.recipe import Recipe
from sparsight.train.sampling import Layout, Noise


def prune_and_sample_cifar10(
    *,
    data: str | None = None,
    init: str | None = None,
    depth: Literal[8, 14, 20, 32, 44, 56, 110] = 56,
    speedup: float = 2.0,
    round_to: int = 16,
    num_images: int = 1024,
    tune_epochs: int = 0,
    tune_lr: float = 2e-5,
    budget: float = 0.5,
    calibration_steps: int = 0,
    epochs: int = 20,
    batch_size: int = 64,
    accumulate: int = 1,
    lr: float = 5e-4,
    weight_decay: float = 1e-2,
    teacher: str | None = None,
    layout: Layout = "a",
    noise: Noise = "blue",
    grid_stride: int | None = None,
    window: int = 3,
    anneal_share: float = 0.6,
    latency: bool = True,
    seed: int = 0,
    out: str = "runs/cifar10-pruned-sampled",
    resume: bool = False,
    num_workers: int = 0,
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
    progress_bar: bool = True,
    quick: bool = False,
    **shared: Any,
) -> dict[str, Any]:
    """Prune channels, sample places, learn from the dense network: a table of every step.

    Papers: He, Zhang, Sun, ICCV 2017, arXiv 1707.06168 (channels); Xie et al., ECCV 2020, arXiv
    2003.08866 (places); Hinton et al., arXiv 1503.02531 (the teacher). None has them together.
    Data: CIFAR-10 (see `sparsight.train.data.CIFAR10`); weights as published by
    akamaster/pytorch_resnet_cifar10.
    Command: `sparsight train recipes/classification/prune_and_sample_cifar10.py --data DIR --init
    cifar10_resnet56.pt`. The same multiply-adds by sampling alone: `cifar10.py --data DIR --init
    cifar10_resnet56.pt --teacher cifar10_resnet56.pt` with the `share_of_dense` of this run's
    result.json as `--budget`.
    Expected score, one run (2026-11-22, --tune-epochs 8 --tune-lr 5e-4 --epochs 16) on 5,085 images
    to train and 1,017 to test: dense 92.7, pruned 91.6, tuned 91.2, sampled and distilled 86.0 at
    0.247 of the dense MACs. One thread of a CPU with AVX-512 (AMD EPYC), 40 minutes beside other
    work. See docs/results/2026-11-22-channel-pruning.md.

    The defaults of sampling are those of `cifar10.py`, for maps of 32x32 with few channels.

    Args:
        data: folder with cifar-10-batches-bin/, or with one *.npz file. Needed unless `quick`.
        init: weights of the trained dense network: a checkpoint of sparsight, or a state_dict saved
            with torch. Needed unless `quick`.
        depth: of the network, 6n + 2.
        speedup: how many times fewer multiply-adds pruning leaves, see
            `sparsight.compress.prune_channels`; 1 leaves all channels.
        round_to: widths are multiples of it, where layers are wide enough.
        num_images: about so many training images that pruning and calibration look at, without
            their labels.
        tune_epochs: passes that train the pruned network before it is sampled. 0 by default: this
            ResNet gained nothing from four.
        tune_lr: peak learning rate of these.
        budget: share of the *pruned* network's MACs to compute, in (0, 1], everything counted: of
            the dense one's that is `budget / speedup`.
        calibration_steps: fit samplers without labels first, and start training there. 0 by
            default: training starts from the pruned network, computed everywhere.
        epochs: passes over the training images of the last, sampled training.
        batch_size: images per micro-batch.
        accumulate: micro-batches per optimiser step.
        lr: peak learning rate of AdamW.
        weight_decay: of weights of convolutions.
        teacher: weights of the teacher, as for the other recipes; default: the dense network that
            pruning started from. `--distill-alpha 0` learns from labels alone.
        layout: masks per residual block: "a" one, "b" or "c" one per convolution.
        noise: sampling noise: "white" (the paper), "blue", "none".
        grid_stride: spacing of the pixels that are always computed; None for no grid.
        window: side of the square of sites that a hole sees.
        anneal_share: part of the training in which the temperature falls, in (0, 1].
        latency: also measure milliseconds of every step, frozen, for one image.
        seed: of weights, images, order, augmentation and noise.
        out: folder for the results: weights.safetensors, result.json, and the steps before:
            dense.safetensors, pruned.safetensors, converted.safetensors, tuned/.
        resume: keep the steps that `out` has, and go on with training from its last.ckpt; repeat
            the other flags.
        num_workers: processes that read images; they are in memory.
        precision: of training; validation and evaluation run in float32.
        progress_bar: draw it.
        quick: two epochs of two batches; on drawn stripes where no data is given, a random ResNet-8
            where no weights are. Proves that the recipe runs.
        **shared: flags of `sparsight.train.shared_flags`: sampling, teacher, machine, memory. One
            process alone.

    Returns:
        What is also written to result.json: "steps" with top-1, MACs, share of the dense ones and
        milliseconds of each; see `sparsight.train.prune_and_sample`.

    Raises:
        ValueError: no data or no weights, flags that contradict each other, a speed-up or budget
            out of reach, or weights of another architecture.
        FileNotFoundError: data or weights missing; says where to obtain them.
        ImportError: the extra `sparsight[compress]` is not installed.
    """
    folder = Path(out)
    flags, distillation, hardware = shared_flags(
        budget=budget,
        teacher=teacher or str(folder / DENSE_FILE),
        layout=layout,
        noise=noise,
        grid_stride=grid_stride,
        anneal_share=anneal_share,
        **shared,
    )
    if not quick and (data is None or init is None):
        missing = "data folder" if data is None else "file of weights"
        raise ValueError(
            f"prune_and_sample_cifar10: no {missing} was given; both are required; pass --data DIR "
            "(https://www.cs.toronto.edu/~kriz/cifar.html, binary version) and --init FILE "
            "(akamaster/pytorch_resnet_cifar10), or --quick true."
        )
    size = (32, 32)
    train_data: CIFAR10 | SyntheticClasses = SyntheticClasses(8, size=size, seed=1)
    val_data: CIFAR10 | SyntheticClasses = SyntheticClasses(4, size=size, seed=2)
    if data is not None:
        train_data, val_data = CIFAR10(data, "train"), CIFAR10(data, "test")
    if quick:
        epochs, batch_size, num_workers, accumulate = 2, min(batch_size, 2), 0, 1
        num_images, tune_epochs = min(num_images, 64), min(tune_epochs, 1)
        calibration_steps = min(calibration_steps, 2)
        depth = 8 if init is None else depth
    dense = Architecture(
        model="resnet_cifar",
        num_classes=len(train_data.classes),
        backbone=f"resnet{depth}",  # type: ignore[arg-type]  # one of those by its annotation
        fpn_channels=None,
        head_channels=None,
        size=size,
    )
    recipe = Recipe(
        train_data=train_data,
        train_transform=cifar10_training_transform(),
        val_data=val_data,
        val_transform=cifar10_evaluation_transform(),
        out=folder,
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
    return prune_and_sample(
        recipe,
        name="prune_and_sample_cifar10",
        dense=dense,
        init=init,
        settings=ChainSettings(
            speedup=speedup,
            round_to=round_to,
            num_images=num_images,
            tune_epochs=tune_epochs,
            tune_lr=tune_lr,
            calibration_steps=calibration_steps,
        ),
        flags=replace(flags, sampling=replace(flags.sampling, window=window)),
        train=partial(
            run_classification,
            name="cifar10",
            dense=dense,
            distillation=distillation,
            weight_decay=weight_decay,
        ),
        score=partial(score_classification, num_classes=dense.num_classes),
        lr=lr,
        latency=latency,
        resume=resume,
    )
