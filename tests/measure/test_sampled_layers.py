"""Rows of sampled modules, against a loop that counts multiply-adds one by one from the masks."""

import functools

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1

import sparsight
from sparsight.convert.freeze import freeze
from sparsight.measure import count_macs
from sparsight.measure.sampled_layers import LayerMacs, join
from sparsight.nn import (
    DeformableBlock,
    DeformableConv2d,
    RBFInterpolation,
    SampledBlock,
    SampledConv2d,
    Sampler,
    ZeroFill,
)


def convolve_by_hand(conv, mask):
    """Multiply-adds at the sites of a mask: one per site, filter, tap and input channel."""
    macs = 0
    for image in mask[:, 0]:
        for row in image.tolist():
            for is_site in row:
                if is_site:
                    for _ in range(conv.out_channels):
                        for _ in range(conv.kernel_size[0] * conv.kernel_size[1]):
                            macs += conv.in_channels // conv.groups
    return macs


def is_read_by_hand(y, x, image, conv):
    """Whether a convolution that runs at the sites of `image` reads input position (y, x)."""
    for oy in range(image.shape[0]):
        for ox in range(image.shape[1]):
            if not image[oy, ox]:
                continue
            for ky in range(conv.kernel_size[0]):
                for kx in range(conv.kernel_size[1]):
                    at_y = oy * conv.stride[0] - conv.padding[0] + ky * conv.dilation[0]
                    at_x = ox * conv.stride[1] - conv.padding[1] + kx * conv.dilation[1]
                    if (at_y, at_x) == (y, x):
                        return True
    return False


def fill_by_hand(mask, window, channels, reader=None, reader_mask=None):
    """Multiply-adds of the fill: one per hole that is read, site in its window, channel."""
    macs, reach = 0, window // 2
    for b, image in enumerate(mask[:, 0]):
        height, width = image.shape
        for y in range(height):
            for x in range(width):
                if image[y, x]:
                    continue
                if reader is not None and not is_read_by_hand(y, x, reader_mask[b, 0], reader):
                    continue
                for v in range(max(0, y - reach), min(height, y + reach + 1)):
                    for u in range(max(0, x - reach), min(width, x + reach + 1)):
                        macs += channels * bool(image[v, u])
    return macs


def block_by_hand(block, masks, window):
    """Multiply-adds of a block: heads, gated convolutions, fills, shortcut."""
    heads = sum(9 * block.conv1.in_channels * decided.numel() for decided in masks)
    convs = [block.conv1, block.conv2]
    if hasattr(block, "conv3"):
        convs.append(block.conv3)
    stride = block.conv2.stride[0]
    if block.layout == "a":
        rest = masks[0][..., ::stride, ::stride]
        gates = [masks[0], rest, rest][: len(convs)]
    elif block.layout == "b" and len(convs) == 3:
        gates = [masks[0], masks[1], masks[1]]
    else:
        gates = masks
    total = heads
    for i, (conv, gate) in enumerate(zip(convs, gates, strict=True)):
        total += convolve_by_hand(conv, gate)
        if isinstance(conv, DeformableConv2d):
            total += convolve_by_hand(conv.offset, gate)
        if i + 1 < len(convs) and isinstance(convs[i + 1], DeformableConv2d):
            total += fill_by_hand(gate, window, conv.out_channels)  # it may look anywhere
        elif i + 1 < len(convs):
            total += fill_by_hand(gate, window, conv.out_channels, convs[i + 1], gates[i + 1])
        else:
            total += fill_by_hand(gate, window, conv.out_channels)
    if block.downsample is not None:
        total += convolve_by_hand(block.downsample[0], torch.ones_like(gates[-1]))
    return total


def make_block(kind, stride, dilation, groups=1):
    if kind == "basic":
        down = nn.Sequential(conv1x1(3, 4, stride), nn.BatchNorm2d(4)) if stride > 1 else None
        return BasicBlock(4 if down is None else 3, 4, stride, down)
    inplanes = 8 if stride == 1 else 6
    down = nn.Sequential(conv1x1(inplanes, 8, stride), nn.BatchNorm2d(8)) if stride > 1 else None
    width = 64 if groups == 1 else 32
    block = Bottleneck(inplanes, 2, stride, down, groups, width, dilation)
    if kind == "deformable":
        return DeformableBlock(block, is_modulated=True)
    if kind == "deformable of its own input":
        block.conv2 = DeformableConv2d.from_conv(block.conv2)
    return block


