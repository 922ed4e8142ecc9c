from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

from sparsight.measure import count_macs
from sparsight.nn import Sampler
from sparsight.nn.budget import BudgetController
from sparsight.train import recipe as recipe_module
from sparsight.train.architecture import Architecture, Sampling, build_dense, convert
from sparsight.train.data import (
    SeededView,
    SyntheticScenes,
    evaluation_transform,
    training_transform,
)
from sparsight.train.hardware import Hardware
from sparsight.train.recipe import Recipe
from sparsight.train.tasks import SegmentationTask

pytestmark = pytest.mark.usefixtures("narrow_resnet18")

ARCHITECTURE = Architecture(
    num_classes=6, fpn_channels=8, head_channels=8, size=(32, 48), sampling=Sampling()
)


def make_recipe(out: Path, **keywords) -> Recipe:
    return Recipe(
        train_data=SyntheticScenes(6, size=(32, 48), seed=1),
        train_transform=training_transform((32, 48), ignore_index=255),
        val_data=SyntheticScenes(2, size=(32, 48), seed=2),
        val_transform=evaluation_transform((32, 48)),
        out=out,
        batch_size=2,
        shows_progress=False,
        **({"epochs": 3} | keywords),
    )


def make_task(seed=0, architecture=ARCHITECTURE) -> SegmentationTask:
    torch.manual_seed(seed)
    model = convert(build_dense(architecture), architecture)
    return SegmentationTask(model, architecture, ignore_index=255, objective=BudgetController(0.6))


class PowerCut(Exception):
    pass


def test_resuming_gives_the_weights_of_the_uninterrupted_run(tmp_path, monkeypatch):
    """Cut in the middle of the third epoch; the rest is done again from the end of the second."""
    whole = make_task()
    make_recipe(tmp_path / "whole").fit(whole)

    def cut(self, trainer, pl_module, batch, batch_idx):
        seeds_of_steps(self, trainer, pl_module, batch, batch_idx)
        if trainer.global_step == 7:
            raise PowerCut

    seeds_of_steps = recipe_module.StepSeed.on_train_batch_start
    cut_task = make_task()
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(recipe_module.StepSeed, "on_train_batch_start", cut)
        make_recipe(tmp_path / "cut").fit(cut_task)
    resumed = make_task(seed=99)  # other initial weights: all must come from the stored state
    make_recipe(tmp_path / "cut").fit(resumed, resume=True)

    state = resumed.state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(state[name], value), name
    logs = sorted(p.name for p in (tmp_path / "cut").iterdir())
    assert logs == ["last.ckpt", "log", "log1"]
    assert (tmp_path / "whole" / "log" / "metrics.csv").is_file()


def test_the_number_of_workers_changes_nothing(tmp_path):
    tasks = []
    for num_workers in (0, 2):
        task = make_task()
        make_recipe(tmp_path / str(num_workers), epochs=1, num_workers=num_workers).fit(task)
        tasks.append(task.state_dict())
    assert all(torch.equal(tasks[1][name], value) for name, value in tasks[0].items())


def test_validation_comes_every_so_many_epochs(tmp_path):
    make_recipe(tmp_path, epochs=4, max_batches=1, validate_every=2).fit(make_task())
    header, *rows = (tmp_path / "log" / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("val_miou")
    assert len([row for row in rows if row.split(",")[column]]) == 2
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 3


def test_the_gradient_of_a_step_is_clipped(tmp_path):
    states = []
    for clip in (5.0, 1e-9):
        task = make_task()
        start = {n: p.detach().clone() for n, p in task.model.named_parameters()}
        make_recipe(tmp_path / str(clip), epochs=1, max_batches=1, gradient_clip=clip).fit(task)
        states.append(
            max(
                float((p.detach() - start[name]).abs().max())
                for name, p in task.model.named_parameters()
                if p.ndim > 1  # the controller moves the samplers' levels beside the gradient
            )
        )
    # AdamW divides by the gradient's size, down to its epsilon of 1e-8.
    assert states[1] < 0.5 * states[0]


def test_another_architecture_is_not_resumed(tmp_path):
    make_recipe(tmp_path, epochs=1, max_batches=1).fit(make_task())
    other = make_task(architecture=replace(ARCHITECTURE, fpn_channels=16))
    with pytest.raises(ValueError, match=r"resume: the training state is of .*fpn_channels=8.*16"):
        make_recipe(tmp_path, epochs=2, max_batches=1).fit(other, resume=True)


def test_nothing_to_resume_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"resume: .*last\.ckpt' does not exist"):
        make_recipe(tmp_path).fit(make_task(), resume=True)


