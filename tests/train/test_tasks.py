from dataclasses import replace

import lightning as L
import pytest
import torch
from torch import nn

from sparsight.compress import Distiller, distillation_loss
from sparsight.measure import count_macs
from sparsight.nn import Sampler, record_sampling
from sparsight.nn.budget import BudgetController, SamplingPrice
from sparsight.train.annealing import TemperatureAnnealing
from sparsight.train.architecture import Architecture, Sampling, build_dense, convert
from sparsight.train.data import SyntheticScenes
from sparsight.train.data.augment import SeededView, evaluation_transform
from sparsight.train.tasks import SegmentationTask, intersection_over_union

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*LeafSpec.*deprecated",
        "ignore:.*does not have many workers",
        "ignore:You defined a `validation_step`",
    ),
    pytest.mark.usefixtures("narrow_resnet18"),
]
DENSE = Architecture(num_classes=6, fpn_channels=16, head_channels=16, size=(64, 96))
SAMPLED = replace(DENSE, sampling=Sampling())


def batch(count=2):
    view = SeededView(SyntheticScenes(count, size=(64, 96), seed=4), evaluation_transform((64, 96)))
    return torch.utils.data.default_collate([view[i] for i in range(count)])


def fit(task, steps, item, **keywords):
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **keywords,
    )
    loader = torch.utils.data.DataLoader([item] * steps, batch_size=None)
    trainer.fit(task, loader)
    return trainer


@torch.no_grad()
def accuracy(model, item):
    images, labels = item
    return (model.eval()(images)["out"].argmax(1) == labels).float().mean().item()


def test_the_iou_is_counted_from_the_confusion_matrix():
    confusion = torch.tensor([[3, 1, 0], [2, 4, 0], [0, 0, 0]])
    iou = intersection_over_union(confusion)
    assert iou[:2].tolist() == pytest.approx([3 / 6, 4 / 7])
    assert iou[2].isnan()


@pytest.mark.parametrize("budget", [None, 0.6])
def test_a_batch_is_overfitted(budget):
    architecture = DENSE if budget is None else SAMPLED
    torch.manual_seed(0)
    item = batch()
    model = convert(build_dense(architecture), architecture)
    before = accuracy(model, item)
    objective = None if budget is None else BudgetController(budget)
    task = SegmentationTask(model, architecture, ignore_index=255, objective=objective, lr=1e-2)
    trainer = fit(task, 30 if budget is None else 80, item, callbacks=[TemperatureAnnealing()])
    assert before < 0.7
    assert accuracy(model, item) > 0.9
    if budget is not None:
        # The mean over the run; nearly all was computed at its start.
        assert float(trainer.callback_metrics["measured_share"]) < 0.9


def test_the_temperature_follows_the_optimiser_step_not_the_micro_batch():
    class Watch(L.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, pl_module, *_):
            temperatures = {m.temperature for m in pl_module.modules() if isinstance(m, Sampler)}
            assert len(temperatures) == 1
            self.seen.append(temperatures.pop())

    item = batch(1)
    expected = {1: [1.0, 0.03**0.5, 0.03], 2: [1.0, 1.0, 0.03**0.5, 0.03**0.5, 0.03, 0.03]}
    for accumulate, values in expected.items():
        watch = Watch()
        task = SegmentationTask(
            convert(build_dense(SAMPLED), SAMPLED),
            SAMPLED,
            ignore_index=255,
            objective=SamplingPrice(0.1),
        )
        callbacks = [TemperatureAnnealing(), watch]
        fit(task, 3 * accumulate, item, accumulate_grad_batches=accumulate, callbacks=callbacks)
        assert watch.seen == pytest.approx(values)


def test_a_schedule_of_ones_own_is_used():
    task = SegmentationTask(
        convert(build_dense(SAMPLED), SAMPLED), SAMPLED, ignore_index=255, objective=None
    )
    fit(task, 2, batch(1), callbacks=[TemperatureAnnealing(lambda step: 0.5 - 0.1 * step)])
    assert {m.temperature for m in task.modules() if isinstance(m, Sampler)} == {0.4}


