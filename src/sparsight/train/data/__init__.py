"""Images and clips with annotations: CamVid, Cityscapes, CIFAR-10, ImageNet, COCO, VOC, drawn ones.

Enters: a folder or a seed. Leaves: pairs of an image, as torchvision's tv_tensor, and a class map,
a class or a detector's target. A training item is a pure function of (seed, epoch, index), so an
interrupted run can go on exactly, with any number of workers. May import: torch, torchvision,
numpy, PIL.
"""

from sparsight.train.data.augment import (
    EpochSampler,
    SeededView,
    Transform,
    evaluation_transform,
    training_transform,
)
from sparsight.train.data.augment_frrn import frrn_transform
from sparsight.train.data.boxes import collate_detection, detection_transform
from sparsight.train.data.camvid import CamVid
from sparsight.train.data.cifar10 import (
    CIFAR10,
    cifar10_evaluation_transform,
    cifar10_training_transform,
)
from sparsight.train.data.cityscapes import Cityscapes
from sparsight.train.data.coco import Coco
from sparsight.train.data.imagenet import (
    ImageFolders,
    imagenet_evaluation_transform,
    imagenet_training_transform,
)
from sparsight.train.data.instance_masks import collate_proposals, proposal_transform
from sparsight.train.data.moving_shapes import MovingShapes, clip_transform
from sparsight.train.data.synthetic import SyntheticScenes
from sparsight.train.data.synthetic_classes import SyntheticClasses
from sparsight.train.data.synthetic_coco import write_synthetic_coco
from sparsight.train.data.synthetic_voc import write_synthetic_voc
from sparsight.train.data.voc import Voc

__all__ = [
    "CIFAR10",
    "CamVid",
    "Cityscapes",
    "Coco",
    "EpochSampler",
    "ImageFolders",
    "MovingShapes",
    "SeededView",
    "SyntheticClasses",
    "SyntheticScenes",
    "Transform",
    "Voc",
    "cifar10_evaluation_transform",
    "cifar10_training_transform",
    "clip_transform",
    "collate_detection",
    "collate_proposals",
    "detection_transform",
    "evaluation_transform",
    "frrn_transform",
    "imagenet_evaluation_transform",
    "imagenet_training_transform",
    "proposal_transform",
    "training_transform",
    "write_synthetic_coco",
    "write_synthetic_voc",
]