def test_less_images_than_a_batch_are_refused(tmp_path):
    few = replace(make_recipe(tmp_path), batch_size=7)
    with pytest.raises(ValueError, match=r"Recipe\.fit: 6 training images make no batch of 7"):
        few.fit(make_task())


def test_each_process_needs_an_image_to_validate_and_a_batch_to_train(tmp_path):
    several = replace(make_recipe(tmp_path), hardware=Hardware(devices=4, accelerator="cpu"))
    with pytest.raises(ValueError, match=r"6 training images make no batch of 2 for each of 4"):
        several.fit(make_task())
    with pytest.raises(ValueError, match=r"2 validation images for 4 processes; .*--devices"):
        replace(several, batch_size=1).fit(make_task())


def test_what_is_validated_is_shared_out_without_repeats(tmp_path):
    made = replace(make_recipe(tmp_path), val_data=SyntheticScenes(7, size=(32, 48), seed=2))
    whole = torch.cat([images for images, _ in made.validation_batches()])
    parts = [made.validation_batches(rank=rank, num_processes=2) for rank in (0, 1)]
    assert [[len(images) for images, _ in part] for part in parts] == [[2, 2], [2, 1]]
    shared = torch.cat([images for part in parts for images, _ in part])  # 0 1 4 5, then 2 3 6
    assert torch.equal(shared[[0, 1, 4, 5, 2, 3, 6]], whole)


def test_what_is_measured_are_training_images_without_augmentation(tmp_path):
    made = replace(make_recipe(tmp_path), train_data=SyntheticScenes(7, size=(40, 60), seed=1))
    view = SeededView(made.train_data, made.val_transform)
    plain = [view[i][0] for i in range(7)]

    def seen(batch):
        return [next(i for i in range(7) if torch.equal(image, plain[i])) for image in batch[0]]

    rounds = [seen(made.measured_batch(number)) for number in range(7)]
    flat = [index for indices in rounds for index in indices]
    assert sorted(flat[:7]) == sorted(flat[7:]) == list(range(7))  # all, then all again
    assert flat[:7] == flat[7:] != list(range(7))
    assert [seen(batch) for batch in made.measured_batches(100)] == rounds[:3]
    assert [seen(batch) for batch in made.measured_batches(1)] == rounds[:1]
    parts = [seen(made.measured_batch(1, rank=rank, num_processes=2)) for rank in (0, 1)]
    assert parts == rounds[2:4]  # what one process with twice the batch would see


def test_validation_images_steer_nothing(tmp_path):
    """The budget is held by what training images need, so that scores are of unseen images."""
    states = []
    for seed in (2, 3):
        task = make_task()
        val_data = SyntheticScenes(2, size=(32, 48), seed=seed)
        made = make_recipe(tmp_path / str(seed), epochs=1, max_batches=1)
        replace(made, val_data=val_data).fit(task)
        states.append(task.state_dict())
    assert float(states[0]["objective.offset"]) != 0.0
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name


def test_the_controller_is_told_what_is_measured_as_at_inference(tmp_path):
    """Nothing learns, norms are full of other images' statistics: the offset can be recounted."""
    task = make_task()
    task.lr = 0.0
    task.objective.rate = 0.0
    for module in task.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
            nn.init.normal_(module.running_mean)
        elif isinstance(module, Sampler):
            nn.init.zeros_(module.head.bias)
    made = make_recipe(tmp_path, epochs=1, max_batches=1)
    made.fit(task)
    counted = count_macs(task.model.eval(), made.measured_batch(0)[0])
    expected = float(task.trainer.callback_metrics["expected_share"])
    assert float(task.trainer.callback_metrics["measured_share"]) == pytest.approx(counted.ratio)
    assert float(task.objective.offset) == pytest.approx(counted.ratio - expected, abs=1e-6)


def test_the_noise_of_a_step_depends_on_the_step_and_the_process_alone():
    class Trainer:
        global_step = 12
        world_size = 2
        global_rank = 0

    def draw(start, rank):
        torch.manual_seed(start)
        trainer = Trainer()
        trainer.global_rank = rank
        recipe_module.StepSeed(5).on_train_batch_start(trainer, L.LightningModule(), None, 3)
        return torch.rand(4)

    assert torch.equal(draw(1, 0), draw(2, 0))
    assert not torch.equal(draw(1, 0), draw(1, 1))


def test_batches_are_made_as_the_task_takes_them(tmp_path):
    made = replace(make_recipe(tmp_path), collate_fn=lambda items: [image for image, _ in items])
    for batches in (made.validation_batches(), made.training_batches()):
        batch = next(iter(batches))
        assert isinstance(batch, list)
        assert [tuple(image.shape) for image in batch] == [(3, 32, 48)] * 2
