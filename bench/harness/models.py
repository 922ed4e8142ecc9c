"""The models that are measured: blocks and networks with random weights, at a wished density."""

import copy
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

import sparsight
from sparsight.convert import ConversionError
from sparsight.nn import Sampler

# planes -> height and width of the map, ResNet-50 on a 512x1024 image
STAGES = {64: (128, 256), 128: (64, 128), 256: (32, 64), 512: (16, 32)}


def liven_norms(model: nn.Module) -> nn.Module:
    """Scales and shifts as after training, so that folding is tested and values keep in range."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
    return model.eval().to(memory_format=torch.channels_last)


def dense_block(planes: int) -> Bottleneck:
    """A bottleneck without shortcut convolution."""
    torch.manual_seed(0)
    block = Bottleneck(4 * planes, planes)
    liven_norms(block)
    return block


def block_input(planes: int, size: tuple[int, int]) -> Tensor:
    """(1, 4 * planes, *size) as behind a ReLU, channels-last."""
    torch.manual_seed(1)
    return torch.randn(1, 4 * planes, *size).relu().to(memory_format=torch.channels_last)


def resnet(layers: tuple[int, int, int, int] = (3, 4, 6, 3), dilate: bool = False) -> ResNet:
    """A ResNet of bottlenecks, ResNet-50 by default; `dilate` the last two stages as FCN does."""
    torch.manual_seed(0)
    made = ResNet(Bottleneck, list(layers), replace_stride_with_dilation=[False, dilate, dilate])
    liven_norms(made)
    return made


class Maps(nn.Module):
    """A backbone whose dictionary or list of maps becomes a tuple, as exporters want it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the maps, finest first."""
        maps = self.body(x)
        return tuple(maps.values() if isinstance(maps, dict) else maps)


def sampler_at(density: float) -> Callable[..., Sampler]:
    """Samplers that keep a position with probability `density`: white noise, no grid."""
    if density in (0.0, 1.0):
        bias = math.copysign(30.0, density - 0.5)
    else:
        bias = math.log(density / (1 - density))
    return functools.partial(Sampler, bias=bias, grid_stride=None)


def sampled_at(model: nn.Module, density: float) -> nn.Module:
    """The converted model; a bare block is wrapped, so that it has a name."""
    model = copy.deepcopy(model)
    if isinstance(model, Bottleneck):
        model = nn.Sequential(model)
    return sparsight.sparsify(model, sampler=sampler_at(density)).eval()


def frozen(model: nn.Module, example: object, dtype: torch.dtype) -> nn.Module | str:
    """The frozen model, or why there is none in this dtype."""
    try:
        return sparsight.freeze(model, example=example, dtype=dtype)
    except ConversionError as refusal:
        if dtype == torch.float32:
            raise
        return f"no {str(dtype).removeprefix('torch.')}: {refusal}"
