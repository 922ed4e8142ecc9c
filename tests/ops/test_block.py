"""sampled_block: a packed block in one call equals the block computed densely and masked."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import deform_conv2d

from sparsight.nn import (
    AveragePoolInterpolation,
    DeformableBlock,
    DeformableConv2d,
    RBFInterpolation,
    SampledBlock,
    Sampler,
    SamplingDecision,
    ZeroFill,
)
from sparsight.ops import cpu
from sparsight.ops.block import (
    MaskSpec,
    OffsetSpec,
    StageShape,
    StageSpec,
    block_sizes,
    pack_block,
    sampled_block,
)

# Widths beside lane edges; "lanes" and "panels" are the two ways that pack.h packs groups.
KINDS = {
    "basic": (BasicBlock, 17, {"in_channels": 17}),
    "basic strided": (BasicBlock, 20, {"stride": 2}),
    "bottleneck": (Bottleneck, 10, {"in_channels": 40}),
    "bottleneck strided": (Bottleneck, 9, {"stride": 2}),
    "bottleneck dilated": (Bottleneck, 8, {"dilation": 2}),
    "grouped in lanes": (Bottleneck, 8, {"groups": 4}),
    "grouped in panels": (Bottleneck, 7, {"groups": 3, "stride": 2}),
    "deformable": (Bottleneck, 9, {"deform": {}}),
    "deformable v2 strided": (
        Bottleneck,
        8,
        {"deform": {"is_modulated": True, "offset_groups": 4}, "stride": 2, "groups": 2},
    ),
    "deformable of its own input": (Bottleneck, 10, {"deform": {"guided": False}, "dilation": 2}),
    "deformable basic": (BasicBlock, 17, {"deform": {"is_modulated": True}, "in_channels": 17}),
}
DEFORMABLE = [kind for kind in KINDS if kind.startswith("deformable")]
DENSITIES = (0.0, "one", 0.1, 0.5, 1.0)


class GivenMask(nn.Module):
    """A sampler that decides what it was told."""

    mask: Tensor

    def forward(self, x: Tensor) -> SamplingDecision:
        return SamplingDecision(self.mask, self.mask.float(), None)


class Packed:
    """A SampledBlock without norms, and the same written down for the operator."""

    def __init__(
        self,
        block: SampledBlock,
        *,
        with_heads: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.block, self.dtype = block, dtype
        parts = block.convolutions()
        masks, self.stages = [], []
        self.parents: list[tuple[int, int, int]] = []
        for sampler, fill in zip(block.samplers, block.interpolations, strict=True):
            head = sampler.head if with_heads else None
            masks.append(
                MaskSpec(
                    head_weight=None if head is None else head.weight,
                    head_bias=None if head is None else head.bias,
                    stride=(1, 1) if head is None else head.stride,
                    grid_stride=(sampler.grid_stride or 0) if with_heads else 0,
                    parent=-1,
                    log_kernel=None if isinstance(fill, ZeroFill) else fill.log_kernel(),
                    eps=getattr(fill, "eps", None),
                )
            )
        for (_, conv, _, decision), stride in zip(parts, block.mask_strides(), strict=True):
            mask = decision
            if stride != (1, 1):
                if (decision, *stride) not in self.parents:
                    self.parents.append((decision, *stride))
                    source = masks[decision]
                    masks.append(
                        MaskSpec(None, None, stride, 0, decision, source.log_kernel, source.eps)
                    )
                mask = len(block.samplers) + self.parents.index((decision, *stride))
            self.stages.append(
                StageSpec(
                    weight=conv.weight,
                    bias=conv.bias,
                    mask=mask,
                    relu=len(self.stages) + 1 < len(parts),
                    stride=conv.stride,
                    padding=conv.padding,
                    dilation=conv.dilation,
                    groups=conv.groups,
                    offset=offset_of(conv),
                )
            )
        self.num_masks = len(masks)
        self.masks = masks
        self.params, self.spec = pack_block(masks, self.stages, relu=True, dtype=dtype)

    def sizes(self, x: Tensor) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Of the stages and of the masks."""
        stages = block_sizes([shape_of(stage) for stage in self.stages], tuple(x.shape[2:]))
        first = [[s.mask for s in self.stages].index(m) for m in range(self.num_masks)]
        return stages, [stages[i] for i in first]

    def arguments(
        self, x: Tensor, given: Sequence[Tensor | None], noise=None, output_dtype=torch.float32
    ) -> tuple:
        """What the operator takes for these masks."""
        stages, masks = self.sizes(x)
        derived = [None] * (self.num_masks - len(given))
        shortcut = x if self.block.downsample is None else self.block.downsample(x)
        return (
            x.to(self.dtype),
            shortcut.detach().to(self.dtype),
            [*(noise or [None] * len(given)), *derived],
            [*given, *derived],
            self.params,
            self.spec,
            [x.shape[0], self.stages[-1].weight.shape[0], *stages[-1]],
            sum(h * w for h, w in masks),
            output_dtype,
        )

    def truth(self, x: Tensor, given: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """SampledBlock's own forward in eval mode."""
        block = copy.deepcopy(self.block).to(dtype).eval()
        for sampler, mask in zip(block.samplers, given, strict=True):
            sampler.mask = mask
        with torch.no_grad():
            return block(x.to(dtype))


def offset_of(conv: nn.Conv2d) -> OffsetSpec | None:
    if not isinstance(conv, DeformableConv2d):
        return None
    offset = conv.offset
    return OffsetSpec(
        weight=offset.weight,
        bias=offset.bias,
        groups=conv.offset_groups,
        is_modulated=conv.is_modulated,
        is_guided=conv.is_guided,
    )


def deformed(block, guided=True, **options):
    """The block with a conv2 whose taps move by a pixel or two."""
    if guided:
        block = DeformableBlock(block, **options)
    else:
        block.conv2 = DeformableConv2d.from_conv(block.conv2, **options)
    offset = block.conv2.offset
    nn.init.normal_(offset.weight, std=offset.weight[0].numel() ** -0.5)
    nn.init.normal_(offset.bias)
    return block


def shape_of(stage: StageSpec) -> StageShape:
    return StageShape(
        in_channels=stage.weight.shape[1] * stage.groups,
        out_channels=stage.weight.shape[0],
        groups=stage.groups,
        kernel_size=(stage.weight.shape[2], stage.weight.shape[3]),
        stride=stage.stride,
        padding=stage.padding,
        dilation=stage.dilation,
        mask=stage.mask,
    )


def make(kind, layout, fill=lambda: RBFInterpolation(width=0.7), sampler=None, seed=0) -> Packed:
    torch.manual_seed(seed)
    cls, planes, options = KINDS[kind]
    options = {"stride": 1, **options}
    in_channels, stride = options.pop("in_channels", 12), options.pop("stride")
    deform = options.pop("deform", None)
    shortcut = None
    if stride != 1 or in_channels != planes * cls.expansion:
        shortcut = nn.Conv2d(in_channels, planes * cls.expansion, 1, stride)
    block = cls(
        in_channels,
        planes,
        stride,
        shortcut,
        base_width=64,
        norm_layer=lambda channels: nn.Identity(),
        **options,
    )
    for module in block.modules():
        if isinstance(module, nn.Conv2d) and module.bias is None:
            module.bias = nn.Parameter(torch.randn(module.out_channels))
    if deform is not None:
        block = deformed(block, **deform)
    made = SampledBlock(
        block.eval(),
        layout=layout,
        sampler=sampler or (lambda in_channels, *, stride: GivenMask()),
        interpolation=fill,
    )
    return Packed(made, with_heads=sampler is not None)


def features(packed: Packed, draw, size=(9, 7), batch=2) -> Tensor:
    return draw.normal(batch, packed.block.conv1.in_channels, *size)


def given_masks(packed: Packed, x: Tensor, draw, density) -> list[Tensor]:
    _, sizes = packed.sizes(x)
    count = len(packed.block.samplers)
    return [draw.mask(x.shape[0], *size, density) for size in sizes[:count]]


def all_masks(packed: Packed, given: Sequence[Tensor]) -> Tensor:
    """Those given and those derived, as the operator returns them."""
    derived = [given[i][..., ::down, ::right] for i, down, right in packed.parents]
    return torch.cat([mask.flatten(1) for mask in [*given, *derived]], dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["a", "b", "c"])
def test_equals_the_masked_dense_block(
    kind, layout, isa, draw, layouts, is_intact, assert_within_bound
):
    packed = make(kind, layout)
    for seed, density in enumerate(DENSITIES):
        d = draw(seed)
        x = features(packed, d)
        given = given_masks(packed, x, d, density)
        truth = packed.truth(x, given, torch.float64)
        twin = packed.truth(x, given, torch.float32)
        out = layouts["guarded"](torch.full_like(twin, torch.nan))
        x_, shortcut, *rest = packed.arguments(x, given)
        placed = layouts["guarded"](x_), layouts["sliced"](shortcut)
        made, masks, _ = cpu.sampled_block(*placed, *rest, isa=isa, num_threads=1, out=out)
        assert made is out
        assert is_intact(out)
        assert torch.equal(masks, all_masks(packed, given))
        note = f"{kind}, layout {layout}, density {density}"
        assert_within_bound("sampled_block", out, truth, twin, truth.abs().max(), note)


@pytest.mark.parametrize(
    "fill",
    [
        lambda: RBFInterpolation(),
        lambda: RBFInterpolation(width=0.5, window=9),
        lambda: RBFInterpolation(width=0.7, eps=1e-2),
        lambda: AveragePoolInterpolation(window=3),
        ZeroFill,
    ],
)
def test_equals_the_masked_dense_block_with_every_kind_of_fill(
    fill, isa, draw, assert_within_bound
):
    packed = make("bottleneck", "c", fill)
    for seed, density in enumerate(DENSITIES):
        d = draw(seed)
        x = features(packed, d, size=(12, 17))
        given = given_masks(packed, x, d, density)
        truth = packed.truth(x, given, torch.float64)
        twin = packed.truth(x, given, torch.float32)
        out, _, _ = cpu.sampled_block(*packed.arguments(x, given), isa=isa, num_threads=1)
        assert_within_bound("sampled_block", out, truth, twin, truth.abs().max(), density)


@pytest.mark.parametrize("kind", KINDS)
def test_stages_without_masks_are_computed_everywhere(kind, isa, draw, layouts, is_intact):
    """Shortcut and last activation included: bit for bit the block with its masks all true."""
    packed = make(kind, "b")
    x = features(packed, draw(0))
    given = given_masks(packed, x, draw(0), 1.0)
    arguments = packed.arguments(x, given)
    expected, _, _ = cpu.sampled_block(*arguments, isa=isa, num_threads=1)
    x_, shortcut, _, _, _, _, shape, _, _ = arguments
    params, spec = pack_block([], [replace(s, mask=-1) for s in packed.stages], relu=True)
    out = layouts["guarded"](torch.full_like(expected, torch.nan))
    _, masks, logits = cpu.sampled_block(
        x_, shortcut, [], [], params, spec, shape, 0, isa=isa, num_threads=1, out=out
    )
    assert is_intact(out)
    assert torch.equal(out, expected)
    assert masks.numel() == logits.numel() == 0


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (3, 40)])
def test_sizes_down_to_one_pixel(size, isa, draw, assert_within_bound):
    packed = make("grouped in panels", "a")
    d = draw(0)
    x = features(packed, d, size, batch=3)
    given = given_masks(packed, x, d, 0.5)
    truth, twin = (packed.truth(x, given, dtype) for dtype in (torch.float64, torch.float32))
    out, _, _ = cpu.sampled_block(*packed.arguments(x, given), isa=isa, num_threads=1)
    assert_within_bound("sampled_block", out, truth, twin, truth.abs().max(), size)


