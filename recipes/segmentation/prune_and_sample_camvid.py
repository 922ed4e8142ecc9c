"""A trained segmentation model of CamVid, pruned, then sampled, learning from what it was."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

from sparsight.models.refinenet import BackboneName
from sparsight.train.architecture import SegmentationModel, build_dense
from sparsight.train.data import CamVid, SyntheticScenes, evaluation_transform
from sparsight.train.distillation import shared_flags
from sparsight.train.evaluate import score
from sparsight.train.initial_weights import with_widths_of
from sparsight.train.prune_and_sample import DENSE_FILE, ChainSettings, prune_and_sample
from sparsight.train.recipe import Recipe
from sparsight.train.sampling_flags import SamplingFlags
from sparsight.train.segmentation_choices import (
    Augmentation,
    Loss,
    segmentation_architecture,
    segmentation_transform,
)
from sparsight.train.segmentation_run import train_segmentation


def prune_and_sample_camvid(
    *,
    data: str | None = None,
    init: str | None = None,
    model: SegmentationModel = "semantic_fpn",
    backbone: BackboneName = "resnet18",
    fpn_channels: int = 48,
    head_channels: int = 48,
    channels: int | None = None,
    size: tuple[int, int] = (240, 320),
    speedup: float = 2.0,
    round_to: int = 16,
    num_images: int = 256,
    tune_epochs: int = 0,
    tune_lr: float = 1e-4,
    budget: float = 0.5,
    calibration_steps: int = 0,
    epochs: int = 20,
    batch_size: int = 8,
    accumulate: int = 1,
    lr: float = 5e-4,
    loss: Loss = "cross_entropy",
    augmentation: Augmentation = "default",
    teacher: str | None = None,
    latency: bool = True,
    seed: int = 0,
    out: str = "runs/camvid-pruned-sampled",
    resume: bool = False,
    num_workers: int = 2,
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
    progress_bar: bool = True,
    quick: bool = False,
    **shared: Any,
) -> dict[str, Any]:
    """Prune channels, sample places, learn from the dense network: a table of every step.

    Papers: He, Zhang, Sun, ICCV 2017, arXiv 1707.06168 (channels); Xie et al., ECCV 2020, arXiv
    2003.08866 (places); Hinton et al., arXiv 1503.02531 (the teacher). None has them together.
    Data: CamVid in the SegNet arrangement, 367 training and 101 validation images of 480x360.
    Command: first `sparsight train recipes/segmentation/camvid.py --data DIR --out runs/dense`,
    then `sparsight train recipes/segmentation/prune_and_sample_camvid.py --data DIR --init
    runs/dense/weights.safetensors`. The same multiply-adds by sampling alone: `camvid.py --data DIR
    --init runs/dense/weights.safetensors --teacher runs/dense/weights.safetensors --lr 5e-4
    --epochs 20` with the `share_of_dense` of this run's result.json as `--budget`.
    Expected score: not run here yet.

    Args:
        data: folder with train/, trainannot/, val/, valannot/. Needed unless `quick`.
        init: checkpoint (*.safetensors) of the trained dense network. Needed unless `quick`.
        model: architecture of `init`, as for camvid.py.
        backbone: of the semantic FPN and of RefineNet.
        fpn_channels: width of the pyramid.
        head_channels: width of the segmentation branch.
        channels: width of FRRN's stem or of RefineNet's decoder; of no other model.
        size: height and width of the images in pixels, as 240x320.
        speedup: how many times fewer multiply-adds pruning leaves, see
            `sparsight.compress.prune_channels`; 1 leaves all channels.
        round_to: widths are multiples of it, where layers are wide enough.
        num_images: about so many training images that pruning and calibration look at, without
            their labels.
        tune_epochs: passes that train the pruned network before it is sampled; 0 for none.
        tune_lr: peak learning rate of these.
        budget: share of the *pruned* network's MACs to compute, in (0, 1], everything counted: of
            the dense one's that is `budget / speedup`.
        calibration_steps: fit samplers without labels first, and start training there. 0 by
            default: training starts from the pruned network, computed everywhere.
        epochs: passes over the training images of the last, sampled training.
        batch_size: images per micro-batch.
        accumulate: micro-batches per optimiser step.
        lr: peak learning rate of AdamW.
        loss: "cross_entropy", or "bootstrapped", FRRN's: of the worst sixteenth of each image.
        augmentation: as for camvid.py.
        teacher: weights of the teacher, as for the other recipes; default: the dense network that
            pruning started from. `--distill-alpha 0` learns from labels alone.
        latency: also measure milliseconds of every step, frozen, for one image.
        seed: of weights, images, order, augmentation and noise.
        out: folder for the results: weights.safetensors, result.json, and the steps before:
            dense.safetensors, pruned.safetensors, converted.safetensors, tuned/.
        resume: keep the steps that `out` has, and go on with training from its last.ckpt; repeat
            the other flags.
        num_workers: processes that read images.
        precision: of training; validation and evaluation run in float32.
        progress_bar: draw it.
        quick: two epochs of two batches on small images; on drawn scenes where no data is given,
            with random weights and a narrow pyramid where there are none. Proves that the recipe
            runs.
        **shared: flags of `sparsight.train.shared_flags`: sampling, teacher, machine, memory. One
            process alone.

    Returns:
        What is also written to result.json: "steps" with mIoU, MACs, share of the dense ones and
        milliseconds of each; see `sparsight.train.prune_and_sample`.

    Raises:
        ValueError: no data or no weights, flags that contradict each other, a speed-up or budget
            out of reach, or a checkpoint of another architecture.
        FileNotFoundError: data folders or checkpoint missing.
        ImportError: the extra `sparsight[compress]` is not installed.
    """
    folder = Path(out)
    flags, distillation, hardware = shared_flags(
        budget=budget, teacher=teacher or str(folder / DENSE_FILE), **shared
    )
    if not quick and (data is None or init is None):
        missing = "data folder" if data is None else "checkpoint"
        raise ValueError(
            f"prune_and_sample_camvid: no {missing} was given; both are required; pass --data DIR "
            "(CamVid in the SegNet arrangement) and --init FILE (weights.safetensors of a dense "
            "run of camvid.py), or --quick true."
        )
    if quick:
        epochs, batch_size, num_workers, accumulate = 2, min(batch_size, 2), 0, 1
        num_images, tune_epochs = min(num_images, 8), min(tune_epochs, 1)
        calibration_steps = min(calibration_steps, 2)
        size = (64, 96)
        if init is None:
            fpn_channels, head_channels = 16, 16
    train_data: CamVid | SyntheticScenes = SyntheticScenes(8, size=size, seed=1)
    val_data: CamVid | SyntheticScenes = SyntheticScenes(4, size=size, seed=2)
    if data is not None:
        train_data, val_data = CamVid(data, "train"), CamVid(data, "val")
    dense = segmentation_architecture(
        model=model,
        num_classes=len(train_data.classes),
        size=size,
        backbone=backbone,
        fpn_channels=fpn_channels,
        head_channels=head_channels,
        channels=channels,
    )
    recipe = Recipe(
        train_data=train_data,
        train_transform=segmentation_transform(
            augmentation, size, model=model, ignore_index=train_data.ignore_index
        ),
        val_data=val_data,
        val_transform=evaluation_transform(size),
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

    def train(at: Recipe, *, flags: SamplingFlags, init: str, **how: Any) -> dict[str, Any]:
        narrow = with_widths_of(dense, init)
        return train_segmentation(
            at,
            name="camvid segmentation",
            dense=narrow,
            planned=flags.plan(size=size, dense=lambda: build_dense(narrow)),
            flags=flags,
            init=init,
            distillation=distillation,
            loss=loss,
            **how,
        )

    return prune_and_sample(
        recipe,
        name="prune_and_sample_camvid",
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
        flags=flags,
        train=train,
        score=partial(score, classes=val_data.classes, ignore_index=val_data.ignore_index),
        lr=lr,
        latency=latency,
        resume=resume,
    )
