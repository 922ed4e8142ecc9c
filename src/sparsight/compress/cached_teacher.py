"""A teacher's outputs on disk, found by the very pixels that it was shown."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import secrets
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsight.nn.frozen_sampler import FrozenSampler
from sparsight.nn.sampler import Sampler

__all__ = ["CachedTeacher"]

_FORMAT = 1
_TITLE = "teacher.json"
_SUFFIX = ".safetensors"


class CachedTeacher:
    """A teacher whose outputs are kept in a folder; pass it to `Distiller` in the teacher's place.

    An entry is found by SHA-256 of what decides it: the image as the teacher gets it, pixel by
    pixel after all transforms, its dtype and shape, the precision of autocast, and which of its
    layers are asked for. So there is no index to go stale: another crop, flip or normalisation is
    another entry, and never the wrong one. Random augmentation is thereby safe, but useless within
    a run that seldom shows the same crop twice; it pays in the *next* run with the same seed, since
    the recipes' crops are functions of (seed, epoch, index): another student, another alpha.

    The folder belongs to one teacher, known by a fingerprint of its weights and structure. Several
    processes and runs may share it: a file is written under a name of its own and renamed.

    Args:
        model: the teacher, deterministic image by image. Put in eval mode.
        folder: made if missing. 2,000 files or so to each of its 256 folders are fine.
        dtype: floating type to store in; torch.float16 halves the space. What is returned is then
            rounded to it, also on the first call, and in float32. None stores and returns what the
            teacher computed.
        max_gib: no more than so much is stored, in GiB, counted over the whole folder; what does
            not fit is computed each time.

    Attributes:
        model: the teacher.
        num_hits: images found so far.
        num_misses: images computed so far.

    Raises:
        ValueError: a folder of another teacher, dtype or format, or one with other files in it; a
            teacher with sampling noise, whose output for an image depends on its place in the
            batch.

    Cost: hashing takes about a millisecond for 1 MB, on the CPU: images on a GPU are copied there.
    One output of C classes takes 4 * C bytes a pixel, half of it in float16.

    Two changes of a teacher are not seen: of the code of its `forward`, after which another folder
    is to be taken, and writes through `parameter.data` while it is in use.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        max_gib: float = 20.0,
    ) -> None:
        noisy = [
            name
            for name, module in model.named_modules()
            if (isinstance(module, Sampler) and module.noise != "none")
            or (isinstance(module, FrozenSampler) and module.inside and module.kind != "none")
        ]
        if noisy:
            raise ValueError(
                f"CachedTeacher: the teacher draws noise in {noisy[0]!r}, which depends on the "
                "image's place in the batch; a teacher that maps each image by itself is required; "
                "pass the dense network, or one converted with noise='none'."
            )
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(
                f"CachedTeacher: dtype={dtype}; a floating type is required; pass torch.float16, "
                "or leave it out to store what the teacher computes."
            )
        if not max_gib > 0:
            raise ValueError(
                f"CachedTeacher: max_gib={max_gib}; more than 0 is required; leave the cache out "
                "to store nothing."
            )
        self.model = model.eval()
        self.folder = Path(folder)
        self.dtype = dtype
        self.num_hits = 0
        self.num_misses = 0
        self._max_bytes = int(max_gib * 2**30)
        self._fingerprint = _fingerprint(model)
        self._versions = _versions(model)
        self._claim_folder()
        self._num_bytes = sum(path.stat().st_size for path in self.folder.glob(f"*/*{_SUFFIX}"))

    def __repr__(self) -> str:
        return (
            f"CachedTeacher({type(self.model).__name__}, {str(self.folder)!r}, "
            f"num_hits={self.num_hits}, num_misses={self.num_misses})"
        )

    def outputs(
        self,
        images: Tensor,
        compute: Callable[[Tensor], dict[str, Tensor]],
        *,
        names: Sequence[str],
    ) -> dict[str, Tensor]:
        """Return what `compute(images)` returns, read from the folder where it is all there.

        If one image of the batch is missing the whole batch is computed, so that an output never
        depends on how the rest of its batch was found; stored ones are still returned as stored.

        Args:
            images: (B, ...).
            compute: runs the teacher; tensors by name, each (B, ...).
            names: what `compute` is asked for; part of what an entry is found by.

        Raises:
            ValueError: the teacher has changed since, an output does not have one row for each
                image, or is not finite in the stored dtype.
        """
        self._check_unchanged()
        keys = _keys(images, names)
        found = [self._read(key) for key in keys]
        num_found = sum(entry is not None for entry in found)
        self.num_hits += num_found
        self.num_misses += len(keys) - num_found
        if num_found < len(keys):
            computed = compute(images)
            for name, value in computed.items():
                if value.shape[:1] != images.shape[:1]:
                    raise ValueError(
                        f"CachedTeacher: {name!r} of the teacher is {tuple(value.shape)} for "
                        f"{len(images)} images; one row for each image is required; use the "
                        "teacher without a cache."
                    )
            rows = {name: self._stored(name, value) for name, value in computed.items()}
            for i, key in enumerate(keys):
                if found[i] is None:
                    found[i] = {name: value[i].clone() for name, value in rows.items()}
                    self._write(key, found[i] or {})
        entries = [entry for entry in found if entry is not None]
        stacked = {name: torch.stack([e[name] for e in entries]) for name in entries[0]}
        return {
            name: (value if self.dtype is None else value.float()).to(images.device)
            for name, value in stacked.items()
        }

    def _stored(self, name: str, value: Tensor) -> Tensor:
        """As it is written: on the CPU, in the dtype of the folder, finite."""
        stored = value.detach().to("cpu", self.dtype or value.dtype).contiguous()
        if not stored.isfinite().all():
            raise ValueError(
                f"CachedTeacher: {name!r} of the teacher is not finite in {stored.dtype}; finite "
                "outputs are required, as they are kept for good; store in float32, and look at "
                "the teacher's outputs if that does not help."
            )
        return stored

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}{_SUFFIX}"

    def _read(self, key: str) -> dict[str, Tensor] | None:
        from safetensors import SafetensorError, safe_open

        path = self._path(key)
        try:
            with safe_open(str(path), framework="pt") as file:
                if (file.metadata() or {}).get("key") == key:
                    return {name: file.get_tensor(name) for name in file.keys()}
        except FileNotFoundError:
            return None
        except SafetensorError:
            pass
        warnings.warn(
            f"CachedTeacher: {str(path)!r} is damaged or was renamed; it is computed again.",
            stacklevel=2,
        )
        return None

    def _write(self, key: str, tensors: dict[str, Tensor]) -> None:
        from safetensors.torch import save

        content = save(tensors, metadata={"key": key})
        if self._num_bytes + len(content) > self._max_bytes:
            if self._num_bytes <= self._max_bytes:
                warnings.warn(
                    f"CachedTeacher: {str(self.folder)!r} is full; what is missing is computed "
                    "each time from now on; raise max_gib, or store in float16.",
                    stacklevel=2,
                )
                self._num_bytes = self._max_bytes + 1
            return
        self._num_bytes += len(content)
        _replace(self._path(key), content)

    def _claim_folder(self) -> None:
        """Make the folder this teacher's, or see that it is."""
        own = {
            "format": _FORMAT,
            "teacher": self._fingerprint,
            "dtype": "as computed" if self.dtype is None else str(self.dtype),
        }
        title = self.folder / _TITLE
        if not title.exists():
            if self.folder.exists() and any(self.folder.iterdir()):
                raise ValueError(
                    f"CachedTeacher: {str(self.folder)!r} holds files but no {_TITLE}; an empty or "
                    "new folder, or one of this teacher, is required; pass another."
                )
            _replace(title, json.dumps(own).encode())
            return
        try:
            stored = json.loads(title.read_text())
        except ValueError:
            stored = {}
        wrong = [key for key in own if not isinstance(stored, dict) or stored.get(key) != own[key]]
        if wrong:
            raise ValueError(
                f"CachedTeacher: {str(self.folder)!r} was written for another "
                f"{' and '.join(wrong)}; a folder of this teacher is required, as the outputs of "
                "another would be learnt from; pass another folder, or delete this one."
            )

    def _check_unchanged(self) -> None:
        versions = _versions(self.model)
        if len(versions) == len(self._versions) and all(
            now is then and count == counted
            for (now, count), (then, counted) in zip(versions, self._versions, strict=True)
        ):
            return
        if _fingerprint(self.model) != self._fingerprint:
            raise ValueError(
                f"CachedTeacher: the teacher has changed since {str(self.folder)!r} was opened; "
                "the same weights are required, as the stored outputs are theirs; load all weights "
                "first, and open a folder of their own."
            )
        self._versions = versions


def _replace(path: Path, content: bytes) -> None:
    """Write under a name of its own, then rename: a reader sees all of it or nothing.

    Not flushed to the disk: what a crash cuts off is found damaged and computed again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _keys(images: Tensor, names: Sequence[str]) -> list[str]:
    """One key for each image."""
    device = images.device.type
    autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
    title = json.dumps(
        [_FORMAT, str(images.dtype), list(images.shape[1:]), autocast, sorted(names)]
    )
    start = hashlib.sha256(title.encode())
    keys = []
    for image in images.detach().cpu():
        of_image = start.copy()
        of_image.update(_bytes(image))
        keys.append(of_image.hexdigest())
    return keys


def _bytes(value: Tensor) -> Any:
    """The elements in logical order, whatever the memory format; what hashlib takes."""
    flat = value.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(model.named_parameters(), model.named_buffers())


def _versions(model: nn.Module) -> list[tuple[Tensor, int]]:
    """Changes with in-place writes to the weights, and with their replacement."""
    return [(value, value._version) for _, value in _tensors(model)]


def _fingerprint(model: nn.Module) -> str:
    """SHA-256 over structure and weights, whatever the device."""
    digest = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", repr(model)).encode())
    for name, value in sorted(_tensors(model)):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()