def test_biases_of_samplers_and_widths_learn_faster_and_gates_do_not_decay():
    task = SegmentationTask(
        convert(build_dense(SAMPLED), SAMPLED), SAMPLED, ignore_index=255, lr=1e-3
    )
    task.trainer = type("T", (), {"estimated_stepping_batches": 100})()
    optimizer = task.configure_optimizers()["optimizer"]
    decayed, plain, scalars = optimizer.param_groups
    names = {id(p): name for name, p in task.model.named_parameters()}
    fast = {names[id(p)] for p in scalars["params"]}
    assert fast == {
        name
        for name in names.values()
        if name.endswith("head.bias") or (".interpolations." in name and name.endswith("width"))
    }
    assert scalars["initial_lr"] == pytest.approx(1e-2)
    assert decayed["weight_decay"] > 0 == plain["weight_decay"] == scalars["weight_decay"]
    assert all(".samplers." not in names[id(p)] for p in decayed["params"])
    grouped = sum(len(g["params"]) for g in optimizer.param_groups)
    assert grouped == len(names)


def test_the_price_is_charged_on_the_share_of_the_whole_model():
    """At bias 0 everywhere, half of what is gated and all of the rest."""
    model = convert(build_dense(SAMPLED), SAMPLED)
    for module in model.modules():
        if isinstance(module, Sampler):
            nn.init.constant_(module.head.bias, 0.0)
            nn.init.zeros_(module.head.weight)
    item = batch(1)
    with record_sampling(model) as record, torch.no_grad():
        model(item[0])
    gated = sum(d.macs for d in record.decisions) / count_macs(model.eval(), item[0]).dense
    assert 0.3 < gated < 0.9
    task = SegmentationTask(model, SAMPLED, ignore_index=255, objective=SamplingPrice(0.1), lr=0.0)
    logged = fit(task, 1, item).callback_metrics
    assert float(logged["expected_share"]) == pytest.approx(1 - gated / 2, abs=1e-5)


def test_a_batch_of_which_no_pixel_counts_costs_nothing():
    model = build_dense(DENSE)
    task = SegmentationTask(model, DENSE, ignore_index=255)
    images, labels = batch(1)
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model(images)["out"], labels, ignore_index=255)
        torch.testing.assert_close(task.task_loss((images, labels)), expected)
        assert float(task.task_loss((images, torch.full_like(labels, 255)))) == 0.0


def test_mixed_precision_trains():
    model = convert(build_dense(SAMPLED), SAMPLED)
    before = model.backbone.conv1.weight.detach().clone()
    task = SegmentationTask(model, SAMPLED, ignore_index=255, objective=BudgetController(0.6))
    trainer = fit(task, 1, batch(1), precision="bf16-mixed")
    logged = torch.stack([trainer.callback_metrics[n] for n in ("loss", "expected_share")])
    assert logged.isfinite().all()
    assert model.backbone.conv1.weight.dtype == torch.float32
    assert not torch.equal(model.backbone.conv1.weight, before)


def test_with_a_distiller_the_labelled_pixels_and_the_teacher_count():
    """The cross-entropy is over labelled pixels, the divergence over all."""
    torch.manual_seed(5)
    model, teacher = build_dense(DENSE).eval(), build_dense(DENSE)
    images, labels = batch()
    labels[:, :40] = 255
    distiller = Distiller(teacher, model, alpha=0.25, temperature=2.0)
    task = SegmentationTask(model, DENSE, ignore_index=255, distiller=distiller)
    loss = task.task_loss((images, labels))
    student, taught = model(images)["out"], teacher.eval()(images)["out"]
    hard = nn.functional.cross_entropy(student, labels, ignore_index=255)
    soft = distillation_loss(student, taught, temperature=2.0)
    torch.testing.assert_close(loss, 0.25 * soft + 0.75 * hard)
