"""Maps merged as a module, and what freezing makes of it."""

import pytest
import torch
from torch import nn

import sparsight
from sparsight.measure import count_macs
from sparsight.models import frrn_a, refinenet, semantic_fpn
from sparsight.nn import MergeMaps
from sparsight.nn.merge_maps import FrozenMergeMaps


class Fork(nn.Module):
    def __init__(self):
        super().__init__()
        self.fine = nn.Conv2d(3, 32, 3, padding=1)
        self.coarse = nn.Conv2d(3, 32, 3, padding=1, stride=2)
        self.merge = MergeMaps("concatenate", resizing="bilinear")
        self.last = nn.Conv2d(64, 5, 1)

    def forward(self, x):
        return self.last(self.merge(self.coarse(x), self.fine(x)))


def test_freezing_makes_it_one_operator():
    model, x = Fork().eval(), torch.randn(2, 3, 9, 14)
    frozen = sparsight.freeze(model, example=x)
    assert type(frozen.merge) is FrozenMergeMaps and type(model.merge) is MergeMaps
    torch.testing.assert_close(frozen(x), model(x), atol=1e-5, rtol=1e-4)
    assert count_macs(frozen, x).total == count_macs(model, x).total


def test_hooks_on_it_are_kept():
    model, x = Fork().eval(), torch.randn(1, 3, 8, 8)
    seen = []
    model.merge.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    frozen = sparsight.freeze(model, example=x)
    seen.clear()
    frozen(x)
    assert seen == [(1, 64, 8, 8)] and type(frozen.merge) is MergeMaps


@pytest.mark.skipif(not sparsight.ops.cpu.has_bfloat16(), reason="no AVX-512 BF16")
def test_maps_stay_narrow_through_it():
    model, x = Fork().eval(), torch.randn(1, 3, 10, 12)
    frozen = sparsight.freeze(model, example=x, dtype=torch.bfloat16)
    assert frozen.fine.output_dtype == frozen.coarse.output_dtype == torch.bfloat16
    with torch.inference_mode():
        torch.testing.assert_close(frozen(x), model(x), atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    "build",
    [
        lambda: frrn_a(4, channels=8, residual_channels=8),
        lambda: frrn_a(4, channels=8, residual_channels=8, unpooling="theano"),
        lambda: refinenet(4, backbone="resnet18", channels=16),
        lambda: refinenet(4, backbone="resnet18", channels=16, align_corners=True),
        lambda: semantic_fpn("resnet18", num_classes=4, fpn_channels=16, head_channels=16),
    ],
)
def test_models_of_any_size_are_frozen_with_it(build):
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(1, 3, 45, 70)
    frozen = sparsight.freeze(model, example=x)
    assert any(isinstance(module, FrozenMergeMaps) for module in frozen.modules())
    with torch.inference_mode():
        expected = model(x)["out"]
        torch.testing.assert_close(
            frozen(x)["out"], expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4
        )


def test_repr_says_what_it_does():
    assert repr(MergeMaps("sum", resizing="nearest")) == "MergeMaps('sum', resizing='nearest')"
