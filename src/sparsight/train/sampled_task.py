"""What every task shares: the price of computing, its measurement, the optimiser, the schedule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from sparsight.compress import Distiller
from sparsight.measure import MacCount, count_macs
from sparsight.nn import ReLUGate, Sampler, record_sampling
from sparsight.nn.budget import (
    BudgetController,
    SamplingPrice,
    SharePull,
    mean_pull,
    sampler_levels,
    share_pull,
)
from sparsight.nn.channels_last import channels_last
from sparsight.nn.evaluating import evaluating
from sparsight.train.annealing import warmup_cosine
from sparsight.train.architecture import AnyArchitecture
from sparsight.train.processes import is_distributed, reduce_over_processes

_NUM_MEASURED_BATCHES = 4
# Measurements for the controller, and the memory of their average. A measurement costs a third of a
# step or more: 100 a run, but at most one in four steps.
_NUM_MEASUREMENTS = 100
_LEAST_STEPS_BETWEEN = 4
_MEMORY = 0.9


class SampledTask(L.LightningModule, ABC):
    """Trains a model, dense or sampled; a task says what its batches, loss and metric are.

    A task implements `task_loss`, `update_metric` and `compute_metric`. One whose model takes
    anything but the batch's first element, as one tensor, also replaces `inputs_of`, `num_images`
    and `dense_macs`.

    Args:
        model: what is trained; `inputs_of(batch)` is its argument.
        architecture: what `model` is; saved with the training state and checked when it is resumed.
        objective: price of computing; None for a dense model. It is charged the expected share of
            the dense MACs of the whole model.
        distiller: whom the model learns from beside the annotations, and how; None for those alone.
        lr: peak learning rate of AdamW; linear warm-up, then a half cosine to 0.
        scalar_lr_factor: learning rate of the samplers' biases and the interpolations' widths over
            that of the rest. They are single numbers with far to go in short runs: a logit from 3
            to below 0, an RBF width from 3 to about 1.
        weight_decay: of weights of convolutions; not of norms, biases, samplers and interpolations.
        warmup: share of the run over which the learning rate rises.

    A budget is held for what inference sees: about 100 times a run the share is measured in eval
    mode, on a batch of training images with the validation's transform (those of `Recipe`; with
    another data module the step's own images, as they are), and the controller's target moves by
    what the expected share of that step left out. Validation images steer nothing.

    Logs per epoch: `loss`, what `compute_metric` returns; sampled: `expected_share`, `multiplier`,
    `measured_share` (what the controller measured, the mean), `val_share` (measured on a few
    validation batches); shares are of the dense MACs, the measured ones with everything counted.
    """

    objective: BudgetController | SamplingPrice | None

    def __init__(
        self,
        model: nn.Module,
        architecture: AnyArchitecture,
        *,
        objective: BudgetController | SamplingPrice | None = None,
        distiller: Distiller | None = None,
        lr: float = 1e-3,
        scalar_lr_factor: float = 10.0,
        weight_decay: float = 1e-2,
        warmup: float = 0.05,
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.distiller = distiller
        self.architecture = architecture
        self.lr = lr
        self.scalar_lr_factor = scalar_lr_factor
        self.weight_decay = weight_decay
        self.warmup = warmup
        self._macs_per_image: dict[tuple[int, ...], int] = {}
        self._pending: list[SharePull] = []  # of the micro-batches since the last optimiser step
        self._last_batch: Any = None
        self._measured = [0, 0]  # MACs that some validation batches needed, and dense ones
        self._measure_every = 1

    @abstractmethod
    def task_loss(self, batch: Any) -> Tensor:
        """Return the scalar loss of a training batch; calls `self.model` exactly once."""

    @abstractmethod
    def update_metric(self, batch: Any) -> None:
        """Run the model on a validation batch and count what it got right."""

    @abstractmethod
    def compute_metric(self) -> dict[str, Any]:
        """Return what was counted since the last call, by name ("val_..."), and forget it."""

    def inputs_of(self, batch: Any) -> Any:
        """Return what the model takes: here the batch's first element, channels-last."""
        return channels_last(batch[0])

    def num_images(self, batch: Any) -> int:
        """Return how many images a batch holds."""
        return len(batch[0])

    def dense_macs(self, batch: Any) -> int:
        """Return the dense model's MACs of the whole batch, heads and all.

        Counted once per image size, on zeros.
        """
        images: Tensor = batch[0]
        size = tuple(images.shape[1:])
        if size not in self._macs_per_image:
            with torch.no_grad(), evaluating(self.model):
                zeros = torch.zeros(1, *size, device=images.device)
                self._macs_per_image[size] = count_macs(self.model, zeros).dense
        return self._macs_per_image[size] * len(images)

    def counted_macs(self, batch: Any) -> MacCount:
        """Return what the model, in eval mode, computes for a validation batch."""
        return count_macs(self.model, self.inputs_of(batch))

    def on_fit_start(self) -> None:
        """Train the whole model, also one that was evaluated before: lightning keeps modes."""
        self.train()

    @property
    def progress(self) -> float:
        """Share of the run's optimiser steps that are done, in [0, 1]."""
        total = max(1, int(self.trainer.estimated_stepping_batches))
        return min(1.0, self.trainer.global_step / total)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the task's loss plus the price of computing."""
        logged: dict[str, Any] = {
            "on_step": False,
            "on_epoch": True,
            "prog_bar": True,
            "sync_dist": True,
            "batch_size": self.num_images(batch),
        }
        if self.objective is None:
            loss = self.task_loss(batch)
            self.log("loss", loss, **logged)
            return loss
        total_macs = self.dense_macs(batch)
        with record_sampling(self.model) as record:
            task_loss = self.task_loss(batch)
            share = self.objective.expected_share(record, total_macs=total_macs)
        loss = task_loss + self.objective(share)
        self._pending.append(share_pull(self.model, record, total_macs=total_macs))
        self._last_batch = batch
        self.log("loss", task_loss, **logged)
        self.log("expected_share", share, **logged)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let price and levels follow the expected share, once per optimiser step."""
        if self.objective is None or not self._pending:
            return
        pull = self._mean_over_processes(mean_pull(self._pending))
        self._pending.clear()
        if isinstance(self.objective, BudgetController):
            self._calibrate(self.objective, pull.share)
        self.objective.update(sampler_levels(self.model), pull, progress=self.progress)
        if isinstance(self.objective, BudgetController):
            self.log("multiplier", self.objective.multiplier)
        self._last_batch = None

    def _calibrate(self, controller: BudgetController, expected_share: float) -> None:
        """Now and then, tell the controller what the expected share of the step leaves out."""
        steps = int(self.trainer.estimated_stepping_batches)
        every = max(_LEAST_STEPS_BETWEEN, steps // _NUM_MEASUREMENTS)
        number, rest = divmod(self.trainer.global_step, every)
        if rest > 0:
            return
        measured_batch = getattr(self.trainer.datamodule, "measured_batch", None)  # type: ignore[attr-defined]  # set by lightning, not declared
        batch = self._last_batch
        if measured_batch is not None:
            batch = self.transfer_batch_to_device(measured_batch(number), self.device, 0)
        with torch.no_grad(), evaluating(self.model):
            counted = self.counted_macs(batch)
        # In a distributed run each process has norms of its own until the next validation: the mean
        # of their shares stands for the share with the mean of their statistics.
        measured = torch.tensor([counted.total, counted.dense], device=self.device)
        total, dense = reduce_over_processes(measured, "sum").tolist()
        controller.calibrate(total / dense, expected_share, memory=_MEMORY)
        self.log(
            "measured_share",
            total / dense,
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            batch_size=1,
        )

    def _mean_over_processes(self, pull: SharePull) -> SharePull:
        """What the gradients, which are means over processes by now, answer to."""
        if not is_distributed():
            return pull
        values = torch.tensor([pull.share, pull.slope, pull.price_slope], device=self.device)
        return SharePull(*reduce_over_processes(values, "mean").tolist())

    def on_validation_epoch_start(self) -> None:
        """Spread the batches on which MACs are counted over the set, in all processes alike."""
        num_batches = torch.tensor(int(sum(self.trainer.num_val_batches)), device=self.device)
        num_batches = int(reduce_over_processes(num_batches, "max"))
        self._measure_every = max(1, num_batches // _NUM_MEASURED_BATCHES)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Update the metric; on a few batches, spread over the set, also count MACs."""
        self.update_metric(batch)
        if self.objective is not None and batch_idx % self._measure_every == 0:
            counted = self.counted_macs(batch)
            self._measured[0] += counted.total
            self._measured[1] += counted.dense

    def on_validation_epoch_end(self) -> None:
        """Log the metric, and the share of the dense MACs that was measured."""
        for name, value in self.compute_metric().items():
            self.log(name, value, prog_bar=True, sync_dist=True)
        if self.objective is not None:
            measured = torch.tensor(self._measured, device=self.device)
            total, dense = reduce_over_processes(measured, "sum").tolist()
            self.log("val_share", total / dense, prog_bar=True, sync_dist=True)
        self._measured = [0, 0]

    @contextmanager
    def recording(self) -> Iterator[dict[str, Tensor]]:
        """Record what the distiller, if there is one, compares of the model's layers."""
        if self.distiller is None:
            yield {}
            return
        with self.distiller.recording() as features:
            yield features

    def trained_groups(self) -> list[dict[str, Any]]:
        """Return the parameters for the optimiser: the model's, and those of hints."""
        groups = parameter_groups(
            self.model,
            lr=self.lr,
            scalar_lr_factor=self.scalar_lr_factor,
            weight_decay=self.weight_decay,
        )
        adapters = [] if self.distiller is None else list(self.distiller.parameters())
        if adapters:
            groups.append({"params": adapters, "weight_decay": 0.0})
        return groups

    def configure_optimizers(self) -> Any:
        """Return AdamW with its groups and the schedule of the learning rate."""
        groups = self.trained_groups()
        optimizer = torch.optim.AdamW(groups, lr=self.lr)
        total = int(self.trainer.estimated_stepping_batches)
        warmup_steps = int(self.warmup * total)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: warmup_cosine(step, total_steps=total, warmup_steps=warmup_steps),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the architecture beside the training state."""
        checkpoint["architecture"] = self.architecture.to_json()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the training state of another architecture."""
        stored = type(self.architecture).from_json(checkpoint["architecture"])
        if stored != self.architecture:
            raise ValueError(
                f"resume: the training state is of {stored}, this run builds {self.architecture}; "
                "equal architectures are required; repeat the flags of the interrupted run, or "
                "start anew with another --out."
            )


