"""Running a model again and again from where it last changed, instead of from its first layer.

When layers are changed from the front to the back, everything before the one at hand computes what
it did in the pass before. Its results are kept, and only those that the rest of the model reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["Replay"]


@dataclass
class _Call:
    """One module in the traced run: when it began and ended, who called it, who read its output."""

    caller: str
    began: int
    ended: int = -1
    num_calls: int = 1
    is_tensor: bool = False
    readers: set[str] = field(default_factory=set)


class _Readers(TorchFunctionMode):
    """Notes which module runs when a function of torch takes a tensor that a module returned."""

    def __init__(self, calls: dict[str, _Call]) -> None:
        super().__init__()
        self.calls = calls
        self.stack: list[str] = []
        self.made: dict[int, tuple[Tensor, dict[str, int]]] = {}

    def note(self, value: Any) -> None:
        if isinstance(value, list | tuple):
            for item in value:
                self.note(item)
        elif isinstance(value, dict):
            for item in value.values():
                self.note(item)
        elif isinstance(value, Tensor) and id(value) in self.made:
            for name, version in self.made[id(value)][1].items():
                if value._version == version:
                    self.calls[name].readers.add(self.stack[-1])

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.note(args)
        self.note(kwargs or {})
        return func(*args, **(kwargs or {}))


def _trace(model: nn.Module, batch: Any) -> dict[str, _Call]:
    calls: dict[str, _Call] = {}
    readers = _Readers(calls)
    clock = 0

    def tick() -> int:
        nonlocal clock
        clock += 1
        return clock

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            if name in calls:
                calls[name].num_calls += 1
            else:
                calls[name] = _Call(readers.stack[-1] if readers.stack else "", tick())
            readers.stack.append(name)

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            readers.stack.pop()
            call = calls[name]
            call.ended, call.is_tensor = tick(), isinstance(out, Tensor)
            if call.is_tensor:
                _, makers = readers.made.setdefault(id(out), (out, {}))
                makers[name] = out._version

        return hook

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_pre_hook(before(name)).remove)
            hooks.callback(module.register_forward_hook(after(name)).remove)
        with torch.no_grad(), readers:
            readers.stack.append("")
            readers.note(model(batch))
    return calls


class Replay:
    """Runs a model on the same batches again, without what lies before the first changed layer.

    Modules that ended before that layer began are not called: those whose output something after
    them reads return what they returned the last time, the others a placeholder of the same shape.
    Which is which is seen in one traced run: any Python may lie in between.

    Args:
        model: in eval mode; its layers may be changed between passes, its modules not exchanged.
        example: one of the batches.
        max_bytes: bound on what is kept. Where a pass would keep more, it starts from where the
            last one that fitted did.
    """

    def __init__(self, model: nn.Module, example: Any, *, max_bytes: int = 1 << 30) -> None:
        self.model = model
        self.max_bytes = max_bytes
        self.calls = _trace(model, example)
        self.frontier = 0  # modules that ended by this tick are replayed
        self.kept: list[dict[str, Tensor | torch.Size]] = []
        self.modules = dict(model.named_modules())

    def run(self, batches: list[Any], *, changed: str, run: Callable[[int, Any], None]) -> None:
        """Run the model on all batches, and keep what the next pass will need.

        Args:
            batches: the same ones in every pass.
            changed: the first layer, by name, that changed since the last pass or will change
                after this one; never before that of an earlier pass.
            run: called as run(index, batch), to call the model; it may stop it midway, after the
                layer `changed` began.
        """
        frontier = self.calls[changed].began - 1 if changed in self.calls else self.frontier
        stubs = self._outermost(self.frontier)
        captured = self._outermost(frontier)
        live = {name for name in captured if self._is_read(name, frontier)}
        kept: list[dict[str, Tensor | torch.Size]] = []
        size, fits = 0, frontier > self.frontier
        for i, batch in enumerate(batches):
            store: dict[str, Tensor | torch.Size] = {}
            with ExitStack() as stack:
                if self.kept:
                    stack.enter_context(self._stubbed(stubs, self.kept[i]))
                if fits:
                    stack.enter_context(self._capturing(captured, live, store))
                run(i, batch)
            kept.append(store)
            size += sum(t.nbytes for t in store.values() if isinstance(t, Tensor))
            fits = fits and size <= self.max_bytes
            if not fits:
                kept = [{} for _ in kept]
        if fits:
            self.frontier, self.kept = frontier, kept

    def _is_done(self, name: str, tick: int) -> bool:
        call = self.calls[name]
        return call.is_tensor and call.num_calls == 1 and call.ended <= tick

    def _is_skipped(self, name: str, tick: int) -> bool:
        """Whether a module does not run, because it or one that calls it is replayed."""
        while name in self.calls:
            if self._is_done(name, tick):
                return True
            if self.calls[name].num_calls > 1 or not name:
                return False
            name = self.calls[name].caller
        return False

    def _outermost(self, tick: int) -> list[str]:
        return [
            name
            for name in self.calls
            if name
            and self._is_done(name, tick)
            and not self._is_skipped(self.calls[name].caller, tick)
        ]

    def _is_read(self, name: str, tick: int) -> bool:
        return any(not self._is_skipped(reader, tick) for reader in self.calls[name].readers)

    @contextmanager
    def _stubbed(self, names: list[str], kept: dict[str, Tensor | torch.Size]) -> Iterator[None]:
        def stub(value: Tensor | torch.Size) -> Callable[..., Tensor]:
            # A copy: what reads it may work in place.
            if isinstance(value, Tensor):
                return lambda *args, **kwargs: value.clone()
            return lambda *args, **kwargs: torch.zeros(()).expand(value)

        stubbed = [self.modules[name] for name in names if name in kept]
        try:
            for name in names:
                if name in kept:
                    vars(self.modules[name])["forward"] = stub(kept[name])
            yield
        finally:
            for module in stubbed:
                vars(module).pop("forward", None)

    @contextmanager
    def _capturing(
        self, names: list[str], live: set[str], store: dict[str, Tensor | torch.Size]
    ) -> Iterator[None]:
        def capture(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, out: Tensor) -> None:
                store[name] = out.detach().clone() if name in live else out.shape

            return hook

        with ExitStack() as hooks:
            for name in names:
                hooks.callback(self.modules[name].register_forward_hook(capture(name)).remove)
            yield
