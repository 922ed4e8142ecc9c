"""Weights that others saved with torch, read without running their code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def read_state_dict(
    path: str | Path, *, name: str = "read_state_dict", advice: str = ""
) -> dict[str, Tensor]:
    """Return the tensors of a file written by `torch.save`, by name.

    Args:
        path: a state_dict, as it is or under "state_dict", with or without "module." before the
            names (as parallel training leaves them). Nothing but tensors and plain values is
            unpickled.
        name: of the caller, for messages.
        advice: what is expected and where to obtain it, for messages.

    Returns:
        Tensors on the CPU, without "module.".

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds no state_dict.
    """
    advice = advice or "a state_dict saved with torch.save is required; pass another file"
    if not Path(path).is_file():
        raise FileNotFoundError(f"{name}: {str(path)!r} does not exist; {advice}.")
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and end-of-file errors of any kind of other file
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{name}: {str(path)!r} cannot be read as tensors ({reason}); {advice}."
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"{name}: {str(path)!r} holds a {type(state).__name__} that is no state_dict; {advice}."
        )
    return {str(key).removeprefix("module."): value for key, value in state.items()}
