"""Which layers of a model can be sampled, which cannot, and why."""

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from sparsight.nn.conv_pair import ConvPair
from sparsight.nn.deform_block import DeformableBlock
from sparsight.nn.deform_conv import DeformableConv2d

__all__ = ["ConversionError", "Targets", "find_targets"]

Where = Callable[[str, nn.Module], bool]

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)

# Blocks whose forward `sparsight.nn.SampledBlock` knows.
_RESIDUAL_BLOCKS = (
    "torchvision.models.resnet.BasicBlock",
    "torchvision.models.resnet.Bottleneck",
    "sparsight.models.resnet_cifar.BasicBlock",
)
_OWN_BLOCKS = (ConvPair, DeformableBlock)


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is registered on this very module that replacing it would drop."""
    return any(getattr(module, kind, None) for kind in _HOOKS)


class ConversionError(ValueError):
    """A model, or some of its layers, cannot be converted.

    Attributes:
        refused: every refused layer as (qualified name, reason); empty if the model as a whole was
            refused.
    """

    refused: tuple[tuple[str, str], ...]

    def __init__(self, message: str, refused: list[tuple[str, str]] | None = None) -> None:
        self.refused = tuple(refused or ())
        lines = [message, *(f"  {name or '(the model)'}: {why}" for name, why in self.refused)]
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type, tuple[str, list[tuple[str, str]]]]:
        # The message already lists the refused layers: give pickle its first part only.
        message = str(self.args[0]).split("\n")
        return type(self), ("\n".join(message[: len(message) - len(self.refused)]), [*self.refused])


@dataclass(frozen=True)
class Targets:
    """What `find_targets` found, by qualified name, outermost first, in the order of named_modules.

    Attributes:
        blocks: residual blocks to sample.
        convs: single convolutions to sample.
        left_dense: what the default would take but cannot: (name, reason).
    """

    blocks: dict[str, nn.Module]
    convs: dict[str, nn.Conv2d]
    left_dense: list[tuple[str, str]]


def find_targets(model: nn.Module, where: Where | None = None) -> Targets:
    """Select the layers of a model to convert.

    Args:
        model: any module; not changed.
        where: called as where(qualified name, module) for every module; True selects a residual
            block or a convolution. A container (it holds blocks or convolutions) may be selected
            along with some of its content, as predicates on names do; it is the content that
            counts. Default None: every residual block of torchvision's ResNet, ResNeXt and Wide
            ResNet, of `sparsight.models.resnet_cifar`, every
            :class:`sparsight.nn.DeformableBlock` and :class:`sparsight.nn.ConvPair`, and the
            convolutions that a module of the model names in ``convs_to_sample()``, a list of names
            relative to it.

    Returns:
        The selected layers. What lies inside a selected block is not listed itself. A module with
        several names is listed once, under its first.

    Raises:
        ConversionError: listing every layer that `where` selected and that cannot be converted;
            or if nothing is left to convert; or if the model as a whole cannot be: it is converted
            already, scripted, compiled, or wrapped for parallel training.
    """
    _refuse_model(model)
    if where is None:
        return _find_default(model)
    return _find_where(model, where)


def _refuse_model(model: nn.Module) -> None:
    refuse_wrapped("sparsify", model)
    for name, module in model.named_modules():
        if hasattr(module, "samplers_named"):
            raise ConversionError(
                f"sparsify: {_place(name)} is a {type(module).__name__}, so that the model is "
                "converted already, but a dense model is needed; select everything in one call, "
                "from the dense source."
            )


def _place(name: str) -> str:
    return f"its submodule {name!r}" if name else "it"


def refuse_wrapped(caller: str, model: nn.Module) -> None:
    """Raise ConversionError where a model is scripted, compiled or wrapped for training."""
    for name, module in model.named_modules():
        at = _place(name)
        if isinstance(module, torch.jit.ScriptModule):
            raise ConversionError(
                f"{caller}: {at} is scripted (torch.jit), but Python modules are needed; convert "
                "the model before scripting."
            )
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise ConversionError(
                f"{caller}: {at} is compiled (torch.compile), but an eager model is needed; "
                "convert first, then compile the result."
            )
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise ConversionError(
                f"{caller}: {at} is wrapped in {type(module).__name__}, but the bare model is "
                "needed; convert model.module, then wrap the result."
            )


def _find_default(model: nn.Module) -> Targets:
    blocks: dict[str, nn.Module] = {}
    convs: dict[str, nn.Conv2d] = {}
    left_dense: list[tuple[str, str]] = []
    names_of_convs: set[str] = set()
    for name, module in model.named_modules():
        # What a module says of its own convolutions: only it knows which of them cost enough.
        told: Callable[[], list[str]] | None = getattr(module, "convs_to_sample", None)
        if told is not None:
            names_of_convs |= {f"{name}.{child}" if name else child for child in told()}
        if _is_inside(name, blocks):
            continue
        if block_class(module) is not None:
            reason = refuse_block(module)
            if reason is None:
                blocks[name] = module
        elif name in names_of_convs:
            reason = refuse_conv(module)  # type: ignore[arg-type]  # says so if it is none
            if reason is None:
                convs[name] = module  # type: ignore[assignment]
        else:
            continue
        if reason is not None:
            left_dense.append((name, reason))
    if not blocks and not convs:
        raise ConversionError(
            f"sparsify: {type(model).__name__} holds no residual block of a known ResNet "
            "family that can be converted, but the default needs one; select convolutions with "
            "where=lambda name, module: isinstance(module, torch.nn.Conv2d) and ...",
            left_dense,
        )
    return Targets(blocks, convs, left_dense)


def _find_where(model: nn.Module, where: Where) -> Targets:
    if not callable(where):
        raise TypeError(
            f"sparsify: where is {where!r}, but must be a callable (name, module) -> bool; pass "
            "for example where=lambda name, module: name.startswith('layer4')."
        )
    names_of: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names_of.setdefault(module, []).append(name)
    selected = [m for m, names in names_of.items() if any(where(name, m) for name in names)]
    if not selected:
        raise ConversionError(
            f"sparsify: where selected none of the {len(names_of)} modules of "
            f"{type(model).__name__}, but at least one block or convolution is needed; compare "
            "with the names of model.named_modules()."
        )

    blocks: dict[str, nn.Module] = {}
    convs: dict[str, nn.Conv2d] = {}
    containers: list[str] = []
    refused: list[tuple[str, str]] = []
    selected_blocks = {name for m in selected if block_class(m) for name in names_of[m]}
    for module in selected:
        names = names_of[module]
        inside = [name for name in names if _is_inside(name, selected_blocks)]
        if len(inside) == len(names):
            continue
        if block_class(module) is not None:
            reason = refuse_block(module)
            if reason is None:
                blocks[names[0]] = module
        elif isinstance(module, nn.Conv2d):
            reason = refuse_conv(module)
            if reason is None and inside:
                reason = f"it is also part of a selected block, as {inside[0]!r}; select only one"
            if reason is None:
                convs[names[0]] = module
        elif any(block_class(m) or isinstance(m, nn.Conv2d) for m in module.modules()):
            containers.append(names[0])
            continue
        else:
            reason = f"a {type(module).__name__} is neither a Conv2d nor a residual block"
        if reason is not None:
            refused.append((names[0], reason))
    taken = [*blocks, *convs, *(name for name, _ in refused)]
    for name in containers:
        if not any(_is_inside(other, [name]) for other in taken):
            kind = type(model.get_submodule(name)).__name__
            refused.append(
                (name, f"a {kind} is a container; select blocks or convolutions inside it")
            )
    if refused:
        raise ConversionError(
            f"sparsify: where selected {len(refused)} layers of {type(model).__name__} that "
            "cannot be sampled; leave them out:",
            refused,
        )
    return Targets(blocks, convs, [])


def _is_inside(name: str, containers: Container[str]) -> bool:
    """Whether a qualified name lies strictly below one of the others."""
    if not name:
        return False
    parts = name.split(".")
    return any(".".join(parts[:i]) in containers for i in range(len(parts)))


def block_class(module: nn.Module) -> type | None:
    """The class that makes this module a residual block of the ResNet family, or None.

    By qualified name: only three rooms may import torchvision, this one may not import
    `sparsight.models`, and a model that holds such a block has imported it already.
    """
    for cls in type(module).__mro__:
        if cls in _OWN_BLOCKS:
            return cls
        if f"{cls.__module__}.{cls.__name__}" in _RESIDUAL_BLOCKS:
            return cls
    return None


def refuse_block(block: Any) -> str | None:
    """Why a residual block cannot be sampled; None if it can."""
    cls = block_class(block)
    assert cls is not None
    if type(block).forward is not cls.forward or "forward" in vars(block):
        return f"{type(block).__name__} has another forward than {_named(cls)}"
    reason = refuse_replacement(block)
    if reason is not None:
        return reason
    num_convs = 3 if cls.__name__ == "Bottleneck" or hasattr(block, "conv3") else 2
    expected = {f"{kind}{i + 1}" for i in range(num_convs) for kind in ("conv", "bn")}
    children = {name for name, child in block.named_children() if child is not None}
    if children - {"downsample"} != expected | {"relu"}:
        difference = ", ".join(sorted(children - {"downsample"} ^ (expected | {"relu"})))
        return f"its children are not those of {_named(cls)}: {difference}"
    if type(block.relu) is not nn.ReLU:
        return f"its activation is {type(block.relu).__name__}, but only ReLU is known"
    for i in range(1, num_convs + 1):
        conv, norm = getattr(block, f"conv{i}"), getattr(block, f"bn{i}")
        is_moving = i == 2 and isinstance(conv, DeformableConv2d)
        reason = _refuse_deformable(conv, cls) if is_moving else _refuse_conv_kind(conv)
        if cls is DeformableBlock and i == 2 and not is_moving:
            reason = f"a {type(conv).__name__} is not a DeformableConv2d"
        if reason is not None:
            return f"conv{i}: {reason}"
        if conv.padding != "same" and any(
            2 * conv.padding[axis] != conv.dilation[axis] * (conv.kernel_size[axis] - 1)
            for axis in (0, 1)
        ):
            return (
                f"conv{i}: padding is not half the kernel, so that the block's masks would not fit"
            )
        is_absent = cls is ConvPair and type(norm) is nn.Identity
        reason = None if is_absent else _refuse_norm(norm)
        if reason is not None:
            return f"bn{i}: {reason}"
    if num_convs == 3 and (tuple(block.conv3.kernel_size), tuple(block.conv3.stride)) != (
        (1, 1),
        (1, 1),
    ):
        return "conv3 is not a 1x1 convolution of stride 1"
    return None


def refuse_conv(conv: nn.Conv2d) -> str | None:
    """Why a single convolution cannot be sampled; None if it can."""
    return _refuse_conv_kind(conv) or refuse_replacement(conv)


def _refuse_conv_kind(conv: Any) -> str | None:
    if _is_lazy(conv):
        return "it is lazy and has no weight yet; run the model once first"
    if not isinstance(conv, nn.Conv2d):
        return f"a {type(conv).__name__} is not a Conv2d"
    if (
        type(conv).forward is not nn.Conv2d.forward
        or type(conv)._conv_forward is not nn.Conv2d._conv_forward
        or "forward" in vars(conv)
    ):
        return f"{type(conv).__name__} has another forward than Conv2d"
    if conv.padding_mode != "zeros":
        return f"padding_mode is {conv.padding_mode!r}, but only 'zeros' can be sampled"
    return None


def _refuse_deformable(conv: DeformableConv2d, block_kind: type) -> str | None:
    if type(conv).forward is not DeformableConv2d.forward or "forward" in vars(conv):
        return f"{type(conv).__name__} has another forward than DeformableConv2d"
    if conv.is_guided and block_kind is not DeformableBlock:
        return (
            f"it is to be guided, and {_named(block_kind)} does not guide it; use a "
            "DeformableBlock, or make the convolution without guide_channels"
        )
    if block_kind is DeformableBlock and not conv.is_guided:
        return "a DeformableBlock guides it, and it was made without guide_channels"
    return None


def _named(cls: type) -> str:
    if cls in _OWN_BLOCKS:
        return cls.__name__
    owner = "torchvision" if "torchvision" in cls.__module__ else cls.__module__
    return f"{owner}'s {cls.__name__}"


def _refuse_norm(norm: Any) -> str | None:
    if _is_lazy(norm):
        return "it is lazy and has no statistics yet; run the model once first"
    buffers = ("running_mean", "running_var")
    if any(cls.__name__ == "FrozenBatchNorm2d" for cls in type(norm).__mro__):
        if all(isinstance(getattr(norm, b, None), torch.Tensor) for b in buffers):
            return None
    if not isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm):
        return (
            f"a {type(norm).__name__} is not BatchNorm2d or FrozenBatchNorm2d, so that it depends "
            "on more than one position"
        )
    if norm.running_mean is None:
        return "it keeps no running statistics, so that it depends on all positions"
    return None


def _is_lazy(module: nn.Module) -> bool:
    return any(nn.parameter.is_lazy(parameter) for parameter in module.parameters(recurse=False))


def refuse_replacement(module: nn.Module) -> str | None:
    """Why this module object cannot be replaced by another one, whatever it computes."""
    # First: some parametrizations bring hooks of their own.
    if parametrize.is_parametrized(module):
        return (
            "a parametrization is registered on it, which replacing it would drop; remove it "
            "first, with torch.nn.utils.parametrize.remove_parametrizations"
        )
    if has_hooks(module):
        return "hooks are registered on it, which replacing it would drop; remove them first"
    return None
