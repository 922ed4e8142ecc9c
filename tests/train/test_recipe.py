from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch

from sparsight.nn.budget import BudgetController
from sparsight.train import recipe as recipe_module
from sparsight.train.architecture import Architecture, Sampling, build_dense, convert
from sparsight.train.data import SyntheticScenes, evaluation_transform, training_transform
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
        torch.manual_seed(recipe_module.mix_seed(self.seed, trainer.global_step, batch_idx))
        if trainer.global_step == 7:
            raise PowerCut

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


def test_the_noise_of_a_step_depends_on_the_step_alone():
    class Trainer:
        global_step = 12

    draws = []
    for start in (1, 2):
        torch.manual_seed(start)
        callback = recipe_module.StepSeed(5)
        callback.on_train_batch_start(Trainer(), L.LightningModule(), None, 3)
        draws.append(torch.rand(4))
    assert torch.equal(*draws)


def test_batches_are_made_as_the_task_takes_them(tmp_path):
    made = replace(make_recipe(tmp_path), collate_fn=lambda items: [image for image, _ in items])
    for batches in (made.validation_batches(), made._training_batches()):
        batch = next(iter(batches))
        assert isinstance(batch, list)
        assert [tuple(image.shape) for image in batch] == [(3, 32, 48)] * 2
