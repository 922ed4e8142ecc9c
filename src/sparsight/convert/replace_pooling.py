"""Other poolings in the place of a model's own, of the same shapes."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from sparsight.convert.find import ConversionError, Where, refuse_replacement, refuse_wrapped
from sparsight.convert.sparsify import describe_output, eval_mode, replace_modules
from sparsight.nn.pooling import (
    AdaptiveSoftPool2d,
    PooledConv2d,
    SoftPool1d,
    SoftPool2d,
    SoftPool3d,
)

__all__ = ["replace_pooling"]

Kind = Literal["soft", "max", "average"]

# One class per kind, for one, two and three axes, and the adaptive ones.
_WINDOWED: dict[str, tuple[type[nn.Module], ...]] = {
    "soft": (SoftPool1d, SoftPool2d, SoftPool3d),
    "max": (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    "average": (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
}
_ADAPTIVE: dict[str, type[nn.Module]] = {
    "soft": AdaptiveSoftPool2d,
    "max": nn.AdaptiveMaxPool2d,
    "average": nn.AdaptiveAvgPool2d,
}
_KIND_OF = {cls: kind for kind, classes in _WINDOWED.items() for cls in classes}
_ADAPTIVE_KIND_OF = {cls: kind for kind, cls in _ADAPTIVE.items()}


def replace_pooling(
    model: nn.Module,
    *,
    kind: Kind = "soft",
    where: Where | None = None,
    strided_convolutions: bool = False,
    example: Any = None,
) -> nn.Module:
    """A copy of the model whose poolings are of another kind, with the same output shapes.

    Window, stride, padding and ceil_mode stay. Padding wins no weight in any kind: an average
    that is put in divides by the positions inside the map (count_include_pad=False).

    Args:
        model: an eager model; not changed.
        kind: what takes their place: "soft" (default), "max" or "average".
        where: where(qualified name, module) -> bool, asked for every max, average and SoftPool
            module, adaptive 2-D ones included, and for strided convolutions where these are asked
            for. Default None: all but the adaptive ones, which mostly are the global pooling
            before a classifier (SoftPool's authors leave it an average).
        strided_convolutions: whether a 2-D convolution that steps becomes one of stride 1 with a
            pooling behind it, of windows as large as the stride. Default False. It then costs as
            many times the multiply-adds as the stride has positions.
        example: what the model takes as its one argument. If given, source and result are run on
            it in eval mode and must return the same structure, shapes and dtypes; and, without
            `where`, no pooling may run outside a module.

    Returns:
        The converted model, in the mode of the source; the source's state_dict loads into it. A
        module shared under several names stays shared.

    Raises:
        ConversionError: listing every selected layer that cannot be replaced, and why: it returns
            indices, has another forward or a divisor of its own, is dilated where averages are
            asked for, or is hooked; or if there is nothing to replace (a functional pooling inside
            a forward cannot be); or if the model is scripted, compiled or wrapped; or if `example`
            shows that the call contract was not kept.
        ValueError: `kind` is unknown.
        TypeError: an argument has a wrong type.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(3, 2, 1))
        >>> replace_pooling(net)[1]
        SoftPool2d(kernel_size=3, stride=2, padding=1)

    Source: Stergiou, Poppe, Kalliatakis, ICCV 2021 (arXiv 2101.00440), section 4; there a window of
    3 in a ResNet's stem becomes one of 2, here it stays.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"replace_pooling: model is a {type(model).__name__}, but must be a torch.nn.Module; "
            "pass the model itself."
        )
    if kind not in get_args(Kind):
        raise ValueError(
            f"replace_pooling: kind is {kind!r}, but must be 'soft', 'max' or 'average'; pass "
            "'soft' for the default."
        )
    if where is not None and not callable(where):
        raise TypeError(
            f"replace_pooling: where is {where!r}, but must be a callable (name, module) -> bool; "
            "pass for example where=lambda name, module: name.startswith('stem')."
        )
    refuse_wrapped("replace_pooling", model)
    selected = _select(model, kind, where, strided_convolutions)
    refused = [
        (name, reason)
        for name, module in selected.items()
        if (reason := _refuse(module, kind)) is not None
    ]
    if refused:
        raise ConversionError(
            f"replace_pooling: {len(refused)} layers of {type(model).__name__} cannot be replaced "
            f"by {kind} pooling; leave them out with `where`:",
            refused,
        )
    if not selected:
        raise ConversionError(
            f"replace_pooling: {type(model).__name__} holds no selected module that {kind} pooling "
            "could replace, but at least one of another kind is needed; a functional pooling "
            "inside a forward (torch.nn.functional.max_pool2d) cannot be replaced: write it as a "
            "module first."
        )
    converted = copy.deepcopy(model)
    replacements: dict[nn.Module, Any] = {}
    for name in selected:
        old = converted.get_submodule(name)
        replacements[old] = _make(old, kind).train(old.training)
    converted = replace_modules(converted, replacements)
    if example is not None:
        _try(model, converted, example, reject_functional=where is None)
    return converted


