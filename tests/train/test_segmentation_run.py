"""A run from the plan to the result, on two drawn scenes."""

import json

import pytest
import torch
from torchvision.models import resnet as zoo

from sparsight.train.architecture import Architecture, build_dense
from sparsight.train.checkpoint import read_architecture
from sparsight.train.data import SyntheticScenes, evaluation_transform, training_transform
from sparsight.train.distillation import Distillation
from sparsight.train.recipe import Recipe
from sparsight.train.sampling import Sampling
from sparsight.train.sampling_flags import sampling_flags
from sparsight.train.segmentation_run import train_segmentation

pytestmark = pytest.mark.usefixtures("narrow_resnet18")

SIZE = (32, 48)
DENSE = Architecture(num_classes=6, fpn_channels=8, head_channels=8, size=SIZE)


def run(
    out,
    teacher=None,
    init=None,
    dense=DENSE,
    loss="cross_entropy",
    backbone_weights=None,
    **keywords,
):
    flags, _ = sampling_flags(**keywords)
    planned = flags.plan(size=SIZE, dense=lambda: build_dense(dense))
    recipe = Recipe(
        train_data=SyntheticScenes(2, size=SIZE, seed=1),
        train_transform=training_transform(planned.size, ignore_index=255),
        val_data=SyntheticScenes(2, size=SIZE, seed=2),
        val_transform=evaluation_transform(planned.size),
        out=out,
        epochs=1,
        batch_size=2,
        max_batches=2,
        shows_progress=False,
        anneal_share=0.6,
    )
    return train_segmentation(
        recipe,
        name="scenes",
        dense=dense,
        loss=loss,
        planned=planned,
        flags=flags,
        lr=1e-3,
        init=init,
        backbone_weights=backbone_weights,
        distillation=Distillation(teacher=teacher),
    )


def test_a_student_starts_from_and_learns_from_its_dense_teacher(tmp_path):
    dense = run(tmp_path / "dense")
    weights = str(tmp_path / "dense" / "weights.safetensors")
    assert dense["share"] == 1.0 and "settling_shift" not in dense
    sampled = run(tmp_path / "sampled", init=weights, teacher=weights, budget=0.8)
    assert sampled["settled_share"] == pytest.approx(0.8, abs=0.05)
    stored = json.loads((tmp_path / "sampled" / "result.json").read_text())
    assert stored["budget"] == 0.8 and stored["method"] == "sampled"
    architecture = read_architecture(tmp_path / "sampled" / "weights.safetensors")
    assert architecture.sampling == Sampling()


@pytest.mark.parametrize("method", ["resized", "perforated", "relu_gate"])
def test_a_baseline_is_a_run_like_any_other(tmp_path, method):
    result = run(tmp_path, method=method, budget=0.8, interpolation="nearest")
    assert result["method"] == method and 0 <= result["miou"] <= 1
    stored = read_architecture(tmp_path / "weights.safetensors")
    if method == "resized":
        assert stored.sampling is None and stored.size != SIZE
    else:
        assert stored.sampling.sampler == method
        # Levels are settled on training images; a fixed pattern costs the same on all.
        assert result.get("settled_share", result["share"]) <= 0.85


def test_frrn_is_trained_on_its_worst_pixels_and_sampled(tmp_path):
    dense = Architecture(
        model="frrn_a",
        num_classes=6,
        backbone=None,
        fpn_channels=None,
        head_channels=None,
        channels=4,
        size=SIZE,
    )
    result = run(tmp_path, dense=dense, loss="bootstrapped", budget=0.8)
    assert result["share"] == pytest.approx(0.8, abs=0.1)
    stored = read_architecture(tmp_path / "weights.safetensors")
    assert (stored.model, stored.channels, stored.sampling) == ("frrn_a", 4, Sampling())
    assert len(result["density"]) == 2 * 23


@pytest.mark.parametrize("method", ["sfp", "fpgm"])
def test_filters_are_pruned_while_it_trains_and_are_removed(tmp_path, method):
    result = run(tmp_path, method=method, filter_ratio=0.5)
    stored = read_architecture(tmp_path / "weights.safetensors")
    assert stored.sampling is None and stored.widths is not None
    assert stored.widths["backbone.layer1.0.conv1.weight"][0] == 4
    assert not any(name.startswith("classifier") and "bias" in name for name in stored.widths)
    assert result["pruned_share"] < 0.9 and result["method"] == method
    assert result["architecture"]["widths"] == stored.widths
    with pytest.raises(ValueError, match=r"scenes: method='sampled' .*filter_ratio=0\.5; what is"):
        run(tmp_path, filter_ratio=0.5)


@pytest.mark.parametrize("budget", [None, 0.8])
def test_a_run_starts_from_the_weights_of_a_backbone(tmp_path, budget, monkeypatch, capsys):
    state = zoo.resnet18().state_dict()
    torch.save(state, tmp_path / "w.pth")
    started = {}

    def fit(recipe, task, *, resume=False):
        started.update(task.model.state_dict())
        return False

    monkeypatch.setattr(Recipe, "fit", fit)
    assert run(tmp_path / "run", backbone_weights=str(tmp_path / "w.pth"), budget=budget) == {}
    names = [name for name in state if not name.startswith("fc.")]
    assert all(torch.equal(started[f"backbone.{name}"], state[name]) for name in names)
    assert "w.pth: loaded into the backbone\n" in capsys.readouterr().out


def test_a_checkpoint_and_weights_of_a_backbone_at_once_are_refused(tmp_path):
    message = r"train_segmentation \(scenes\): init='a' and backbone_weights='b' were both given"
    with pytest.raises(ValueError, match=message):
        run(tmp_path, init="a", backbone_weights="b")
