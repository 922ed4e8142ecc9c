import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsight.compress import CachedTeacher, Distiller, FeatureHints, distillation_loss
from sparsight.compress.distiller import logits_in

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 4])


def net(channels, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU(), nn.Flatten(),
        nn.LazyLinear(5),
    )  # fmt: skip


def ready(channels, seed=0):
    model = net(channels, seed)
    model(IMAGES)
    return model


def taught(distiller, student, **keywords):
    with distiller.recording() as features:
        output = student(IMAGES)
    return distiller.loss(IMAGES, output, LABELS, features=features, **keywords)


def test_the_loss_is_soft_hard_and_hints():
    student, teacher = ready(4), ready(6, 1)
    hints = FeatureHints(student, teacher, ["0"], example=IMAGES)
    distiller = Distiller(
        teacher, student, features=hints, feature_weight=0.5, temperature=2.0, alpha=0.75
    )
    loss = taught(distiller, student)
    teacher.eval()
    logits = distillation_loss(
        student(IMAGES), teacher(IMAGES), LABELS, temperature=2.0, alpha=0.75
    )
    v = hints.adapters["0"](student[0](IMAGES))
    torch.testing.assert_close(loss, logits + 0.5 * F.mse_loss(v, teacher[0](IMAGES)))


def test_a_teacher_equal_to_the_student_costs_nothing_and_pulls_nowhere():
    student = ready(4).eval()
    teacher = copy.deepcopy(student)
    hints = FeatureHints(student, teacher, ["0", "2"], example=IMAGES)
    distiller = Distiller(teacher, student, features=hints, alpha=1.0)
    loss = taught(distiller, student)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in student.parameters())


def test_training_leaves_the_teacher_alone():
    """Weights, norms' statistics, gradients; also where somebody sets it to training mode."""
    student, teacher = ready(4), ready(6, 1)
    before = copy.deepcopy(teacher.state_dict())
    hints = FeatureHints(student, teacher, ["0"], example=IMAGES)
    holder = nn.ModuleDict(
        {"model": student, "distiller": Distiller(teacher, student, features=hints)}
    )
    holder.train()
    teacher.train()
    optimizer = torch.optim.SGD(holder.parameters(), lr=0.1, weight_decay=0.1)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = taught(holder["distiller"], student)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_only_adapters_are_its_own():
    student, teacher = ready(4), ready(6, 1)
    assert not Distiller(teacher, student).state_dict()
    hints = FeatureHints(student, teacher, ["0"], example=IMAGES)
    distiller = Distiller(teacher, student, features=hints)
    own = ["features.adapters.0.weight", "features.adapters.0.bias"]
    assert list(distiller.state_dict()) == own
    assert [name for name, _ in distiller.named_parameters()] == own
    assert not any("adapter" in name for name in student.state_dict())


def test_the_teacher_goes_where_the_rest_goes():
    student, teacher = ready(4), ready(6, 1)
    holder = nn.ModuleDict({"distiller": Distiller(teacher, student)})
    holder.double()
    assert teacher[0].weight.dtype == torch.float64
    assert student[0].weight.dtype == torch.float32  # it is no child
    holder.to("meta")
    assert teacher[1].running_mean.device.type == "meta"


def test_a_copy_has_its_own_teacher_and_student():
    student = ready(4)
    holder = nn.ModuleDict({"model": student, "distiller": Distiller(ready(6, 1), student)})
    other = copy.deepcopy(holder)
    assert other["distiller"].teacher is not holder["distiller"].teacher
    assert other["distiller"]._networks[1] is other["model"]


