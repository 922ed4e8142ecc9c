"""Trained weights on disk, in a file that says what model it is; and the state for resuming.

Nothing here unpickles code: weights are safetensors, training state is read with
`weights_only=True`. Every file is written under a temporary name and renamed, so a reader sees the
old file or the new one, never half of one.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sparsight.train.architecture import (
    AnyArchitecture,
    architecture_from_json,
    build_dense,
    convert,
)

_KEY = "sparsight.architecture"
_DATASET_KEY = "sparsight.dataset"
_LONGEST_MISFIT = 200


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write `content` to a temporary file beside `path`, flush it, rename it to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(
    path: str | Path,
    model: nn.Module,
    architecture: AnyArchitecture,
    *,
    dataset: str | None = None,
) -> None:
    """Write the weights of `model` and its architecture to one safetensors file.

    Args:
        path: file to write, usually `*.safetensors`; an existing one is replaced.
        model: what `build_dense` and `convert` made of `architecture`.
        architecture: stored as JSON in the file's metadata under "sparsight.architecture".
        dataset: name of the data set that the model was trained on, stored under
            "sparsight.dataset"; None for one without a name.
    """
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()
    }
    metadata = {_KEY: json.dumps(architecture.to_json())}
    if dataset is not None:
        metadata[_DATASET_KEY] = dataset
    write_atomically(path, save(tensors, metadata=metadata))


def read_architecture(path: str | Path) -> AnyArchitecture:
    """Return the architecture stored in a checkpoint, without reading its weights.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file, or not one that `save_checkpoint` wrote.
    """
    return _architecture(path, _read(path, reads_weights=False)[0])


def read_dataset(path: str | Path) -> str | None:
    """Return the name of the data set that a checkpoint was trained on; None where it says nothing.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file.
    """
    return _read(path, reads_weights=False)[0].get(_DATASET_KEY)


def load_checkpoint(
    path: str | Path, *, expected: AnyArchitecture | None = None
) -> tuple[nn.Module, AnyArchitecture]:
    """Return the model stored in a checkpoint and its architecture.

    Args:
        path: a file written by `save_checkpoint`.
        expected: build this architecture instead and load the weights into it. Weights of a dense
            model fit its sampled form (the samplers keep their initial values) and any image size;
            nothing else may differ.

    Returns:
        The model in training mode on the CPU, and the architecture it was built from.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint of sparsight, or of another architecture than `expected`; names
            what differs.
    """
    metadata, tensors = _read(path)
    stored = _architecture(path, metadata)
    architecture = stored if expected is None else expected
    found = architecture.differences(stored)
    if found:
        raise ValueError(
            f"load_checkpoint: {str(path)!r} holds another architecture than the one asked for: "
            f"{'; '.join(found)}; equal architectures are required (a dense checkpoint may start "
            "a sampled model); change the flags of this run to match, or pass another checkpoint."
        )
    dense = build_dense(architecture)
    if stored.sampling is None:
        _load(path, dense, tensors)
        return convert(dense, architecture), architecture
    model = convert(dense, architecture)
    _load(path, model, tensors)
    return model, architecture


def _load(path: str | Path, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:  # lists hundreds of lines where another version named layers
        found = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
        shown = (
            found[0] if len(found[0]) <= _LONGEST_MISFIT else f"{found[0][:_LONGEST_MISFIT]} ..."
        )
        raise ValueError(
            f"load_checkpoint: the weights in {str(path)!r} do not fit the architecture that it "
            f"names: {shown} ({len(found)} such); the weights of that architecture are required; "
            "the file was changed, or written by another version of sparsight: use that version, "
            "or train again."
        ) from error


def _read(
    path: str | Path, *, reads_weights: bool = True
) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"load_checkpoint: {str(path)!r} does not exist; a *.safetensors file written by "
            "`sparsight train` is required; pass the path printed at the end of training."
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys() if reads_weights else ()
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(
            f"load_checkpoint: {str(path)!r} is not a safetensors file ({error}); a file written "
            "by `sparsight train` is required; pickled checkpoints are not read: convert them "
            "with safetensors first."
        ) from error
    return metadata, tensors


def _architecture(path: str | Path, metadata: dict[str, str]) -> AnyArchitecture:
    if _KEY not in metadata:
        raise ValueError(
            f"load_checkpoint: {str(path)!r} says nothing of its architecture; metadata {_KEY!r} "
            "is required; write it with sparsight.train.save_checkpoint."
        )
    try:
        values = json.loads(metadata[_KEY])
    except json.JSONDecodeError:
        values = None
    if not isinstance(values, dict):
        raise ValueError(
            f"load_checkpoint: {_KEY!r} in {str(path)!r} reads {metadata[_KEY][:80]!r}; the fields "
            "of an architecture as JSON are required; write it with "
            "sparsight.train.save_checkpoint."
        )
    return architecture_from_json(values)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's training state, written atomically and read without unpickling code."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write `checkpoint` under a temporary name, then rename it to `path`."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(path, buffer.getvalue())

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read tensors and plain values only, whatever the caller asks for."""
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"resume: {str(path)!r} does not exist; the last.ckpt of an interrupted run is "
                "required; pass the --out folder of that run, or leave --resume out."
            )
        return torch.load(path, map_location="cpu", weights_only=True)
