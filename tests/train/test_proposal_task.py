"""Mask proposals as a task: losses, cost, recall, the published optimiser."""

from dataclasses import replace

import lightning as L
import pytest
import torch
from torch import nn

from sparsight.measure import count_macs
from sparsight.nn import Sampler
from sparsight.nn.budget import SamplingPrice
from sparsight.train.architecture import ProposalArchitecture, Sampling, build_dense, convert
from sparsight.train.data import (
    Coco,
    SeededView,
    collate_proposals,
    proposal_transform,
    write_synthetic_coco,
)
from sparsight.train.proposal_task import ProposalTask, count_over_scales

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*LeafSpec.*deprecated", "ignore:.*does not have many workers"
    ),
    pytest.mark.usefixtures("narrow_resnet18"),
]
DENSE = ProposalArchitecture(
    backbone="resnet18",
    num_stages=2,
    k=3,
    m=7,
    head_channels=8,
    size=(64, 96),
    scales=(0.5, 1.0),
)
SAMPLED = replace(DENSE, sampling=Sampling(window=3))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Coco:
    root = write_synthetic_coco(tmp_path_factory.mktemp("coco"), num_images=4, size=(64, 96))
    return Coco(root, with_masks=True)


def batch_of(data, *indices, is_training=True):
    view = SeededView(data, proposal_transform(is_training=is_training, scales=(0.5, 1.0)))
    return collate_proposals([view[i] for i in indices])


def make_task(data, architecture, **options):
    torch.manual_seed(0)
    model = convert(build_dense(architecture), architecture)
    return ProposalTask(model, architecture, val_data=data, **options)


def fit(task, batch, steps):
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    loader = torch.utils.data.DataLoader([batch] * steps, batch_size=None)
    trainer.fit(task, loader, torch.utils.data.DataLoader([batch], batch_size=None))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("price", [None, 0.1])
def test_a_batch_is_learnt_and_both_losses_are_logged(data, price):
    """Images of two sizes, one without an object."""
    objective = None if price is None else SamplingPrice(price)
    options = {"objective": objective, "optimizer": "adamw", "lr": 5e-3}
    task = make_task(data, DENSE if price is None else SAMPLED, **options)
    batch = batch_of(data, 0, 1, 2)
    first, last = fit(task, batch, 1), fit(task, batch, 20)
    assert last["loss"] < 0.9 * first["loss"]
    assert last["loss"] == pytest.approx(last["loss_objectness"] + last["loss_mask"], rel=1e-4)
    assert {"val_ar10", "val_ar100"} <= set(last)
    assert ("expected_share" in last) == (price is not None)


def test_the_masks_loss_has_a_weight(data):
    task = make_task(data, DENSE, mask_weight=3.0).train()
    logged = {}
    task.log_dict = lambda values, **_: logged.update(values)
    loss = task.task_loss(batch_of(data, 0, 1))
    torch.testing.assert_close(loss, logged["loss_objectness"] + 3 * logged["loss_mask"])


def test_the_cost_of_a_step_is_that_of_its_scale_and_of_inference_that_of_all(data):
    task = make_task(data, SAMPLED).eval()
    images, targets = batch_of(data, 0, 1)
    for scale in (0.5, 1.0):
        batch = images, [{**target, "scale": scale} for target in targets]
        tensors, _ = task.model.prepare(images, [scale] * 2)
        assert task.dense_macs(batch) == count_macs(task.model.network, tensors).dense
    counted = task.counted_macs((images, targets))
    parts = [
        count_macs(task.model.network, task.model.prepare(images, [scale] * 2)[0])
        for scale in (0.5, 1.0)
    ]
    assert counted.dense == sum(part.dense for part in parts)
    assert counted.total == sum(part.total for part in parts)
    assert sum(row.total for row in counted.layers) == counted.total
    whole = count_macs(task.model, images[:1])
    assert whole.total == count_over_scales(task.model, images[:1]).total


def test_the_metric_is_that_of_the_images_seen(data):
    task = make_task(data, DENSE).eval()

    class Oracle(nn.Module):
        """Finds what is there."""

        max_proposals = 1000

        def forward(self, images):
            assert self.max_proposals == 100  # enough while training
            return [
                {
                    "masks": target["masks"][:, None],
                    "boxes": target["boxes"],
                    "scores": torch.ones(len(target["boxes"])),
                }
                for target in self.targets
            ]

    task.model = Oracle()
    for indices in ((0, 1), (2,)):
        batch = batch_of(data, *indices, is_training=False)
        task.model.targets = batch[1]
        task.update_metric(batch)
    assert task.compute_metric()["val_ar100"] > 0.99  # what is covered wholly cannot be found
    assert task.model.max_proposals == 1000
    images, targets = batch_of(data, 3, is_training=False)
    nothing = {"masks": targets[0]["masks"][:0], "boxes": targets[0]["boxes"][:0]}
    task.model.targets = [nothing]
    task.update_metric((images, targets))
    assert task.compute_metric()["val_ar100"] == 0.0


def test_the_published_optimiser_is_the_default(data):
    task = make_task(data, DENSE)
    task.trainer = type("T", (), {"estimated_stepping_batches": 40_000})()
    configured = task.configure_optimizers()
    optimizer = configured["optimizer"]
    assert type(optimizer) is torch.optim.SGD
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}
    assert {group["initial_lr"] for group in optimizer.param_groups} == {1e-3}
    assert optimizer.param_groups[0]["weight_decay"] == 5e-4
    factor = configured["lr_scheduler"]["scheduler"].lr_lambdas[0]
    assert [factor(step) for step in (0, 31_999, 32_000, 39_999)] == pytest.approx([1, 1, 0.1, 0.1])
    adamw = make_task(data, DENSE, optimizer="adamw")
    adamw.trainer = task.trainer
    assert type(adamw.configure_optimizers()["optimizer"]) is torch.optim.AdamW


def test_masks_may_be_sampled_by_image(data):
    task = make_task(data, SAMPLED).eval()
    for module in task.model.modules():
        if isinstance(module, Sampler):
            nn.init.constant_(module.head.bias, 0.0)
    counted = task.counted_macs(batch_of(data, 0))
    assert 0.4 < counted.ratio < 0.98
