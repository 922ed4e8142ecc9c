"""Weights that others saved: read without running their code, held against a model's."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# What torch.load(weights_only=True) raises on a file that is cut off, damaged or none of its own:
# found by damaging files of both its forms at random. OSError and MemoryError are the machine's.
_UNREADABLE = (
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AssertionError,
    struct.error,
)
_MOST_NAMED = 8  # keys of each kind, in a message


def read_state_dict(
    path: str | Path, *, name: str = "read_state_dict", advice: str = ""
) -> dict[str, Tensor]:
    """Return the tensors of a `*.safetensors` file or of one written by `torch.save`, by name.

    Args:
        path: a state_dict, as it is or under "state_dict", with or without "module." before the
            names (as parallel training leaves them). Nothing but tensors and plain values is
            unpickled; a name that ends in ".safetensors" is read with the package of that name.
        name: of the caller, for messages.
        advice: what is expected and where to obtain it, for messages.

    Returns:
        Tensors on the CPU, without "module.".

    Raises:
        FileNotFoundError: no such file.
        OSError: the file cannot be opened.
        ValueError: the file holds no state_dict; says what it is instead.
    """
    advice = advice or (
        "tensors by name are required, as *.safetensors or written by torch.save; save "
        "model.state_dict() alone or pass another file"
    )
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{name}: {str(path)!r} does not exist; {advice}.")

    def no_state(reason: str) -> ValueError:
        return ValueError(f"{name}: {str(path)!r} holds no state_dict ({reason}); {advice}.")

    state: Any
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state = load_file(path)
        except SafetensorError as error:
            raise no_state(str(error)) from error
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except _UNREADABLE as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise no_state(f"torch cannot read it: {reason}") from error
        except Exception as error:
            # torch raises pickle's own error here, and this package imports no pickle. Its message
            # advises to run the code in the file.
            if type(error).__name__ != "UnpicklingError":
                raise
            raise no_state("it holds more than tensors, or torch did not write it") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise no_state(f"it holds a {type(state).__name__}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise no_state(f"its {key!r} is a {type(value).__name__}")
    return {key.removeprefix("module."): value for key, value in state.items()}


def is_count(key: str) -> bool:
    """Whether a key is of a norm's number of batches."""
    return key.endswith("num_batches_tracked")


def misfits(own: dict[str, Tensor], tensors: dict[str, Tensor], *, missing: list[str]) -> list[str]:
    """Return what keeps tensors from being loaded, for a message; nothing if they fit.

    Args:
        own: state_dict that they are to replace.
        tensors: by name.
        missing: names in `own` that had to be among them and are not.
    """
    unexpected = [key for key in tensors if key not in own]
    misshapen = [
        f"{key} {tuple(value.shape)}, not {tuple(own[key].shape)}"
        for key, value in tensors.items()
        if key in own and value.shape != own[key].shape
    ]
    return [
        f"{len(keys)} {what} ({_listed(keys)})"
        for what, keys in (
            ("parameters are missing", missing),
            ("are unknown", unexpected),
            ("have another shape", misshapen),
        )
        if keys
    ]


def _listed(keys: list[str]) -> str:
    rest = len(keys) - _MOST_NAMED
    return ", ".join(keys[:_MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")