def sample(block, layout, interpolation, bias=-0.5):
    def sampler(channels, *, stride):
        return Sampler(channels, stride=stride, grid_stride=4, bias=bias)

    sampled = SampledBlock(block, layout=layout, sampler=sampler, interpolation=interpolation)
    for index, (_, child) in enumerate(sampled.samplers_named()):
        child.layer = index
    return sampled.eval()


@pytest.mark.parametrize("layout", ["a", "b", "c"])
@pytest.mark.parametrize(
    ("kind", "stride", "dilation", "groups"),
    [
        ("basic", 1, 1, 1),
        ("basic", 2, 1, 1),
        ("bottleneck", 1, 1, 1),
        ("bottleneck", 2, 1, 1),
        ("bottleneck", 1, 2, 2),
        ("deformable", 2, 1, 1),
        ("deformable of its own input", 1, 1, 2),
    ],
)
def test_block_counts_what_a_loop_counts(kind, stride, dilation, groups, layout):
    block = sample(make_block(kind, stride, dilation, groups), layout, RBFInterpolation(window=3))
    x = torch.randn(2, block.conv1.in_channels, 7, 8)
    with sparsight.record_sampling(block) as record, torch.no_grad():
        block(x)
    masks = [decision.mask for decision in record.decisions]
    assert all(0 < mask.float().mean() < 1 for mask in masks)
    count = count_macs(block, x)
    assert count.total == block_by_hand(block, masks, 3)
    assert count.dense == count_macs(make_block(kind, stride, dilation, groups).eval(), x).total
    gated = sum(block.gated_macs(i, *mask.shape[2:]) for i, mask in enumerate(masks)) * 2
    down = sum(row.dense for row in count.layers if "downsample" in row.name)
    assert count.dense == gated + down


@pytest.mark.parametrize("bias", [30.0, -30.0])
def test_full_and_empty_masks(bias):
    """A full mask costs the source and the heads; an empty one the heads and the shortcut."""
    block = sample(make_block("bottleneck", 2, 1), "b", RBFInterpolation(), bias)
    for sampler in block.samplers:
        sampler.grid_stride = None
    x = torch.randn(1, 6, 6, 6)
    count = count_macs(block, x)
    heads = 9 * 6 * (36 + 9)
    shortcut = 9 * 6 * 8
    assert count.total == heads + (count.dense if bias > 0 else shortcut)
    densities = {row.name: row.density for row in count.layers if row.name.startswith("conv")}
    assert set(densities.values()) == {1.0 if bias > 0 else 0.0}


def test_zero_fill_costs_nothing():
    block = sample(make_block("basic", 1, 1), "b", ZeroFill())
    kinds = {row.kind for row in count_macs(block, torch.randn(1, 4, 6, 6)).layers}
    assert kinds == {"Conv2d", "Sampler"}


def test_sampled_convolution_with_its_own_and_with_a_shared_decision():
    """The decision is paid for once, by the sampler that took it."""
    x = torch.randn(2, 4, 6, 7)
    conv = nn.Conv2d(4, 5, 3, padding=1)
    fill = RBFInterpolation(window=5)
    own = SampledConv2d.from_conv(conv, sampler=Sampler(4, bias=0.0), interpolation=fill).eval()
    with torch.no_grad():
        mask = own.sampler(x).mask
    expected = convolve_by_hand(conv, mask) + fill_by_hand(mask, 5, 5)
    head = 9 * 4 * mask.numel()
    assert count_macs(own, x).total == expected + head
    assert count_macs(own, x).dense == count_macs(conv.eval(), x).total

    class Sharing(nn.Module):
        def __init__(self):
            super().__init__()
            self.sampler = Sampler(4, bias=0.0)
            self.first = SampledConv2d.from_conv(conv, sampler=None, interpolation=fill)
            self.second = SampledConv2d.from_conv(conv, sampler=None, interpolation=fill)

        def forward(self, x):
            decision = self.sampler(x)
            return self.first(x, decision) + self.second(x, decision=decision)

    count = count_macs(Sharing().eval(), x)
    assert count.total == 2 * expected + head
    assert count.dense == 2 * count_macs(conv.eval(), x).total


