"""Backbones without their last two strides: one map at an eighth of the image's size.

Letters in shapes: B batch, C channels, H W height and width in pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from sparsight.models.resnet_stages import STAGES, is_resnet
from sparsight.models.state_dict import read_state_dict

STRIDE = 8
TrunkName = Literal["vgg16", "resnet18", "resnet34", "resnet50", "resnet101"]
TRUNK_NAMES = ("vgg16", "resnet18", "resnet34", "resnet50", "resnet101")

# Output channels of the convolutions of VGG-16 between its poolings.
_VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16Trunk(nn.Module):
    """The 13 convolutions of VGG-16 at stride 8, under torchvision's names.

    The fourth pooling has stride 1 and looks at 3x3 positions, so that the map keeps its size; the
    three convolutions behind it are dilated by 2, so that they see what they saw. The fifth pooling
    and the classifier are left out. torchvision's `vgg16` state_dict loads with `strict=False`:
    `classifier.*` is left over.

    Attributes:
        out_channels: 512.
    """

    out_channels = 512

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for number, widths in enumerate(_VGG16, start=1):
            dilation = 2 if number == 5 else 1
            for width in widths:
                conv = nn.Conv2d(channels, width, 3, padding=dilation, dilation=dilation)
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # it has one
                layers += [conv, nn.ReLU(inplace=True)]
                channels = width
            if number < 4:
                layers.append(nn.MaxPool2d(2, stride=2))
            elif number == 4:
                layers.append(nn.MaxPool2d(3, stride=1, padding=1))
        self.features = nn.Sequential(*layers)

    def forward(self, image: Tensor) -> Tensor:
        """Return (B, 512, H // 8, W // 8) of an image (B, 3, H, W)."""
        return self.features(image)

    def convs_to_sample(self) -> list[str]:
        """Names of the convolutions that `sparsify` samples by default: all but the first.

        The first has three input channels: filling its holes would cost more than computing them.
        """
        return [
            f"features.{i}"
            for i, layer in enumerate(self.features)
            if isinstance(layer, nn.Conv2d) and i > 0
        ]


class ResNetTrunk(nn.Module):
    """A ResNet at stride 8: layer3 and layer4 are dilated instead of stepping.

    Children keep their names of torchvision: a classifier's state_dict loads with `strict=False`.

    Args:
        resnet: torchvision's, or one with its attributes; changed in place.
        num_stages: 4, or 3 or 2 to leave out the last ones, which at stride 8 cost most: of a
            ResNet-18 layer4 71 %, layer3 18 %.

    Attributes:
        out_channels: of the map.

    Source: torchvision's `replace_stride_with_dilation`, for basic blocks too: the first block of a
    stage keeps the dilation of the stage before, the others double it.
    """

    def __init__(self, resnet: nn.Module, *, num_stages: int = 4) -> None:
        super().__init__()
        stages = STAGES[:num_stages]
        for name in ("conv1", "bn1", "relu", "maxpool", *stages):
            self.add_module(name, getattr(resnet, name))
        dilation = 1
        for name in stages[2:]:
            for i, block in enumerate(getattr(resnet, name)):
                _step_by_one(block, dilation if i == 0 else 2 * dilation)
            dilation *= 2
        last: Any = getattr(self, stages[-1])[-1]
        self.out_channels: int = (getattr(last, "conv3", None) or last.conv2).out_channels
        self._stages = stages

    def forward(self, image: Tensor) -> Tensor:
        """Return (B, C, H / 8, W / 8), sides rounded up, of an image (B, 3, H, W)."""
        children: Any = self
        x = children.maxpool(children.relu(children.bn1(children.conv1(image))))
        for name in self._stages:
            x = getattr(self, name)(x)
        return x


def _step_by_one(block: Any, dilation: int) -> None:
    """Take the stride out of a residual block and spread its 3x3 convolutions."""
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
            if tuple(module.kernel_size) == (3, 3):
                module.dilation = module.padding = (dilation, dilation)
    block.stride = 1


def named_trunk(
    name: str, *, num_stages: int = 4, is_norm_frozen: bool = False, caller: str = "named_trunk"
) -> VGG16Trunk | ResNetTrunk:
    """Return a trunk with random weights.

    Args:
        name: "vgg16" or a ResNet of torchvision.
        num_stages: of a ResNet, see `ResNetTrunk`.
        is_norm_frozen: norms of a ResNet are constants, for weights that were trained before.
        caller: for messages.

    Raises:
        ValueError: another name, stages outside 2 to 4, or settings of a ResNet for VGG.
    """
    if name not in TRUNK_NAMES:
        raise ValueError(
            f"{caller}: backbone={name!r}; one of {', '.join(TRUNK_NAMES)} or a module of stride "
            f"{STRIDE} is required; build any other backbone yourself and pass it."
        )
    if num_stages not in (2, 3, 4):
        raise ValueError(
            f"{caller}: num_stages={num_stages}; 2, 3 or 4 is required; leave it out for the whole "
            "ResNet."
        )
    if name == "vgg16":
        if num_stages != 4 or is_norm_frozen:
            raise ValueError(
                f"{caller}: num_stages={num_stages}, is_norm_frozen={is_norm_frozen} with "
                "backbone='vgg16'; VGG has neither residual stages nor norms; leave both out."
            )
        return VGG16Trunk()
    from torchvision.models import resnet as zoo  # heavy: only for those who ask for its models
    from torchvision.ops import FrozenBatchNorm2d

    norm = FrozenBatchNorm2d if is_norm_frozen else nn.BatchNorm2d
    return ResNetTrunk(getattr(zoo, name)(weights=None, norm_layer=norm), num_stages=num_stages)


def trunk_of(
    module: nn.Module, *, num_stages: int = 4, caller: str = "trunk_of"
) -> tuple[nn.Module, int]:
    """Return a backbone that was passed as a trunk, and the channels of its map.

    Args:
        module: a ResNet with torchvision's attributes, dilated in place; or a module that maps
            (B, 3, H, W) to one map of stride 8 and says its `out_channels`.
        num_stages: of a ResNet, see `ResNetTrunk`.
        caller: for messages.

    Raises:
        ValueError: neither.
    """
    if is_resnet(module):
        trunk = ResNetTrunk(module, num_stages=num_stages)
        return trunk, trunk.out_channels
    channels = getattr(module, "out_channels", None)
    if not isinstance(channels, int):
        raise ValueError(
            f"{caller}: backbone {type(module).__name__} has no out_channels; a ResNet with "
            f"torchvision's attribute names, or a module that maps an image to one map of stride "
            f"{STRIDE} and has the integer attribute out_channels, is required; set it."
        )
    return module, channels


def load_trunk_weights(trunk: nn.Module, path: str | Path) -> None:
    """Load a local file of torchvision's classification weights into a trunk, in place.

    Args:
        trunk: of `named_trunk`, dense.
        path: a state_dict on disk, as `read_state_dict` takes it, of the network that the trunk is
            of; its classifier, and stages that the trunk does not have, are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds no state_dict, or one of another network; names what differs.
    """
    advice = (
        "a local file of torchvision's weights of the same backbone is required, as *.safetensors "
        "or written by torch.save; fetch it from the URL that torchvision names "
        "(torchvision.models.VGG16_Weights.IMAGENET1K_V1.url)"
    )
    tensors = read_state_dict(path, name="load_trunk_weights", advice=advice)
    own = trunk.state_dict()
    wrong = [
        f"{name} is {tuple(tensors[name].shape) if name in tensors else 'missing'}"
        for name, value in own.items()
        if not name.endswith("num_batches_tracked")
        and (name not in tensors or tensors[name].shape != value.shape)
    ]
    if wrong:
        raise ValueError(
            f"load_trunk_weights: {str(path)!r} does not fit the {type(trunk).__name__}: "
            f"{wrong[0]} ({len(wrong)} such); {advice}."
        )
    trunk.load_state_dict({k: v for k, v in tensors.items() if k in own}, strict=False)
