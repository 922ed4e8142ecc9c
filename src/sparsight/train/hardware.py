"""What a run computes on: how many processes on how many machines, and memory against time."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from sparsight.convert.find import block_class
from sparsight.nn import SampledBlock, recompute_activations


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What a run computes on, and what it trades there. The recipes take each as a flag.

    Attributes:
        devices: processes on each machine, a GPU each where there are GPUs. Each takes `batch_size`
            images a step, so that 2 processes see, step by step, what one with twice the batch
            size sees; learning rates are not scaled.
        num_nodes: machines. The same command is started on each, by torchrun or srun, or by hand
            with MASTER_ADDR, MASTER_PORT and NODE_RANK set.
        strategy: "ddp" averages the gradients of all processes; "auto" does so where there are
            several.
        accelerator: "auto" takes GPUs where there are any, else the CPU.
        sync_batchnorm: norms take their statistics of all processes' images, not each of its own.
            GPUs only.
        checkpoint_activations: keep only the inputs of residual blocks and compute the blocks
            again in the backward pass: less memory for about a third more time; gradients are the
            same.

    Raises:
        ValueError: less than one device or machine, or synchronised norms without GPUs.
    """

    devices: int = 1
    num_nodes: int = 1
    strategy: Literal["auto", "ddp"] = "auto"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    sync_batchnorm: bool = False
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        for name in ("devices", "num_nodes"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"Hardware: {name}={getattr(self, name)}; at least 1 is required; pass "
                    f"--{name} 1, or leave it out."
                )
        if self.sync_batchnorm and (self.accelerator == "cpu" or not torch.cuda.is_available()):
            raise ValueError(
                f"Hardware: sync_batchnorm=True on the CPU (accelerator={self.accelerator!r}); "
                "torch synchronises norms on GPUs only; leave --sync_batchnorm out, or freeze the "
                "norms."
            )

    @property
    def num_processes(self) -> int:
        """Processes on all machines together."""
        return self.devices * self.num_nodes

    def trainer_arguments(self) -> dict[str, Any]:
        """Return the arguments of `lightning.Trainer` that say the same."""
        is_distributed = self.strategy == "ddp" or self.num_processes > 1
        return {
            "accelerator": self.accelerator,
            "devices": self.devices,
            "num_nodes": self.num_nodes,
            # Buffers broadcast at each forward would wait for processes that have no validation
            # batch left, and would make the first one's norms everybody's.
            "strategy": DDPStrategy(broadcast_buffers=False) if is_distributed else "auto",
            "sync_batchnorm": self.sync_batchnorm,
        }

    def saving_memory(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return the context in which to train `model`: with its blocks recomputed, or as it is.

        Raises:
            ValueError: activations are to be recomputed, and the model has no residual block.
        """
        if not self.checkpoint_activations:
            return nullcontext()
        return recompute_activations(_residual_blocks(model))


def _residual_blocks(model: nn.Module) -> list[nn.Module]:
    blocks = [
        module
        for module in model.modules()
        if isinstance(module, SampledBlock) or block_class(module) is not None
    ]
    if not blocks:
        raise ValueError(
            f"Hardware: checkpoint_activations=True, but {type(model).__name__} has no residual "
            "block of a known ResNet; at least one is required, as it is blocks that are computed "
            "again; leave --checkpoint-activations out."
        )
    return blocks
