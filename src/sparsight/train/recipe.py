"""One training run: what is trained, on what, for how long, and where the results go."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, Dataset, default_collate

from sparsight.nn.channels_last import put_channels_last
from sparsight.train.annealing import TemperatureAnnealing
from sparsight.train.checkpoint import AtomicCheckpointIO
from sparsight.train.data.augment import (
    EpochSampler,
    SeededView,
    Transform,
    items_of_process,
    mix_seed,
)
from sparsight.train.hardware import Hardware
from sparsight.train.processes import MeanNormStatistics, is_distributed
from sparsight.train.sampled_task import SampledTask

_STATE_NAME = "last"
_LARGEST_MEASURED_BATCH = 32


class StepSeed(L.Callback):
    """Seeds torch's generator before each training batch from (seed, step, micro-batch).

    So the noise of a step does not depend on what ran before it, and a resumed run repeats it
    exactly. Micro-batches are numbered over all processes: no two draw the same noise.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed the coming batch."""
        micro_batch = batch_idx * trainer.world_size + trainer.global_rank
        torch.manual_seed(mix_seed(self.seed, trainer.global_step, micro_batch))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run that can be interrupted and resumed exactly.

    Attributes:
        train_data: yields (image, annotation) pairs, of tv_tensors or plain values, in the form
            that the transforms take.
        train_transform: random transform of a pair; draws only from torch's global generator.
        val_data: as `train_data`.
        val_transform: deterministic transform of a pair.
        out: folder for `last.ckpt` (training state, after each validation) and `log/metrics.csv`.
        epochs: passes over `train_data`.
        batch_size: images per process and micro-batch: an optimiser step takes `batch_size *
            accumulate * hardware.num_processes`.
        seed: decides order, augmentation and sampling noise; initial weights are the caller's.
        num_workers: processes that read images; 0 reads in this one. Any number gives the same
            weights.
        precision: as Lightning's; "bf16-mixed" halves the time of a step on CPUs with AVX512-BF16.
        accumulate: micro-batches per optimiser step.
        max_batches: at most so many batches an epoch and in validation; None for all.
        collate_fn: makes a batch of a list of transformed items, in the form that the task takes;
            None stacks them. Detectors need one: their images differ in size.
        validate_every: epochs from one validation and stored state to the next.
        gradient_clip: largest norm of the gradient of a step.
        shows_progress: draw a progress bar.
        anneal_share: part of the run in which the samplers' temperature falls, in (0, 1].
        remeasures_norms: `measure_norms_again` does something.
        callbacks: further ones of Lightning's, run after the recipe's own; one that prunes filters
            after each epoch is such a one.
        hardware: what the run computes on.
    """

    train_data: Dataset[Any]
    train_transform: Transform
    val_data: Dataset[Any]
    val_transform: Transform
    out: Path
    epochs: int
    batch_size: int
    seed: int = 0
    num_workers: int = 0
    precision: Any = "32-true"
    accumulate: int = 1
    max_batches: int | None = None
    collate_fn: Callable[[list[Any]], Any] | None = None
    validate_every: int = 1
    gradient_clip: float = 5.0
    shows_progress: bool = True
    anneal_share: float = 1.0
    remeasures_norms: bool = True
    callbacks: Sequence[L.Callback] = ()
    hardware: Hardware = field(default_factory=Hardware)

    def fit(self, task: SampledTask, *, resume: bool = False) -> bool:
        """Train `task` in place, for what is left of `epochs`.

        With several processes on a machine, this one starts the others, each with its own command
        line, unless torchrun or a cluster did. Afterwards all of them hold the same weights and
        none waits for another any more.

        Args:
            task: says what loss and metric are. Its weights are where training starts; replaced by
                the stored ones when resuming.
            resume: continue from `out/last.ckpt`.

        Returns:
            Whether this process is to go on with the result: True in the first one of a run, False
            in the others, which have nothing left to do.

        Raises:
            FileNotFoundError: `resume` without a stored state.
            ValueError: the stored state is of another architecture; there are fewer training images
                than one step of all processes takes, or fewer validation images than processes; or
                activations are to be recomputed in a model without residual blocks.
        """
        self._check_num_images()
        put_channels_last(task.model)
        state = ModelCheckpoint(
            dirpath=self.out,
            filename=_STATE_NAME,
            every_n_epochs=self.validate_every,
            save_on_train_epoch_end=True,  # after validation, when all of the epoch is done
            enable_version_counter=False,
        )
        # The logger deletes what it finds: a resumed run writes beside the interrupted one's log.
        num_logs = len(list(self.out.glob("log*"))) if resume else 0
        with _quiet_lightning(), self.hardware.saving_memory(task.model):
            trainer = L.Trainer(
                **self.hardware.trainer_arguments(),
                precision=self.precision,
                max_epochs=self.epochs,
                accumulate_grad_batches=self.accumulate,
                gradient_clip_val=self.gradient_clip,
                limit_train_batches=self.max_batches,
                limit_val_batches=self.max_batches,
                num_sanity_val_steps=0,
                check_val_every_n_epoch=self.validate_every,
                logger=CSVLogger(self.out, name=None, version=f"log{num_logs or ''}"),
                log_every_n_steps=10,
                callbacks=[
                    StepSeed(self.seed),
                    TemperatureAnnealing(share=self.anneal_share),
                    MeanNormStatistics(),
                    *self.callbacks,
                    state,
                ],
                plugins=[AtomicCheckpointIO()],
                enable_progress_bar=self.shows_progress,
                enable_model_summary=False,
                use_distributed_sampler=False,  # ours yields (epoch, index)
            )
            trainer.fit(
                task,
                datamodule=_Batches(self),
                ckpt_path=str(self.out / f"{_STATE_NAME}.ckpt") if resume else None,
                weights_only=True,
            )
            if is_distributed():
                # What follows is one process's work, and must not wait for the others: metrics of
                # torchmetrics would.
                trainer.strategy.barrier()
                dist.destroy_process_group()
        return trainer.is_global_zero

    def _check_num_images(self) -> None:
        num_processes = self.hardware.num_processes
        num_images = self._num_training_images
        if num_images < self.batch_size * num_processes:
            of = "" if num_processes == 1 else f" for each of {num_processes} processes"
            raise ValueError(
                f"Recipe.fit: {num_images} training images make no batch of {self.batch_size}{of}; "
                "at least one full batch is required; lower --batch-size."
            )
        num_images = len(self.val_data)  # type: ignore[arg-type]  # no __len__ in the base class
        if num_images < num_processes:
            raise ValueError(
                f"Recipe.fit: {num_images} validation images for {num_processes} processes; at "
                "least one for each is required; lower --devices or --num-nodes."
            )

    def training_batches(self, *, rank: int = 0, num_processes: int = 1) -> DataLoader[Any]:
        """Return the training batches of one process, in random order by epoch."""
        view = SeededView(self.train_data, self.train_transform, seed=self.seed)
        return DataLoader(
            view,
            batch_size=self.batch_size,
            sampler=EpochSampler(
                len(view),
                seed=self.seed,
                batch_size=self.batch_size,
                rank=rank,
                num_processes=num_processes,
            ),
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
            drop_last=True,
            persistent_workers=self.num_workers > 0,
        )

    def validation_batches(self, *, rank: int = 0, num_processes: int = 1) -> DataLoader[Any]:
        """Return the validation images of one process in batches, in order; by default all."""
        view = SeededView(self.val_data, self.val_transform, seed=self.seed)
        # Not DistributedSampler's share: that repeats images until all processes have equally many.
        own = items_of_process(range(len(view)), self.batch_size, rank, num_processes)
        return DataLoader(
            view,
            batch_size=self.batch_size,
            sampler=own,
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
        )

    def augmented_batches(self, num_images: int) -> Iterator[Any]:
        """Yield batches as training would go on after the last epoch: new orders and transforms.

        Args:
            num_images: about so many, in whole batches, but no more than `max_batches`; at least
                one batch comes.
        """
        batches = self.training_batches()
        number = max(1, num_images // self.batch_size)
        number = number if self.max_batches is None else min(number, self.max_batches)
        for epoch in itertools.count(self.epochs):
            cast(EpochSampler, batches.sampler).set_epoch(epoch)
            for batch in itertools.islice(batches, number):
                yield batch
                number -= 1
            if number == 0:
                return

    def measured_batch(self, number: int, *, rank: int = 0, num_processes: int = 1) -> Any:
        """Return training images as inference sees them: with the validation's transform.

        For what may depend on images but must not on those that scores are of, such as the levels
        that meet a budget.

        Args:
            number: from 0; which batch of a round through the set, in an order that depends on
                `seed` only; after the last one the round starts again.
            rank: which of the processes this one is, from 0; no two see the same images.
            num_processes: that take a batch each.

        Returns:
            A batch of `batch_size` images, at most 32, in the form that the task takes.
        """
        view = SeededView(self.train_data, self.val_transform, seed=self.seed)
        generator = torch.Generator().manual_seed(mix_seed(self.seed, -2))
        order = torch.randperm(len(view), generator=generator).tolist()
        first = (number * num_processes + rank) * self._measured_size
        positions = range(first, first + self._measured_size)
        collate = self.collate_fn or default_collate
        return collate([view[order[position % len(view)]] for position in positions])

    def measured_batches(self, num_images: int) -> Iterator[Any]:
        """Yield the first of the `measured_batch`es, of about so many images, none of them twice.

        Args:
            num_images: more than there are give nearly all, in whole batches; at least one comes.
        """
        at_most = self._num_training_images // self._measured_size
        for number in range(max(1, min(num_images // self._measured_size, at_most))):
            yield self.measured_batch(number)

    @property
    def _measured_size(self) -> int:
        return min(self.batch_size, _LARGEST_MEASURED_BATCH)

    @property
    def _num_training_images(self) -> int:
        return len(self.train_data)  # type: ignore[arg-type]  # no __len__ in the base class


class _Batches(L.LightningDataModule):
    """Gives every process its batches, once it knows which one it is."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe

    def train_dataloader(self) -> DataLoader[Any]:
        return self.recipe.training_batches(**self._process())

    def val_dataloader(self) -> DataLoader[Any]:
        return self.recipe.validation_batches(**self._process())

    def measured_batch(self, number: int) -> Any:
        return self.recipe.measured_batch(number, **self._process())

    def _process(self) -> dict[str, int]:
        assert self.trainer is not None
        return {"rank": self.trainer.global_rank, "num_processes": self.trainer.world_size}


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Without lightning's advertisement and its warnings about what is meant here."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in (
                ".*exists and is not empty",  # resuming writes where it read
                ".*is smaller than the logging interval",
                ".*does not have many workers",
                ".*LeafSpec.*deprecated",  # lightning 2.6 calling torch 2.15
                ".*You're resuming from a checkpoint",
            ):
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        logger.setLevel(level)
