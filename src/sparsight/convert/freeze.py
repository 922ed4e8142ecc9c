"""A converted model in, the same function with packed weights and real kernels out."""

import copy
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from sparsight.convert.choose import Choose, faster_dense, told_forms
from sparsight.convert.find import ConversionError, has_hooks
from sparsight.convert.fold import fold_norms, fuse_pools, fuse_relus
from sparsight.convert.map_dtypes import keep_maps_narrow
from sparsight.nn.channels_last import put_channels_last
from sparsight.nn.frozen_block import Form, FrozenBlock, refusal
from sparsight.nn.frozen_conv import FrozenConv2d, refusal_of_conv, refusal_of_pool
from sparsight.nn.frozen_gated import FrozenGatedLayer, is_gated, refusal_of_gates
from sparsight.nn.frozen_sampler import FrozenSampler
from sparsight.nn.merge_maps import FrozenMergeMaps, MergeMaps
from sparsight.nn.sampled_block import SampledBlock
from sparsight.nn.sampled_conv import SampledConv2d
from sparsight.ops import cpu

__all__ = ["freeze"]


def freeze(
    model: nn.Module,
    *,
    example: Any,
    dtype: torch.dtype | None = None,
    choose: Choose | None = None,
) -> nn.Module:
    """An inference-only copy of the model that spends time at its sampled positions only.

    Norms and activations are folded into the convolutions, weights are packed once, and every
    sampled block becomes one operator call. The copy takes any batch and input size and returns
    what ``model.eval()`` returns, up to the rounding of `dtype`.

    That law is why nothing runs dense unless `choose` asks for it: where dense is faster, it also
    computes what the source interpolates. A layer that is chosen to run dense returns what its
    source returns with its masks all true. The choice is made here, once, and holds for every later
    input; ``repr`` shows it.

    Args:
        model: a model from :func:`sparsight.sparsify`, or a dense one (norms are folded); not
            changed. Its eval-mode function is frozen, whatever its mode.
        example: what the model takes as its one argument: a tensor, or a list of images. It is run
            to see which norms can be folded and that the copy keeps the call contract.
        dtype: what the layers compute in: torch.float32 or None (default), which takes the model's,
            or torch.bfloat16, whose weights, features and sampler heads have 8 bits of mantissa and
            whose sums are float32; it needs a CPU with AVX-512 BF16. The model takes and returns
            float32 either way: maps are bfloat16 where only frozen layers read them, as seen in
            one run on `example`. A logit within its rounding of 0 may decide the other way.
        choose: which sampled layers run dense. None (default): none. "measured": those that are
            faster dense by more than 2 % on what they receive when the model runs `example`, by
            medians taken in turns, about half a second a layer; the choice is one for this
            machine, number of threads and input size. A mapping from names of sampled layers, or a
            callable (name, module) over all of them, to "dense" or "sampled": those it says; what a
            mapping leaves out stays sampled. A convolution whose decisions are passed by its
            callers always stays sampled.

    Returns:
        The frozen model, in eval mode; `train()` raises. `record_sampling` and `measure` work on
        it; a dense layer shows full masks and counts every position. Sampled layers that the
        kernels do not cover stay as they are, with a warning that names them and says why; so do,
        if measured, those that `example` does not reach.

    Raises:
        TypeError: the model is no module, or `choose` nothing of the above.
        ConversionError: the model is frozen already or is not float32 on the CPU, this CPU cannot
            compute in `dtype`, `choose` names what is no sampled layer, says an unknown word or
            asks for dense where that cannot be, or the copy does not return what the source
            returns for `example`.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> image = torch.randn(1, 3, 16, 16)
        >>> freeze(net, example=image)(image).shape
        torch.Size([1, 4, 16, 16])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"freeze: model is a {type(model).__name__}, but must be a torch.nn.Module; pass what "
            "sparsify returned."
        )
    dtype = torch.float32 if dtype is None else dtype
    if dtype not in (torch.float32, torch.bfloat16):
        raise ConversionError(
            f"freeze: dtype is {dtype}, but the kernels compute in torch.float32 or "
            "torch.bfloat16; pass one of them, or leave dtype out."
        )
    if dtype == torch.bfloat16 and not cpu.has_bfloat16():
        raise ConversionError(
            "freeze: dtype is torch.bfloat16, but this CPU, or the compiler that sparsight was "
            "built with, has no AVX-512 BF16 instructions; leave dtype out for float32."
        )
    if any(
        isinstance(module, FrozenBlock | FrozenConv2d | FrozenGatedLayer)
        for module in model.modules()
    ):
        raise ConversionError(
            "freeze: the model is frozen already, but a trainable one is needed; pass the "
            "converted model that it was made from."
        )
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu" or (
            parameter.is_floating_point() and parameter.dtype != torch.float32
        ):
            raise ConversionError(
                f"freeze: parameter {name} is {parameter.dtype} on {parameter.device}, but the "
                "kernels need torch.float32 on the CPU; call model.float().cpu() first."
            )
    forms = told_forms(model, choose)
    frozen: Any = copy.deepcopy(model).eval().requires_grad_(False)
    with torch.no_grad():
        expected = _contract(frozen(example))
    fold_norms(frozen, example)
    sources = {
        name: module
        for name, module in frozen.named_modules(remove_duplicate=False)
        if choose == "measured" and isinstance(module, SampledBlock | SampledConv2d)
    }
    frozen, kept = _freeze_sampled(frozen, forms, dtype)
    frozen = _freeze_dense(frozen, kept, example, dtype)
    frozen = _replace(
        frozen,
        {
            module: FrozenMergeMaps(module.merging, resizing=module.resizing).eval()
            for module in frozen.modules()
            if type(module) is MergeMaps and not has_hooks(module)
        },
    )
    put_channels_last(frozen)
    if dtype == torch.bfloat16:
        keep_maps_narrow(frozen, example)
    if sources:
        frozen = _take_faster(frozen, sources, example, dtype)
    with torch.no_grad():
        arrived = _contract(frozen(example))
    if arrived != expected:
        raise ConversionError(
            f"freeze: the frozen model returns {arrived} for the example, but the source returns "
            f"{expected}; please report this model."
        )
    return frozen


def _freeze_sampled(
    model: nn.Module, forms: Mapping[str, Form], dtype: torch.dtype
) -> tuple[nn.Module, set[nn.Module]]:
    """Replace the sampled layers; also returns the modules that must stay as they are."""
    kept: set[nn.Module] = set()
    unfrozen: list[tuple[str, str]] = []
    refused: list[tuple[str, str]] = []
    # Innermost first: a block is packed together with its shortcut, which may hold sampled layers.
    for name, module in reversed(list(model.named_modules())):
        if not isinstance(module, SampledBlock | SampledConv2d):
            continue
        form = forms.get(name, "sampled")
        reason = refusal_of_gates(module) if is_gated(module) else refusal(module)
        if reason is None and any(has_hooks(part) for part in module.modules()):
            reason = "hooks are registered on it or inside it, which freezing would drop"
        if reason is not None and form == "dense":
            refused.append((name, reason))
            continue
        if reason is not None:
            unfrozen.append((name, reason))
            kept.update(module.modules())
            continue
        layer: nn.Module
        if is_gated(module):
            layer = FrozenGatedLayer(module, dtype=dtype)
        else:
            layer = FrozenBlock(module, dtype=dtype, computed=form)
        model = _replace(model, {module: layer})
    if refused:
        raise ConversionError(
            f"freeze: choose asks for {len(refused)} layers to run dense that the kernels do not "
            "cover; leave them out of choose, and they stay unfrozen:",
            refused[::-1],
        )
    for name, reason in reversed(unfrozen):
        warnings.warn(
            f"freeze: layer {name or '(the model)'} stays unfrozen, at the speed of the dense "
            f"one, because {reason}.",
            stacklevel=3,
        )
    for module in model.modules():
        # A head that runs outside the kernel stays what the sampler's own code expects.
        if isinstance(module, FrozenSampler):
            kept.update(module.modules())
        if isinstance(module, FrozenGatedLayer):
            kept.update(module.samplers.modules())
    return model, kept


def _take_faster(
    model: nn.Module,
    sources: Mapping[str, SampledBlock | SampledConv2d],
    example: Any,
    dtype: torch.dtype,
) -> nn.Module:
    """Replace the sampled layers that are faster dense."""
    pack_dense = partial(FrozenBlock, dtype=dtype, computed="dense")
    faster, unreached = faster_dense(model, sources, example, pack_dense=pack_dense)
    for sampled, dense in faster.items():
        # One by one: a dense block's shortcut may hold the next layer to be replaced.
        model = _replace(model, {sampled: dense})
    for name in unreached:
        warnings.warn(
            f"freeze: layer {name} stays sampled, because it does not run for the example and "
            "cannot be measured.",
            stacklevel=3,
        )
    return model


def _freeze_dense(
    model: nn.Module, kept: set[nn.Module], example: Any, dtype: torch.dtype
) -> nn.Module:
    """Pack the dense convolutions, each with the ReLU and the max pooling that alone read it."""
    convs = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Conv2d
        and module not in kept
        and not has_hooks(module)
        and refusal_of_conv(module) is None
    }
    # Only of those that will be replaced: an activation taken from another would be lost.
    clamped = fuse_relus(model, example, among=convs)
    pools = fuse_pools(
        model,
        example,
        allowed=lambda name, pool: name in convs and refusal_of_pool(convs[name], pool) is None,
    )
    return _replace(
        model,
        {
            conv: FrozenConv2d(conv, relu=name in clamped, pool=pools.get(name), dtype=dtype)
            for name, conv in convs.items()
        },
    )


def _replace(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put the new modules in the place of the old ones, under every name."""
    if model in replacements:
        return replacements[model]
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if child in replacements:
                parent._modules[child_name] = replacements[child]
    return model


def _contract(output: Any) -> Any:
    """Structure of a call's result; sizes only of dense maps (a detector's counts may differ)."""
    leaves, structure = pytree.tree_flatten(output)
    shapes = [
        (leaf.ndim, leaf.dtype) if isinstance(leaf, torch.Tensor) else type(leaf) for leaf in leaves
    ]
    return structure, shapes
