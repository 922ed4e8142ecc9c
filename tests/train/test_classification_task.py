import copy
from dataclasses import replace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsight.compress import Distiller
from sparsight.nn.budget import BudgetController
from sparsight.train.annealing import TemperatureAnnealing
from sparsight.train.architecture import Architecture, build_dense, convert
from sparsight.train.classification_task import ClassificationTask
from sparsight.train.data import SyntheticClasses, cifar10_evaluation_transform
from sparsight.train.data.augment import SeededView
from sparsight.train.evaluate_classification import score_classification
from sparsight.train.sampling import Sampling

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*deprecated",
    "ignore:.*does not have many workers",
    "ignore:You defined a `validation_step`",
)
DENSE = Architecture(
    model="resnet_cifar",
    backbone="resnet20",
    num_classes=3,
    fpn_channels=None,
    head_channels=None,
    size=(32, 32),
)
SAMPLED = replace(DENSE, sampling=Sampling(noise="blue"))


def batch(count=6):
    images = SyntheticClasses(count, size=(16, 16), num_classes=3)
    view = SeededView(images, cifar10_evaluation_transform())
    return torch.utils.data.default_collate([view[i] for i in range(count)])


def fit(task, steps, item, validate=None, **keywords):
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0 if validate is None else 1.0,
        callbacks=[TemperatureAnnealing(share=0.6)],
        **keywords,
    )
    loader = torch.utils.data.DataLoader([item] * steps, batch_size=None)
    val = None if validate is None else torch.utils.data.DataLoader([validate], batch_size=None)
    trainer.fit(task, loader, val)
    return trainer


def test_a_batch_is_overfitted_within_the_budget():
    torch.manual_seed(0)
    item = batch()
    model = convert(build_dense(SAMPLED), SAMPLED)
    task = ClassificationTask(model, SAMPLED, objective=BudgetController(0.8), lr=5e-3)
    fit(task, 40, item)
    score = score_classification(model.eval(), [item], num_classes=3)
    assert score.top1 == 1.0
    assert score.top5 is None
    assert score.share == pytest.approx(0.8, abs=0.06)  # before any settling


def test_the_loss_is_cross_entropy_plus_what_the_teacher_knows():
    torch.manual_seed(1)
    images, labels = batch()
    model, teacher = build_dense(DENSE).eval(), build_dense(DENSE)
    distiller = Distiller(teacher, model, temperature=2.0, alpha=0.75)
    task = ClassificationTask(model, DENSE, distiller=distiller)
    loss = task.task_loss((images, labels))
    student, taught = model(images), teacher.eval()(images)
    divergence = F.kl_div(
        (student / 2).log_softmax(1), (taught / 2).softmax(1), reduction="batchmean"
    )
    hard = F.cross_entropy(student, labels)
    assert torch.allclose(loss, 0.25 * hard + 0.75 * 4 * divergence)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert len(task.state_dict()) == len(build_dense(DENSE).state_dict())


def test_a_teacher_that_is_the_student_teaches_nothing():
    item = batch()
    model = build_dense(DENSE).eval()
    distiller = Distiller(copy.deepcopy(model), model, alpha=0.75)
    alone, taught = (
        ClassificationTask(model, DENSE, distiller=given).task_loss(item)
        for given in (None, distiller)
    )
    assert torch.allclose(0.25 * alone, taught, atol=1e-6)


class Given(nn.Module):
    """Logits that are read off the images."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return images[:, 0, 0, :] * self.weight


def test_top1_and_top5_are_counted_over_all_images():
    """Of four images, one is right at once and one among five."""
    logits = torch.tensor(
        [
            [9.0, 5, 4, 3, 2, 1, 0],
            [9, 5, 4, 3, 2, 1, 0],
            [9, 5, 4, 3, 2, 1, 0],
            [1, 2, 3, 4, 5, 6, 7],
        ]
    )
    labels = torch.tensor([0, 4, 5, 0])
    images = logits[:, None, None, :].expand(4, 3, 2, 7).contiguous()
    architecture = replace(DENSE, num_classes=7)
    task = ClassificationTask(Given(), architecture)
    trainer = fit(task, 1, (images, labels), validate=(images, labels))
    assert float(trainer.callback_metrics["val_top1"]) == pytest.approx(0.25)
    assert float(trainer.callback_metrics["val_top5"]) == pytest.approx(0.5)


def test_mixed_precision_trains():
    network = convert(build_dense(SAMPLED), SAMPLED)
    before = network.conv1.weight.detach().clone()
    task = ClassificationTask(network, SAMPLED, objective=BudgetController(0.6))
    trainer = fit(task, 1, batch(2), precision="bf16-mixed")
    logged = torch.stack([trainer.callback_metrics[n] for n in ("loss", "expected_share")])
    assert logged.isfinite().all()
    assert network.conv1.weight.dtype == torch.float32
    assert not torch.equal(network.conv1.weight, before)