def test_a_layer_called_twice_is_one_row():
    conv = SampledConv2d.from_conv(
        nn.Conv2d(4, 4, 3, padding=1), sampler=Sampler(4, bias=0.0), interpolation=ZeroFill()
    )
    pair = nn.Sequential(conv, conv).eval()
    once, twice = (
        count_macs(conv.eval(), torch.zeros(1, 4, 6, 6)),
        count_macs(pair, torch.zeros(1, 4, 6, 6)),
    )
    assert twice.total == 2 * once.total
    assert [row.name for row in twice.layers] == ["0.sampler", "0"]
    # The sampler's logits do not depend on the features here: both calls draw the same mask.
    assert [row.density for row in twice.layers] == [row.density for row in once.layers]


def test_rows_add_up():
    row = LayerMacs("a", "Conv2d", 10, 4, 10, 4) + LayerMacs("a", "Conv2d", 30, 24, 30, 24)
    assert (row.dense, row.total, row.density) == (40, 28, 0.7)
    assert LayerMacs("a", "Linear", 5, 5).density == 1.0
    assert (join("", "a"), join("a", ""), join("a", "b")) == ("a", "a", "a.b")


@pytest.mark.parametrize("layout", ["a", "b", "c"])
def test_frozen_counts_what_converted_counts(layout):
    """Row by row: names, kinds, densities and multiply-adds, in one operator a block."""
    model = nn.Sequential(make_block("basic", 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, padding=1))
    model.append(make_block("bottleneck", 1, 2, groups=2))
    model.append(make_block("deformable", 1, 1))
    sampler = functools.partial(Sampler, bias=-0.5, grid_stride=4)
    model = sparsight.sparsify(model, layout=layout, sampler=sampler).eval()
    x = torch.randn(2, 3, 13, 16)
    with torch.no_grad():
        frozen = freeze(model, example=x)
        converted, packed = count_macs(model, x), count_macs(frozen, x)
    assert set(packed.layers) == set(converted.layers)
    assert (packed.total, packed.dense) == (converted.total, converted.dense)


@pytest.mark.parametrize("layout", ["a", "b", "c"])
def test_a_layer_that_runs_dense_counts_its_source(layout):
    """The dense network's multiply-adds, without heads and interpolation; other layers as ever."""
    source = nn.Sequential(make_block("basic", 2, 1), nn.Conv2d(4, 8, 3, padding=1))
    source.append(make_block("bottleneck", 1, 2, groups=2))
    x = torch.randn(2, 3, 13, 16)
    expected = count_macs(source.eval(), x)
    sampler = functools.partial(Sampler, bias=-0.5, grid_stride=4)
    model = sparsight.sparsify(source, layout=layout, sampler=sampler).eval()
    dense = count_macs(freeze(model, example=x, choose=lambda name, layer: "dense"), x)
    assert (dense.total, dense.dense, dense.ratio) == (expected.total, expected.total, 1.0)
    rows = {(row.name, row.total) for row in expected.layers}
    assert {(row.name, row.total) for row in dense.layers} == rows
    assert all(row.density == 1.0 for row in dense.layers)
    mixed = count_macs(freeze(model, example=x, choose={"2": "dense"}), x)
    first = {row for row in count_macs(model, x).layers if row.name.startswith("0.")}
    assert {row for row in mixed.layers if row.name.startswith("0.")} == first
    assert {row for row in dense.layers if row.name.startswith("2.")} < set(mixed.layers)


def test_frozen_convolution_counts_what_its_source_counts():
    model = nn.Sequential(nn.Conv2d(4, 5, 3, padding=1), nn.ReLU())
    sampler = functools.partial(Sampler, bias=-0.5)
    model = sparsight.sparsify(model, where=lambda name, _: name == "0", sampler=sampler).eval()
    x = torch.randn(1, 4, 9, 8)
    converted, packed = count_macs(model, x), count_macs(freeze(model, example=x), x)
    assert set(packed.layers) == set(converted.layers)
