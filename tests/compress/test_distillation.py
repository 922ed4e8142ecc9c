"""The loss of a student, against the worked example of the specification and torch's own losses."""

import math

import pytest
import torch
import torch.nn.functional as F

from sparsight.compress import distillation, distillation_loss

ONE_TWO_THREE = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)


def composed(student, teacher, labels=None, *, temperature=4.0, alpha=0.9, ignore_index=-100):
    """The formula with torch's losses, in float64, positions flattened first."""
    student, teacher = (
        logits.double().movedim(1, -1).flatten(0, -2) for logits in (student, teacher)
    )
    soft = temperature**2 * F.kl_div(
        (student / temperature).log_softmax(1),
        (teacher / temperature).log_softmax(1),
        reduction="batchmean",
        log_target=True,
    )
    if labels is None:
        return soft
    hard = F.cross_entropy(student, labels.flatten(), ignore_index=ignore_index)
    return alpha * soft + (1 - alpha) * hard


@pytest.mark.parametrize(
    ("temperature", "loss", "gradient"),
    [
        (1.0, 0.266217, [0.243303, 0.088605, -0.331908]),
        (4.0, 0.328202, [0.316232, 0.027350, -0.343583]),
        (1e6, None, [1 / 3, 0.0, -1 / 3]),
    ],
)
def test_the_worked_example(temperature, loss, gradient):
    student = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    found = distillation_loss(student, ONE_TWO_THREE, temperature=temperature)
    found.backward()
    if loss is not None:
        assert found.item() == pytest.approx(loss, abs=1e-6)
    assert student.grad is not None
    assert student.grad[0].tolist() == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize("shape", [(6, 5), (2, 5, 3, 4), (2, 5, 7), (1, 5, 2, 3, 2), (3, 1, 2, 2)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_it_is_the_formula_with_torchs_losses(shape, temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, *shape) * 3
    labels = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    labels.view(-1)[0] = -100
    student.requires_grad_()
    for given in (None, labels):
        options = {"temperature": temperature, "alpha": 0.7}
        found = distillation_loss(student, teacher, given, **options)
        wanted = composed(student, teacher, given, **options)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-6)
        slopes = [torch.autograd.grad(loss, student)[0] for loss in (found, wanted)]
        torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-7)


def test_alpha_0_is_cross_entropy_and_alpha_1_the_teacher_alone():
    torch.manual_seed(1)
    student, teacher = torch.randn(2, 4, 6, 3, 3)
    labels = torch.randint(0, 6, (4, 3, 3))
    alone = distillation_loss(student, teacher, labels, alpha=0.0)
    torch.testing.assert_close(alone, F.cross_entropy(student, labels))
    taught = distillation_loss(student, teacher, labels, alpha=1.0)
    assert torch.equal(taught, distillation_loss(student, teacher))
    # A teacher that counts for nothing may say anything.
    assert distillation_loss(student, teacher * math.nan, labels, alpha=0.0).equal(alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 10), (2, 19, 8, 8)])
def test_distilling_from_oneself_costs_nothing_and_pulls_nowhere(shape, dtype):
    torch.manual_seed(2)
    logits = (torch.randn(shape) * 5).to(dtype).requires_grad_()
    loss = distillation_loss(logits, logits.detach().clone())
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize("chunk", [1, 40, 10**6])
def test_cut_into_any_chunks_it_is_the_same(monkeypatch, chunk):
    torch.manual_seed(3)
    monkeypatch.setattr(distillation, "_CHUNK_ELEMENTS", chunk)
    for shape in ((5, 4), (3, 4, 5, 3), (3, 4, 7)):
        student, teacher = torch.randn(2, *shape, dtype=torch.float64)
        labels = torch.randint(0, 4, (shape[0], *shape[2:]))
        student.requires_grad_()
        found = distillation_loss(student, teacher, labels)
        wanted = composed(student, teacher, labels)
        torch.testing.assert_close(found, wanted)
        slopes = [torch.autograd.grad(loss, student)[0] for loss in (found, wanted)]
        torch.testing.assert_close(*slopes)


def test_gradcheck():
    torch.manual_seed(4)
    student, teacher = torch.randn(2, 2, 3, 2, 2, dtype=torch.float64)
    labels = torch.tensor([[[0, 1], [2, -100]], [[1, -100], [0, 2]]])
    student.requires_grad_()
    for keeps in (True, False):
        assert torch.autograd.gradcheck(
            lambda x, keeps=keeps: distillation_loss(x, teacher, labels, distills_ignored=keeps),
            student,
        )
    assert torch.autograd.gradcheck(lambda x: distillation_loss(x, teacher), student)


def test_the_teacher_takes_no_gradient():
    student, teacher = torch.randn(2, 3, 4, requires_grad=True).unbind()
    teacher = teacher.detach().requires_grad_()
    distillation_loss(student, teacher).backward()
    assert teacher.grad is None
    assert not distillation_loss(student.detach(), teacher).requires_grad


def test_ignored_pixels_have_no_label_but_a_teacher():
    torch.manual_seed(5)
    student, teacher = torch.randn(2, 1, 3, 2, 2, dtype=torch.float64)
    labels = torch.tensor([[[0, 255], [2, 255]]])
    options = {"temperature": 2.0, "alpha": 0.5, "ignore_index": 255}
    found = distillation_loss(student, teacher, labels, **options)
    torch.testing.assert_close(found, composed(student, teacher, labels, **options))
    left = [logits[:, :, :, :1] for logits in (student, teacher)]
    found = distillation_loss(student, teacher, labels, distills_ignored=False, **options)
    torch.testing.assert_close(found, composed(*left, labels[:, :, :1], **options))


