"""Wall time of several callables on the same input, measured so that they can be compared."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from sparsight.measure.macs import check_eval


@dataclass(frozen=True)
class Latency:
    """Wall time of one candidate.

    Attributes:
        name: as given.
        latency_ms: median over the samples.
        iqr_ms: distance of the quartiles.
        fastest_ms: the fastest sample.
        num_samples: calls measured.
        ratio: median latency over the first candidate's; below 1 is faster than it.
    """

    name: str
    latency_ms: float
    iqr_ms: float
    fastest_ms: float
    num_samples: int
    ratio: float


@dataclass(frozen=True)
class LatencyComparison:
    """Candidates measured in turns in one run.

    Attributes:
        rows: one per candidate, in the order given.
        num_threads: of torch, during the run.
        device: where the inputs lie, "cpu" or "cuda".
    """

    rows: list[Latency]
    num_threads: int
    device: str

    def __getitem__(self, name: str) -> Latency:
        """The row of a candidate."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def __str__(self) -> str:
        width = max(len("candidate"), *(len(row.name) for row in self.rows))
        lines = [f"{'candidate':{width}}  median ms     IQR ms  fastest ms     n  ratio"]
        lines += [
            f"{row.name:{width}}  {row.latency_ms:9.3f}  {row.iqr_ms:9.3f}  {row.fastest_ms:10.3f}"
            f"  {row.num_samples:4d}  {row.ratio:5.3f}"
            for row in self.rows
        ]
        lines.append(f"{self.device}, {self.num_threads} threads")
        return "\n".join(lines)


def measure_latency(
    candidates: Mapping[str, Callable[..., Any]] | Callable[..., Any],
    *args: Any,
    repeats: int | Callable[[float], int] = 20,
    warmup: int = 3,
    min_time_s: float = 0.0,
    lead_in: int = 0,
    rest_s: float = 0.0,
) -> LatencyComparison:
    """Compare the wall time of callables on the same arguments.

    The candidates take turns, A B A B, so that a change of the machine's clock or load meets all of
    them, and every other round runs backwards, so that none always follows the same neighbour.
    Everything runs under `torch.inference_mode`, with the number of threads that torch has; a CUDA
    device is waited for at both ends of a sample.

    Args:
        candidates: callables by name, the baseline first; or a single one. Modules must be in eval
            mode.
        *args: what each is called with.
        repeats: rounds at least, one sample of each candidate a round. Default 20. Or what gives
            the number of samples of a candidate from its fastest warm-up call in ms, so that slow
            ones may have fewer: the samples of each are then spread evenly over all rounds.
        warmup: rounds thrown away beforehand: compilation, packing, caches. Default 3.
        min_time_s: go on until this many seconds were measured for every candidate. Default 0.
        lead_in: calls of a candidate right before each of its samples, not measured. Default 0. Use
            1 where candidates have caches of their own to warm.
        rest_s: seconds of rest before each turn. Default 0. Where candidates bring their own
            threads, those of one may spin for tens of milliseconds after it returned, on the cores
            that the next one needs.

    Returns:
        Median, inter-quartile range and number of samples of each, and its ratio to the first.

    Raises:
        ValueError: no candidate, less than one repeat, negative warm-up, lead-in or rest, repeats
            that follow from a warm-up of none, or a module in training mode.

    Example:
        >>> x = torch.zeros(8)
        >>> comparison = measure_latency({"sine": torch.sin, "cosine": torch.cos}, x, repeats=3)
        >>> [row.name for row in comparison.rows], comparison["sine"].ratio
        (['sine', 'cosine'], 1.0)
    """
    if not isinstance(candidates, Mapping):
        name = getattr(candidates, "__name__", type(candidates).__name__)
        candidates = {name: candidates}
    fixed = repeats if isinstance(repeats, int) else None
    is_short = fixed is not None and fixed < 1
    if not candidates or is_short or min(warmup, lead_in, rest_s) < 0:
        raise ValueError(
            f"measure_latency: got {len(candidates)} candidates, repeats={repeats}, "
            f"warmup={warmup}, lead_in={lead_in} and rest_s={rest_s}; at least one candidate, one "
            "repeat and no negative warm-up, lead-in or rest are required; name what to measure, "
            "the baseline first."
        )
    if fixed is None and warmup == 0:
        raise ValueError(
            "measure_latency: repeats is a function of a candidate's time, but warmup=0 measures "
            "none beforehand; at least one round is required; pass warmup=1 or a number."
        )
    for name, candidate in candidates.items():
        if isinstance(candidate, nn.Module):
            check_eval(f"measure_latency (candidate {name!r})", candidate)
    device = _device(candidates.values(), args)
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    with torch.inference_mode():
        fastest_ms = dict.fromkeys(candidates, math.inf)
        for _ in range(warmup):
            for name, candidate in candidates.items():
                fastest_ms[name] = min(fastest_ms[name], _sample_ms(candidate, args, device))
        counts = {
            name: repeats if isinstance(repeats, int) else max(1, repeats(fastest_ms[name]))
            for name in candidates
        }
        for name in _turns(samples, counts, min_time_s):
            time.sleep(rest_s)
            for _ in range(lead_in):
                _sample_ms(candidates[name], args, device)
            samples[name].append(_sample_ms(candidates[name], args, device))
    first = statistics.median(next(iter(samples.values())))
    rows = [_row(name, times_ms, first) for name, times_ms in samples.items()]
    return LatencyComparison(rows, torch.get_num_threads(), device)


def _turns(
    samples: Mapping[str, list[float]], counts: Mapping[str, int], min_time_s: float
) -> Iterator[str]:
    """Whose turn it is, until each had enough; those with fewer samples skip rounds evenly."""
    names = list(samples)
    planned = max(counts.values())
    done = 0
    while done < planned or min(sum(times) for times in samples.values()) < min_time_s * 1e3:
        for name in names if done % 2 == 0 else reversed(names):
            # The count of samples due after a round grows by 0 or 1; past the plan all take part.
            due = (done + 1) * counts[name] // planned - done * counts[name] // planned
            if due or done >= planned:
                yield name
        done += 1


def _sample_ms(candidate: Callable[..., Any], args: tuple, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    candidate(*args)
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def _device(candidates: Any, args: tuple) -> str:
    tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
    for candidate in candidates:
        if isinstance(candidate, nn.Module):
            tensors += candidate.parameters()
    return "cuda" if any(tensor.is_cuda for tensor in tensors) else "cpu"


def _row(name: str, times_ms: list[float], first_ms: float) -> Latency:
    middle = statistics.median(times_ms)
    low, _, high = (
        statistics.quantiles(times_ms, n=4, method="inclusive")
        if len(times_ms) > 1
        else (middle, middle, middle)
    )
    return Latency(name, middle, high - low, min(times_ms), len(times_ms), middle / first_ms)
