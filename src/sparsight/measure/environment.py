"""What a number was measured on: machine and versions, nothing that names a person or a host."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

# Instruction sets that decide which kernels run, as the Linux kernel spells them.
_ISA_FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512_bf16",
    "avx512_vnni",
    "amx_bf16",
    "asimd",
    "sve",
)


def environment() -> dict[str, str]:
    """Describe machine and software beside a measurement.

    Returns:
        Text by name: CPU model, its instruction sets among those that matter, logical cores and how
        many of them this process may use, torch's threads, memory, GPU, versions of the operating
        system, Python, torch, torchvision, sparsight and, where they are installed, openvino and
        onnxruntime, and the git commit ("-dirty" if a tracked file differs) where sparsight runs
        from a checkout.

    Example:
        >>> environment()["torch"] == torch.__version__
        True
    """
    cpu = _cpu_info()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    described = {
        "CPU": cpu.get("model name", platform.machine()),
        "instruction sets": _instruction_sets(cpu),
        "cores": f"{os.cpu_count()} logical, {usable} usable",
        "threads": f"{torch.get_num_threads()}",
        "memory": _memory(),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "OS": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": _version("torchvision"),
        "openvino": _version("openvino"),
        "onnxruntime": _version("onnxruntime"),
        "sparsight": _version("sparsight"),
        "commit": _commit(Path(__file__).resolve()),
    }
    return {name: text for name, text in described.items() if text}


def _cpu_info() -> dict[str, str]:
    """Fields of the first processor; empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text(encoding="utf-8").split("\n\n")[0]
    fields = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in fields}


def _instruction_sets(cpu: dict[str, str]) -> str:
    flags = (cpu.get("flags") or cpu.get("Features") or "").split()
    return " ".join(flag for flag in _ISA_FLAGS if flag in flags)


def _memory() -> str:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return ""
    return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _commit(file: Path) -> str:
    """The commit that `file` belongs to; empty if it is not a tracked file of a repository."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(file.parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # Without this, a package installed below someone else's checkout would report that checkout's
    # commit.
    if git("ls-files", "--error-unmatch", file.name) is None:
        return ""
    commit = git("rev-parse", "--short=12", "HEAD")
    if commit is None:
        return ""
    changed = git("status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if changed else commit
