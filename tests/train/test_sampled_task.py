import lightning as L
import pytest
import torch
from torch import nn

from sparsight.convert import sparsify
from sparsight.measure import count_macs
from sparsight.nn import Sampler
from sparsight.nn.budget import BudgetController, SamplingPrice
from sparsight.train.architecture import Architecture
from sparsight.train.sampled_task import (
    SampledTask,
    gate_parameters,
    parameter_groups,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*deprecated", "ignore:.*does not have many workers"
)


class Sum(nn.Module):
    """A model that takes a list of images of any size, as detectors do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, images):
        return torch.stack([self.conv(image[None]).mean() for image in images])


class ListTask(SampledTask):
    """The smallest task on batches that are lists: everything else must come from the base."""

    def task_loss(self, batch):
        return self.model(self.inputs_of(batch)).square().mean()

    def update_metric(self, batch):
        self.total = getattr(self, "total", 0.0) + float(self.model(batch).sum())

    def compute_metric(self):
        total, self.total = self.total, 0.0
        return {"val_total": total}

    def inputs_of(self, batch):
        return batch

    def num_images(self, batch):
        return len(batch)

    def dense_macs(self, batch):
        return sum(27 * 4 * image[0].numel() for image in batch)


def sampled_sum():
    return sparsify(Sum(), where=lambda name, module: name == "conv")


def test_a_task_with_lists_of_images_is_trained_measured_and_logged():
    torch.manual_seed(0)
    model = sampled_sum()
    nn.init.constant_(model.get_submodule("conv.sampler.head").bias, 0.0)
    task = ListTask(model, Architecture(), objective=SamplingPrice(0.1), lr=1e-2)
    batch = [torch.rand(3, 22, 33), torch.rand(3, 12, 9)]
    assert task.dense_macs(batch) == count_macs(model.eval(), batch).dense
    before = model.get_submodule("conv").weight.detach().clone()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    loader = torch.utils.data.DataLoader([batch] * 3, batch_size=None)
    trainer.fit(task, loader, loader)
    logged = trainer.callback_metrics
    assert {"loss", "expected_share", "val_share", "val_total"} <= set(logged)
    assert 0.4 < float(logged["expected_share"]) < 0.6
    assert float(logged["val_share"]) == pytest.approx(count_macs(model.eval(), batch).ratio)
    assert not torch.equal(before, model.get_submodule("conv").weight)


def test_without_a_recipe_the_share_of_the_steps_own_images_is_measured():
    torch.manual_seed(0)
    model = sampled_sum()
    nn.init.constant_(model.get_submodule("conv.sampler.head").bias, 0.0)
    controller = BudgetController(0.7, rate=0.0)
    task = ListTask(model, Architecture(), objective=controller, lr=0.0)
    batches = [[torch.rand(3, 22, 33), torch.rand(3, 12, 9)] for _ in range(6)]
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    trainer.fit(task, loader, loader)
    model.eval()
    shares = [count_macs(model, batches[step]).ratio for step in (0, 4)]  # every fourth step
    logged = trainer.callback_metrics
    assert float(logged["measured_share"]) == pytest.approx(sum(shares) / 2)
    # The mean of both differences; the levels are as they were.
    offset = sum(shares) / 2 - float(logged["expected_share"])
    assert float(controller.offset) == pytest.approx(offset, abs=1e-3)


def test_a_task_without_loss_or_metric_is_none():
    with pytest.raises(TypeError, match=r"abstract.*compute_metric.*task_loss.*update_metric"):
        SampledTask(Sum(), Architecture())  # type: ignore[abstract]


def test_frozen_parameters_are_in_no_group():
    model = sampled_sum()
    gates = gate_parameters(model)
    names = {name for name, p in model.named_parameters() if any(p is gate for gate in gates)}
    assert names == {
        "conv.sampler.head.weight",
        "conv.sampler.head.bias",
        "conv.interpolation.width",
    }
    model.requires_grad_(False)
    assert parameter_groups(model, lr=1.0, scalar_lr_factor=10.0, weight_decay=0.1) == []
    for module in model.modules():
        if isinstance(module, Sampler):
            module.requires_grad_(True)
    groups = parameter_groups(model, lr=1.0, scalar_lr_factor=10.0, weight_decay=0.1)
    assert [len(group["params"]) for group in groups] == [1, 1]
    assert groups[1]["lr"] == 10.0
