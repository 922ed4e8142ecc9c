import copy
from dataclasses import replace

import lightning as L
import pytest
import torch
from torch import nn

from sparsight.compress import Distiller, FeatureHints
from sparsight.measure import count_macs
from sparsight.nn import Sampler, record_sampling
from sparsight.nn.budget import SamplingPrice
from sparsight.train.architecture import DetectorArchitecture, Sampling, build_dense, convert
from sparsight.train.data import (
    Coco,
    SeededView,
    collate_detection,
    detection_transform,
    write_synthetic_coco,
)
from sparsight.train.detection_task import DetectionTask, backbone_input

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*LeafSpec.*deprecated", "ignore:.*does not have many workers"
    ),
    pytest.mark.usefixtures("narrow_resnet18"),
]
DENSE = DetectorArchitecture(
    num_classes=3, backbone="resnet18", fpn_channels=16, head_channels=32, size=(64, 96)
)
SAMPLED = replace(DENSE, sampling=Sampling())


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Coco:
    root = write_synthetic_coco(tmp_path_factory.mktemp("coco"), num_images=4, size=(64, 96))
    return Coco(root)


def batch_of(data, *indices):
    view = SeededView(data, detection_transform(is_training=False))
    return collate_detection([view[i] for i in indices])


def make_task(data, architecture, **options):
    torch.manual_seed(0)
    model = convert(build_dense(architecture), architecture)
    return DetectionTask(model, architecture, val_data=data, **options)


def fit(task, batch, steps, **keywords):
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **keywords,
    )
    loader = torch.utils.data.DataLoader([batch] * steps, batch_size=None)
    val_loader = torch.utils.data.DataLoader([batch], batch_size=None)
    trainer.fit(task, loader, val_loader)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("price", [None, 0.1])
def test_a_batch_is_learnt_and_what_is_logged_has_torchvisions_names(data, price):
    """Images of two sizes, one without an object."""
    objective = None if price is None else SamplingPrice(price)
    options = {"objective": objective, "optimizer": "adamw", "lr": 2e-3}
    task = make_task(data, DENSE if price is None else SAMPLED, **options)
    batch = batch_of(data, 0, 1, 2)
    first = fit(task, batch, 1)
    last = fit(task, batch, 15)
    assert last["loss"] < 0.75 * first["loss"]
    parts = [value for name, value in last.items() if name.startswith("loss_")]
    assert len(parts) == 4
    assert sum(parts) == pytest.approx(last["loss"], rel=1e-4)
    assert {"val_ap", "val_ap50", "val_ap75"} <= set(last)
    assert ("val_share" in last) == (price is not None)


def test_mixed_precision_trains_and_validates(data):
    task = make_task(data, SAMPLED, objective=SamplingPrice(0.1))
    logged = fit(task, batch_of(data, 0, 1), 1, precision="bf16-mixed")
    assert torch.tensor([logged["loss"], logged["val_share"]]).isfinite().all()
    assert "val_ap" in logged


def test_the_share_is_of_the_padded_batchs_backbone(data):
    task = make_task(data, SAMPLED, objective=SamplingPrice(0.1))
    batch = batch_of(data, 0, 1)
    tensors = backbone_input(task.model, batch[0])
    assert tensors.shape == (2, 3, 64, 96)
    body = task.model.eval().backbone.body
    assert task.dense_macs(batch) == count_macs(body, tensors).dense
    counted = task.counted_macs(batch)
    assert counted.dense == task.dense_macs(batch)
    for module in task.model.modules():
        if isinstance(module, Sampler):
            nn.init.constant_(module.head.bias, 0.0)
            nn.init.zeros_(module.head.weight)
    with record_sampling(task.model) as record, torch.no_grad():
        body(tensors)
    gated = sum(d.macs for d in record.decisions) / counted.dense
    assert 0.5 < gated < 0.98
    logged = fit(task.train(), batch, 1)
    # Half of what is gated, and all of the stem and the shortcuts.
    assert logged["expected_share"] == pytest.approx(1 - gated / 2, abs=1e-5)


