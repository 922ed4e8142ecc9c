"""Mask proposals on COCO or VOC with InstanceFCN, dense or sampled."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal

import lightning as L

from sparsight.models.instance_fcn import SCALES
from sparsight.models.stride8_trunks import load_trunk_weights
from sparsight.models.window_sampling import WindowRule
from sparsight.train.architecture import ProposalArchitecture, build_dense, convert
from sparsight.train.checkpoint import load_checkpoint, save_checkpoint, write_atomically
from sparsight.train.data import (
    Coco,
    Voc,
    collate_proposals,
    proposal_transform,
    write_synthetic_coco,
    write_synthetic_voc,
)
from sparsight.train.evaluate_proposals import measured_network_share, score_proposals
from sparsight.train.proposal_task import ProposalTask
from sparsight.train.recipe import Recipe
from sparsight.train.sampling_flags import sampling_flags
from sparsight.train.settling import measure_norms_again, settle


def instance_fcn(
    *,
    data: str | None = None,
    dataset: Literal["coco", "voc"] = "coco",
    sbd: str | None = None,
    backbone: Literal["vgg16", "resnet18", "resnet34", "resnet50", "resnet101"] = "vgg16",
    num_stages: int = 4,
    pretrained: str | None = None,
    init: str | None = None,
    is_norm_frozen: bool | None = None,
    k: int = 5,
    m: int = 21,
    head_channels: int = 512,
    size: tuple[int, int] = (600, 1200),
    scales: tuple[float, ...] | list[float] = SCALES,
    crop_scale: float | None = None,
    positive_octaves: float = 0.3,
    steps: int = 40_000,
    epochs: int | None = None,
    batch_size: int = 1,
    accumulate: int = 8,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    lr: float = 1e-3,
    mask_weight: float = 1.0,
    mask_target: Literal["binary", "share"] = "binary",
    scalar_lr_factor: float = 1.0,
    gradient_clip: float = 35.0,
    seed: int = 0,
    out: str = "runs/instance_fcn",
    resume: bool = False,
    num_workers: int = 2,
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
    validate_every: int = 1,
    overfit_images: int | None = None,
    progress_bar: bool = True,
    quick: bool = False,
    **shared: Any,
) -> dict[str, Any]:
    """Train InstanceFCN on COCO or VOC and score its mask proposals on the validation images.

    Paper: Dai et al., ECCV 2016, arXiv 1603.08678. AR@10, 100, 1000 of VGG-16: on VOC 2012 val
    38.9, 49.7, 52.6, on the first 5,000 images of COCO's val 16.6, 31.7, 39.2.
    Data: COCO 2017; or VOC 2012, trained on the annotations of SBD. ImageNet weights of the
    backbone, as torchvision's file.
    Command: `sparsight train recipes/proposals/instance_fcn.py --data DIR --pretrained
    vgg16-397923af.pth --devices 8 --accumulate 1 --out runs/instance_fcn`.
    Expected score, hours and hardware: the published schedule (40,000 steps of 8 images) was not
    run here, on any hardware. 20 images of COCO over-fitted, 16,600 steps of a small ResNet-18 in
    40 minutes of one CPU thread: AR@100 64.0, see docs/results/2026-11-22-dense-prediction.md.
    Departures from the paper: see `sparsight.models.instance_fcn`; every other image is flipped.

    Args:
        data: folder of the data set: COCO's with annotations/instances_{train,val}2017.json,
            train2017/ and val2017/, or VOC's with VOCdevkit/VOC2012/. Needed unless `quick`.
        dataset: "coco" or "voc".
        sbd: of VOC: folder of SBD, whose "train_noval" images are trained on, as published, instead
            of the 1,464 of VOC's own "train".
        backbone: "vgg16" as published, or a ResNet of torchvision at stride 8.
        num_stages: of a ResNet: 3 leaves out layer4, 2 layer3 too, most of the cost.
        pretrained: local file of torchvision's weights of the backbone; default: random weights.
        init: checkpoint (*.safetensors) to start from; a dense one may start a sampled model.
        is_norm_frozen: norms of a ResNet are constants; default: if `pretrained` is given.
        k: bins a side of a window.
        m: cells of 8 pixels a side of a window.
        head_channels: width of both branches.
        size: shorter side of the image in pixels at scale 1, and the bound on the longer, as
            600x1200.
        scales: factors on the size: one for each training image, drawn; all at inference. As
            published 0.1975,0.2963,0.4444,0.6667,1,1.5.
        crop_scale: at larger scales, training images are cropped to the size that they have at this
            one, around an object where one fits: uncropped, the largest scale costs as much as all
            others together.
        positive_octaves: how far the size of an object may be from the window's, as a power of 2,
            for it to be learnt there: half the distance of the scales or more, or objects between
            two scales are learnt at neither.
        steps: optimiser steps; 40,000 as published. Rounded to whole epochs.
        epochs: passes over the training images instead.
        batch_size: images per process and micro-batch, which share a scale. Published are 8 images
            a step, each at its own: `--batch-size 1 --accumulate 8`, or `--devices 8 --accumulate
            1`.
        accumulate: micro-batches per optimiser step.
        optimizer: "sgd" as published; "adamw" for short runs from random weights.
        lr: peak learning rate; 1e-3 as published, which falls to a tenth after four fifths.
        mask_weight: of the masks' loss beside that of objectness.
        mask_target: what a cell of a mask is told: "binary" whether half of it is the object's,
            "share" how much of it is, which gives back finer outlines.
        scalar_lr_factor: learning rate of the samplers' biases and interpolation widths over that
            of the rest; 10 suits short runs.
        gradient_clip: largest norm of a step's gradient.
        seed: of weights, order, flips, scales, windows and noise.
        out: folder for the results: weights.safetensors, result.json, last.ckpt, log/metrics.csv.
        resume: go on from `out`/last.ckpt; repeat the other flags.
        num_workers: processes that read images.
        precision: of training; validation and evaluation of the final weights run in float32.
        validate_every: epochs from one validation and stored state to the next.
        overfit_images: train on the first so many training images, without flips, and score on the
            same ones, to see that a model can learn at all.
        progress_bar: draw it.
        quick: two epochs of two steps, narrow branches, small images; on drawn scenes where no data
            is given. Proves that the recipe runs.
        **shared: flags of `sparsight.train.sampling_flags`: sampling, processes, machines, memory.

    Returns:
        What is also written to result.json: average recall, MACs, share. Empty in all processes of
        a distributed run but the first.

    Raises:
        ValueError: no data, a budget outside (0, 1], a budget and a weight at once, `pretrained`
            and `init` at once, SBD without VOC, or a checkpoint of another architecture.
        FileNotFoundError: data folders, weights or checkpoint missing.
    """
    flags, hardware = sampling_flags(**shared)
    if pretrained is not None and init is not None:
        raise ValueError(
            f"instance_fcn: pretrained={pretrained!r} and init={init!r} were both given; at most "
            "one is required; drop --pretrained to go on from the checkpoint."
        )
    if sbd is not None and dataset != "voc":
        raise ValueError(
            f"instance_fcn: sbd={sbd!r} with dataset={dataset!r}; SBD annotates VOC's images, and "
            "dataset 'voc' is required; add --dataset voc, or leave --sbd out."
        )
    folder = Path(out)
    if quick:
        epochs, batch_size, num_workers, accumulate = 2, min(batch_size, 2), 0, 1
        head_channels, size, scales = 16, (64, 128), (0.75, 1.0)
        if data is None:
            drawn = folder / "data"
            for name, split, num_images in (("train", 1, 8), ("val", 2, 4)):
                if dataset == "coco":
                    write_synthetic_coco(
                        drawn, num_images=num_images, split=f"{name}2017", seed=split
                    )
                else:
                    write_synthetic_voc(drawn, num_images=num_images, split=name, seed=split)
            data = str(drawn)
    if data is None:
        raise ValueError(
            "instance_fcn: no data folder was given; COCO's, with "
            "annotations/instances_train2017.json, annotations/instances_val2017.json, train2017/ "
            "and val2017/, or, for --dataset voc, VOC's, with VOCdevkit/VOC2012/, is required; "
            "pass --data DIR, or --quick true to run on drawn scenes."
        )
    train_data = _training_images(data, dataset, sbd, overfit_images)
    val_data: Coco | Voc = train_data
    if overfit_images is None:
        val_data = Coco(data, "val2017", with_masks=True) if dataset == "coco" else Voc(data, "val")
    if epochs is None:
        step_images = batch_size * accumulate * hardware.num_processes
        epochs = math.ceil(steps / max(1, len(train_data) // step_images))

    dense_architecture = ProposalArchitecture(
        backbone=backbone,
        num_stages=num_stages,
        is_norm_frozen=(pretrained is not None and backbone != "vgg16")
        if is_norm_frozen is None
        else is_norm_frozen,
        k=k,
        m=m,
        head_channels=head_channels,
        size=size,
        scales=tuple(scales),
    )
    planned = flags.plan(
        size=size, dense=lambda: build_dense(dense_architecture).get_submodule("network")
    )
    architecture = dataclasses.replace(
        dense_architecture, size=planned.size, sampling=planned.sampling
    )
    L.seed_everything(seed, verbose=False)
    if init is not None:
        network, _ = load_checkpoint(init, expected=architecture)
    else:
        dense = build_dense(architecture)
        if pretrained is not None:
            load_trunk_weights(dense.get_submodule("network.backbone"), pretrained)
        network = convert(dense, architecture)
    proposer: Any = network
    proposer.rule = WindowRule(positive_octaves=positive_octaves)
    proposer.mask_target = mask_target
    task = ProposalTask(
        network,
        architecture,
        val_data=val_data,
        optimizer=optimizer,
        objective=planned.objective,
        lr=lr,
        mask_weight=mask_weight,
        scalar_lr_factor=scalar_lr_factor,
    )
    is_flipped = overfit_images is None
    recipe = Recipe(
        train_data=train_data,
        train_transform=proposal_transform(
            scales=architecture.scales,
            is_training=True,
            is_flipped=is_flipped,
            crop_scale=crop_scale,
        ),
        val_data=val_data,
        val_transform=proposal_transform(),
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
        collate_fn=collate_proposals,
        anneal_share=flags.anneal_share,
        remeasures_norms=flags.remeasures_norms,
        hardware=hardware,
        shows_progress=progress_bar,
    )
    if not recipe.fit(task, resume=resume):
        return {}

    network.cpu().eval()
    result: dict[str, Any] = {
        "task": f"{dataset} mask proposals",
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
            network, recipe, flags.budget, num_images=64, measure=measured_network_share
        )
    path = folder / "weights.safetensors"
    save_checkpoint(path, network, architecture, dataset=dataset)
    scored = score_proposals(network, recipe.validation_batches(), data=val_data)
    result |= dataclasses.asdict(scored) | {"architecture": architecture.to_json()}
    write_atomically(folder / "result.json", json.dumps(result, indent=2).encode())
    print(f"{scored}\nweights: {path}")
    return result


def _training_images(
    data: str, dataset: Literal["coco", "voc"], sbd: str | None, max_images: int | None
) -> Coco | Voc:
    if dataset == "coco":
        return Coco(data, "train2017", keeps_empty=False, max_images=max_images, with_masks=True)
    if sbd is not None:
        return Voc(sbd, "train_noval", max_images=max_images)
    return Voc(data, "train", max_images=max_images)
