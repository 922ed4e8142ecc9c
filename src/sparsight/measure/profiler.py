"""Where a model's time and multiply-adds go, layer by layer."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from sparsight.measure.macs import MacCount, call_model, count_macs
from sparsight.measure.sampled_layers import LayerMacs, join, owns_samplers

ELSEWHERE = "(between layers)"

Mark = Any  # a reading of a clock, or a CUDA event
Clock = Callable[[], tuple[Callable[[], Mark], Callable[[Mark, Mark], float]]]


@dataclass(frozen=True)
class LayerProfile:
    """One layer's share of a call; a residual block or convolution that is sampled is one layer.

    Attributes:
        name: qualified name in the model; "(between layers)" is what runs in no layer: resizing,
            additions, the forward functions themselves.
        kind: class of the module.
        density: share of what can be skipped that was computed, weighted by MACs; 1 where nothing
            is sampled.
        dense_macs: multiply-adds in the source network.
        macs: multiply-adds that this input needed.
        time_ms: median wall time over the repeats, all calls of the layer in one run of the model.
    """

    name: str
    kind: str
    density: float
    dense_macs: int
    macs: int
    time_ms: float


@dataclass(frozen=True)
class Profile:
    """A model's layers and their sums.

    Attributes:
        layers: in order of execution; their MACs sum to the totals.
        dense_macs: of the source network.
        macs: that this input needed.
        time_ms: median wall time of the whole call, hooks included.
        num_samples: calls measured.
    """

    layers: list[LayerProfile] = field(repr=False)
    dense_macs: int
    macs: int
    time_ms: float
    num_samples: int

    def __str__(self) -> str:
        name = max(len(row.name) for row in self.layers)
        kind = max([len(row.kind) for row in self.layers] + [len("kind")])
        lines = [
            f"{'layer':{name}}  {'kind':{kind}}  density   dense MMACs         MMACs         ms"
        ]
        lines += [
            f"{row.name:{name}}  {row.kind:{kind}}  {row.density:7.3f}"
            f"  {row.dense_macs / 1e6:12.2f}  {row.macs / 1e6:12.2f}  {row.time_ms:9.3f}"
            for row in self.layers
        ]
        lines.append(
            f"{'all':{name}}  {'':{kind}}  {'':7}  {self.dense_macs / 1e6:12.2f}"
            f"  {self.macs / 1e6:12.2f}  {self.time_ms:9.3f}  (median of {self.num_samples})"
        )
        return "\n".join(lines)


def profile(model: nn.Module, x: Any, *, repeats: int = 5, warmup: int = 2) -> Profile:
    """Measure density, multiply-adds and time of each layer of a model, on one input.

    Layers are the modules that sample (blocks and convolutions, converted or frozen) and, outside
    of them, the modules without children. A converted model that is not frozen computes densely and
    masks afterwards: it needs fewer MACs than its source and takes longer. The hooks cost some
    microseconds a layer; compare models by `measure_latency`.

    Args:
        model: ordinary, converted or frozen, in eval mode; left as it was.
        x: what the model takes: a tensor, a list of images, or a tuple of arguments.
        repeats: calls measured, at least 1. Default 5.
        warmup: calls thrown away beforehand. Default 2.

    Returns:
        The layers, whose multiply-adds are those of `count_macs`. It prints as a table.

    Raises:
        ValueError: the model is in training mode, or repeats is below 1.

    Example:
        >>> conv = nn.Conv2d(3, 8, 3, padding=1).eval()
        >>> profile(conv, torch.zeros(1, 3, 10, 10)).layers[0].macs
        21600
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(
            f"profile: repeats is {repeats} and warmup {warmup}; at least one repeat and no "
            "negative warm-up are required; the defaults are 5 and 2."
        )
    counted = count_macs(model, x)
    names = dict(_timed_layers(model, ""))
    tensors = [
        leaf for leaf in (*tree_leaves(x), *model.parameters()) if isinstance(leaf, torch.Tensor)
    ]
    is_cuda = any(tensor.is_cuda for tensor in tensors)
    clock = _cuda_clock if is_cuda else _cpu_clock
    runs: list[_Run] = []
    with torch.inference_mode():
        for _ in range(warmup):
            call_model(model, x)
        for _ in range(repeats):
            runs.append(_run(model, x, names, clock, is_cuda))
    return _assemble(names, counted, runs)


