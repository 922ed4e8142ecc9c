"""Counted multiply-adds: what a model computes for one input, and what its source network would."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparsight.measure.multiply_adds import convolution_macs, has_formula, multiply_adds
from sparsight.measure.sampled_layers import (
    LayerMacs,
    convolution_modules,
    interpolation_modules,
    join,
    owns_samplers,
    sampled_layers,
    samplers_of,
    shortcut_convolutions,
)
from sparsight.nn import Sampler, SamplingDecision


@dataclass(frozen=True)
class MacCount:
    """Multiply-adds of one call of a model, the whole batch together.

    Attributes:
        total: MACs that this input needed, sampler heads and interpolation included.
        dense: MACs of the source network: every sampled layer at every position, without heads and
            interpolation.
        layers: one row per layer that multiplies.
    """

    total: int
    dense: int
    layers: list[LayerMacs] = field(repr=False)

    @property
    def ratio(self) -> float:
        """Share of the source's MACs that was needed; above 1 if sampling costs more."""
        return self.total / self.dense if self.dense else float("nan")

    def __str__(self) -> str:
        name = max([len(row.name) for row in self.layers] + [len("layer")])
        kind = max([len(row.kind) for row in self.layers] + [len("kind")])
        lines = [f"{'layer':{name}}  {'kind':{kind}}  density   dense MMACs         MMACs"]
        lines += [
            f"{row.name:{name}}  {row.kind:{kind}}  {row.density:7.3f}"
            f"  {row.dense / 1e6:12.3f}  {row.total / 1e6:12.3f}"
            for row in self.layers
        ]
        lines.append(
            f"{'all':{name}}  {'':{kind}}  {'':7}  {self.dense / 1e6:12.3f}"
            f"  {self.total / 1e6:12.3f}  ({self.ratio:.3f} of dense)"
        )
        return "\n".join(lines)


def count_macs(model: nn.Module, x: Any) -> MacCount:
    """Count the multiply-adds of one call of a model.

    Works on ordinary, converted and frozen models, and gives a converted model and its frozen form
    the same rows. For a sampled layer it counts what the masks of this input ask for, whichever
    kernel answered: a converted model in eager mode computes more than is counted. A layer that
    `freeze(choose=...)` made dense counts every position, and neither heads nor interpolation.

    Counted, padding included: convolutions (transposed, grouped, depthwise, torchvision's
    deformable ones), linear layers, matrix products, attention (the upper bound: no mask), also
    where a forward calls functions instead of modules. A sampler head counts 9*C per position of
    its mask. Interpolation counts one multiply-add per filled hole, site in its window, and
    channel, a copy of the nearest site none; between two convolutions of a block only the holes
    that the second one reads are filled (before a deformable one, which may look anywhere, all),
    after the last one all are. The
    offsets of a deformable convolution are a row of their own, at its sites. Not counted: biases,
    normalisation, activations, pooling, additions, resizing, the bilinear gathering of deformable
    convolutions, recurrent layers.

    The box head of a detector sees as many proposals as survive, so `dense` of a converted detector
    is its own call with every mask full, not a run of the source.

    Args:
        model: any module in eval mode; run once, without gradients, and left as it was.
        x: what the model takes: a tensor, a list of images (torchvision's detectors), or a tuple of
            arguments.

    Returns:
        The counts of the whole batch. FLOPs are twice the MACs.

    Raises:
        ValueError: the model, or one of its samplers, is in training mode.
        RuntimeError: an operator of sparsight ran whose cost nobody declared.

    Example:
        >>> conv = torch.nn.Conv2d(3, 8, 3, padding=1).eval()
        >>> count_macs(conv, torch.zeros(1, 3, 10, 10)).total
        21600
    """
    check_eval("count_macs", model)
    tally = _Tally()
    with _watching(model, tally), _attention_in_parts(), torch.no_grad(), _Counter(tally):
        call_model(model, x)
    layers = list(tally.rows.values())
    return MacCount(sum(row.total for row in layers), sum(row.dense for row in layers), layers)


def call_model(model: Callable[..., Any], x: Any) -> Any:
    """Call a model: a tuple is spread over its arguments, anything else is its only one."""
    return model(*x) if isinstance(x, tuple) else model(x)


def check_eval(caller: str, model: nn.Module) -> None:
    """Raise ValueError unless the model and its samplers are in eval mode."""
    stateful = [("the model", model)]
    for name, module in model.named_modules():
        if owns_samplers(module):
            stateful += [(join(name, child), sampler) for child, sampler in samplers_of(module)]
    for name, module in stateful:
        if module.training:
            raise ValueError(
                f"{caller}: {name} is in training mode; what is measured is inference, with hard "
                "masks and without targets; call model.eval() first."
            )


