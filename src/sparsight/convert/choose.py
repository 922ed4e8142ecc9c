"""Which sampled layers of a frozen model run dense: those that the caller names, or is measured."""

import difflib
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from sparsight.convert.find import ConversionError
from sparsight.nn.frozen_block import Form, FrozenBlock, Measurement
from sparsight.nn.frozen_gated import is_gated
from sparsight.nn.record import record_sampling
from sparsight.nn.sampled_block import SampledBlock
from sparsight.nn.sampled_conv import SampledConv2d

__all__ = ["Choose", "faster_dense", "told_forms"]

Choose = Literal["measured"] | Mapping[str, Form] | Callable[[str, nn.Module], Form]

# Running dense changes values, so that a tie stays sampled: dense must win by more than the noise
# of the medians.
MARGIN = 0.02
# Samples of each form and milliseconds of both forms together, at most, over all calls of a layer;
# each form is called once whatever it costs.
MAX_SAMPLES = 20
MAX_LAYER_MS = 500.0


def told_forms(model: nn.Module, choose: Choose | None) -> dict[str, Form]:
    """What the caller says about each layer, before anything is changed.

    Args:
        model: the converted model.
        choose: see :func:`sparsight.freeze`.

    Returns:
        By every qualified name of each layer that was spoken of, "dense" or "sampled"; empty for
        None and "measured".

    Raises:
        TypeError: `choose` is neither a word, a mapping nor a callable.
        ConversionError: listing every name that is no sampled layer, every unknown word and every
            layer that cannot run dense.
    """
    if choose is None or choose == "measured":
        return {}
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = {n: m for n, m in modules.items() if isinstance(m, SampledBlock | SampledConv2d)}
    if isinstance(choose, str):
        raise ConversionError(
            f"freeze: choose is {choose!r}, but the only word that it may be is 'measured'; pass "
            "that, or say it layer by layer: {'layer1.0': 'dense'}."
        )
    if isinstance(choose, Mapping):
        told: dict[str, Any] = dict(choose)
    elif callable(choose):
        told = {name: choose(name, layer) for name, layer in layers.items()}
    else:
        raise TypeError(
            f"freeze: choose is a {type(choose).__name__}, but must be None, 'measured', a mapping "
            "of layer names or a callable (name, module), to 'dense' or 'sampled'; pass for "
            "example choose={'layer1.0': 'dense'}."
        )
    refused: list[tuple[str, str]] = []
    first_told: dict[nn.Module, str] = {}
    for name, form in told.items():
        reason = _refuse_name(name, modules, layers) or _refuse_form(form, layers[name])
        if reason is None:
            first = first_told.setdefault(layers[name], name)
            if told[first] != form:
                reason = (
                    f"it is {form!r}, but the same module is {told[first]!r} as {first!r}; say "
                    "the same for both names"
                )
        if reason is not None:
            refused.append((str(name), reason))
    if refused:
        raise ConversionError(
            f"freeze: choose says something about {len(refused)} layers of "
            f"{type(model).__name__} that cannot be followed; correct them or leave them out:",
            refused,
        )
    return {n: told[first_told[m]] for n, m in layers.items() if m in first_told}


def _refuse_name(
    name: Any, modules: Mapping[str, nn.Module], layers: Mapping[str, nn.Module]
) -> str | None:
    """Why there is no sampled layer of this name; None if there is."""
    if name in layers:
        return None
    if name in modules:
        why = f"it is a {type(modules[name]).__name__}, not a sampled layer"
        near = [layer for layer in layers if layer.startswith(f"{name}.") or not name][:3]
    else:
        why = "there is no module of this name"
        near = difflib.get_close_matches(str(name), layers, n=3)
    near = near or list(layers)[:3]
    if not near:
        return f"{why}; the model has no sampled layers"
    return f"{why}; sampled layers are named like {', '.join(map(repr, near))}"


def _refuse_form(form: Any, layer: nn.Module) -> str | None:
    """Why a layer cannot take this form; None if it can."""
    if form not in ("dense", "sampled"):
        return f"{form!r} is no form of a layer; it must be 'dense' or 'sampled'"
    if form == "dense" and is_gated(layer):
        return "its gate scales what is computed, so that there is no dense form of it"
    if form == "dense" and isinstance(layer, SampledConv2d) and layer.sampler is None:
        return "it has no sampler: its callers decide where it computes, and dense would not listen"
    return None


@dataclass
class _Timing:
    """One layer of the frozen model, and what its calls took so far.

    Attributes:
        sampled: the layer, as it stands in the model.
        dense: its other form; None before its first call.
        calls: in one run of the model, on anything but an empty batch.
        is_told: whether a caller passed it a decision, so that it must stay sampled.
        ms: sum of the calls' medians, by form.
        gated: dense multiply-adds that its masks gate.
        computed: how many of them they asked for.
    """

    sampled: FrozenBlock
    dense: FrozenBlock | None
    calls: int
    is_told: bool
    ms: dict[Form, float]
    gated: float
    computed: float