def test_the_metric_is_that_of_the_images_seen(data):
    task = make_task(data, DENSE).eval()

    class Oracle(nn.Module):
        """Finds what is there, in the second image something else too."""

        def forward(self, images):
            found = []
            for image, target in zip(images, self.targets, strict=True):
                boxes = target["boxes"]
                scores = torch.full((len(boxes),), 0.9, dtype=image.dtype)
                found.append({"boxes": boxes, "labels": target["labels"], "scores": scores})
            return found

    task.model = Oracle()
    for indices in ((0, 1), (2,)):
        images, task.model.targets = batch_of(data, *indices)
        task.update_metric((images, task.model.targets))
    assert task.compute_metric() == {
        "val_ap": pytest.approx(1.0),
        "val_ap50": pytest.approx(1.0),
        "val_ap75": pytest.approx(1.0),
    }
    # Forgotten: a part of the images again, nothing found in it.
    images, targets = batch_of(data, 3)
    task.model.targets = [{**targets[0], "boxes": torch.zeros(0, 4), "labels": torch.zeros(0)}]
    task.update_metric((images, task.model.targets))
    assert task.compute_metric()["val_ap"] == 0.0


def test_the_published_optimiser_is_the_default(data):
    task = make_task(data, replace(DENSE, trainable_layers=4))
    task.trainer = type("T", (), {"estimated_stepping_batches": 12_000})()
    configured = task.configure_optimizers()
    optimizer = configured["optimizer"]
    assert type(optimizer) is torch.optim.SGD
    assert {g["momentum"] for g in optimizer.param_groups} == {0.9}
    assert {g["initial_lr"] for g in optimizer.param_groups} == {0.01}
    assert optimizer.param_groups[0]["weight_decay"] == 1e-4
    learnt = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert learnt == {id(p) for p in task.model.parameters() if p.requires_grad}
    assert id(task.model.backbone.body.conv1.weight) not in learnt
    factor = configured["lr_scheduler"]["scheduler"].lr_lambdas[0]
    assert [factor(step) for step in (0, 500, 7999, 8000, 11_000)] == pytest.approx(
        [1 / 3, 1, 1, 0.1, 0.01]
    )


def test_hints_are_charged_beside_the_losses_of_detection(data):
    """The teacher sees what the student's backbone saw: resized, normalised, padded."""
    task = make_task(data, DENSE)
    torch.manual_seed(1)
    teacher = build_dense(DENSE).backbone
    student = task.model.backbone
    example = torch.zeros(1, 3, 64, 96)
    hints = FeatureHints(student, teacher, ["fpn"], example=example)
    task.distiller = Distiller(teacher, student, features=hints, feature_weight=2.0, logits_of=None)
    images, targets = batch_of(data, 0, 1)
    wanted = [{"boxes": t["boxes"], "labels": t["labels"]} for t in targets]
    task.log_dict = lambda *_, **__: None
    torch.manual_seed(2)
    loss = task.train().task_loss((images, targets))
    torch.manual_seed(2)
    alone = torch.stack(list(task.model(images, wanted).values())).sum()
    batch = backbone_input(task.model, images)
    maps = zip(student(batch).values(), teacher(batch).values(), strict=True)
    compared = torch.stack([nn.functional.mse_loss(v, u) for v, u in maps]).mean()
    torch.testing.assert_close(loss, alone + 2 * compared)
    assert not task.model.backbone._forward_pre_hooks


def test_a_detector_that_is_its_own_teacher_learns_nothing_from_it(data):
    task = make_task(data, DENSE).eval()
    teacher = copy.deepcopy(task.model.backbone)
    hints = FeatureHints(task.model.backbone, teacher, ["fpn"], example=torch.zeros(1, 3, 64, 96))
    distiller = Distiller(teacher, task.model.backbone, features=hints, logits_of=None)
    images = backbone_input(task.model, batch_of(data, 0)[0])
    with distiller.recording() as features:
        task.model.backbone(images)
    assert distiller.loss(images, None, features=features).item() == 0
