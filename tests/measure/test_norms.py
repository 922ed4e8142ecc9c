"""Running statistics measured again."""

import pytest
import torch
from torch import nn

import sparsight
from sparsight.measure import measure_norms
from sparsight.nn import Sampler


def _batches(number: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 2, 6, 5, generator=generator) * 3 + 1 for _ in range(number)]


def test_statistics_are_the_means_over_the_batches() -> None:
    model, batches = nn.Sequential(nn.BatchNorm2d(2)), _batches()
    model.train()
    model(torch.full((2, 2, 3, 3), 100.0))
    assert measure_norms(model, batches) == 3
    norm = model[0]
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
    means = torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0)
    variances = torch.stack([b.transpose(0, 1).flatten(1).var(1) for b in batches]).mean(0)
    torch.testing.assert_close(norm.running_mean, means)
    torch.testing.assert_close(norm.running_var, variances)
    assert norm.momentum == 0.1


def test_modes_and_weights_stay() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.Dropout())
    model.train()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" not in k}
    measure_norms(model, _batches())
    assert [m.training for m in model] == [True, False, True]
    for name, value in before.items():
        if "tracked" not in name:
            assert torch.equal(model.state_dict()[name], value)


def test_masks_are_those_of_inference() -> None:
    """With a level that computes nothing, hard masks leave the grid; relaxed ones would not."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = sparsight.sparsify(resnet18(num_classes=3)).eval()
    for module in model.modules():
        if isinstance(module, Sampler):
            nn.init.constant_(module.level, -0.5)
    batches = [torch.randn(2, 3, 32, 32) for _ in range(2)]
    masks: list[bool] = []
    for module in model.modules():
        if isinstance(module, Sampler):
            module.register_forward_hook(lambda m, i, o: masks.append(o.relaxed is None))
    measure_norms(model, batches)
    assert masks and all(masks)


def test_a_model_without_norms_is_not_run() -> None:
    def never() -> None:
        raise AssertionError("run")

    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, track_running_stats=False))
    model.register_forward_hook(lambda *_: never())
    assert measure_norms(model, _batches()) == 0


def test_no_batches_are_an_error_and_nothing_is_lost() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2))
    model(torch.randn(4, 2, 3, 3))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="no batches"):
        measure_norms(model, [])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_failing_batch_leaves_the_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2))
    model(torch.randn(4, 2, 3, 3))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError):
        measure_norms(model, [*_batches(1), torch.randn(4, 3, 6, 5)])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
