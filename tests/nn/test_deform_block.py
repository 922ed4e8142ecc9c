"""Laws of `DeformableBlock`."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import deform_conv2d

from sparsight.nn import DeformableBlock, DeformableConv2d
from sparsight.nn.deform_block import make_stage_deformable

KINDS = {
    "basic": lambda: BasicBlock(8, 8),
    "bottleneck": lambda: Bottleneck(16, 4),
    "bottleneck strided": lambda: Bottleneck(8, 4, 2, nn.Conv2d(8, 16, 1, 2)),
    "resnext": lambda: Bottleneck(16, 4, groups=4, base_width=64, dilation=2),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_it_starts_as_the_block_it_was_made_from(kind, training):
    torch.manual_seed(0)
    source = KINDS[kind]().train(training)
    block = DeformableBlock(copy.deepcopy(source))
    assert all(module.training is training for module in block.modules())
    x = torch.randn(2, source.conv1.in_channels, 9, 10)
    torch.testing.assert_close(block(x), source(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_state_of_the_source_loads_but_for_the_offsets(kind):
    missing, unexpected = DeformableBlock(KINDS[kind]()).load_state_dict(
        KINDS[kind]().state_dict(), strict=False
    )
    assert (missing, unexpected) == (["conv2.offset.weight", "conv2.offset.bias"], [])


@pytest.mark.parametrize("is_modulated", [False, True])
def test_offsets_are_made_of_the_blocks_input(is_modulated):
    torch.manual_seed(0)
    block = DeformableBlock(Bottleneck(16, 4), offset_groups=2, is_modulated=is_modulated).eval()
    conv = block.conv2
    assert isinstance(conv, DeformableConv2d)
    nn.init.normal_(conv.offset.weight, std=0.2)
    x = torch.randn(2, 16, 8, 9)
    made = conv.offset(x)
    factors = made[:, 36:].sigmoid() if is_modulated else None
    features = block.relu(block.bn1(block.conv1(x)))
    h = deform_conv2d(features, made[:, :36], conv.weight, None, padding=1, mask=factors)
    expected = block.relu(block.bn3(block.conv3(block.relu(block.bn2(h)))) + x)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)


def test_a_stride_before_conv2_is_refused():
    with pytest.raises(ValueError, match=r"conv1 has stride \(2, 2\), but .* one size; keep"):
        DeformableBlock(BasicBlock(8, 8, 2, nn.Conv2d(8, 8, 1, 2)))


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_a_stage_moves_by_the_blocks_inputs_where_sizes_allow(kind):
    torch.manual_seed(0)
    if kind == "basic":
        halving = BasicBlock(8, 8, 2, nn.Conv2d(8, 8, 1, 2))
    else:
        halving = Bottleneck(8, 2, 2, nn.Conv2d(8, 8, 1, 2))
    source = nn.Sequential(halving, type(halving)(8, 8 if kind == "basic" else 2)).eval()
    stage = copy.deepcopy(source)
    make_stage_deformable(stage)
    assert [type(block) is DeformableBlock for block in stage] == [kind == "bottleneck", True]
    assert [type(block.conv2) for block in stage] == [DeformableConv2d] * 2
    assert [block.conv2.is_guided for block in stage] == [kind == "bottleneck", True]
    x = torch.randn(2, 8, 9, 10)
    torch.testing.assert_close(stage(x), source(x), rtol=1e-4, atol=1e-4)