def _timed_layers(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules that sample, and modules without children outside of them."""
    children = dict(module.named_children())
    is_packed = getattr(module, "source_conv", None) is not None
    if owns_samplers(module) or is_packed or not children:
        yield name, module
        return
    for child, submodule in children.items():
        yield from _timed_layers(submodule, join(name, child))


@dataclass(frozen=True)
class _Run:
    """One call of the model: its time, and that of each layer that ran, in milliseconds."""

    whole_ms: float
    layers_ms: dict[str, float]


def _cpu_clock() -> tuple[Callable[[], Mark], Callable[[Mark, Mark], float]]:
    return time.perf_counter, lambda start, end: (end - start) * 1e3


def _cuda_clock() -> tuple[Callable[[], Mark], Callable[[Mark, Mark], float]]:
    def now() -> Mark:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return now, lambda start, end: start.elapsed_time(end)


def _run(
    model: nn.Module, x: Any, layers: dict[str, nn.Module], clock: Clock, is_cuda: bool
) -> _Run:
    now, between_ms = clock()
    marks: dict[str, list[tuple[Mark, Mark]]] = {}
    with _stop_watches(layers, now, marks):
        start = now()
        call_model(model, x)
        end = now()
    if is_cuda:
        torch.cuda.synchronize()
    layers_ms = {name: sum(between_ms(*pair) for pair in pairs) for name, pairs in marks.items()}
    return _Run(between_ms(start, end), layers_ms)


@contextmanager
def _stop_watches(
    layers: dict[str, nn.Module], now: Callable[[], Mark], marks: dict[str, list[tuple[Mark, Mark]]]
) -> Iterator[None]:
    """Mark begin and end of every call of the layers, in order of their first call."""
    running: dict[str, list[Mark]] = {name: [] for name in layers}

    def begin(name: str) -> Callable[..., None]:
        return lambda module, args: running[name].append(now())

    def end(name: str) -> Callable[..., None]:
        return lambda module, args, out: marks.setdefault(name, []).append(
            (running[name].pop(), now())
        )

    with ExitStack() as hooks:
        for name, module in layers.items():
            hooks.callback(module.register_forward_pre_hook(begin(name)).remove)
            hooks.callback(module.register_forward_hook(end(name)).remove)
        yield


def _assemble(layers: dict[str, nn.Module], counted: MacCount, runs: list[_Run]) -> Profile:
    ran = list(runs[0].layers_ms)
    rows = []
    for name in ran:
        inside = [row for row in counted.layers if _is_inside(row.name, name)]
        times_ms = [run.layers_ms.get(name, 0.0) for run in runs]
        rows.append(_row(name, type(layers[name]).__name__, inside, times_ms))
    outside = [row for row in counted.layers if not any(_is_inside(row.name, name) for name in ran)]
    between_ms = [run.whole_ms - sum(run.layers_ms.values()) for run in runs]
    rows.append(_row(ELSEWHERE, "", outside, between_ms))
    whole_ms = statistics.median(run.whole_ms for run in runs)
    return Profile(rows, counted.dense, counted.total, whole_ms, len(runs))


def _row(name: str, kind: str, counted: list[LayerMacs], times_ms: list[float]) -> LayerProfile:
    dense, total = sum(row.dense for row in counted), sum(row.total for row in counted)
    return LayerProfile(name, kind, _density(counted), dense, total, statistics.median(times_ms))


def _is_inside(name: str, layer: str) -> bool:
    return not layer or name == layer or name.startswith(layer + ".")


def _density(rows: list[LayerMacs]) -> float:
    """MAC-weighted share computed of what a mask gates; 1 if nothing is gated."""
    gated = [row for row in rows if row.dense and row.positions]
    dense = sum(row.dense for row in gated)
    return sum(row.total for row in gated) / dense if dense else 1.0
