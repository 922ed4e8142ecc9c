"""Where a frozen network's maps may be bfloat16: between layers that take them as they are."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sparsight.nn.frozen_block import FrozenBlock
from sparsight.nn.frozen_conv import FrozenConv2d
from sparsight.nn.pooling import AdaptiveSoftPool2d, SoftPool1d, SoftPool2d, SoftPool3d

__all__ = ["keep_maps_narrow"]

_TAG = "_sparsight_producers"
_aten = torch.ops.aten
# What may stand between two frozen layers: its result is of its inputs' dtype, and has no more
# rounding than the maps themselves.
_PASSES = {
    _aten.add,
    _aten.add_,
    _aten.alias,
    _aten.avg_pool2d,
    _aten.cat,
    _aten.clone,
    _aten.detach,
    _aten.max_pool2d,
    _aten.max_pool2d_with_indices,
    _aten.relu,
    _aten.relu_,
    torch.ops.sparsight.merge_maps,
    torch.ops.sparsight.soft_pool,
}
# So do these modules, whatever operators they are made of.
_SOFT_POOLS = (SoftPool1d, SoftPool2d, SoftPool3d, AdaptiveSoftPool2d)
_PLAIN = (FrozenConv2d, nn.Sequential, nn.Identity, nn.AvgPool2d, *_SOFT_POOLS)


def _producers(values: Any) -> set[nn.Module]:
    found: set[nn.Module] = set()
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, Tensor):
            found |= getattr(leaf, _TAG, set())
    return found


class _Readers(TorchDispatchMode):
    """Collects the layers whose output something reads that needs float32."""

    def __init__(self) -> None:
        super().__init__()
        self.wide: set[nn.Module] = set()
        self.read: set[nn.Module] = set()
        self.tagged: list[weakref.ref[Tensor]] = []
        self.pooled: list[set[nn.Module]] = []  # what the pooling that runs now reads

    def tag(self, tensor: Tensor, made_by: set[nn.Module]) -> None:
        setattr(tensor, _TAG, getattr(tensor, _TAG, set()) | made_by)
        self.tagged.append(weakref.ref(tensor))

    def enter_pool(self, module: nn.Module, args: Any) -> None:
        """Before a soft pooling: what follows is its own affair."""
        self.pooled.append(_producers(args))

    def leave_pool(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """After it: who reads its output reads the layers behind its input."""
        made_by = self.pooled.pop()
        self.read |= made_by
        if made_by:
            self.tag(output, made_by)

    def kept(self) -> set[nn.Module]:
        """Layers whose maps somebody still holds after the call."""
        return _producers([tensor for ref in self.tagged if (tensor := ref()) is not None])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.pooled:
            return result
        made_by = _producers((args, kwargs))
        if made_by:
            self.read |= made_by
            packet = func.overloadpacket
            if packet in _PASSES:
                for leaf in pytree.tree_leaves(result):
                    if isinstance(leaf, Tensor):
                        self.tag(leaf, made_by)
            elif packet is _aten.to and result is args[0]:
                pass  # a cast to float32, which while one looks changes nothing
            elif not _is_a_frozen_layer_reading(packet, (args, kwargs)):
                self.wide |= made_by
        return result


def _is_a_frozen_layer_reading(packet: Any, arguments: Any) -> bool:
    if packet is torch.ops.sparsight.sampled_block:
        return True
    # While one looks, maps are float32 and every layer narrows what it is given: `to` in inference
    # mode, its part `_to_copy` elsewhere.
    narrows = torch.bfloat16 in pytree.tree_leaves(arguments)
    return packet in (_aten.to, _aten._to_copy) and narrows


def keep_maps_narrow(model: nn.Module, example: Any) -> list[str]:
    """Let the bfloat16 layers of a frozen model hand bfloat16 to each other.

    The model is run once on `example` to see what reads each layer's output: one that is read by
    frozen layers only, directly or through pooling, sums, ReLU or concatenation, returns bfloat16
    from then on. Everything else stays float32, and so does what outlives the call: what the model
    returns, in whatever container, and what it or a hook keeps.

    Args:
        model: frozen, with ``dtype=torch.bfloat16`` layers that return float32; changed.
        example: what the model takes as its one argument.

    Returns:
        Names of the layers that return bfloat16.
    """
    layers = {
        module: name
        for name, module in model.named_modules()
        if isinstance(module, FrozenBlock | FrozenConv2d) and module.dtype == torch.bfloat16
    }

    readers = _Readers()

    def tag(module: nn.Module, args: Any, output: Tensor) -> None:
        readers.tag(output, {module})

    handles = [layer.register_forward_hook(tag) for layer in layers]
    for module in model.modules():
        if type(module) in _SOFT_POOLS:
            # Innermost: what other hooks do with its input and output is looked at.
            handles += [
                module.register_forward_pre_hook(readers.enter_pool),
                module.register_forward_hook(readers.leave_pool, prepend=True),
            ]
    try:
        with torch.no_grad(), readers:
            returned = model(example)
        kept = readers.kept()
        del returned
    finally:
        for handle in handles:
            handle.remove()
    narrowed = []
    for layer, name in layers.items():
        if layer in readers.read and layer not in readers.wide | kept:
            layer.output_dtype = torch.bfloat16
            narrowed.append(name)
    for layer in layers:
        if isinstance(layer, FrozenBlock) and layer.downsample is not None:
            plain = all(isinstance(part, _PLAIN) for part in layer.downsample.modules())
            layer.shortcut_dtype = torch.bfloat16 if plain else torch.float32
    return narrowed