def _select(
    model: nn.Module, kind: Kind, where: Where | None, strided_convolutions: bool
) -> dict[str, nn.Module]:
    """What is to be replaced, by its first name; what is of the kind already is left out."""
    names_of: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names_of.setdefault(module, []).append(name)
    selected: dict[str, nn.Module] = {}
    for module, names in names_of.items():
        windowed = _kind_of(module, _KIND_OF)
        adaptive = _kind_of(module, _ADAPTIVE_KIND_OF)
        if windowed is not None or (adaptive is not None and where is not None):
            if kind in (windowed, adaptive):
                continue
        elif not (strided_convolutions and _is_strided(module)):
            continue
        if where is None or any(where(name, module) for name in names):
            selected[names[0]] = module
    return selected


def _kind_of(module: nn.Module, kinds: dict[type[nn.Module], str]) -> str | None:
    return next((kind for cls, kind in kinds.items() if isinstance(module, cls)), None)


def _is_strided(module: nn.Module) -> bool:
    if not isinstance(module, nn.Conv2d) or isinstance(module, PooledConv2d):
        return False
    return max(module.stride) > 1


def _refuse(module: Any, kind: Kind) -> str | None:
    """Why a selected module cannot be replaced; None if it can."""
    reason = refuse_replacement(module)
    if reason is not None:
        return reason
    known = {*_KIND_OF, *_ADAPTIVE_KIND_OF, nn.Conv2d}
    if type(module) not in known or "forward" in vars(module):
        return f"a {type(module).__name__} may have another forward than the class it is made from"
    if getattr(module, "return_indices", False):
        return "it returns indices (return_indices=True), which only max pooling has"
    if getattr(module, "divisor_override", None) is not None:
        return f"its divisor_override is {module.divisor_override}, so that it is no mean"
    if kind == "average" and not isinstance(module, nn.Conv2d):
        dilation = getattr(module, "dilation", 1)
        if any(d != 1 for d in (dilation if isinstance(dilation, tuple | list) else [dilation])):
            return f"its dilation is {dilation}, which average pooling does not have"
    return None


def _make(module: Any, kind: Kind) -> Any:
    """The module that takes its place."""
    if isinstance(module, nn.Conv2d):
        return PooledConv2d.from_conv(module, kind=kind)
    if type(module) in _ADAPTIVE_KIND_OF:
        return _ADAPTIVE[kind](module.output_size)
    axes = next(
        i for classes in _WINDOWED.values() for i, cls in enumerate(classes) if type(module) is cls
    )
    cls: Any = _WINDOWED[kind][axes]
    numbers = {
        "stride": module.stride,
        "padding": module.padding,
        "ceil_mode": module.ceil_mode,
    }
    if kind == "average":
        return cls(module.kernel_size, **numbers, count_include_pad=False)
    return cls(module.kernel_size, **numbers, dilation=getattr(module, "dilation", 1))


class _FunctionalPools(TorchDispatchMode):
    """Collects the modules in whose own forward a pooling runs that is no module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {module: name for name, module in model.named_modules()}
        self.running: list[nn.Module] = []
        self.found: dict[str, str] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        enter = register_module_forward_pre_hook(lambda m, _: self.running.append(m))
        leave = register_module_forward_hook(lambda *_: self.running.pop() and None)
        try:
            with self:
                yield
        finally:
            enter.remove()
            leave.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        called = func.name().partition(".")[0]
        is_pool = ("max_pool" in called or "avg_pool" in called) and "adaptive" not in called
        if is_pool and self.running:
            owner = self.running[-1]
            if not any(_kind_of(owner, kinds) for kinds in (_KIND_OF, _ADAPTIVE_KIND_OF)):
                self.found[self.names.get(owner, type(owner).__name__)] = called
        return func(*args, **(kwargs or {}))


def _try(source: nn.Module, converted: nn.Module, example: Any, *, reject_functional: bool) -> None:
    """Run both models on the example and compare what they return."""
    with eval_mode(source):
        expected = describe_output(source(example))
    pools = _FunctionalPools(converted)
    with eval_mode(converted), pools.watching():
        arrived = describe_output(converted(example))
    if arrived != expected:
        raise ConversionError(
            f"replace_pooling: the converted model returns {arrived} for the example, but the "
            f"source returns {expected}; leave layers out with `where` until they agree."
        )
    if reject_functional and pools.found:
        raise ConversionError(
            f"replace_pooling: {type(source).__name__} pools outside of modules, which cannot be "
            "replaced; write these as modules, or say with `where` what is to be replaced:",
            [(name, f"its forward calls {op}") for name, op in pools.found.items()],
        )
