"""Detection on COCO with Faster R-CNN, dense or sampled."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from sparsight.measure import count_published_macs
from sparsight.models.faster_rcnn import load_torchvision_weights
from sparsight.train.architecture import DetectorArchitecture, build_dense, convert
from sparsight.train.checkpoint import load_checkpoint, save_checkpoint, write_atomically
from sparsight.train.data import (
    Coco,
    collate_detection,
    detection_transform,
    write_synthetic_coco,
)
from sparsight.train.detection_task import DetectionTask
from sparsight.train.distillation import shared_flags
from sparsight.train.evaluate_detection import measured_backbone_share, score_detector
from sparsight.train.filter_pruning import pruning_of, remove_pruned_filters
from sparsight.train.initial_weights import check_one_start, dense_network, with_widths_of
from sparsight.train.recipe import Recipe
from sparsight.train.settling import measure_norms_again, settle

_PRUNED_PART = "backbone.body"  # by --method sfp and fpgm; budgets of detectors are of backbones


def coco(
    *,
    data: str | None = None,
    backbone: Literal[
        "resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "resnext101_32x8d"
    ] = "resnet101",
    deformable: bool = False,
    pretrained: str | None = None,
    init: str | None = None,
    backbone_weights: str | None = None,
    num_classes: int | None = None,
    is_norm_frozen: bool | None = None,
    trainable_layers: int = 4,
    fpn_channels: int = 256,
    head_channels: int = 1024,
    size: tuple[int, int] = (1000, 1667),
    epochs: int = 12,
    batch_size: int = 8,
    accumulate: int = 1,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    lr: float = 0.01,
    scalar_lr_factor: float = 1.0,
    gradient_clip: float = 35.0,
    first_sampled_layer: int = 1,
    seed: int = 0,
    out: str = "runs/coco",
    resume: bool = False,
    num_workers: int = 2,
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
    validate_every: int = 1,
    overfit_images: int | None = None,
    progress_bar: bool = True,
    quick: bool = False,
    **shared: Any,
) -> dict[str, Any]:
    """Train Faster R-CNN with a feature pyramid on COCO and score it on the validation images.

    Paper: Xie et al., ECCV 2020, arXiv 2003.08866. Its rows, ResNet-101 with deformable conv3 to
    conv5, mAP on val2017 and "GFLOPs" of the backbone (`sparsight.measure.count_published_macs`):
    dense at shorter side 1000, 800, 600, 500: 43.4 / 289.5, 42.3 / 184.1, 40.4 / 100.2, 38.5 /
    70.0; sampled at 1000 with weight .02, .05, .1, .2: 43.3 / 164.8, 42.7 / 120.3, 41.9 / 94.4,
    40.7 / 71.4.
    Data: COCO 2017, 118,287 training images, of which 117,266 have objects, and 5,000 validation
    images; ImageNet weights of the backbone, as torchvision's file.
    Command: `sparsight train recipes/detection/coco.py --data DIR --deformable --pretrained
    resnet101-63fe2227.pth --sampling_weight 0.05 --out runs/sampled`; the dense rows leave
    `--sampling_weight` out and have `--size 800x1333`, `600x1000`, `500x833`.
    Expected score, hours and hardware: the published schedule (12 epochs of 8 images a step) was
    not run here, on any hardware. What was (2026-11-22, commit ae790bd, two AVX-512 cores):
    over-fitting ten images with a ResNet-18 at 256x427, scored on the same ten, AP 93.9 dense and
    89.6 sampled to half of the backbone's MACs; docs/results/2026-11-22-coco-overfit.md.
    Departures from the published detector: torchvision's heads and losses; norms of pretrained
    weights keep scale and bias too (`is_norm_frozen`); the price is charged on the expected share
    of the backbone's MACs, unless `--weights published`.

    Args:
        data: folder with annotations/instances_{train,val}2017.json, train2017/ and val2017/.
            Needed unless `quick`.
        backbone: ResNet or ResNeXt of torchvision.
        deformable: deformable conv3 to conv5.
        pretrained: local file of torchvision's weights, of a classifier for the backbone, or of a
            detector; default: random weights.
        init: checkpoint (*.safetensors) to start from; a dense one may start a sampled model, a
            pruned one stays as narrow as it is.
        backbone_weights: of the backbone alone: a file of torchvision's weights of a classifier, or
            their name, as IMAGENET1K_V1, which torchvision fetches.
        num_classes: background included; default 81 for COCO, labels in a row. 91, labels that are
            the category ids, suits torchvision's detector weights.
        is_norm_frozen: norms are constants; default: if `pretrained` or `backbone_weights` are
            given.
        trainable_layers: 4 as published, all but the stem; 5 with random weights.
        fpn_channels: width of the pyramid.
        head_channels: width of the box head.
        size: shorter side of the image in pixels, and the bound on the longer, as 1000x1667.
        epochs: passes over the training images.
        batch_size: images per process and micro-batch. Published are 8 images a step, one on each
            of 8 GPUs: `--devices 8 --batch-size 1`.
        accumulate: micro-batches per optimiser step: 8 with a batch size of 1 takes the least
            memory, and is the published step where norms are frozen.
        optimizer: "sgd" as published; "adamw" for short runs from random weights.
        lr: peak learning rate; 0.01 as published.
        scalar_lr_factor: learning rate of the samplers' biases and interpolation widths over that
            of the rest; 1 as published, 10 suits short runs.
        gradient_clip: largest norm of a step's gradient; 35 as published.
        first_sampled_layer: 1 samples all residual blocks, as published; 2 those of conv3 to conv5.
        seed: of weights, order, flips and noise.
        out: folder for the results: weights.safetensors, result.json, last.ckpt, log/metrics.csv.
        resume: go on from `out`/last.ckpt; repeat the other flags.
        num_workers: processes that read images.
        precision: of training; validation and evaluation of the final weights run in float32.
        validate_every: epochs from one validation and stored state to the next.
        overfit_images: train on the first so many training images, without flips, and score on the
            same ones, to see that a detector can learn at all.
        progress_bar: draw it.
        quick: two epochs of two batches, a narrow pyramid and head, small images; on drawn scenes
            where no data is given. Proves that the recipe runs.
        **shared: flags of `sparsight.train.shared_flags`: sampling, teacher, processes, machines,
            memory.

    Returns:
        What is also written to result.json: COCO's metrics, MACs, share. Empty in all processes of
        a distributed run but the first.

    Raises:
        ImportError: filters are to be pruned without the extra `sparsight[compress]`.
        ValueError: no data, a budget outside (0, 1], a budget and a weight at once, two of
            `pretrained`, `init` and `backbone_weights` at once, a checkpoint of another
            architecture, or weights that do not fit.
        FileNotFoundError: data folders, weights or checkpoint missing.
        ConnectionError: torchvision could not fetch the weights.
    """
    flags, distillation, hardware = shared_flags(**shared)
    check_one_start("coco", pretrained=pretrained, init=init, backbone_weights=backbone_weights)
    is_pretrained = pretrained is not None or backbone_weights is not None
    folder = Path(out)
    if quick:
        epochs, batch_size, num_workers, accumulate = 2, min(batch_size, 2), 0, 1
        fpn_channels, head_channels, size = 32, 64, (96, 128)
        if data is None:
            drawn = folder / "data"
            write_synthetic_coco(drawn, num_images=8, split="train2017", seed=1)
            write_synthetic_coco(drawn, num_images=4, split="val2017", seed=2)
            data = str(drawn)
    if data is None:
        raise ValueError(
            "coco: no data folder was given; a folder with annotations/instances_train2017.json, "
            "annotations/instances_val2017.json, train2017/ and val2017/ is required; pass --data "
            "DIR (https://cocodataset.org/#download), or --quick true to run on drawn scenes."
        )
    train_data = Coco(
        data, "train2017", keeps_empty=False, num_classes=num_classes, max_images=overfit_images
    )
    val_data = train_data
    if overfit_images is None:
        val_data = Coco(data, "val2017", num_classes=train_data.num_classes)

    dense_architecture = with_widths_of(
        DetectorArchitecture(
            num_classes=train_data.num_classes,
            backbone=backbone,
            deformable=deformable,
            is_norm_frozen=is_pretrained if is_norm_frozen is None else is_norm_frozen,
            trainable_layers=trainable_layers,
            fpn_channels=fpn_channels,
            head_channels=head_channels,
            size=size,
            first_sampled_layer=first_sampled_layer,
        ),
        init,
    )
    planned = flags.plan(
        size=size, dense=lambda: build_dense(dense_architecture).get_submodule("backbone.body")
    )
    architecture = dataclasses.replace(
        dense_architecture, size=planned.size, sampling=planned.sampling
    )
    L.seed_everything(seed, verbose=False)
    if init is not None:
        network, _ = load_checkpoint(init, expected=architecture)
    else:
        dense = dense_network(architecture, backbone_weights)
        if pretrained is not None:
            kept = load_torchvision_weights(dense, pretrained)
            say = rank_zero_only(print)  # not once a process
            say(f"{pretrained}: loaded; {len(kept)} parameters keep their random values")
        network = convert(dense, architecture)
    task = DetectionTask(
        network,
        architecture,
        val_data=val_data,
        optimizer=optimizer,
        objective=planned.objective,
        distiller=distillation.distiller(network, dense_architecture),
        lr=lr,
        scalar_lr_factor=scalar_lr_factor,
    )
    pruning = pruning_of(flags, network, architecture.size, name="coco", part=_PRUNED_PART)
    recipe = Recipe(
        train_data=train_data,
        train_transform=detection_transform(is_training=overfit_images is None),
        val_data=val_data,
        val_transform=detection_transform(is_training=False),
        out=folder,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        num_workers=num_workers,
        precision=precision,
        accumulate=accumulate,
        max_batches=2 if quick else None,
        validate_every=validate_every,
        gradient_clip=gradient_clip,
        collate_fn=collate_detection,
        anneal_share=flags.anneal_share,
        remeasures_norms=flags.remeasures_norms,
        callbacks=() if pruning is None else (pruning,),
        hardware=hardware,
        shows_progress=progress_bar,
    )
    if not recipe.fit(task, resume=resume):
        return {}

    network.cpu().eval()
    result: dict[str, Any] = {
        "task": "coco detection",
        "method": flags.method,
        "seed": seed,
        "epochs": epochs,
        "budget": flags.budget,
        "sampling_weight": flags.sampling_weight,
    }
    measure_norms_again(network, recipe, num_images=256)
    if planned.settles:
        assert flags.budget is not None
        result |= settle(
            network, recipe, flags.budget, num_images=64, measure=measured_backbone_share
        )
    if pruning is not None:
        network, architecture, share = remove_pruned_filters(
            network, architecture, part=_PRUNED_PART
        )
        result["pruned_share"] = share
    path = folder / "weights.safetensors"
    save_checkpoint(path, network, architecture)
    scored = score_detector(network, recipe.validation_batches(), data=val_data)
    published = count_published_macs(
        network, shorter_side=architecture.size[0], density=scored.density or 1.0
    )
    result |= dataclasses.asdict(scored) | {
        "published_gmacs": published.total / 1e9,
        "architecture": architecture.to_json(),
    }
    write_atomically(folder / "result.json", json.dumps(result, indent=2).encode())
    print(f"{scored}\nweights: {path}")
    return result
