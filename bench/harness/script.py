"""What every benchmark script does: read its flags, take turns, print and write its rows."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsight.measure import Latency, markdown_table, measure_latency, write_report

# A candidate, or in its place the reason why there is none: it then stands in the table.
Candidate = Callable[..., Any] | str
Row = dict[str, Any]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """The flags that all scripts share.

    Attributes:
        quick: tiny shapes, few samples and no torch.compile, to see that a script works.
        repeats: samples of each candidate at least.
        threads: of every candidate, whatever runs it.
        dtype: that the networks compute in.
        out: folder of the report, or None to print only.
    """

    quick: bool
    repeats: int
    threads: int
    dtype: torch.dtype
    out: Path | None

    @property
    def dtype_name(self) -> str:
        """As written in the rows."""
        return str(self.dtype).removeprefix("torch.")


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the shared flags."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does the script work?")
    parser.add_argument("--repeats", type=int, help="samples of each candidate at least")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--out", type=Path, help="folder of the report; default: print only")
    return parser


def settings_of(args: argparse.Namespace, *, repeats: int) -> Settings:
    """The shared flags; `repeats` is the script's own default. Sets torch's threads."""
    torch.set_num_threads(args.threads)
    return Settings(
        quick=args.quick,
        repeats=args.repeats or (3 if args.quick else repeats),
        threads=args.threads,
        dtype=DTYPES[args.dtype],
        out=args.out,
    )


def compare(
    settings: Settings, candidates: Mapping[str, Candidate], *inputs: Any
) -> dict[str, Latency | str]:
    """Measure in turns; reasons are passed through.

    A call that is not measured precedes every sample: the thread pools of torch, OpenVINO and ONNX
    Runtime spin for milliseconds after a call, on the cores that the next candidate needs.
    """
    runnable = {name: run for name, run in candidates.items() if not isinstance(run, str)}
    measured = measure_latency(
        runnable,
        *inputs,
        repeats=settings.repeats,
        warmup=1 if settings.quick else 3,
        min_time_s=0.0 if settings.quick else 0.3,
        lead_in=0 if settings.quick else 1,
    )
    return {
        name: run if isinstance(run, str) else measured[name] for name, run in candidates.items()
    }


def cells(name: str, latency: Latency | str) -> Row:
    """Median and spread of one candidate as columns, or the reason why it is missing."""
    if isinstance(latency, str):
        return {f"{name} ms": latency}
    return {f"{name} ms": latency.latency_ms, f"{name} IQR ms": latency.iqr_ms}


def fastest_ms(latencies: Mapping[str, Latency | str], *names: str) -> float | None:
    """The smallest median among those that were measured, or None."""
    times = [
        latency.latency_ms
        for name, latency in latencies.items()
        if name in names and not isinstance(latency, str)
    ]
    return min(times, default=None)


def publish(settings: Settings, name: str, rows: Sequence[Row], *, title: str, notes: str) -> None:
    """Print the table; with --out also write `<out>/<name>.json` and `.md`."""
    print(markdown_table(rows))
    if settings.dtype != torch.float32:
        name = f"{name}-{settings.dtype_name}"
    if settings.out is None:
        return
    policy = os.environ.get("OMP_WAIT_POLICY", "not set")
    _, page = write_report(
        settings.out / name,
        rows,
        title=title,
        command=f"python bench/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}".strip(),
        notes=f"{notes} OMP_WAIT_POLICY: {policy}.",
    )
    print(f"written: {page}")
