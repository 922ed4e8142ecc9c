"""What every benchmark script does: read its flags, take turns, measure its stages."""

import argparse
import functools
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.stages import Row, Stage, StageFile, chosen, run_stages
from sparsight.measure import Latency, environment, measure_latency

# A candidate, or in its place the reason why there is none: it then stands in the table.
Candidate = Callable[..., Any] | str

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Above this a sample is slow, and few of them must do.
SLOW_MS = 500.0
MOST_SAMPLES = 40
REST_S = 0.03

# What the times of dense networks are taken of; "chain" is four blocks in one OpenVINO network. The
# same names for every script, so that make can pass --without to all.
RIVALS = ("openvino", "openvino nhwc", "onnxruntime", "compile", "eager", "chain")
SLOW_TO_BUILD = ("compile", "chain")  # tens of seconds each: not in the quick form


@dataclass(frozen=True)
class Settings:
    """The flags that all scripts share.

    Attributes:
        quick: tiny shapes, few samples and no torch.compile, to see that a script works.
        budget_s: seconds of samples of each candidate, which gives their number.
        threads: of every candidate, whatever runs it.
        dtype: that the networks compute in.
        out: folder of the report, or None to print only.
        without: rivals that are left out, by name.
        only: stages that are measured; all where empty.
        resume: leave out the stages that the report holds already.
    """

    quick: bool
    budget_s: float
    threads: int
    dtype: torch.dtype
    out: Path | None
    without: frozenset[str] = frozenset()
    only: tuple[str, ...] = ()
    resume: bool = False

    @property
    def dtype_name(self) -> str:
        """As written in the rows."""
        return str(self.dtype).removeprefix("torch.")

    def left_out(self, rival: str) -> str | None:
        """Why a rival is not built, or None."""
        if rival in self.without:
            return "left out by --without"
        return "left out by --quick" if self.quick and rival in SLOW_TO_BUILD else None


def argument_parser(description: str | None, *, dtypes: bool = False) -> argparse.ArgumentParser:
    """A parser with the shared flags.

    Args:
        description: the script's docstring.
        dtypes: whether the script knows others than float32.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does the script work?")
    parser.add_argument("--budget-s", type=float, help="seconds of samples of each candidate")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="folder of the report; default: print only")
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="measure only these")
    parser.add_argument(
        "--resume", action="store_true", help="leave out stages that --out holds complete"
    )
    if dtypes:
        parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        choices=RIVALS,
        metavar="RIVAL",
        help=f"time these dense rivals nowhere: {', '.join(RIVALS)}",
    )
    return parser


def settings_of(args: argparse.Namespace, *, budget_s: float = 1.0) -> Settings:
    """The shared flags; `budget_s` is the script's own default. Sets torch's threads."""
    torch.set_num_threads(args.threads)
    return Settings(
        quick=args.quick,
        budget_s=budget_s if args.budget_s is None else args.budget_s,
        threads=args.threads,
        dtype=DTYPES[getattr(args, "dtype", "float32")],
        out=args.out,
        without=frozenset(args.without),
        only=tuple(args.only),
        resume=args.resume,
    )


def num_samples(call_ms: float, *, budget_s: float) -> int:
    """Samples of a candidate: what the budget allows, but 7 at least, 3 of what is slow."""
    least = 7 if call_ms < SLOW_MS else 3
    return min(max(least, int(budget_s * 1e3 / call_ms)), MOST_SAMPLES)


def compare(
    settings: Settings, candidates: Mapping[str, Candidate], *inputs: Any
) -> dict[str, Latency | str]:
    """Measure in turns; reasons are passed through.

    A rest and a call that is not measured precede every sample: the thread pools of torch, OpenVINO
    and ONNX Runtime spin for tens of milliseconds after a call, on the cores that the next
    candidate needs. Without the rest, half of the samples of a 10 ms block took 20 ms.
    """
    runnable = {name: run for name, run in candidates.items() if not isinstance(run, str)}
    measured = measure_latency(
        runnable,
        *inputs,
        repeats=3 if settings.quick else functools.partial(num_samples, budget_s=settings.budget_s),
        warmup=1 if settings.quick else 2,
        lead_in=0 if settings.quick else 1,
        rest_s=0.0 if settings.quick else REST_S,
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


def open_file(
    settings: Settings, name: str, stages: Sequence[str], *, title: str, notes: str
) -> StageFile:
    """The script's file in the folder of the report; with another dtype, of another name.

    Exits where a stage of `--only` does not exist, or the file is of another environment: nothing
    is measured in vain.
    """
    if settings.dtype != torch.float32:
        name = f"{name}-{settings.dtype_name}"
    # What else decides a time: rows of two such runs do not belong into one table.
    form = "quick: tiny shapes, few samples, not a result" if settings.quick else "full"
    described = {
        **environment(),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set"),
        "form": form,
    }
    try:
        chosen(stages, settings.only)
        return StageFile(
            None if settings.out is None else settings.out / name,
            title=title,
            notes=notes,
            described=described,
            order=stages,
        )
    except ValueError as refusal:
        sys.exit(str(refusal))


def measure_into(file: StageFile, settings: Settings, stages: Sequence[Stage]) -> None:
    """Measure the stages that are asked for; exits with an error where one failed."""
    failed = run_stages(
        file,
        stages,
        command=f"python bench/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}".strip(),
        only=settings.only,
        resume=settings.resume,
    )
    if file.stem is not None:
        print(f"written: {file.stem}.json")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; what was measured is kept")


def run_script(
    settings: Settings, name: str, stages: Sequence[Stage], *, title: str, notes: str
) -> None:
    """Open the script's file and measure its stages into it."""
    names = [stage.name for stage in stages]
    measure_into(open_file(settings, name, names, title=title, notes=notes), settings, stages)
