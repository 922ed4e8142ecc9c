"""The classification recipes, on drawn stripes: from flags to a score on disk."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsight.cli import load_recipe
from sparsight.convert import ConversionError
from sparsight.measure import count_macs
from sparsight.models import resnet_cifar
from sparsight.nn import SampledBlock, SoftPool2d, SoftPool3d, ZeroFill
from sparsight.train.checkpoint import load_checkpoint, read_dataset

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*deprecated"),
    pytest.mark.usefixtures("narrow_resnet18"),
]
RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "classification"
CIFAR10, IMAGENET, MOVING_SHAPES = (
    load_recipe(RECIPES / f"{name}.py") for name in ("cifar10", "imagenet", "moving_shapes")
)


def test_a_quick_run_saves_a_network_that_meets_its_budget(tmp_path):
    torch.manual_seed(0)
    result = CIFAR10(quick=True, depth=8, budget=0.7, out=str(tmp_path / "a"), progress_bar=False)
    assert abs(result["settled_share"] - 0.7) < 0.01
    assert 0 <= result["top1"] <= result["top5"] <= 1
    assert json.loads((tmp_path / "a" / "result.json").read_text())["top1"] == result["top1"]
    network, architecture = load_checkpoint(tmp_path / "a" / "weights.safetensors")
    assert (architecture.model, architecture.backbone) == ("resnet_cifar", "resnet8")
    assert sum(isinstance(module, SampledBlock) for module in network.modules()) == 3
    counted = count_macs(network.eval(), torch.randn(2, 3, 32, 32))
    assert counted.total < counted.dense


def test_a_dense_run_starts_a_sampled_one_that_learns_from_it(tmp_path):
    CIFAR10(quick=True, depth=8, out=str(tmp_path / "dense"), progress_bar=False)
    weights = str(tmp_path / "dense" / "weights.safetensors")
    result = CIFAR10(
        quick=True,
        depth=8,
        sampling_weight=0.1,
        interpolation=None,
        init=weights,
        teacher=weights,
        out=str(tmp_path / "sampled"),
        progress_bar=False,
    )
    assert "settled_share" not in result
    network, architecture = load_checkpoint(tmp_path / "sampled" / "weights.safetensors")
    assert architecture.sampling is not None and architecture.sampling.interpolation is None
    blocks = [module for module in network.modules() if isinstance(module, SampledBlock)]
    assert all(isinstance(fill, ZeroFill) for block in blocks for fill in block.interpolations)


def test_imagenet_runs_at_the_published_weight(tmp_path):
    result = IMAGENET(
        quick=True,
        backbone="resnet18",
        size=(32, 32),
        sampling_weight=0.015,
        out=str(tmp_path),
        progress_bar=False,
    )
    assert result["architecture"]["backbone"] == "resnet18"
    assert result["share"] > 0.5


def test_a_checkpoint_is_rebuilt_with_its_poolings(tmp_path):
    flags = {"quick": True, "depth": 8, "progress_bar": False}
    result = CIFAR10(**flags, pooling="soft", pools_strides=True, out=str(tmp_path / "a"))
    weights = str(tmp_path / "a" / "weights.safetensors")
    network, architecture = load_checkpoint(weights)
    assert (architecture.pooling, architecture.pools_strides) == ("soft", True)
    assert sum(isinstance(module, SoftPool2d) for module in network.modules()) == 2
    counted = count_macs(network.eval(), torch.zeros(1, 3, 32, 32)).total
    assert result["macs_total"] == counted
    # Two convolutions, 16 to 32 and 32 to 64 channels, at four times the positions.
    stepping = 9 * (16 * 32 * 16 * 16 + 32 * 64 * 8 * 8)
    strided = count_macs(resnet_cifar(8).eval(), torch.zeros(1, 3, 32, 32)).total
    assert counted == strided + 3 * stepping
    with pytest.raises(ValueError, match="pooling is 'soft', not 'own'; pools_strides is True"):
        CIFAR10(**flags, init=weights, out=str(tmp_path / "b"))


@pytest.mark.parametrize(
    ("pooling", "cls"),
    [
        ("own", nn.MaxPool3d),
        ("max", nn.MaxPool3d),
        ("average", nn.AvgPool3d),
        ("soft", SoftPool3d),
    ],
)
def test_clips_are_learnt_from_with_each_pooling(pooling, cls, tmp_path):
    result = MOVING_SHAPES(quick=True, pooling=pooling, out=str(tmp_path), progress_bar=False)
    assert 0 <= result["top1"] <= 1 and result["num_images"] == 4
    weights = tmp_path / "weights.safetensors"
    assert read_dataset(weights) == "moving_shapes"
    network, architecture = load_checkpoint(weights)
    assert (architecture.task, architecture.size) == ("video", (16, 16))
    assert sum(type(module) is cls for module in network.modules()) == 3


def test_clips_are_learnt_from_a_teacher_too_and_are_not_sampled(tmp_path):
    flags = {"quick": True, "progress_bar": False}
    MOVING_SHAPES(**flags, out=str(tmp_path / "a"))
    teacher = str(tmp_path / "a" / "weights.safetensors")
    result = MOVING_SHAPES(**flags, pooling="soft", teacher=teacher, out=str(tmp_path / "b"))
    assert result["architecture"]["pooling"] == "soft"
    with pytest.raises(ConversionError, match="holds no residual block"):
        MOVING_SHAPES(**flags, budget=0.5, out=str(tmp_path / "c"))


@pytest.mark.parametrize("recipe", [CIFAR10, IMAGENET])
def test_without_data_the_layout_and_the_source_are_said(recipe):
    with pytest.raises(ValueError, match=r"no data folder was given; .*is required; .*https://"):
        recipe()


def test_flags_that_contradict_each_other_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"budget=0\.5 and sampling_weight=0\.1 were both given"):
        CIFAR10(quick=True, budget=0.5, sampling_weight=0.1, out=str(tmp_path))
    with pytest.raises(ValueError, match=r"cifar10: method='resized'; the transforms"):
        CIFAR10(quick=True, budget=0.5, method="resized", out=str(tmp_path))


def test_calibration_sees_augmented_images_of_as_many_passes_as_it_takes(tmp_path, monkeypatch):
    recipe = load_recipe(RECIPES / "calibrate_cifar10.py")
    seen = []

    def stop(model, images, **options):
        seen.append(images)
        raise InterruptedError

    monkeypatch.setitem(recipe.__globals__, "calibrate", stop)
    for is_augmented in (True, False):
        with pytest.raises(InterruptedError):
            recipe(quick=True, num_images=12, is_augmented=is_augmented, out=str(tmp_path))
    augmented, plain = seen
    assert len(augmented) == 12 and len(plain) == 8  # of 8 in the set
    assert not any(torch.equal(image, other) for image in augmented[:4] for other in plain)
    assert not torch.equal(augmented[0], augmented[8])


def test_a_calibrated_network_is_saved_where_training_may_start(tmp_path):
    recipe = load_recipe(RECIPES / "calibrate_cifar10.py")
    torch.save(resnet_cifar(8).state_dict(), tmp_path / "w.pt")
    result = recipe(
        quick=True,
        budget=0.8,
        weights=str(tmp_path / "w.pt"),
        out=str(tmp_path / "a"),
        progress_bar=False,
    )
    assert abs(result["calibration"]["share"] - 0.8) < 0.02
    trained = CIFAR10(
        quick=True,
        depth=8,
        budget=0.8,
        window=3,
        init=str(tmp_path / "a" / "weights.safetensors"),
        out=str(tmp_path / "b"),
        progress_bar=False,
    )
    assert abs(trained["settled_share"] - 0.8) < 0.01
    with pytest.raises(ValueError, match=r"calibrate_cifar10: no file of weights was given"):
        recipe(data=str(tmp_path))