def gate_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of samplers and interpolations: those a dense model does not have."""
    return [
        parameter
        for module in model.modules()
        if isinstance(module, Sampler | ReLUGate)
        or type(module).__module__ == "sparsight.nn.interpolation"
        for parameter in module.parameters()
    ]


def parameter_groups(
    model: nn.Module, *, lr: float, scalar_lr_factor: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Return the trainable parameters in groups for `torch.optim.AdamW`; empty groups left out.

    Args:
        model: dense or sampled; frozen parameters (`requires_grad` off) are left out.
        lr: common learning rate.
        scalar_lr_factor: factor on `lr` for the samplers' biases and the interpolations' widths.
        weight_decay: of weights with more than one dimension outside samplers and interpolations.
    """
    slow, decayed, plain, undecayed = [], [], [], []
    gates = {id(parameter) for parameter in gate_parameters(model)}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        is_gate = id(parameter) in gates
        if parameter.ndim > 1:
            # A logit sums 9*C features: a head's weights, unlike its bias, move it far enough at
            # the common rate. Ten times that saturates the logits, and samples no longer follow
            # the content.
            group = undecayed if is_gate else decayed
        else:
            group = slow if is_gate else plain
        group.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain + undecayed, "weight_decay": 0.0},
        {"params": slow, "weight_decay": 0.0, "lr": lr * scalar_lr_factor},
    ]
    return [group for group in groups if group["params"]]
