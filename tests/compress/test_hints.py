import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsight.compress import FeatureHints, record_features
from sparsight.convert import sparsify
from sparsight.models import resnet_cifar


def net(channels, stride=1):
    return nn.Sequential(nn.Conv2d(3, channels, 3, stride, padding=1), nn.ReLU(), nn.Flatten(1))


def recorded(hints, student, teacher, images):
    with record_features(student, hints.student_names) as v:
        student(images)
    with torch.no_grad(), record_features(teacher, hints.teacher_names) as u:
        teacher(images)
    return v, u


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_fitnets_is_the_mean_squared_difference_through_the_adapter():
    torch.manual_seed(0)
    student, teacher = net(4), net(6)
    hints = FeatureHints(student, teacher, {"0": "1"}, example=IMAGES)
    v, u = recorded(hints, student, teacher, IMAGES)
    adapter = hints.adapters["0"]
    assert isinstance(adapter, nn.Conv2d)
    expected = (u["1"] - F.conv2d(v["0"], adapter.weight, adapter.bias)).square().mean()
    loss = hints(v, u)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in hints.parameters())
    assert student[0].weight.grad is not None and teacher[0].weight.grad is None


@pytest.mark.parametrize("mode", ["attention", "attention_mean"])
def test_attention_is_the_papers_or_its_code(mode):
    torch.manual_seed(1)
    student, teacher = net(4), net(6)
    hints = FeatureHints(student, teacher, ["1"], example=IMAGES, mode=mode)
    assert not list(hints.parameters())
    v, u = recorded(hints, student, teacher, IMAGES)
    expected = []
    for i in range(2):
        q = [x["1"][i].pow(2).mean(0).flatten() for x in (v, u)]
        difference = q[0] / q[0].norm() - q[1] / q[1].norm()
        expected.append(difference.norm() if mode == "attention" else difference.pow(2).mean())
    torch.testing.assert_close(hints(v, u), torch.stack(expected).mean())


@pytest.mark.parametrize("mode", ["fitnets", "attention", "attention_mean"])
def test_hints_of_oneself_cost_nothing_and_pull_nowhere(mode):
    torch.manual_seed(2)
    student = net(4)
    teacher = copy.deepcopy(student)
    hints = FeatureHints(student, teacher, ["0", "1"], example=IMAGES, mode=mode)
    assert not hints.adapters
    loss = hints(*recorded(hints, student, teacher, IMAGES))
    loss.backward()
    assert loss.item() == 0
    assert student[0].weight.grad is not None and not student[0].weight.grad.any()


def test_equal_channels_are_adapted_on_request():
    hints = FeatureHints(net(4), net(4), ["0"], example=IMAGES, adapts_equal=True)
    assert list(hints.state_dict()) == ["adapters.0.weight", "adapters.0.bias"]


@pytest.mark.parametrize("mode", ["fitnets", "attention"])
def test_the_larger_map_is_averaged_down(mode):
    torch.manual_seed(3)
    student, teacher = net(4), net(4, stride=2)
    hints = FeatureHints(student, teacher, ["1"], example=IMAGES, mode=mode)
    v, u = recorded(hints, student, teacher, IMAGES)
    if mode == "fitnets":
        expected = (F.avg_pool2d(v["1"], 2) - u["1"]).square().mean()
    else:
        squares = F.avg_pool2d(v["1"].square().mean(1, keepdim=True), 2), u["1"].square().mean(1)
        a, b = (F.normalize(x.flatten(1)) for x in squares)
        expected = (a - b).norm(dim=1).mean()
    torch.testing.assert_close(hints(v, u), expected)
    torch.testing.assert_close(
        hints({"1": v["1"], "0": v["1"]}, u), hints(v, u)
    )  # what is recorded beside is no pair


def test_more_pairs_keep_the_size_of_the_loss():
    torch.manual_seed(4)
    student, teacher = net(4), net(4)
    losses = []
    for names in (["0"], ["1"], ["0", "1"]):
        hints = FeatureHints(student, teacher, names, example=IMAGES)
        losses.append(hints(*recorded(hints, student, teacher, IMAGES)))
    torch.testing.assert_close(losses[2], (losses[0] + losses[1]) / 2)


def test_vectors_are_adapted_by_a_linear_layer():
    hints = FeatureHints(net(4), net(6), ["2"], example=IMAGES)
    assert isinstance(hints.adapters["2"], nn.Linear)
    with pytest.raises(ValueError, match=r"'2' is \(2, 256\); attention is over the positions"):
        FeatureHints(net(4), net(4), ["2"], example=IMAGES, mode="attention")


def test_a_sampled_student_is_hinted_by_its_blocks():
    torch.manual_seed(5)
    teacher = resnet_cifar(8).eval()
    student = sparsify(copy.deepcopy(teacher))
    hints = FeatureHints(student, teacher, ["layer2", "layer3.0"], example=IMAGES)
    modes = [module.training for module in student.modules()]
    hints(*recorded(hints, student, teacher, IMAGES)).backward()
    assert modes == [module.training for module in student.modules()]


def test_low_precision_features_are_compared_in_float32():
    student, teacher = net(4), net(6)
    hints = FeatureHints(student, teacher, ["0"], example=IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        loss = hints(*recorded(hints, student, teacher, IMAGES))
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_modes_are_put_back():
    student = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1))
    student[0].eval()
    before = student[0].running_mean.clone()
    FeatureHints(student, net(4), {"1": "0"}, example=IMAGES)
    assert student.training and not student[0].training and student[1].training
    assert torch.equal(student[0].running_mean, before)


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        ([], {}, r"features=\[\]; at least one pair"),
        ("layer", {}, r"features='layer'; at least one pair"),
        (["0"], {"mode": "nst"}, r"mode='nst'; 'fitnets', 'attention'"),
        (["9"], {}, r"no layer '9'"),
        ({"0": "2"}, {}, r"'0' is \(2, 4, 8, 8\) in the student and \(2, 384\) in the teacher"),
    ],
)
def test_what_cannot_be_compared_is_refused(features, options, message):
    with pytest.raises(ValueError, match=message):
        FeatureHints(net(4), net(6), features, example=IMAGES, **options)


def test_features_that_were_not_recorded_are_missed():
    hints = FeatureHints(net(4), net(6), ["0"], example=IMAGES)
    with pytest.raises(ValueError, match=r"'0' of the student did not run"):
        hints({}, {"0": torch.zeros(2, 6, 8, 8)})
    teacher = net(6)
    teacher[0].spare = nn.Identity()
    with pytest.raises(ValueError, match=r"'0\.spare' of the teacher did not run"):
        FeatureHints(net(4), teacher, {"0": "0.spare"}, example=IMAGES)