def faster_dense(
    model: nn.Module,
    sources: Mapping[str, SampledBlock | SampledConv2d],
    example: Any,
    *,
    pack_dense: Callable[[Any], FrozenBlock],
) -> tuple[dict[FrozenBlock, FrozenBlock], list[str]]:
    """Time each sampled layer in both forms, on what it receives when the model runs `example`.

    The forms take turns on the live input, in the frozen model with every layer sampled, so that
    one layer's choice does not depend on another's. Every measured layer that stays gets its
    `measured`, and every dense form that wins.

    Args:
        model: the frozen model, in its final form but for the choice.
        sources: what each layer was packed from, by qualified name.
        example: what the model takes; it is run twice.
        pack_dense: makes the dense form of a source.

    Returns:
        The layers that are faster dense, to be replaced by their dense forms, which run the same
        shortcuts; and the names of the layers that `example` does not reach.
    """
    layers: dict[str, FrozenBlock] = {}
    timings: dict[nn.Module, _Timing] = {}
    for name, module in model.named_modules():
        if name in sources and isinstance(module, FrozenBlock) and module.samplers:
            layers[name] = module
            timings[module] = _Timing(module, None, 0, False, {"dense": 0.0, "sampled": 0.0}, 0, 0)
    source_of = {layer: sources[name] for name, layer in layers.items()}
    is_timing = False

    def count(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        x, decision = _arguments(*args, **kwargs)
        timings[module].calls += bool(x.numel())
        timings[module].is_told |= decision is not None

    def measure(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        nonlocal is_timing
        timing = timings[module]
        x, _ = _arguments(*args, **kwargs)
        # A sampled layer inside of another one's shortcut runs while that one is timed.
        if is_timing or timing.is_told or not x.numel():
            return
        is_timing = True
        try:
            if timing.dense is None:
                timing.dense = pack_dense(source_of[timing.sampled])
                timing.dense.downsample = timing.sampled.downsample
                timing.dense.shortcut_dtype = timing.sampled.shortcut_dtype
                timing.dense.output_dtype = timing.sampled.output_dtype
            _add_call(timing, timing.dense, x)
        finally:
            is_timing = False

    for hook in (count, measure):
        handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in timings]
        try:
            with torch.no_grad():
                model(example)
        finally:
            for handle in handles:
                handle.remove()

    faster: dict[FrozenBlock, FrozenBlock] = {}
    for timing in timings.values():
        if timing.dense is None:
            continue
        measured = Measurement(
            dense_ms=timing.ms["dense"],
            sampled_ms=timing.ms["sampled"],
            density=timing.computed / timing.gated,
        )
        timing.sampled.measured = timing.dense.measured = measured
        if measured.dense_ms < (1 - MARGIN) * measured.sampled_ms:
            faster[timing.sampled] = timing.dense
    unreached = [n for n, m in layers.items() if not (timings[m].calls or timings[m].is_told)]
    return faster, unreached


def _arguments(x: torch.Tensor, decision: Any = None) -> tuple[torch.Tensor, Any]:
    """What a frozen layer was called with, by position or by name."""
    return x, decision


def _add_call(timing: _Timing, dense: FrozenBlock, x: torch.Tensor) -> None:
    """Time both forms on the input of one call."""
    forms: dict[Form, FrozenBlock] = {"dense": dense, "sampled": timing.sampled}
    with record_sampling(timing.sampled) as record:
        timing.sampled.forward(x)
    own = {name for name, _ in timing.sampled.samplers_named()}
    for decision in record.decisions:
        if decision.name in own:
            timing.gated += decision.macs
            timing.computed += decision.macs * decision.mask.float().mean().item()
    limit_ms = MAX_LAYER_MS / timing.calls
    samples: dict[Form, list[float]] = {form: [call_ms(forms[form], x)] for form in forms}
    spent_ms = sum(times_ms[0] for times_ms in samples.values())
    if spent_ms < limit_ms:
        # That was the warm-up. Calls too long to be repeated do not need one.
        samples = {"dense": [], "sampled": []}
    for i in range(max(1, MAX_SAMPLES // timing.calls)):
        if spent_ms >= limit_ms:
            break
        # A B, B A, as in measure_latency: none always follows the same neighbour.
        for form in list(forms)[:: 1 if i % 2 == 0 else -1]:
            samples[form].append(call_ms(forms[form], x))
            spent_ms += samples[form][-1]
    for form, times_ms in samples.items():
        timing.ms[form] += statistics.median(times_ms)


def call_ms(layer: FrozenBlock, x: torch.Tensor) -> float:
    """Milliseconds of one call, without hooks: the only place where freezing looks at a clock."""
    start = time.perf_counter()
    layer.forward(x)
    return (time.perf_counter() - start) * 1e3
