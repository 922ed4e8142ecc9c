"""The flags of a teacher, and the distiller that they make of a file of weights."""

import copy
from dataclasses import replace

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from sparsight.models import resnet_cifar
from sparsight.train.architecture import (
    Architecture,
    DetectorArchitecture,
    ProposalArchitecture,
    build_dense,
    convert,
)
from sparsight.train.checkpoint import load_checkpoint, save_checkpoint
from sparsight.train.classification_task import ClassificationTask
from sparsight.train.distillation import Distillation, load_teacher, shared_flags
from sparsight.train.sampling import Sampling

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*LeafSpec.*deprecated",
        "ignore:.*does not have many workers",
        "ignore:You defined a `validation_step`",
    ),
    pytest.mark.usefixtures("narrow_resnet18"),
]
WITHOUT_PYRAMID = {"fpn_channels": None, "head_channels": None}
DENSE = Architecture(
    model="resnet_cifar", num_classes=4, backbone="resnet8", size=(32, 32), **WITHOUT_PYRAMID
)
FPN = Architecture(num_classes=6, fpn_channels=8, head_channels=8, size=(32, 48))
DETECTOR = DetectorArchitecture(
    num_classes=3, backbone="resnet18", fpn_channels=16, head_channels=32, size=(64, 96)
)


@pytest.fixture
def weights(tmp_path):
    """A CIFAR ResNet of another depth, as torch saves it."""
    torch.manual_seed(7)
    path = tmp_path / "teacher.pt"
    torch.save(resnet_cifar(14, num_classes=4).state_dict(), path)
    return path


def checkpoint(path, architecture):
    model = convert(build_dense(architecture), architecture)
    save_checkpoint(path, model, architecture)
    return path


def task_with(weights, **options):
    torch.manual_seed(0)
    network = build_dense(DENSE)
    distillation = Distillation(teacher=str(weights), **options)
    distiller = distillation.distiller(network, DENSE)
    return ClassificationTask(network, DENSE, distiller=distiller, lr=5e-3)


def batch(count=4):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 16, 16, generator=generator)
    return images, torch.arange(count) % 4


