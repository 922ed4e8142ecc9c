"""The maps of a backbone that is asked for by name, or passed in as a module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from sparsight.models.mobilenet_stages import MobileNetV2Stages, is_mobilenet_v2
from sparsight.models.resnet_stages import ResNetStages, is_resnet, probe_stages

TIMM = "timm:"  # what a name of timm's models begins with
# What a module that returns no list of maps raises; the last of timm's that take one size only.
_NO_MAPS = (TypeError, AttributeError, IndexError, ValueError, StopIteration, AssertionError)


class LastFour(nn.Module):
    """The last four maps of a module that returns a list of them.

    Args:
        features: maps (B, 3, H, W) to at least four maps, finest first.
    """

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return four maps, finest first."""
        return list(self.features(image))[-4:]


def stages_of(
    caller: str, backbone: nn.Module | str, *, names: Sequence[str], is_norm_frozen: bool
) -> nn.Module:
    """Return a module that maps (B, 3, H, W) to maps, finest first: four, or six of a MobileNetV2.

    Args:
        caller: of whom, for messages.
        backbone: one of `names`; "timm:NAME"; or a module, see `refinenet`.
        names: torchvision's names that the caller takes.
        is_norm_frozen: norms are torchvision's FrozenBatchNorm2d; of a backbone of torchvision
            asked for by name.

    Raises:
        ValueError: an unknown name, or a module that does not return four maps.
        ModuleNotFoundError: a name of timm's, and timm is not installed.
    """
    if isinstance(backbone, str):
        if backbone.startswith(TIMM):
            return _checked(caller, LastFour(_of_timm(caller, backbone)), backbone)
        if backbone not in names:
            raise ValueError(
                f"{caller}: backbone={backbone!r}; one of {', '.join(map(repr, names))}, "
                f"'{TIMM}NAME' or a module is required; build any other backbone yourself and pass "
                "it."
            )
        # heavy: only for those who ask for a backbone by name
        from torchvision import models as zoo
        from torchvision.ops import FrozenBatchNorm2d

        norm = {"norm_layer": FrozenBatchNorm2d} if is_norm_frozen else {}
        if backbone == "mobilenet_v2":
            return MobileNetV2Stages(zoo.mobilenet_v2(weights=None, **norm))
        return ResNetStages(getattr(zoo.resnet, backbone)(weights=None, **norm))
    if is_resnet(backbone):
        return ResNetStages(backbone)
    if is_mobilenet_v2(backbone) and "mobilenet_v2" in names:
        return MobileNetV2Stages(backbone)
    return _checked(caller, LastFour(backbone), type(backbone).__name__)


def _of_timm(caller: str, backbone: str) -> nn.Module:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{caller}: backbone={backbone!r}, but timm is not installed; it is required for its "
            "models; pip install 'sparsight[timm]', or pass a backbone of torchvision.",
            name="timm",
        ) from error
    name = backbone.removeprefix(TIMM)
    try:
        return timm.create_model(name, features_only=True, pretrained=False)
    except (RuntimeError, AttributeError) as error:
        raise ValueError(
            f"{caller}: backbone={backbone!r}; the name of a model of timm that gives its features "
            f"is required ({error}); choose one of timm.list_models()."
        ) from error


def _checked(caller: str, stages: LastFour, name: str) -> nn.Module:
    try:
        _, strides = probe_stages(stages)
    except _NO_MAPS as error:
        strides, reason = [], f"does not return a list of maps ({error})"
    else:
        reason = f"returns maps of strides {strides}, finest first"
    if len(strides) != 4 or strides != sorted(strides):
        raise ValueError(
            f"{caller}: backbone {name} {reason}; a ResNet with torchvision's attribute names, or "
            "a module that returns at least four maps, finest first, is required; pass for example "
            "timm.create_model(name, features_only=True)."
        )
    return stages