@dataclass
class _Frame:
    """One running call of a module.

    Attributes:
        name: qualified name.
        module: the module.
        samplers: of a module that samples: index and name of each of its samplers, by id.
        masks: what they decided in this call, by index.
        declared: ids of the modules below whose multiply-adds are read off the masks, or off a
            declaration of this module, so that the operators they run are not booked.
        is_sampler: whether sampling added this module to the source network.
    """

    name: str
    module: nn.Module
    samplers: dict[int, tuple[int, str]] = field(default_factory=dict)
    masks: dict[int, Tensor] = field(default_factory=dict)
    declared: set[int] = field(default_factory=set)
    is_sampler: bool = False


class _Tally:
    """Rows by layer, added up over calls, and the stack of running modules."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], LayerMacs] = {}
        self.stack: list[_Frame] = []

    def add(self, row: LayerMacs) -> None:
        key = row.name, row.kind
        self.rows[key] = self.rows[key] + row if key in self.rows else row

    @property
    def is_declared(self) -> bool:
        """Whether a running module has declared what runs now, or runs it in its own forward."""
        declared: set[int] = set()
        for frame in self.stack:
            if id(frame.module) in declared:
                return True
            declared |= frame.declared
        return bool(self.stack and self.stack[-1].declared)

    def add_operator(self, macs: int) -> None:
        """Book the multiply-adds of an operator on the innermost module that runs."""
        if not self.stack:
            self.add(LayerMacs("", "function", macs, macs))
            return
        innermost = self.stack[-1]
        dense = 0 if any(frame.is_sampler for frame in self.stack) else macs
        self.add(LayerMacs(innermost.name, type(innermost.module).__name__, dense, macs))

    def enter(self, name: str, module: nn.Module) -> None:
        frame = _Frame(name, module)
        if owns_samplers(module):
            for index, (child, sampler) in enumerate(samplers_of(module)):
                frame.samplers[id(sampler)] = index, join(name, child)
            shortcut = [conv for _, conv in shortcut_convolutions(module)]
            below = [*convolution_modules(module), *interpolation_modules(module), *shortcut]
            frame.declared = {id(child) for child in below}
        elif isinstance(module, Sampler) or any(
            id(module) in outer.samplers for outer in self.stack
        ):
            frame.is_sampler = True
            if getattr(module, "head", None) is not None:
                frame.declared = {id(module.head)}
        elif getattr(module, "source_conv", None) is not None:
            frame.declared = {id(module.source_conv)}
        self.stack.append(frame)

    def leave(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        frame = self.stack.pop()
        assert frame.module is module
        if owns_samplers(module):
            for row in sampled_layers(frame.name, module, _masks(frame, args, kwargs)):
                self.add(row)
        elif isinstance(out, SamplingDecision):
            name = frame.name
            for owner in reversed(self.stack):
                if id(module) in owner.samplers:
                    index, name = owner.samplers[id(module)]
                    owner.masks[index] = out.mask
                    break
            if frame.declared:
                macs = convolution_macs(module.head, out.mask.numel())
                self.add(LayerMacs(name, "Sampler", 0, macs))
        elif frame.declared:
            packed: Any = module
            (x,) = (*args, *kwargs.values())
            macs = convolution_macs(packed.source_conv, packed.positions(x))
            self.add(LayerMacs(frame.name, "Conv2d", macs, macs))


def _masks(frame: _Frame, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """The masks of one call: its own samplers', or that of a decision the caller passed in."""
    passed = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, SamplingDecision)]
    if passed:
        return [decision.mask for decision in passed]
    assert len(frame.masks) == len(frame.samplers), f"{frame.name}: a sampler did not run"
    return [frame.masks[index] for index in sorted(frame.masks)]


class _Counter(TorchDispatchMode):
    """Books every operator that multiplies on the module that runs it."""

    def __init__(self, tally: _Tally) -> None:
        super().__init__()
        self.tally = tally

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        if _is_composite(func) and not has_formula(func):
            # Under inference_mode composite operators arrive whole: look at what they are made of.
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if not self.tally.is_declared:
            macs = multiply_adds(func, args, kwargs, out)
            if macs:
                self.tally.add_operator(macs)
        return out


@cache
def _is_composite(func: Any) -> bool:
    """Whether an operator can be decomposed into others."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return func is not torch.ops.prim.device.default and (
        key in func.py_kernels or torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)
    )


@contextmanager
def _watching(model: nn.Module, tally: _Tally) -> Iterator[None]:
    """Keep the tally's stack of running modules, by hooks that are gone afterwards."""

    def enter_as(name: str) -> Callable[..., None]:
        return lambda module, args: tally.enter(name, module)

    def leave(module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        tally.leave(module, args, kwargs, out)

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # takes no hooks; its operators are booked on the module that calls it
            before = module.register_forward_pre_hook(enter_as(name), prepend=True)
            hooks.callback(before.remove)
            hooks.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
        yield


@contextmanager
def _attention_in_parts() -> Iterator[None]:
    """Run nn.MultiheadAttention as matrix products: its fused inference operator has no formula."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
