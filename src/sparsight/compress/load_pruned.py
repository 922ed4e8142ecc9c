"""Loading what was pruned into a network of full width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsight.compress.narrow import narrow
from sparsight.nn.channel_select import ChannelSelect

__all__ = ["insert_select", "load_pruned"]

_SELECT = ".select.channels"


def insert_select(model: nn.Module, name: str, channels: Tensor) -> None:
    """Put a `ChannelSelect` before a layer, in place.

    Args:
        model: changed.
        name: of the layer, which becomes `<name>.layer`, behind `<name>.select`.
        channels: (K,) the channels that the layer gets to see.
    """
    layer: Any = model.get_submodule(name)
    pair = nn.Sequential()
    pair.add_module("select", ChannelSelect(channels.to(layer.weight.device)))
    pair.add_module("layer", layer)
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, pair.train(layer.training))


def load_pruned(model: nn.Module, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Give a fresh dense model the widths of a pruned one, and its weights.

    The shapes in the state_dict are the record of the widths, so that nothing else needs saving.

    Args:
        model: the architecture that was pruned, at full width; changed in place.
        state_dict: of what `prune_channels` or `prune_filters` returned, fine-tuned or not. For a
            model that is sampled as well, load first and `sparsify` then.

    Returns:
        `model` itself, in its mode.

    Raises:
        ValueError: a name or a shape that pruning this architecture cannot have led to, or a tensor
            that is missing.

    Example:
        >>> import copy
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> fresh = copy.deepcopy(net)
        >>> narrow(net, {"0.weight": [5, 3, 3, 3], "0.bias": [5], "2.weight": [4, 5, 3, 3]})
        >>> load_pruned(fresh, net.state_dict())[0].out_channels
        5
    """
    for key, value in state_dict.items():
        if not key.endswith(_SELECT):
            continue
        name = key.removesuffix(_SELECT)
        layer = dict(model.named_modules()).get(name)
        if isinstance(layer, nn.Conv2d):
            insert_select(model, name, torch.zeros_like(value))
    narrow(model, state_dict)
    try:
        model.load_state_dict(dict(state_dict))
    except RuntimeError as error:
        raise ValueError(
            f"load_pruned: state_dict does not fit {type(model).__name__} ({error}); all tensors "
            "of a pruned model of this architecture are required; build the one that was pruned."
        ) from error
    return model
