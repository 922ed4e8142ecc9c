"""Architectures, one file each; the backbone is an argument.

Enters: a backbone and a number of classes. Leaves: an ordinary dense `nn.Module` with the call
contract of torchvision's models, ready for `sparsight.sparsify`. May import: nn and below;
torchvision only to build a backbone, or fetch its weights, by name.
"""

from sparsight.models.backbone_weights import load_backbone_weights
from sparsight.models.faster_rcnn import faster_rcnn
from sparsight.models.frrn import FRRN, frrn_a, frrn_b
from sparsight.models.instance_fcn import InstanceFCN, instance_fcn
from sparsight.models.refinenet import RefineNet, light_weight_refinenet, refinenet
from sparsight.models.resnet_cifar import ResNetCifar, load_resnet_cifar, resnet_cifar
from sparsight.models.semantic_fpn import SemanticFPN, semantic_fpn
from sparsight.models.small_c3d import SmallC3D, small_c3d
from sparsight.models.state_dict import read_state_dict
from sparsight.models.torchvision_resnet import torchvision_resnet
from sparsight.models.torchvision_segmentation import torchvision_segmentation

__all__ = [
    "FRRN",
    "InstanceFCN",
    "RefineNet",
    "ResNetCifar",
    "SemanticFPN",
    "SmallC3D",
    "faster_rcnn",
    "frrn_a",
    "frrn_b",
    "instance_fcn",
    "light_weight_refinenet",
    "load_backbone_weights",
    "load_resnet_cifar",
    "read_state_dict",
    "refinenet",
    "resnet_cifar",
    "semantic_fpn",
    "small_c3d",
    "torchvision_resnet",
    "torchvision_segmentation",
]