def test_the_tasks_own_loss_takes_the_place_of_cross_entropy():
    student, teacher = ready(4), ready(6, 1)
    distiller = Distiller(teacher, student, alpha=0.25)
    output = student(IMAGES)
    soft = distiller.loss(IMAGES, output)
    mixed = distiller.loss(IMAGES, output, hard_loss=torch.tensor(8.0))
    torch.testing.assert_close(mixed, 0.25 * soft + 6.0)
    hints = FeatureHints(student, teacher, ["0"], example=IMAGES)
    alone = Distiller(teacher, student, features=hints, logits_of=None)
    with alone.recording() as features:
        student(IMAGES)
    compared = alone.loss(IMAGES, None, features=features)
    whole = alone.loss(IMAGES, None, features=features, hard_loss=torch.tensor(8.0))
    torch.testing.assert_close(whole, compared + 8.0)


class Out(nn.Module):
    """Maps of logits at a given size, as torchvision's models return them, or in a pair."""

    def __init__(self, size, form=dict):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 1)
        self.size = size
        self.form = form

    def forward(self, x):
        out = F.interpolate(self.conv(x), size=self.size)
        return {"out": out, "aux": -out} if self.form is dict else [-out, out]


@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize("form", [dict, list])
def test_maps_of_logits_are_found_and_resized(tmp_path, is_cached, form):
    torch.manual_seed(2)
    student, teacher = Out((8, 8), form), Out((4, 6), form)
    source = CachedTeacher(teacher, tmp_path) if is_cached else teacher
    finds = logits_in if form is dict else lambda output: output[1]
    distiller = Distiller(source, student, logits_of=finds)
    labels = torch.zeros(2, 8, 8, dtype=torch.int64)
    output = student(IMAGES)
    resized = F.interpolate(
        finds(teacher(IMAGES)), size=(8, 8), mode="bilinear", align_corners=False
    )
    expected = distillation_loss(finds(output), resized, labels)
    for _ in range(2):
        torch.testing.assert_close(distiller.loss(IMAGES, output, labels), expected)


def test_a_cached_teacher_teaches_the_same(tmp_path):
    student, teacher = ready(4), ready(6, 1)
    hints = FeatureHints(student, teacher, ["0"], example=IMAGES)
    plain = Distiller(teacher, student, features=hints)
    wanted = taught(plain, student)
    cached = CachedTeacher(teacher, tmp_path)
    distiller = Distiller(cached, student, features=hints)
    losses = [taught(distiller, student) for _ in range(2)]
    assert losses[0].equal(wanted) and losses[1].equal(wanted)
    assert (cached.num_hits, cached.num_misses) == (2, 2)


def test_mixed_precision_is_finite_and_float32():
    student, teacher = ready(4), ready(6, 1)
    hints = FeatureHints(student, teacher, ["0"], example=IMAGES, mode="attention")
    distiller = Distiller(teacher, student, features=hints)
    with torch.autocast("cpu", torch.bfloat16):
        loss = taught(distiller, student)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_what_cannot_teach_is_refused():
    student, teacher = ready(4), ready(6, 1)
    with pytest.raises(ValueError, match=r"share 6 parameters, such as '0\.weight'; .*deepcopy"):
        Distiller(student, student)
    with pytest.raises(ValueError, match=r"something to compare is required"):
        Distiller(teacher, student, logits_of=None)
    with pytest.raises(ValueError, match=r"feature_weight=-1; a number of at least 0"):
        Distiller(teacher, student, feature_weight=-1)
    with pytest.raises(ValueError, match=r"temperature=0"):
        Distiller(teacher, student, temperature=0)
    with pytest.raises(ValueError, match=r"alpha=nan"):
        Distiller(teacher, student, alpha=math.nan)
    hints = FeatureHints(student, teacher, ["0"], example=IMAGES)
    with pytest.raises(ValueError, match=r"no features arrived, but hints compare 0; run the"):
        Distiller(teacher, student, features=hints).loss(IMAGES, student(IMAGES), LABELS)
    with pytest.raises(ValueError, match=r"labels and hard_loss were both given"):
        taught(Distiller(teacher, student), student, hard_loss=torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"returned a list; logits, or a mapping .*logits_of"):
        logits_in([torch.zeros(1, 2)])
    with pytest.raises(TypeError, match=r"returned a dict; logits, or a mapping"):
        logits_in({"other": torch.zeros(1, 2)})
