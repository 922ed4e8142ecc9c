"""A tiny sampled checkpoint and a few images of each data set, made once a module."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sparsight.nn import Sampler
from sparsight.train.architecture import (
    Architecture,
    DetectorArchitecture,
    ProposalArchitecture,
    build_dense,
    convert,
)
from sparsight.train.checkpoint import save_checkpoint
from sparsight.train.data import (
    SyntheticClasses,
    SyntheticScenes,
    write_synthetic_coco,
    write_synthetic_voc,
)
from sparsight.train.sampling import Sampling

NUM_IMAGES = 4
SIZE = (32, 48)
SAMPLING = Sampling(grid_stride=None, window=3)
WITHOUT_PYRAMID = {"fpn_channels": None, "head_channels": None}
ARCHITECTURES = {
    "camvid": Architecture(
        num_classes=11, fpn_channels=8, head_channels=8, size=SIZE, sampling=SAMPLING
    ),
    "cityscapes": Architecture(
        num_classes=19, fpn_channels=8, head_channels=8, size=SIZE, sampling=SAMPLING
    ),
    "cifar10": Architecture(
        model="resnet_cifar",
        num_classes=10,
        backbone="resnet8",
        size=(32, 32),
        sampling=SAMPLING,
        **WITHOUT_PYRAMID,
    ),
    "imagenet": Architecture(
        model="resnet",
        num_classes=2,
        backbone="resnet18",
        size=(32, 32),
        sampling=SAMPLING,
        **WITHOUT_PYRAMID,
    ),
    "coco": DetectorArchitecture(
        num_classes=3,
        backbone="resnet18",
        fpn_channels=8,
        head_channels=16,
        size=(64, 90),
        sampling=SAMPLING,
    ),
    "voc": ProposalArchitecture(
        backbone="resnet18",
        num_stages=2,
        k=3,
        m=7,
        head_channels=8,
        size=(64, 90),
        scales=(0.5, 1.0),
        sampling=SAMPLING,
    ),
}


def write_data(name: str, root: Path) -> Path:
    """Write the validation images of a data set, and of its training images what a reader asks."""
    if name == "coco":
        return write_synthetic_coco(root, num_images=NUM_IMAGES, split="val2017", size=(64, 80))
    if name == "voc":
        return write_synthetic_voc(root, num_images=NUM_IMAGES, split="val", size=(64, 80))
    if name in ("cifar10", "imagenet"):
        drawn = SyntheticClasses(NUM_IMAGES, size=(32, 32))
        pixels = [drawn[i][0].permute(1, 2, 0).numpy() for i in range(NUM_IMAGES)]
        if name == "cifar10":
            split = {"images": np.stack(pixels), "labels": np.arange(NUM_IMAGES)}
            np.savez(root / "set.npz", **{f"test_{key}": value for key, value in split.items()})
            return root
        for i, picture in enumerate(pixels):
            for part in ("train", "val"):
                folder = root / part / f"n{i % 2}"
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(folder / f"picture{i}.png")
        return root
    scenes = SyntheticScenes(NUM_IMAGES, size=SIZE)
    for i in range(NUM_IMAGES):
        image, labels = scenes[i]
        paths = root / "val" / f"scene{i}.png", root / "valannot" / f"scene{i}.png"
        if name == "cityscapes":
            paths = (
                root / "leftImg8bit" / "val" / "ulm" / f"ulm_{i:06}_000000_leftImg8bit.png",
                root / "gtFine" / "val" / "ulm" / f"ulm_{i:06}_000000_gtFine_labelIds.png",
            )
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(paths[0])
        Image.fromarray(labels.byte().numpy()).save(paths[1])
    return root


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory) -> Callable[[str], tuple[Path, Path]]:
    """By name of a data set, a checkpoint that does not name it, and the folder of its images."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in made:
            torch.manual_seed(0)
            model = convert(build_dense(ARCHITECTURES[name]), ARCHITECTURES[name])
            for module in model.modules():
                if isinstance(module, Sampler):
                    nn.init.constant_(module.head.bias, 0.0)
            folder = tmp_path_factory.mktemp(name)
            save_checkpoint(folder / "weights.safetensors", model, ARCHITECTURES[name])
            (folder / "data").mkdir()
            made[name] = folder / "weights.safetensors", write_data(name, folder / "data")
        return made[name]

    return make
