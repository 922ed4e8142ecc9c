"""What layers read and write while a model runs, at sampled positions, without holding whole maps.

A layer here is a convolution or a linear layer. Letters in shapes: B images, P positions of each,
N sampled rows, D columns of what a layer reads, O what it writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsight.compress.narrow import is_convolution
from sparsight.compress.sample_patches import gather_positions, gather_windows

__all__ = ["LayerUse", "Rows", "read_rows", "survey_layers"]

_SUMS = {"add", "add_", "__add__", "__radd__", "__iadd__"}


@dataclass
class LayerUse:
    """How a model uses a layer in one call, as `survey_layers` saw it.

    Attributes:
        name: qualified name.
        order: 0 for the layer that ran first, and so on.
        num_calls: how often it ran: more than once where it is shared, as a detector's heads are.
        positions: over all calls and images: of the output; of a transposed convolution's input.
        leading: first dimension of its input in every call.
        norm: name of the normalisation that alone reads its output, or None.
        num_sums: in how many calls its (normalised) output was added to something as it was.
    """

    name: str
    order: int
    num_calls: int = 0
    positions: int = 0
    leading: list[int] = field(default_factory=list)
    norm: str | None = None
    num_sums: int = 0


@dataclass(frozen=True)
class Rows:
    """What one call of a layer showed at the sampled positions.

    Attributes:
        inputs: (N, D), or None where only outputs were asked for.
        outputs: (N, O), before any normalisation.
        shortcut: (N, O), what was added to its normalised output; None where nothing was.
    """

    inputs: Tensor | None
    outputs: Tensor
    shortcut: Tensor | None


def _channel_dim(module: nn.Module) -> int:
    return -1 if isinstance(module, nn.Linear) else 1


def is_norm(module: Any) -> bool:
    """Whether a module shifts and scales each channel by constants in eval mode."""
    return isinstance(getattr(module, "running_mean", None), Tensor) and isinstance(
        getattr(module, "running_var", None), Tensor
    )


class _Sums(TorchFunctionMode):
    """Tells which layer's output takes part in a sum, and what the other summand is.

    Tensors are followed by identity, from a layer through its norm; what an in-place operation
    changed is followed no further. Works inside any Python control flow, where a symbolic trace
    would stop.
    """

    def __init__(self, on_sum: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self.on_sum = on_sum
        self.owners: dict[int, tuple[str, Tensor, int]] = {}

    def own(self, name: str, out: Tensor) -> None:
        self.owners[id(out)] = name, out, out._version

    def owner(self, tensor: Any) -> str | None:
        if id(tensor) not in self.owners:
            return None
        name, known, version = self.owners[id(tensor)]
        return name if known is tensor and known._version == version else None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in _SUMS and len(args) > 1 and not kwargs:
            for own, other in ((args[0], args[1]), (args[1], args[0])):
                name = self.owner(own)
                if name is not None and isinstance(other, Tensor) and other.shape == own.shape:
                    self.on_sum(name, other)
        return func(*args, **(kwargs or {}))


@contextmanager
def _hooked(
    model: nn.Module,
    sums: _Sums,
    names: Iterable[str],
    on_output: Callable[[str, Any, Tensor, Tensor], None],
    on_norm: Callable[[str, str], None],
) -> Iterator[None]:
    """Call back after the named layers, and where a norm reads one of them."""

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, out: Tensor) -> None:
            on_output(name, module, args[0], out)
            sums.own(name, out)

        return hook

    def after_norm(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, out: Any) -> None:
            layer = sums.owner(args[0]) if args else None
            if layer is not None:
                on_norm(layer, name)
                sums.own(layer, out)

        return hook

    wanted = set(names)
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name in wanted:
                hooks.callback(module.register_forward_hook(after(name)).remove)
            elif is_norm(module):
                hooks.callback(module.register_forward_hook(after_norm(name)).remove)
        with torch.no_grad(), sums:
            yield


def survey_layers(model: nn.Module, batch: Any) -> dict[str, LayerUse]:
    """Return how a model in eval mode uses its convolutions and linear layers.

    Args:
        model: run once, left as it was.
        batch: what it takes as its one argument.

    Returns:
        By name, in the order in which they ran; layers that did not run are missing.
    """
    uses: dict[str, LayerUse] = {}
    read_by: dict[str, list[str]] = {}

    def on_output(name: str, module: Any, x: Tensor, out: Tensor) -> None:
        use = uses.setdefault(name, LayerUse(name, len(uses)))
        use.num_calls += 1
        use.leading.append(x.shape[0])
        mapped = x if getattr(module, "transposed", False) else out
        use.positions += mapped.numel() // max(1, mapped.shape[_channel_dim(module)])

    def on_sum(name: str, other: Tensor) -> None:
        uses[name].num_sums += 1

    def on_norm(layer: str, norm: str) -> None:
        read_by.setdefault(norm, []).append(layer)

    names = [
        name
        for name, module in model.named_modules()
        if is_convolution(module) or isinstance(module, nn.Linear)
    ]
    with _hooked(model, _Sums(on_sum), names, on_output, on_norm):
        model(batch)
    for norm, layers in read_by.items():
        if len(layers) == 1:  # a norm that several share cannot be shifted for one of them
            uses[layers[0]].norm = norm
    return uses


class _Enough(Exception):
    """All that was asked for has been seen: the rest of the model need not run."""


def read_rows(
    model: nn.Module,
    batch: Any,
    shares: Tensor,
    layers: Iterable[LayerUse],
    *,
    reads_inputs: bool,
) -> dict[str, list[Rows]]:
    """Run a model as far as some layers need, and return what they showed at sampled positions.

    Args:
        model: in eval mode.
        batch: what it takes as its one argument.
        shares: (B, P, 2) positions, see `draw_positions`.
        layers: whom to watch, as surveyed.
        reads_inputs: whether inputs are wanted too.

    Returns:
        For every layer its calls in order. A linear layer on (B, F) has one row for each image, one
        on (B, ..., F) up to P rows.
    """
    uses = {use.name: use for use in layers}
    seen: dict[str, list[Rows]] = {name: [] for name in uses}
    open_ends = sum(use.num_calls + use.num_sums for use in uses.values())

    def settle() -> None:
        nonlocal open_ends
        open_ends -= 1
        if open_ends == 0:
            raise _Enough

    def on_output(name: str, module: Any, x: Tensor, out: Tensor) -> None:
        rows = _read_input(module, x, shares, out) if reads_inputs else None
        seen[name].append(Rows(rows, _read_output(module, out, shares), None))
        settle()

    def on_sum(name: str, other: Tensor) -> None:
        if name not in uses:
            return
        last = seen[name][-1]
        read = gather_positions(other, shares) if other.ndim == 4 else None
        seen[name][-1] = Rows(last.inputs, last.outputs, read)
        settle()

    try:
        with _hooked(model, _Sums(on_sum), uses, on_output, lambda *_: None):
            model(batch)
    except _Enough:
        pass
    return seen


def _read_input(module: Any, x: Tensor, shares: Tensor, out: Tensor) -> Tensor:
    if isinstance(module, nn.Conv2d):
        return gather_windows(x, module, shares, (out.shape[2], out.shape[3]))
    return _read_linear(x, shares)


def _read_output(module: Any, out: Tensor, shares: Tensor) -> Tensor:
    if isinstance(module, nn.Conv2d):
        return gather_positions(out, shares)
    return _read_linear(out, shares)


def _read_linear(x: Tensor, shares: Tensor) -> Tensor:
    if x.ndim == 2:
        return x.clone()
    tokens = x.flatten(1, -2)
    if tokens.shape[1] <= shares.shape[1]:
        return tokens.flatten(0, 1).clone()
    index = (shares[..., 0] * tokens.shape[1]).floor().long().clamp_max(tokens.shape[1] - 1)
    return tokens[torch.arange(len(x))[:, None], index].flatten(0, 1)
