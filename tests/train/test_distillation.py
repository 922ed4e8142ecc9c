import pytest
import torch

from sparsight.train.distillation import distillation


def test_distilling_from_oneself_costs_nothing_and_pulls_nowhere():
    logits = torch.randn(2, 5, 3, 4, requires_grad=True)
    loss = distillation(logits, logits.detach().clone())
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_is_the_divergence_per_position(temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 5, 3, 4)
    expected = 0.0
    for b in range(2):
        for y in range(3):
            for x in range(4):
                p = torch.softmax(teacher[b, :, y, x] / temperature, 0)
                q = torch.softmax(student[b, :, y, x] / temperature, 0)
                expected += float((p * (p / q).log()).sum()) / 24
    loss = distillation(student, teacher.requires_grad_(), temperature=temperature)
    assert loss.item() == pytest.approx(temperature**2 * expected, rel=1e-4)
    assert not loss.requires_grad
