"""Small C++ sources beside this file, compiled when a benchmark needs them."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path


def build_library(source: str, folder: Path, flags: Sequence[str] = ()) -> Path | str:
    """The shared library made from a source of this folder, or why there is none."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return "no C++ compiler found"
    path = Path(__file__).parent / source
    library = folder / f"{path.stem}.so"
    command = [compiler, "-O3", "-shared", "-fPIC", "-std=c++20", *flags, str(path)]
    subprocess.run([*command, "-o", str(library)], check=True)
    return library
