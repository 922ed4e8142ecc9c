"""A trained CIFAR ResNet sampled to a budget without labels."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from sparsight.measure import calibrate
from sparsight.models import load_resnet_cifar, resnet_cifar
from sparsight.train.architecture import Architecture
from sparsight.train.checkpoint import save_checkpoint, write_atomically
from sparsight.train.data import (
    CIFAR10,
    SeededView,
    SyntheticClasses,
    cifar10_evaluation_transform,
    cifar10_training_transform,
)
from sparsight.train.evaluate_classification import score_classification
from sparsight.train.sampling import InterpolationKind, Layout, Noise, Sampling, apply_sampling


def calibrate_cifar10(
    *,
    data: str | None = None,
    weights: str | None = None,
    budget: float = 0.6,
    num_images: int = 5000,
    is_augmented: bool = True,
    num_steps: int = 400,
    batch_size: int = 32,
    lr: float = 1e-3,
    remeasure_norms: bool = True,
    layout: Layout = "a",
    noise: Noise = "blue",
    grid_stride: int | None = None,
    interpolation: InterpolationKind | None = "rbf",
    window: int = 3,
    seed: int = 0,
    out: str = "runs/cifar10-calibrated",
    progress_bar: bool = True,
    quick: bool = False,
) -> dict[str, Any]:
    """Calibrate a trained network on training images without their labels, and score it.

    Data: CIFAR-10 (see `sparsight.train.data.CIFAR10`); weights as published by
    akamaster/pytorch_resnet_cifar10.
    Command: `sparsight train recipes/classification/calibrate_cifar10.py --data DIR --weights
    cifar10_resnet56.pt --budget 0.6`.
    Expected score, one run (2026-11-22, commit f3c7d1d, --num-images 5085, on plain images, which
    --is-augmented false shows; augmented ones were not scored) on 1,017 test images: top-1 88.4 at
    a share of 0.597, dense 92.7. A quarter of an hour on one thread of a CPU with AVX-512 (AMD
    EPYC), beside other work. See docs/results/2026-11-22-budget.md.

    Args:
        data: folder with cifar-10-batches-bin/, or with one *.npz file. Needed unless `quick`.
        weights: state_dict of the trained dense network. Needed unless `quick`.
        budget: share of the dense MACs to compute, in (0, 1], everything counted.
        num_images: training images that are shown: the first of the set, and, augmented, the set
            again in other views if it has fewer.
        is_augmented: padded, cropped and flipped as in training. The network knows the plain images
            of a small set by heart, and norms measured on them are not those of new images.
        num_steps: of calibration.
        batch_size: images per step.
        lr: peak learning rate of the samplers' weights.
        remeasure_norms: measure the norms' statistics again; false leaves all but samplers and
            interpolations as they are.
        layout: masks per residual block: "a" one, "b" or "c" one per convolution.
        noise: sampling noise: "white" (the paper), "blue", "none".
        grid_stride: spacing of the pixels that are always computed; None for no grid.
        interpolation: what fills the holes: "rbf", "conv", "average", "nearest"; None for zeros.
        window: side of the square of sites that a hole sees.
        seed: of the order of the images and the noise of fitting.
        out: folder for weights.safetensors, from which cifar10.py may start, and result.json.
        progress_bar: count the steps on standard error.
        quick: two steps on drawn stripes, with random weights. Proves that the recipe runs.

    Returns:
        What is also written to result.json: scores of the dense and the calibrated network, share,
        errors.

    Raises:
        ValueError: no data or no weights, or a budget that cannot be met.
        FileNotFoundError: data or weights missing; says where to obtain them.
    """
    if not quick and (data is None or weights is None):
        missing = "data folder" if data is None else "file of weights"
        raise ValueError(
            f"calibrate_cifar10: no {missing} was given; both are required; pass --data DIR "
            "(https://www.cs.toronto.edu/~kriz/cifar.html, binary version) and --weights FILE "
            "(akamaster/pytorch_resnet_cifar10), or --quick true."
        )
    train_data: CIFAR10 | SyntheticClasses = SyntheticClasses(8, size=(32, 32), seed=1)
    test_data: CIFAR10 | SyntheticClasses = SyntheticClasses(4, size=(32, 32), seed=2)
    if data is not None:
        train_data, test_data = CIFAR10(data, "train"), CIFAR10(data, "test")
    dense = resnet_cifar(20).eval() if weights is None else load_resnet_cifar(weights)
    if quick:
        num_steps, batch_size, num_images = 2, 4, min(num_images, 16)
    architecture = Architecture(
        model="resnet_cifar",
        num_classes=len(train_data.classes),
        backbone=f"resnet{dense.depth}",  # type: ignore[arg-type]  # published depths
        fpn_channels=None,
        head_channels=None,
        size=(32, 32),
        sampling=Sampling(
            layout=layout,
            noise=noise,
            grid_stride=grid_stride,
            interpolation=interpolation,
            window=window,
        ),
    )
    if is_augmented:
        view = SeededView(train_data, cifar10_training_transform(), seed=seed)
        drawn = [divmod(i, len(view)) for i in range(num_images)]  # (epoch, image)
        images = torch.stack([view[index][0] for index in drawn])
    else:
        view = SeededView(train_data, cifar10_evaluation_transform())
        images = torch.stack([view[i][0] for i in range(min(num_images, len(view)))])
    tests = DataLoader(SeededView(test_data, cifar10_evaluation_transform()), batch_size=64)
    num_classes = architecture.num_classes
    dense_score = score_classification(dense, tests, num_classes=num_classes)
    print(f"dense: {dense_score}", flush=True)
    model = apply_sampling(dense, architecture.sampling)
    calibrate(
        model,
        images,
        budget=budget,
        num_steps=num_steps,
        batch_size=batch_size,
        lr=lr,
        remeasure_norms=remeasure_norms,
        seed=seed,
        shows_progress=progress_bar,
    )
    report: Any = model.calibration_report
    print(f"calibration: {report}")
    scored = score_classification(model, tests, num_classes=num_classes)
    print(f"calibrated: {scored}")
    save_checkpoint(Path(out) / "weights.safetensors", model, architecture)
    result = {
        "task": "calibrate_cifar10",
        "seed": seed,
        "dense": dataclasses.asdict(dense_score),
        "calibrated": dataclasses.asdict(scored),
        "calibration": dataclasses.asdict(report),
        "architecture": architecture.to_json(),
    }
    write_atomically(Path(out) / "result.json", json.dumps(result, indent=2).encode())
    return result
