"""What layers of a network return, seen from outside: hooks for the time of a `with` block."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["check_recorded", "record_features", "tensors_in"]


@contextmanager
def record_features(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Record what some layers return in the one call of the model inside a `with` block.

    Outputs, gradients, the random state and the modules are left as they are.

    Args:
        model: any module; not one wrapped by torch.compile, whose graph runs no hooks.
        names: qualified names of its layers, as `model.named_modules()` has them.

    Yields:
        By name of the layer, what it returned, with its gradient; filled as the model runs. A layer
        that returns a mapping or a sequence of tensors, as a feature pyramid does, has one entry
        for each: "fpn['0']", "fpn['1']", or "pair[0]", "pair[1]".

    Raises:
        ValueError: a name that the model does not have, a compiled model, or a layer that runs a
            second time inside the block.
        TypeError: a layer that returns something else than tensors.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU())
        >>> with record_features(net, ["0"]) as features:
        ...     _ = net(torch.zeros(1, 3, 4, 4))
        >>> {name: tuple(value.shape) for name, value in features.items()}
        {'0': (1, 8, 4, 4)}
    """
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "record_features: the model is wrapped by torch.compile, whose graph runs no hooks, "
            "but an eager module is needed; pass the module that was compiled (model._orig_mod)."
        )
    names = list(names)
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules or not name:
            close = difflib.get_close_matches(name, modules, n=3) or [n for n in modules if n][:5]
            raise ValueError(
                f"record_features: {type(model).__name__} has no layer {name!r}; a name of "
                f"model.named_modules() is required; close to it are {', '.join(map(repr, close))}."
            )
    features: dict[str, Tensor] = {}
    seen: set[str] = set()

    def recorder(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if name in seen:
                raise ValueError(
                    f"record_features: layer {name!r} ran twice inside the block; one run is "
                    "required, as only one can be compared; run the model once, or name a layer "
                    "that is not shared."
                )
            seen.add(name)
            features.update(tensors_in(output, name))

        return hook

    handles = []
    try:
        for name in names:
            handles.append(modules[name].register_forward_hook(recorder(name)))
        yield features
    finally:
        for handle in handles:
            handle.remove()


def tensors_in(output: Any, name: str) -> dict[str, Tensor]:
    """Return the tensors that a module returned, by name.

    Args:
        output: a tensor, or a mapping or sequence of tensors.
        name: of a single tensor; the others have their key or index behind it: "name['key']".

    Raises:
        TypeError: something else is in it.
    """
    if isinstance(output, Tensor):
        return {name: output}
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(output, Mapping):
        items = output.items()
    elif isinstance(output, Sequence) and not isinstance(output, str):
        items = enumerate(output)
    found = {f"{name}[{key!r}]": value for key, value in items}
    if not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise TypeError(
            f"record_features: {name!r} returned a {type(output).__name__}; a tensor, or a mapping "
            "or sequence of tensors, is required; name a layer further inside."
        )
    return found


def check_recorded(names: Iterable[str], features: Mapping[str, Tensor], *, of: str) -> None:
    """Raise ValueError unless each layer of `names` is among the recorded `features` of a model."""
    recorded = {key.partition("[")[0] for key in features}
    missing = [name for name in names if name not in recorded]
    if missing:
        raise ValueError(
            f"FeatureHints: {', '.join(map(repr, missing))} of the {of} did not run inside the "
            "recording; a layer that runs is required; call the model inside the `with` block, or "
            "name the block around a layer that is not called by itself."
        )
