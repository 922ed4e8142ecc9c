"""Segmentation as a Lightning task: loss, metric, optimiser, and the price of computing."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from sparsight.measure import count_macs
from sparsight.nn import Sampler, record_sampling
from sparsight.nn.objective import sampling_loss
from sparsight.train.annealing import warmup_cosine
from sparsight.train.architecture import Architecture
from sparsight.train.losses import BudgetController, SamplingPrice, mean_of

_NUM_MEASURED_BATCHES = 4


def intersection_over_union(confusion: Tensor) -> Tensor:
    """Return the IoU of each class from a confusion matrix.

    Args:
        confusion: (K, K) counts of pixels, rows truth, columns prediction.

    Returns:
        (K,) float64 in [0, 1]; NaN for a class that neither truth nor prediction contains, so that
        `nanmean` is the mIoU.
    """
    counts = confusion.double()
    hits = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - hits
    return torch.where(union > 0, hits / union.clamp(min=1), torch.nan)


class SegmentationTask(L.LightningModule):
    """Trains a segmentation model, dense or sampled.

    Args:
        model: (B, 3, H, W) -> {"out": (B, K, H, W) logits}.
        architecture: what `model` is; saved with the training state and checked when it is resumed.
        ignore_index: label of the pixels that do not count.
        objective: price of computing; None for a dense model. It is charged the expected share of
            the dense MACs of the whole model.
        lr: peak learning rate of AdamW; linear warm-up, then a half cosine to 0.
        scalar_lr_factor: learning rate of the samplers' biases and the interpolations' widths over
            that of the rest. They are single numbers with far to go in short runs: a logit from 3
            to below 0, an RBF width from 3 to about 1.
        weight_decay: of weights of convolutions; not of norms, biases, samplers and interpolations.
        warmup: share of the run over which the learning rate rises.

    Logs per epoch: `loss`, `val_miou`; sampled: `expected_share`, `multiplier`, `val_share`
    (measured share of the dense MACs on a few validation batches, everything counted).
    """

    recent_share: Tensor
    objective: BudgetController | SamplingPrice | None

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        *,
        ignore_index: int,
        objective: BudgetController | SamplingPrice | None = None,
        lr: float = 1e-3,
        scalar_lr_factor: float = 10.0,
        weight_decay: float = 1e-2,
        warmup: float = 0.05,
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.architecture = architecture
        self.ignore_index = ignore_index
        self.lr = lr
        self.scalar_lr_factor = scalar_lr_factor
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.confusion = MulticlassConfusionMatrix(
            architecture.num_classes, ignore_index=ignore_index, validate_args=False
        )
        self._macs_per_image: dict[tuple[int, int], int] = {}
        self._pending: list[float] = []  # expected shares since the last optimiser step
        self._measured: list[float] = []
        # What the objective saw lately; a buffer, so that a resumed run calibrates as the
        # uninterrupted one.
        self.register_buffer("recent_share", torch.ones(()))

    def on_fit_start(self) -> None:
        """Train the whole model, also one that was evaluated before: lightning keeps modes."""
        self.train()

    @property
    def progress(self) -> float:
        """Share of the run's optimiser steps that are done, in [0, 1]."""
        total = max(1, int(self.trainer.estimated_stepping_batches))
        return min(1.0, self.trainer.global_step / total)

    def dense_macs_per_image(self, size: tuple[int, int]) -> int:
        """Return the MACs of the dense model for one image of (height, width) pixels."""
        if size not in self._macs_per_image:
            was_training = self.model.training
            device = next(self.model.parameters()).device
            with torch.no_grad():
                self._macs_per_image[size] = count_macs(
                    self.model.eval(), torch.zeros(1, 3, *size, device=device)
                ).dense
            self.model.train(was_training)
        return self._macs_per_image[size]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy plus the price of computing."""
        images, labels = batch
        images = images.contiguous(memory_format=torch.channels_last)
        if self.objective is None:
            loss = self._cross_entropy(self.model(images)["out"], labels)
            self.log(
                "loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(images)
            )
            return loss
        total = self.dense_macs_per_image((images.shape[-2], images.shape[-1])) * len(images)
        with record_sampling(self.model) as record:
            task_loss = self._cross_entropy(self.model(images)["out"], labels)
            share = sampling_loss(record, total_macs=total)
        loss = task_loss + self.objective(share, progress=self.progress)
        self._pending.append(float(share.detach()))
        self.log(
            "loss", task_loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(images)
        )
        self.log(
            "expected_share",
            share,
            on_step=False,
            on_epoch=True,
            prog_bar=True,
            batch_size=len(images),
        )
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the price follow the expected share, once per optimiser step."""
        if self.objective is None or not self._pending:
            return
        share = mean_of(self._pending)
        self._pending.clear()
        self.recent_share.lerp_(torch.tensor(share), 0.1)
        total = int(self.trainer.estimated_stepping_batches)
        self.objective.update(share, progress=self.progress, total_steps=total)
        if isinstance(self.objective, BudgetController):
            self.log("multiplier", self.objective.multiplier)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count pixels; on a few batches, spread over the set, also MACs."""
        images, labels = batch
        images = images.contiguous(memory_format=torch.channels_last)
        logits = self.model(images)["out"].float()
        logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
        self.confusion.update(logits.argmax(1), labels)
        num_batches = int(sum(self.trainer.num_val_batches))
        if (
            self.objective is not None
            and batch_idx % max(1, num_batches // _NUM_MEASURED_BATCHES) == 0
        ):
            counted = count_macs(self.model, images)
            self._measured.append(counted.total / counted.dense)

    def on_validation_epoch_end(self) -> None:
        """Log the mIoU; tell the controller what the expected share leaves out."""
        self.log(
            "val_miou",
            intersection_over_union(self.confusion.compute()).nanmean().float(),
            prog_bar=True,
        )
        self.confusion.reset()
        if self.objective is not None and self._measured:
            share = mean_of(self._measured)
            self.log("val_share", share, prog_bar=True)
            if not self.trainer.sanity_checking:
                self.objective.calibrate(share, float(self.recent_share))
        self._measured.clear()

    def configure_optimizers(self) -> Any:
        """Return AdamW with three groups and the schedule of the learning rate."""
        slow, decayed, plain, undecayed = [], [], [], []
        gates = {
            id(p)
            for module in self.model.modules()
            if isinstance(module, Sampler)
            or type(module).__module__ == "sparsight.nn.interpolation"
            for p in module.parameters()
        }
        for parameter in self.model.parameters():
            if not parameter.requires_grad:
                continue
            is_gate = id(parameter) in gates
            if parameter.ndim > 1:
                # A logit sums 9*C features: a head's weights, unlike its bias, move it far enough
                # at the common rate. Ten times that saturates the logits, and samples no longer
                # follow the content.
                group = undecayed if is_gate else decayed
            else:
                group = slow if is_gate else plain
            group.append(parameter)
        groups = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": plain + undecayed, "weight_decay": 0.0},
            {"params": slow, "weight_decay": 0.0, "lr": self.lr * self.scalar_lr_factor},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=self.lr)
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
        stored = Architecture.from_json(checkpoint["architecture"])
        if stored != self.architecture:
            raise ValueError(
                f"resume: the training state is of {stored}, this run builds {self.architecture}; "
                "equal architectures are required; repeat the flags of the interrupted run, or "
                "start anew with another --out."
            )

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, ignore_index=self.ignore_index)