def test_a_batch_without_labels_has_no_hard_term():
    torch.manual_seed(6)
    student, teacher = torch.randn(2, 2, 3, 4, 4)
    labels = torch.full((2, 4, 4), -100)
    student.requires_grad_()
    soft = distillation_loss(student, teacher)
    found = distillation_loss(student, teacher, labels, alpha=0.25)
    torch.testing.assert_close(found, 0.25 * soft)
    nothing = distillation_loss(student, teacher, labels, distills_ignored=False)
    (slope,) = torch.autograd.grad(nothing, student)
    assert nothing.item() == 0 and not slope.any()
    empty = torch.zeros(0, 3, requires_grad=True)
    assert distillation_loss(empty, empty.detach(), torch.zeros(0, dtype=torch.int64)).item() == 0


def test_a_channels_last_view_is_as_good():
    torch.manual_seed(7)
    student, teacher = torch.randn(2, 2, 5, 4, 6)
    labels = torch.randint(0, 5, (2, 4, 6))
    wanted = distillation_loss(student, teacher, labels)
    last = student.to(memory_format=torch.channels_last).requires_grad_()
    found = distillation_loss(last, teacher.permute(0, 1, 3, 2).contiguous().mT, labels)
    torch.testing.assert_close(found, wanted)
    (slope,) = torch.autograd.grad(found, last)
    assert slope.is_contiguous(memory_format=torch.channels_last)
    sliced = torch.randn(2, 5, 8, 12)[:, :, ::2, ::2].copy_(student)
    torch.testing.assert_close(distillation_loss(sliced, teacher, labels), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_worked_on_in_float32(dtype):
    """Also under autocast, and with a gradient whose elements are below float16's least number."""
    torch.manual_seed(8)
    student, teacher = (torch.randn(2, 1, 4, 64, 64) * 4).to(dtype)
    student.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = distillation_loss(student, teacher.float())
    wanted = composed(student, teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=0)
    scale = 2.0**16  # as a GradScaler's
    (slope,) = torch.autograd.grad(found * scale, student)
    (exact,) = torch.autograd.grad(wanted * scale, student)
    assert slope.dtype == dtype
    torch.testing.assert_close(slope, exact, rtol=2e-2, atol=1e-3)


def test_what_is_not_a_number_shows():
    student, teacher = torch.randn(2, 4, 3)
    for broken in (0, 1):
        pair = [student.clone(), teacher.clone()]
        pair[broken][1, 2] = math.nan
        assert distillation_loss(*pair).isnan()


def test_a_class_that_the_teacher_rules_out_is_no_nan():
    student = torch.zeros(1, 3, requires_grad=True)
    teacher = torch.tensor([[0.0, 0.0, -math.inf]])
    loss = distillation_loss(student, teacher, temperature=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(3 / 2), abs=1e-6)
    assert student.grad is not None
    assert student.grad[0].tolist() == pytest.approx([-1 / 6, -1 / 6, 1 / 3], abs=1e-6)


MAP = torch.zeros(2, 3, 4, 4)
LABELS = torch.zeros(2, 4, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("student", "teacher", "labels", "options", "message"),
    [
        (MAP, MAP.long(), None, {}, r"teacher_logits is torch\.int64; floating point"),
        (MAP.int(), MAP, None, {}, r"student_logits is torch\.int32; floating point"),
        (MAP[0, 0, 0], MAP[0, 0, 0], None, {}, r"shape \(4,\); \(B, C, \.\.\.\) .*is required"),
        (MAP, MAP[:1], None, {}, r"\(2, 3, 4, 4\), teacher_logits \(1, 3, 4, 4\); equal shapes"),
        (MAP, MAP[:, :2], None, {}, r"3 classes, teacher_logits 2; the same classes"),
        (MAP, MAP[..., :2], None, {}, r"resize the logits, .*F\.interpolate\(teacher_logits, size"),
        (MAP, MAP, LABELS.int(), {}, r"labels is torch\.int32; int64 classes"),
        (MAP, MAP, LABELS[:, :2], {}, r"labels of shape \(2, 4, 4\) are required; resize"),
        (MAP, MAP, LABELS + 255, {}, r"labels holds 255; .*pass ignore_index=255"),
        (MAP, MAP, None, {"temperature": 0.0}, r"temperature=0\.0; a positive number"),
        (MAP, MAP, None, {"temperature": math.inf}, r"temperature=inf; a positive number"),
        (MAP, MAP, LABELS, {"alpha": 1.5}, r"alpha=1\.5; the share of the soft term"),
        (MAP, MAP, LABELS, {"alpha": math.nan}, r"alpha=nan; the share of the soft term"),
        (MAP, MAP.to("meta"), None, {}, r"on cpu, teacher_logits on meta; one device"),
    ],
)
def test_what_does_not_fit_is_refused(student, teacher, labels, options, message):
    with pytest.raises((ValueError, TypeError), match=r"distillation_loss: .*" + message):
        distillation_loss(student, teacher, labels, **options)


def test_it_keeps_one_copy_for_the_backward_pass():
    """A segmentation map: what is saved is the gradient and nothing else of its size."""
    student, teacher = torch.randn(2, 1, 19, 64, 64)
    student.requires_grad_()
    labels = torch.zeros(1, 64, 64, dtype=torch.int64)
    loss = distillation_loss(student, teacher, labels)
    assert loss.grad_fn is not None
    (saved,) = loss.grad_fn.saved_tensors  # type: ignore[attr-defined]
    assert saved.shape == student.shape
    assert all(
        parent.name() == "torch::autograd::AccumulateGrad"
        for parent, _ in loss.grad_fn.next_functions
        if parent is not None
    )
