"""Weights of torchvision's classifiers, into the backbone of a model for dense prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsight.models.backbone_stages import TIMM, LastFour
from sparsight.models.state_dict import is_count, misfits, read_state_dict

# What a ResNet has as a classifier and not as a backbone; others say so in `left_out`.
_LEFT_OUT = ("fc.",)


def load_backbone_weights(
    model: nn.Module, weights: str | Path, *, name: str | None = None
) -> list[str]:
    """Load the weights of a classifier into the backbone of a model; its classifier is dropped.

    Args:
        model: with a `backbone`, as `semantic_fpn`, `refinenet` and `faster_rcnn` return it, dense;
            changed in place. Both backbones of a two-scale RefineNet get them.
        weights: a file as `read_state_dict` takes it, *.safetensors or written by torch.save; or
            the name of weights in torchvision, as "IMAGENET1K_V1" or "DEFAULT", which torchvision
            fetches, unless it did before. What is the name of a file is read as a file.
        name: torchvision's name of the backbone, as "resnet50"; needed for the name of weights.

    Returns:
        Names of the backbone's parameters that keep their values: offsets of deformable
        convolutions, which no classifier has.

    Raises:
        FileNotFoundError: no such file, and nothing that could be the name of weights.
        ConnectionError: torchvision could not fetch the weights; says from where.
        ValueError: the model has no backbone; torchvision has no such weights; the file holds no
            state_dict; or, naming the keys, it holds another network's.

    Cost: for a name, a download of the weights, once a machine (torch.hub's folder).

    Example:
        >>> import tempfile, torch
        >>> from torchvision.models import resnet18
        >>> from sparsight.models import semantic_fpn
        >>> file = Path(tempfile.mkdtemp()) / "resnet18.pth"
        >>> torch.save(resnet18().state_dict(), file)
        >>> load_backbone_weights(semantic_fpn("resnet18", num_classes=3), file)
        []
    """
    backbones = _backbones(model)
    if not backbones:
        raise ValueError(
            f"load_backbone_weights: {type(model).__name__} has no backbone; a semantic FPN, a "
            "RefineNet or a Faster R-CNN is required; load weights of the whole network instead."
        )
    tensors = _tensors(weights, name)
    kept: list[str] = []
    for backbone in backbones:
        kept = _fit(backbone, tensors, weights)
    return kept


def _backbones(model: nn.Module) -> list[nn.Module]:
    backbone = getattr(model, "backbone", None)
    # A detector's is a ResNet and the pyramid on top of it.
    found = [getattr(backbone, "body", backbone), getattr(model, "other_backbone", None)]
    found = [module.features if isinstance(module, LastFour) else module for module in found]
    return [module for module in found if isinstance(module, nn.Module)]


def _tensors(weights: str | Path, name: str | None) -> dict[str, Tensor]:
    path = Path(weights)
    # The names in torchvision are upper case, and without folder or suffix.
    is_name = str(weights).isupper() and path.name == str(weights) and not path.suffix
    if is_name and not path.exists():
        return _fetched(str(weights), name)
    advice = (
        "a local file of torchvision's weights is required, or their name, as IMAGENET1K_V1; pass "
        "another file, or fetch the one that torchvision names (its weights' .url)"
    )
    return read_state_dict(path, name="load_backbone_weights", advice=advice)


def _fetched(weights: str, name: str | None) -> dict[str, Tensor]:
    from torchvision.models import get_model_weights  # heavy: only for those who ask for a name

    if name is not None and name.startswith(TIMM):
        raise ValueError(
            f"load_backbone_weights: weights={weights!r} by name for {name!r}; timm's weights are "
            "required as a file; save the state_dict of timm.create_model("
            f"{name.removeprefix(TIMM)!r}, features_only=True, pretrained=True), and pass that."
        )
    if name is None:
        raise ValueError(
            f"load_backbone_weights: weights={weights!r} without the name of the backbone; "
            "torchvision's name of it is required; pass name='resnet50', or a file."
        )
    try:
        kinds: Any = get_model_weights(name)
    except ValueError as error:
        raise ValueError(
            f"load_backbone_weights: torchvision has no model {name!r}, but the weights "
            f"{weights!r} are asked for by name; pass a file of weights instead."
        ) from error
    if weights not in kinds.__members__:
        known = ", ".join(dict.fromkeys([*kinds.__members__, "DEFAULT"]))
        raise ValueError(
            f"load_backbone_weights: weights={weights!r} of {name!r}; one of {known} is required; "
            "pass one of these, or a file."
        )
    found = kinds[weights]
    try:
        return dict(found.get_state_dict(progress=False, check_hash=True))
    except OSError as error:  # URLError is one
        raise ConnectionError(
            f"load_backbone_weights: torchvision could not fetch {weights} of {name!r} from "
            f"{found.url} ({error}); a network is required the first time; fetch this file "
            "elsewhere and pass it."
        ) from error


def _fit(backbone: nn.Module, tensors: dict[str, Tensor], weights: str | Path) -> list[str]:
    own = backbone.state_dict()
    left_out: Any = getattr(backbone, "left_out", _LEFT_OUT)
    # FrozenBatchNorm2d does not count batches, and old files have no counts.
    fitting = {
        key: value
        for key, value in tensors.items()
        if key in own or not (is_count(key) or key.startswith(left_out))
    }
    missing = [key for key in own if key not in fitting and not is_count(key)]
    refused = misfits(own, fitting, missing=[key for key in missing if ".offset." not in key])
    if refused:
        raise ValueError(
            f"load_backbone_weights: {str(weights)!r} does not fit the backbone: "
            f"{'; '.join(refused)}; weights of the same network are required; build the model "
            "with the backbone that they were trained with."
        )
    backbone.load_state_dict(fitting, strict=False)
    return missing
