"""Resident memory of this process, as Linux tells it, and a fresh process to watch it in."""

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness.stages import Row


def field_kib(file: str, field: str) -> int:
    """A field of a file in /proc/self."""
    for line in Path("/proc/self", file).read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0])
    raise KeyError(field)


def resident_kib() -> int:
    """Resident memory, page by page: the counter in /proc/self/status lags by some hundred KiB."""
    return field_kib("smaps_rollup", "Rss")


def peak_kib() -> int:
    """The high-water mark since `start_watching`, or since the process began."""
    return field_kib("status", "VmHWM")


def start_watching() -> None:
    """Give freed memory back and forget the high-water mark so far."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def row_of_fresh_process(script: str, task: Any, environment: Mapping[str, str]) -> Row:
    """What a script prints for a task, a dataclass that it is given as `--child`, in a new process.

    Raises:
        RuntimeError: the process failed; with its last words.
    """
    command = [sys.executable, script, "--child", json.dumps(asdict(task))]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=dict(environment)
    )
    if done.returncode:
        raise RuntimeError(
            f"{Path(script).name}: the process of {task} exited with {done.returncode}, but must "
            f"print a row; its last words: {done.stderr[-2000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])
