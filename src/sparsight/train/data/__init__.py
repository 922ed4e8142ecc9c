"""Images and annotations as datasets: CamVid from a folder, and street scenes drawn on the spot.

Enters: a folder or a seed. Leaves: `(image, class map)` pairs as torchvision tv_tensors. A training
item is a pure function of (seed, epoch, index), so an interrupted run can go on exactly, with any
number of workers. May import: torch, torchvision, numpy, PIL.
"""

from sparsight.train.data.augment import (
    EpochSampler,
    SeededView,
    evaluation_transform,
    training_transform,
)
from sparsight.train.data.camvid import CamVid
from sparsight.train.data.synthetic import SyntheticScenes

__all__ = [
    "CamVid",
    "EpochSampler",
    "SeededView",
    "SyntheticScenes",
    "evaluation_transform",
    "training_transform",
]