def test_flags_become_sampling_a_distillation_and_a_hardware():
    flags, distillation, hardware = shared_flags(
        teacher="t.pt",
        distill_temperature=2.0,
        distill_alpha=0.5,
        distill_features="layer1, layer2=layer3",
        distill_feature_weight=3.0,
        distill_feature_mode="attention",
        cache_teacher="folder",
        cache_teacher_half=True,
        budget=0.5,
        devices=2,
        accelerator="cpu",
    )
    assert flags.budget == 0.5 and flags.method == "sampled"
    assert distillation == Distillation(
        teacher="t.pt",
        temperature=2.0,
        alpha=0.5,
        features=(("layer1", "layer1"), ("layer2", "layer3")),
        feature_weight=3.0,
        feature_mode="attention",
        cache="folder",
        cache_in_half=True,
    )
    assert hardware.devices == 2
    assert shared_flags()[1].distiller(build_dense(DENSE), DENSE) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"distill_features": "layer1"}, r"features=.*but there is no teacher; .*pass --teacher"),
        ({"cache_teacher": "x"}, r"cache='x', but there is no teacher"),
        ({"teacher": "t", "distill_features": "a=b=c"}, r"distill_features='a=b=c'; names of"),
        ({"teacher": "t", "distill_features": "a,,b"}, r"names of layers with commas"),
        ({"devices": 0}, r"Hardware: devices=0"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        shared_flags(**flags)


def test_a_teacher_may_be_of_another_depth_or_architecture(tmp_path, weights):
    assert len(load_teacher(weights, like=DENSE).layer1) == 2
    wide = replace(FPN, fpn_channels=16)
    teacher = load_teacher(checkpoint(tmp_path / "w.safetensors", wide), like=FPN)
    assert teacher(torch.zeros(1, 3, 32, 48))["out"].shape == (1, 6, 32, 48)
    # A sampled network may teach too, at its own share.
    sampled = replace(DENSE, sampling=Sampling(noise="blue"))
    load_teacher(checkpoint(tmp_path / "s.safetensors", sampled), like=DENSE)
    imagenet = Architecture(model="resnet", num_classes=4, backbone="resnet18", **WITHOUT_PYRAMID)
    torch.save(build_dense(imagenet).state_dict(), tmp_path / "r.pth")
    load_teacher(tmp_path / "r.pth", like=replace(imagenet, sampling=Sampling()))
    with pytest.raises(ValueError, match=r"in 4 classes, the student for classification in 5"):
        load_teacher(weights, like=replace(DENSE, num_classes=5))
    with pytest.raises(ValueError, match=r"is for segmentation in 6 classes, the student for clas"):
        load_teacher(tmp_path / "w.safetensors", like=DENSE)
    with pytest.raises(FileNotFoundError):
        load_teacher(tmp_path / "none.safetensors", like=FPN)
    with pytest.raises(ValueError, match=r"is to teach instance_fcn; a student for segmentation"):
        load_teacher(tmp_path / "w.safetensors", like=ProposalArchitecture())


def test_training_trains_adapters_and_leaves_the_teacher_alone(tmp_path, weights):
    """Under mixed precision; what is saved of the student has no trace of either."""
    task = task_with(weights, features=(("layer2", "layer3"),))
    distiller = task.distiller
    before = copy.deepcopy(distiller.teacher.state_dict())
    adapters = {name: value.clone() for name, value in distiller.state_dict().items()}
    assert list(adapters) == [f"features.adapters.layer2.{part}" for part in ("weight", "bias")]
    assert not any("teacher" in name for name, _ in task.named_parameters())
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        precision="bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(task, torch.utils.data.DataLoader([batch()] * 3, batch_size=None))
    assert torch.isfinite(trainer.callback_metrics["loss"])
    trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(p) for p in [*task.model.parameters(), *distiller.parameters()]}
    assert not distiller.teacher.training
    for name, value in distiller.teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, value in distiller.state_dict().items():
        assert not torch.equal(value, adapters[name]), name
    save_checkpoint(tmp_path / "student.safetensors", task.model, DENSE)
    load_checkpoint(tmp_path / "student.safetensors", expected=DENSE)


def test_a_cache_changes_nothing_but_the_work(tmp_path, weights):
    losses = []
    for cache in (None, str(tmp_path / "outputs"), str(tmp_path / "outputs")):
        task = task_with(weights, features=(("layer2", "layer2"),), cache=cache)
        losses.append(task.task_loss(batch()))
        cached = task.distiller._cache
    assert losses[0].equal(losses[1]) and losses[1].equal(losses[2])
    assert cached is not None and (cached.num_hits, cached.num_misses) == (4, 0)


def test_in_several_processes_only_the_students_gradients_are_averaged(tmp_path, weights):
    """One process is enough to see what DistributedDataParallel takes hold of."""
    task = task_with(weights, features=(("layer2", "layer3"),))

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.task = task

        def forward(self, images, labels):
            return self.task.task_loss((images, labels))

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(Step())
        parallel(*batch()).backward()
    finally:
        dist.destroy_process_group()
    own = dict(task.named_parameters())
    assert not {id(p) for p in own.values()} & {id(p) for p in task.distiller.teacher.parameters()}
    assert all(p.grad is not None for p in own.values())


def test_a_detector_learns_from_its_teachers_pyramid(tmp_path):
    torch.manual_seed(2)
    wide = replace(DETECTOR, fpn_channels=24, num_classes=5)
    path = checkpoint(tmp_path / "d.safetensors", wide)
    student = build_dense(DETECTOR)
    distiller = Distillation(teacher=str(path)).distiller(student, DETECTOR)
    levels = ["0", "1", "2", "3", "pool"]
    assert list(distiller.features.adapters) == [f"fpn['{level}']" for level in levels]
    with distiller.recording() as features:
        student.backbone(torch.randn(1, 3, 64, 96))
    loss = distiller.loss(torch.randn(1, 3, 64, 96), None, features=features)
    assert loss.isfinite() and loss > 0
    with pytest.raises(ValueError, match=r"no layer 'layer2'; .*'body\.layer2'"):
        named = Distillation(teacher=str(path), features=(("layer2", "layer2"),))
        named.distiller(student, DETECTOR)
