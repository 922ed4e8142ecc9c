"""What the processes of a run tell each other beside gradients: sums, means, norms' statistics."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def reduce_over_processes(value: Tensor, how: Literal["mean", "sum", "max"]) -> Tensor:
    """Return the mean, sum or maximum over the processes of a run, the same in each.

    Args:
        value: any shape, the same in every process, on a device that they can talk from.
        how: of each element.

    Returns:
        A tensor of `value`'s shape and dtype, without gradient; of a single process its value.

    Cost: one collective call; nothing in a single process.
    """
    value = value.detach()
    if not is_distributed():
        return value
    value = value.clone()
    dist.all_reduce(value, dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM)
    return value / dist.get_world_size() if how == "mean" else value


def gather_lists(own: list[Any]) -> list[Any]:
    """Return the lists of all processes of a run behind each other, the same in each.

    Args:
        own: of plain values; in a single process it is what comes back.

    Cost: one collective call, which sends all of it to all; nothing in a single process.
    """
    if not is_distributed():
        return own
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return [value for part in parts for value in part]


def is_distributed() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized()


class MeanNormStatistics(L.Callback):
    """Gives every process the mean of all processes' running statistics of batch norms.

    Before each validation and at the end of the run. In between each process keeps its own, of its
    own images: then what is validated, stored and resumed does not depend on who stores it. The
    mean of the means is that of all images; the mean of the variances leaves out how far the
    processes' means lie apart.
    """

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Average for the validation and the training state stored after it."""
        average_norm_statistics(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Average what is left after the last validation."""
        average_norm_statistics(pl_module)


@torch.no_grad()
def average_norm_statistics(model: nn.Module) -> None:
    """Replace the running means and variances of all batch norms by their means over processes."""
    if not is_distributed():
        return
    statistics = [
        buffer
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]
    if not statistics:
        return
    means = reduce_over_processes(torch.cat([buffer.flatten() for buffer in statistics]), "mean")
    parts = means.split([buffer.numel() for buffer in statistics])
    for buffer, part in zip(statistics, parts, strict=True):
        buffer.copy_(part.view_as(buffer))
