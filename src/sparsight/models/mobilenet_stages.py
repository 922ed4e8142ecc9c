"""The maps of a MobileNetV2, as the light-weight RefineNet takes them.

Letters in shapes: B batch, C channels, H W height and width in pixels.
"""

from __future__ import annotations

from torch import Tensor, nn

# Of torchvision's `features`: the last layer of each width from 24 channels on, by its index. The
# 1x1 convolution to 1280 channels behind them is the classifier's.
_ENDS = (3, 6, 10, 13, 16, 17)


class MobileNetV2Stages(nn.Module):
    """The outputs of the last six stages of a MobileNetV2, without its head.

    Strides 4, 8, 16, 16, 32, 32 with 24, 32, 64, 96, 160 and 320 channels. Children keep the names
    they have in torchvision, so that its weights load (`load_backbone_weights`).

    `sparsight.sparsify` leaves all of it dense: an inverted residual block is no residual block
    that it knows, and most of its multiply-adds are in 1x1 convolutions from few channels, where a
    hole that is interpolated costs nearly as much as one that is computed.

    Args:
        mobilenet: torchvision's MobileNetV2, of any width; its modules are used as they are, not
            copied.
    """

    left_out = ("classifier.", f"features.{_ENDS[-1] + 1}.")  # of torchvision's keys

    def __init__(self, mobilenet: nn.Module) -> None:
        super().__init__()
        layers = mobilenet.features
        assert isinstance(layers, nn.Sequential)
        self.features = layers[: _ENDS[-1] + 1]

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return the outputs of the six stages, finest first.

        Args:
            image: (B, 3, H, W), floating point.

        Returns:
            Six maps (B, C_i, H_i, W_i).
        """
        x, maps = image, []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in _ENDS:
                maps.append(x)
        return maps


def is_mobilenet_v2(module: nn.Module) -> bool:
    """Whether a module is torchvision's MobileNetV2, by name: it may not be installed."""
    names = (f"{cls.__module__}.{cls.__name__}" for cls in type(module).__mro__)
    return "torchvision.models.mobilenetv2.MobileNetV2" in names
