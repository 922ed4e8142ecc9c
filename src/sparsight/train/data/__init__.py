"""Images and annotations as datasets: CamVid, COCO, and street scenes drawn on the spot.

Enters: a folder or a seed. Leaves: pairs of an image and its annotation, a class map or a
detector's target, as torchvision tv_tensors. A training item is a pure function of (seed, epoch,
index), so an interrupted run can go on exactly, with any number of workers. May import: torch,
torchvision, numpy, PIL.
"""

from sparsight.train.data.augment import (
    EpochSampler,
    SeededView,
    evaluation_transform,
    training_transform,
)
from sparsight.train.data.boxes import collate_detection, detection_transform
from sparsight.train.data.camvid import CamVid
from sparsight.train.data.coco import Coco
from sparsight.train.data.synthetic import SyntheticScenes
from sparsight.train.data.synthetic_coco import write_synthetic_coco

__all__ = [
    "CamVid",
    "Coco",
    "EpochSampler",
    "SeededView",
    "SyntheticScenes",
    "collate_detection",
    "detection_transform",
    "evaluation_transform",
    "training_transform",
    "write_synthetic_coco",
]
