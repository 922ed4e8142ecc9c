"""Watch what a model samples, from outside: forward hooks for the time of a `with` block."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from sparsight.nn.sampler import SamplingDecision

__all__ = ["RecordedDecision", "SamplingRecord", "record_sampling"]

# Set while a backward pass computes again what was recorded before.
_IS_RECOMPUTING: ContextVar[bool] = ContextVar("is_recomputing", default=False)


@dataclass(frozen=True)
class RecordedDecision:
    """One decision of one sampler in one call of the model.

    Attributes:
        name: qualified name of the sampler in the model, e.g. "backbone.layer1.0.samplers.0".
        mask: (B, 1, H, W) bool, True where features are computed.
        probability: (B, 1, H, W) float32 before noise and grid, with its gradient.
        relaxed: (B, 1, H, W) float32 in training mode, else None.
        macs: multiply-adds that the decision gates in the dense model, over the whole batch.
        block_share: what the decision counts in its block by the published code, which is .25, .5
            and .25 for the convolutions of a bottleneck; a half each for those of a basic block,
            which is not published.
    """

    name: str
    mask: Bool[Tensor, "B 1 H W"]
    probability: Float[Tensor, "B 1 H W"]
    relaxed: Float[Tensor, "B 1 H W"] | None
    macs: int
    block_share: float = 1.0


@dataclass
class SamplingRecord:
    """The decisions of all calls since the record began or was cleared, in order of execution.

    Attributes:
        decisions: one entry per sampler and call. They keep the masks and, in training, the graph
            behind the probabilities alive.
    """

    decisions: list[RecordedDecision] = field(default_factory=list)

    def clear(self) -> None:
        """Forget the decisions so far, for example between two steps of training."""
        self.decisions.clear()


@contextmanager
def record_sampling(model: nn.Module) -> Iterator[SamplingRecord]:
    """Record every sampling decision that the model makes inside a `with` block.

    The outputs, the random state and the modules are left as they are. Records may be nested. Every
    call inside the block appends; what `recompute_activations` computes again in a backward pass
    does not.

    Args:
        model: a converted or frozen model, or any module that contains one.

    Yields:
        The record, filled as the model runs and still readable afterwards.

    Raises:
        ValueError: if the model has no samplers, or is wrapped by torch.compile, whose graph does
            not run hooks.

    Example:
        >>> import torch
        >>> from sparsight.nn import SampledConv2d, Sampler, ZeroFill
        >>> conv = SampledConv2d(
        ...     3, 8, 1, sampler=Sampler(3, bias=0.0), interpolation=ZeroFill()
        ... ).eval()
        >>> with record_sampling(conv) as record:
        ...     _ = conv(torch.randn(1, 3, 20, 20))
        >>> [(d.name, tuple(d.mask.shape), d.macs) for d in record.decisions]
        [('sampler', (1, 1, 20, 20), 9600)]
    """
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "record_sampling: the model is wrapped by torch.compile, whose graph runs no hooks, "
            "but an eager module is needed; pass the module that was compiled (model._orig_mod)."
        )
    record = SamplingRecord()
    handles = []
    try:
        for owner_name, owner in model.named_modules():
            samplers_named = getattr(owner, "samplers_named", None)
            if samplers_named is None:
                continue
            for i, (relative_name, sampler) in enumerate(samplers_named()):
                name = f"{owner_name}.{relative_name}" if owner_name else relative_name
                hook = _Recorder(record, name, owner, i)
                handles.append(sampler.register_forward_hook(hook))
        if not handles:
            raise ValueError(
                f"record_sampling: {type(model).__name__} has no samplers, but there must be "
                "something to record; convert the model first, with sparsight.sparsify(model)."
            )
        yield record
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recording_paused() -> Iterator[None]:
    """Keep decisions made inside a `with` block, which were recorded before, out of all records."""
    token = _IS_RECOMPUTING.set(True)
    try:
        yield
    finally:
        _IS_RECOMPUTING.reset(token)


@dataclass(frozen=True, eq=False)
class _Recorder:
    """Forward hook of one sampler."""

    record: SamplingRecord
    name: str
    owner: Any
    index: int

    def __call__(self, module: nn.Module, args: Any, output: SamplingDecision) -> None:
        if _IS_RECOMPUTING.get():
            return
        batch, _, height, width = output.mask.shape
        self.record.decisions.append(
            RecordedDecision(
                name=self.name,
                mask=output.mask,
                probability=output.probability,
                relaxed=output.relaxed,
                macs=batch * self.owner.gated_macs(self.index, height, width),
                block_share=_block_share(self.owner, self.index),
            )
        )


# By number of convolutions in the block: what each counts in the published loss.
_PUBLISHED_SHARES = {1: (1.0,), 2: (0.5, 0.5), 3: (0.25, 0.5, 0.25)}


def _block_share(owner: Any, index: int) -> float:
    """What a decision counts in its block by the published code."""
    if not hasattr(owner, "convolutions"):
        return 1.0
    decisions = [decision for *_, decision in owner.convolutions()]
    shares = _PUBLISHED_SHARES[len(decisions)]
    return sum(s for s, decision in zip(shares, decisions, strict=True) if decision == index)