def test_the_bound_sees_one_lost_site(draw, assert_within_bound):
    packed = make("bottleneck", "b")
    x = features(packed, draw(0))
    given = given_masks(packed, x, draw(1), 0.5)
    truth, twin = (packed.truth(x, given, dtype) for dtype in (torch.float64, torch.float32))
    site = given[1].flatten().nonzero()[3]
    given[1].view(-1)[site] = False
    out, _, _ = sampled_block_of(packed, x, given)
    with pytest.raises(AssertionError, match="over its bound"):
        assert_within_bound("sampled_block", out, truth, twin, truth.abs().max())


def sampled_block_of(packed: Packed, x: Tensor, given, noise=None):
    *tensors, shape, positions, _ = packed.arguments(x, given, noise)
    return sampled_block(*tensors, output_shape=shape, mask_positions=positions)


@pytest.mark.parametrize("kind", ["basic", "bottleneck strided", "grouped in lanes", *DEFORMABLE])
@pytest.mark.parametrize("layout", ["a", "c"])
def test_one_thread_equals_n_threads_bit_for_bit(kind, layout, isa, draw):
    packed = make(kind, layout)
    for seed, density in enumerate(DENSITIES):
        d = draw(seed)
        x = features(packed, d, size=(31, 18))
        arguments = packed.arguments(x, given_masks(packed, x, d, density))
        results = [cpu.sampled_block(*arguments, isa=isa, num_threads=n)[0] for n in (1, 2, 3)]
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("kind", DEFORMABLE)
def test_a_deformable_block_reads_no_input_that_nobody_asks_for(kind, isa, draw):
    """Whatever the offsets are: conv1 reads its sites, the offsets their windows, holes are filled.

    The second call runs in memory that the first one left NaN in.
    """
    packed = make(kind, "b")
    size = (13, 24)
    x = features(packed, draw(3), size)
    given = given_masks(packed, x, draw(4), 0.5)
    for mask in given:
        mask[..., mask.shape[3] // 2 :] = False  # nothing is asked for in the right half
    poisoned = x.clone()
    poisoned[..., size[1] // 2 + 6 :] = torch.nan
    everywhere = [torch.ones_like(mask) for mask in given]
    expected, _, _ = cpu.sampled_block(*packed.arguments(x, given), isa=isa, num_threads=1)
    nan = torch.full_like(x, torch.nan)
    cpu.sampled_block(*packed.arguments(nan, everywhere), isa=isa, num_threads=1)
    _, *rest = packed.arguments(x, given)
    out, _, _ = cpu.sampled_block(poisoned, *rest, isa=isa, num_threads=1)
    assert torch.equal(out, expected)
    assert out.isfinite().all()


@pytest.mark.parametrize("is_modulated", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("density", [0.0, "one", 0.9, 1.0])
def test_one_deformable_stage_equals_torchvision_at_the_sites(
    density, groups, is_modulated, isa, draw, assert_within_bound
):
    """Its offsets are rows of sites, not of positions; three blocks of sites are mixed in turn."""
    d = draw(0)
    channels, size = 64, (41, 31)
    x, weight = d.normal(2, channels, *size), d.normal(5 * groups, channels // groups, 3, 3)
    bias = d.normal(5 * groups)
    columns = (3 if is_modulated else 2) * 2 * 9
    moving = OffsetSpec(
        d.normal(columns, channels, 3, 3) / 24, d.normal(columns), 2, is_modulated, False
    )
    numbers = {"stride": (1, 1), "padding": (2, 1), "dilation": (2, 1)}
    stage = StageSpec(weight, bias, 0, False, groups=groups, offset=moving, **numbers)
    packed = pack_block([MaskSpec(None, None, (1, 1), 0, -1, None, None)], [stage], relu=False)
    given = d.mask(2, *size, density)

    def by_torchvision(dtype):
        made = F.conv2d(x.to(dtype), moving.weight.to(dtype), moving.bias.to(dtype), **numbers)
        factors = made[:, 36:].sigmoid() if is_modulated else None
        return deform_conv2d(
            x.to(dtype), made[:, :36], weight.to(dtype), bias.to(dtype), mask=factors, **numbers
        )

    truth, twin = (
        torch.where(given, by_torchvision(dtype), 0.0) for dtype in (torch.float64, torch.float32)
    )
    shape = [2, 5 * groups, *size]
    arguments = (x, None, [None], [given], *packed, shape, size[0] * size[1])
    out = torch.full_like(twin, torch.nan).contiguous(memory_format=torch.channels_last)
    cpu.sampled_block(*arguments, isa=isa, num_threads=1, out=out)
    assert_within_bound("sampled_block", out, truth, twin, truth.abs().max(), density)


def single(weight: Tensor, bias: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
    """One convolution, computed everywhere, nothing after it."""
    kernel = weight.shape[2], weight.shape[3]
    padding = kernel[0] // 2, kernel[1] // 2
    stage = StageSpec(weight, bias, 0, False, padding=padding, groups=groups)
    return pack_block([MaskSpec(None, None, (1, 1), 0, -1, None, None)], [stage], relu=False)


def run_single(packed, x, out_channels, isa):
    height, width = x.shape[2:]
    given = torch.ones(1, 1, height, width, dtype=torch.bool)
    shape = [1, out_channels, height, width]
    arguments = (x, None, [None], [given], *packed, shape, height * width)
    return cpu.sampled_block(*arguments, isa=isa, num_threads=1)[0]


@pytest.mark.parametrize("out_channels", [1, 15, 16, 31, 32, 33, 70])
@pytest.mark.parametrize("in_channels", [1, 16, 33])
def test_one_hot_features_read_the_packed_weight_back(in_channels, out_channels, isa, draw):
    weight, bias = draw(0).normal(out_channels, in_channels, 1, 1), draw(1).normal(out_channels)
    # Position p holds channel p alone: the output there is column p of the weight.
    x = torch.eye(in_channels).view(1, in_channels, 1, in_channels)
    out = run_single(single(weight, bias), x, out_channels, isa)
    assert torch.equal(out[0, :, 0, :], weight[:, :, 0, 0] + bias[:, None])


@pytest.mark.parametrize(
    ("groups", "in_per_group", "out_per_group"),
    [(4, 4, 4), (6, 8, 8), (20, 1, 1), (2, 16, 16), (3, 5, 5), (4, 4, 8), (2, 33, 40), (7, 1, 3)],
)
def test_grouped_weights_are_read_back_too(groups, in_per_group, out_per_group, isa, draw):
    in_channels, out_channels = groups * in_per_group, groups * out_per_group
    weight, bias = draw(0).normal(out_channels, in_per_group, 1, 1), torch.zeros(out_channels)
    x = torch.eye(in_channels).view(1, in_channels, 1, in_channels)
    out = run_single(single(weight, bias, groups), x, out_channels, isa)
    dense = torch.block_diag(*weight[:, :, 0, 0].split(out_per_group))
    assert torch.equal(out[0, :, 0, :], dense)


def test_an_impulse_reads_the_taps_back(isa, draw):
    weight, bias = draw(0).normal(33, 2, 3, 5), torch.zeros(33)
    for channel in range(2):
        x = torch.zeros(1, 2, 3, 5)
        x[0, channel, 1, 2] = 1.0
        out = run_single(single(weight, bias), x, 33, isa)
        assert torch.equal(out[0], weight[:, channel].flip(1, 2))


def test_a_derived_mask_takes_every_second_position_of_its_parent(isa, draw):
    packed = make("bottleneck strided", "a")
    assert packed.parents == [(0, 2, 2)]
    for size in ((9, 7), (8, 10), (1, 2)):
        x = features(packed, draw(0), size)
        given = given_masks(packed, x, draw(1), 0.5)
        _, masks, _ = cpu.sampled_block(*packed.arguments(x, given), isa=isa, num_threads=1)
        parent, derived = masks.split([size[0] * size[1], given[0][..., ::2, ::2][0].numel()], 1)
        assert torch.equal(parent, given[0].flatten(1))
        assert torch.equal(derived, given[0][..., ::2, ::2].flatten(1))


def heads(noise="white", **settings):
    """Samplers with a random head, so that logits differ from place to place."""

    def build(in_channels, *, stride):
        sampler = Sampler(in_channels, stride=stride, noise=noise, bias=0.3, **settings).eval()
        nn.init.normal_(sampler.head.weight, std=0.2)
        return sampler

    return build


@pytest.mark.parametrize("kind", ["basic strided", "bottleneck", "bottleneck strided"])
@pytest.mark.parametrize("layout", ["a", "b", "c"])
@pytest.mark.parametrize("grid_stride", [None, 3])
def test_logits_equal_the_heads_and_masks_the_sign_with_noise_and_grid(
    kind, layout, grid_stride, isa, draw
):
    packed = make(kind, layout, sampler=heads(grid_stride=grid_stride))
    x = features(packed, draw(2), (11, 6), batch=3)
    samplers = packed.block.samplers
    _, sizes = packed.sizes(x)
    noise = [draw(3).normal(3, 1, *size) for size in sizes[: len(samplers)]]
    arguments = packed.arguments(x, [None] * len(samplers), noise)
    _, masks, logits = cpu.sampled_block(*arguments, isa=isa, num_threads=2)
    at = 0
    for sampler, n in zip(samplers, noise, strict=True):
        end = at + n[0].numel()
        made, mask = logits[:, at:end].view(n.shape), masks[:, at:end].view(n.shape)
        head = sampler.head
        expected = F.conv2d(x.double(), head.weight.double(), head.bias.double(), head.stride, 1)
        torch.testing.assert_close(made.double(), expected, atol=1e-5, rtol=1e-5)
        chosen = made + n >= 0
        if grid_stride is not None:
            chosen[..., ::grid_stride, ::grid_stride] = True
        assert torch.equal(mask, chosen)
        at = end


def test_a_given_mask_replaces_the_decision_of_a_head(isa, draw):
    packed = make("bottleneck", "b", sampler=heads())
    x = features(packed, draw(4))
    given = [draw(5).mask(2, 9, 7, 0.4), None]
    noise = [None, torch.zeros(2, 1, 9, 7)]
    arguments = packed.arguments(x, given, noise)
    _, masks, logits = cpu.sampled_block(*arguments, isa=isa, num_threads=1)
    assert torch.equal(masks[:, :63], given[0].flatten(1))
    assert torch.equal(masks[:, 63:], (logits[:, 63:] >= 0) | grid_positions(9, 7, 11))


def grid_positions(height: int, width: int, stride: int) -> Tensor:
    grid = torch.zeros(height, width, dtype=torch.bool)
    grid[::stride, ::stride] = True
    return grid.flatten()


@pytest.mark.parametrize("layout", ["a", "b"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_features_that_make_a_logit_nan_are_refused_with_the_image(layout, bad, isa, draw):
    packed = make("bottleneck strided", layout, sampler=heads(noise="none"))
    x = features(packed, draw(6), batch=3)
    x[1, :2, 4, 3] = torch.tensor([bad, -bad])
    # Infinities of both signs meet in a logit only where its two weights agree in sign.
    for sampler in packed.block.samplers:
        with torch.no_grad():
            sampler.head.weight[:, 0] = sampler.head.weight[:, 1]
    packed = Packed(packed.block, with_heads=True)
    _, sizes = packed.sizes(x)
    noise = [torch.zeros(3, 1, *size) for size in sizes[: len(packed.block.samplers)]]
    arguments = packed.arguments(x, [None] * len(noise), noise)
    with pytest.raises(ValueError, match=r"logits of image 1 hold NaN.*look for the first layer"):
        cpu.sampled_block(*arguments, isa=isa, num_threads=2)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("layout", ["b", "c"])
@pytest.mark.parametrize("kind", ["bottleneck", "deformable"])
def test_passes_opcheck(kind, layout, draw):
    """With a head for every mask: the logits of the others are undefined and differ by call."""
    packed = make(kind, layout, sampler=heads())
    x = features(packed, draw(7))
    noise = [draw(8).normal(2, 1, 9, 7) for _ in packed.block.samplers]
    arguments = packed.arguments(x, [None] * len(noise), noise)
    torch.library.opcheck(torch.ops.sparsight.sampled_block.default, arguments)


def test_the_public_function_is_the_operator(draw):
    packed = make("grouped in lanes", "c")
    x = features(packed, draw(9))
    given = given_masks(packed, x, draw(10), 0.5)
    out, masks, _ = sampled_block_of(packed, x, given)
    expected, expected_masks, _ = cpu.sampled_block(*packed.arguments(x, given))
    assert torch.equal(out, expected)
    assert torch.equal(masks, expected_masks)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_sizes_and_costs_are_those_of_the_convolutions():
    conv = nn.Conv2d(12, 18, (3, 1), stride=(2, 1), padding=(2, 0), dilation=(2, 1), groups=3)
    shape = StageShape(12, 18, 3, (3, 1), (2, 1), (2, 0), (2, 1), 0)
    assert shape.macs_per_position == conv.weight.numel()
    again = StageShape(18, 4, 1, (2, 2), (1, 1), (0, 0), (1, 1), 0)
    sizes = block_sizes([shape, again], (11, 6))
    first = conv(torch.zeros(1, 12, 11, 6))
    second = nn.Conv2d(18, 4, 2)(first)
    moving = replace(shape, offset=replace(shape, out_channels=27, groups=1))
    assert moving.macs_per_position == conv.weight.numel() + 27 * 12 * 3
    assert sizes == [tuple(first.shape[2:]), tuple(second.shape[2:])]


def test_an_unknown_isa_is_refused(draw):
    packed = make("basic", "b")
    x = features(packed, draw(0))
    arguments = packed.arguments(x, given_masks(packed, x, draw(1), 0.5))
    with pytest.raises((ValueError, RuntimeError), match="sse9"):
        cpu.sampled_block(*arguments, isa="sse9")
    with pytest.raises(ValueError, match="num_threads is 0"):
        cpu.sampled_block(*arguments, num_threads=0)
