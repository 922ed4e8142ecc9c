from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsight.cli import main
from sparsight.train.architecture import (
    Architecture,
    DetectorArchitecture,
    Sampling,
    build_dense,
    convert,
)
from sparsight.train.hardware import Hardware

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FPN = Architecture(num_classes=3, fpn_channels=8, head_channels=8)
CIFAR = Architecture(model="resnet_cifar", backbone="resnet20", num_classes=3)
DETECTOR = DetectorArchitecture(
    num_classes=3, backbone="resnet18", fpn_channels=8, head_channels=8, size=(64, 64)
)


@pytest.mark.parametrize(
    "recipe",
    [
        "segmentation/camvid",
        "segmentation/cityscapes",
        "classification/cifar10",
        "classification/imagenet",
        "detection/coco",
    ],
)
def test_every_recipe_has_the_flags_and_explains_them(recipe, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(RECIPES / f"{recipe}.py"), "--help"])
    assert stopped.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for flag in (
        "--devices DEVICES processes on each machine",
        "--num_nodes NUM_NODES machines. The same command",
        '--strategy {auto,ddp} "ddp" averages',
        '--accelerator {auto,cpu,gpu} "auto" takes GPUs',
        "--sync_batchnorm {true,false} norms take their statistics",
        "--checkpoint_activations {true,false} keep only the inputs",
    ):
        assert flag in printed


def test_one_process_needs_no_strategy_and_several_average_gradients():
    assert Hardware().trainer_arguments()["strategy"] == "auto"
    assert Hardware().num_processes == 1
    several = Hardware(devices=4, num_nodes=2, accelerator="cpu")
    assert several.num_processes == 8
    found = several.trainer_arguments()
    assert (found["devices"], found["num_nodes"], found["accelerator"]) == (4, 2, "cpu")
    for hardware in (several, Hardware(strategy="ddp")):
        strategy = hardware.trainer_arguments()["strategy"]
        assert strategy._ddp_kwargs == {"broadcast_buffers": False}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"devices": 0}, r"Hardware: devices=0; at least 1 is required; pass --devices 1"),
        ({"num_nodes": -1}, r"Hardware: num_nodes=-1; at least 1 is required"),
        (
            {"sync_batchnorm": True, "accelerator": "cpu"},
            r"Hardware: sync_batchnorm=True on the CPU .*leave --sync_batchnorm out",
        ),
    ],
)
def test_what_cannot_be_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        Hardware(**flags)


def test_blocks_are_recomputed_in_dense_and_sampled_models_and_nowhere_else():
    saving = Hardware(checkpoint_activations=True)
    for sampling in (None, Sampling()):
        described = replace(CIFAR, sampling=sampling)
        model = convert(build_dense(described), described)
        with saving.saving_memory(model):
            wrapped = [name for name, m in model.named_modules() if "forward" in vars(m)]
        assert len(wrapped) == 9
        assert all(name.count(".") == 1 and name.startswith("layer") for name in wrapped)
        with Hardware().saving_memory(model):
            assert not any("forward" in vars(module) for module in model.modules())
    with pytest.raises(ValueError, match=r"Linear has no residual block of a known ResNet"):
        saving.saving_memory(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "described",
    [
        CIFAR,
        replace(CIFAR, sampling=Sampling(layout="a")),
        replace(CIFAR, sampling=Sampling(sampler="relu_gate", interpolation=None)),
        replace(CIFAR, sampling=Sampling(sampler="perforated", interpolation="nearest")),
        replace(CIFAR, sampling=Sampling(interpolation="conv", noise="blue")),
        replace(FPN, sampling=Sampling()),
        replace(FPN, backbone="resnet50", is_deformable=True, sampling=Sampling(layout="c")),
        Architecture(model="fcn_resnet50", num_classes=3, backbone=None, sampling=Sampling()),
        replace(DETECTOR, sampling=Sampling(), trainable_layers=3),
    ],
    ids=lambda described: described.model,
)
def test_every_parameter_that_learns_takes_part_in_each_step(described):
    """Or processes that average gradients would wait for it; looking for such costs time."""
    torch.manual_seed(0)
    model = convert(build_dense(described), described).train()
    if isinstance(described, DetectorArchitecture):
        boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0]])
        targets = [{"boxes": boxes[:n], "labels": torch.ones(n).long()} for n in (0, 1)]
        losses = model([torch.rand(3, 64, 64) for _ in targets], targets)
        loss = torch.stack(list(losses.values())).sum()
    else:
        out = model(torch.randn(2, 3, 64, 64))
        loss = (out["out"] if isinstance(out, dict) else out).square().sum()
    loss.backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
