"""Running statistics of batch norms, measured again as inference computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparsight.measure.macs import call_model
from sparsight.nn.evaluating import evaluating


def running_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms of `model` that keep running statistics, each once."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def norm_state(model: nn.Module) -> list[dict[str, Tensor]]:
    """Return copies of the running statistics of `running_norms`, for `set_norm_state`."""
    return [{k: v.clone() for k, v in norm.named_buffers()} for norm in running_norms(model)]


@torch.no_grad()
def set_norm_state(model: nn.Module, state: list[dict[str, Tensor]]) -> None:
    """Set the running statistics of `running_norms` to those that `norm_state` returned."""
    for norm, values in zip(running_norms(model), state, strict=True):
        for name, buffer in norm.named_buffers():
            buffer.copy_(values[name])


@contextmanager
def batch_statistics(
    model: nn.Module, *, is_on: bool, momentum: float | None = 0.0
) -> Iterator[None]:
    """For a `with` block, batch norms of a model in eval mode normalise by the batch.

    Args:
        model: whose norms with running statistics are set to training mode, and to eval afterwards.
        is_on: False changes nothing.
        momentum: of the running statistics; 0 leaves them and the count of batches as they are,
            None makes them the mean over the batches.
    """
    norms = running_norms(model) if is_on else []
    kept = [norm.momentum for norm in norms]
    counts = [int(norm.num_batches_tracked or 0) for norm in norms]
    for norm in norms:
        norm.momentum = momentum
        norm.train()
    try:
        yield
    finally:
        for norm, value, count in zip(norms, kept, counts, strict=True):
            norm.momentum = value
            norm.eval()
            # Batches are counted at any momentum. Mean and variance are not touched here: the
            # graph of a step that is still to be differentiated holds them.
            if momentum == 0.0 and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.fill_(count)


@torch.no_grad()
def measure_norms(model: nn.Module, batches: Iterable[Any]) -> int:
    """Replace the running statistics of batch norms by their mean over `batches`.

    With the masks of inference: hard ones. Those of training are a moving average over the last ten
    batches or so, while the weights change and with relaxed masks.

    Args:
        model: any; modes of its modules are as before afterwards. Without batch norms that keep
            running statistics nothing happens.
        batches: what the model takes, a tuple for several arguments; on its device. Of images that
            look to the network as new ones do: of a small training set those that are augmented, as
            it knows the others by heart.

    Returns:
        How many batches were seen.

    Raises:
        ValueError: there are norms, but no batches.

    Cost: one pass over the batches.

    Source: Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3 ("PreciseBN"). The
    variance here is the mean of the batches' variances, without how far their means lie apart.
    """
    norms = running_norms(model)
    if not norms:
        return 0
    before = norm_state(model)
    seen = 0
    try:
        with evaluating(model):
            for norm in norms:
                norm.reset_running_stats()
            with batch_statistics(model, is_on=True, momentum=None):
                for batch in batches:
                    call_model(model, batch)
                    seen += 1
            if seen == 0:
                raise ValueError(
                    f"measure_norms: there are no batches, but {len(norms)} batch norms need at "
                    "least one; pass a list, not an iterator that was used before."
                )
    except BaseException:
        set_norm_state(model, before)
        raise
    return seen
