"""SampledBlock: equal to its source where everything is sampled, to its definition elsewhere."""

import collections
import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1
from torchvision.ops import deform_conv2d
from torchvision.ops.misc import FrozenBatchNorm2d

from sparsight.nn import (
    AveragePoolInterpolation,
    ConvInterpolation,
    DeformableBlock,
    DeformableConv2d,
    NearestInterpolation,
    RBFInterpolation,
    SampledBlock,
    Sampler,
    ZeroFill,
    record_sampling,
)
from sparsight.nn.sampler import join_heads

KINDS = {
    "basic": (BasicBlock, {}),
    "basic strided": (BasicBlock, {"stride": 2}),
    "bottleneck": (Bottleneck, {}),
    "bottleneck strided": (Bottleneck, {"stride": 2}),
    "bottleneck dilated": (Bottleneck, {"dilation": 4}),
    "resnext": (Bottleneck, {"groups": 4, "base_width": 32, "stride": 2}),
    "frozen norm": (Bottleneck, {"norm_layer": FrozenBatchNorm2d}),
    "bottleneck strided at conv1": (Bottleneck, {"caffe": True, "stride": 2}),
    "deformable": (Bottleneck, {"deform": {}}),
    "deformable v2 strided": (
        Bottleneck,
        {"deform": {"is_modulated": True, "offset_groups": 2}, "stride": 2, "groups": 4},
    ),
    "deformable of its own input": (Bottleneck, {"deform": {"guided": False}, "dilation": 2}),
    "deformable basic": (BasicBlock, {"deform": {"is_modulated": True}}),
}
LAYOUTS = ["a", "b", "c"]
FILLS = [
    RBFInterpolation,
    lambda: RBFInterpolation(eps=1e-5),
    ConvInterpolation,
    AveragePoolInterpolation,
    NearestInterpolation,
    ZeroFill,
]


def make_block(kind, seed=0):
    torch.manual_seed(seed)
    cls, options = KINDS[kind]
    options = dict(options)
    caffe = options.pop("caffe", False)
    deform = options.pop("deform", None)
    norm = options.get("norm_layer", nn.BatchNorm2d)
    planes, in_channels = 8, 12
    shortcut = nn.Sequential(
        conv1x1(in_channels, planes * cls.expansion, options.get("stride", 1)),
        norm(planes * cls.expansion),
    )
    block = cls(in_channels, planes, downsample=shortcut, **options)
    if caffe:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    if deform is not None:
        block = deformed(block, **deform)
    return block.eval()


def deformed(block, guided=True, **options):
    """The block with a conv2 whose taps move by a pixel or two."""
    if guided:
        block = DeformableBlock(block, **options)
    else:
        block.conv2 = DeformableConv2d.from_conv(block.conv2, **options)
    nn.init.normal_(block.conv2.offset.weight, std=0.2)
    nn.init.normal_(block.conv2.offset.bias)
    return block


def convolve2(block, h, x):
    """conv2 of a block, by torchvision where its taps move."""
    conv = block.conv2
    if not isinstance(conv, DeformableConv2d):
        return conv(h)
    made = conv.offset(x if isinstance(block, DeformableBlock) else h)
    numbers = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
    moves = 2 * conv.offset_groups * 9
    factors = made[:, moves:].sigmoid() if conv.is_modulated else None
    return deform_conv2d(h, made[:, :moves], conv.weight, conv.bias, mask=factors, **numbers)


def assert_close(actual, expected):
    """Float rounding: interpolation hands channels-last maps on, so that convolutions differ."""
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def convert(block, layout="b", fill=RBFInterpolation, **options):
    counter = itertools.count()

    def sampler(in_channels, *, stride):
        made = Sampler(in_channels, stride=stride, **options)
        made.layer = next(counter)
        return made

    return SampledBlock(copy.deepcopy(block), layout=layout, sampler=sampler, interpolation=fill)


def definition(block, sampled, x, masks):
    """The layouts as the paper draws them, every fill in place, from the source block."""
    layout, fills = sampled.layout, list(sampled.interpolations)

    def fill(i, features):
        mask = masks[i]
        step = -(-mask.shape[2] // features.shape[2])
        return fills[i](features, mask[..., ::step, ::step])

    shortcut = block.downsample(x)
    if not hasattr(block, "conv3"):
        first, second = (0, 0) if layout == "a" else (0, 1)
        h = fill(first, F.relu(block.bn1(block.conv1(x))))
        return F.relu(fill(second, block.bn2(convolve2(block, h, x))) + shortcut)
    ids = {"a": (0, 0, 0), "b": (0, 1, 1), "c": (0, 1, 2)}[layout]
    h = fill(ids[0], F.relu(block.bn1(block.conv1(x))))
    h = F.relu(block.bn2(convolve2(block, h, x)))
    if ids[1] != ids[2]:
        h = fill(ids[1], h)
    return F.relu(fill(ids[2], block.bn3(block.conv3(h))) + shortcut)


# In training no small ones: batch norm over a handful of values amplifies rounding.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("size", "training"),
    [((1, 1), False), ((2, 3), False), ((13, 18), False), ((5, 6), True), ((13, 18), True)],
)
def test_full_mask_equals_the_source(kind, layout, size, training):
    block = make_block(kind).train(training)
    sampled = convert(block, layout, bias=-1e4, grid_stride=1)
    x = torch.randn(3, 12, *size)
    assert_close(sampled(x), block(x))


# All kinds in all layouts, and every pair of a kind or a layout with a fill.
BLOCKS = [
    (kind, layout, fill)
    for k, kind in enumerate(KINDS)
    for i, layout in enumerate(LAYOUTS)
    for f, fill in enumerate(FILLS)
    if f == 0 or (k + i + f) % len(LAYOUTS) == 0
]


@pytest.mark.parametrize(("kind", "layout", "fill"), BLOCKS)
def test_block_equals_its_definition_for_any_mask(kind, layout, fill):
    block = make_block(kind)
    for bias, size in itertools.product((-1e4, -3.0, 0.0), ((13, 18), (3, 2))):
        sampled = convert(block, layout, fill, bias=bias, grid_stride=None)
        x = torch.randn(2, 12, *size)
        masks = [sampler(x).mask for sampler in sampled.samplers]
        expected = definition(block, sampled, x, masks)
        assert_close(sampled(x), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_path_with_the_hard_mask_is_the_inference_path(kind, layout):
    """Straight-through in training mode with inference's noise: the same numbers."""
    block = make_block(kind)
    sampled = convert(block, layout, bias=0.0, noise="none", straight_through=True)
    for sampler in sampled.samplers:
        nn.init.normal_(sampler.head.weight)
    x = torch.randn(2, 12, 13, 18)
    expected = sampled(x)
    sampled.samplers.train()
    assert torch.allclose(sampled(x), expected, atol=1e-5)
    assert not torch.allclose(block(x), expected, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_soft_masks_equal_the_definition(kind, layout):
    block = make_block(kind)
    sampled = convert(block, layout, bias=-4.0)
    sampled.samplers.train()
    for sampler in sampled.samplers:
        sampler.temperature = 0.03  # relaxed values underflow to 0: some holes see nothing
    x = torch.randn(2, 12, 13, 18)
    torch.manual_seed(3)
    masks = [sampler(x).relaxed for sampler in sampled.samplers]
    torch.manual_seed(3)
    expected = definition(block, sampled, x, masks)
    assert_close(sampled(x), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_mask_leaves_the_shortcut(kind, layout):
    block = make_block(kind)
    sampled = convert(block, layout, bias=-1e4, grid_stride=None)
    x = torch.randn(3, 12, 9, 10)
    assert torch.equal(sampled(x), F.relu(block.downsample(x)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_single_site(layout):
    """A grid wider than the map: position (0, 0) alone."""
    block = make_block("bottleneck")
    sampled = convert(block, layout, bias=-1e4, grid_stride=100)
    x = torch.randn(1, 12, 12, 12)
    out = sampled(x)
    only_shortcut = F.relu(block.downsample(x))
    assert torch.equal(out[..., 4:, :], only_shortcut[..., 4:, :])
    assert not torch.equal(out[..., :4, :4], only_shortcut[..., :4, :4])


def test_one_thread_equals_two_bit_for_bit():
    sampled = convert(make_block("resnext"), bias=0.0)
    x = torch.randn(2, 12, 33, 47)
    threads = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            results.append([sampler(x).mask for sampler in sampled.samplers])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gated_macs_sum_to_those_of_the_residual_branch(kind, layout):
    block = make_block(kind)
    sampled = convert(block, layout)
    x = torch.randn(1, 12, 13, 18)
    counted = {}
    handles = []
    for name, module in block.named_modules():
        if isinstance(module, nn.Conv2d) and "downsample" not in name:

            def hook(module, args, out, name=name):
                counted[name] = out[0, 0].numel() * module.weight.numel()

            handles.append(module.register_forward_hook(hook))
    block(x)
    if "conv2.offset" in counted:  # at the sites of the convolution that it moves
        counted["conv2"] += counted.pop("conv2.offset")
    sizes = [sampler(x).mask.shape[-2:] for sampler in sampled.samplers]
    gated = [sampled.gated_macs(i, *size) for i, size in enumerate(sizes)]
    assert sum(gated) == sum(counted.values())
    for i, total in enumerate(gated):
        names = [name for name, _, _, decision in sampled.convolutions() if decision == i]
        assert total == sum(counted[name] for name in names)
    with pytest.raises(IndexError, match=r"decisions here; pass 0 to"):
        sampled.gated_macs(len(gated), 1, 1)


@pytest.mark.parametrize(
    ("kind", "layout", "strides"),
    [
        ("bottleneck strided", "a", [(1, 1), (2, 2), (2, 2)]),
        ("bottleneck strided", "b", [(1, 1), (1, 1), (1, 1)]),
        ("bottleneck strided at conv1", "a", [(1, 1), (1, 1), (1, 1)]),
        ("basic strided", "a", [(1, 1), (1, 1)]),
    ],
)
def test_mask_strides(kind, layout, strides):
    assert convert(make_block(kind), layout).mask_strides() == strides


@pytest.mark.parametrize("kind", KINDS)
def test_state_of_the_source_loads(kind):
    block = make_block(kind)
    sampled = convert(make_block(kind, seed=1), bias=-1e4, grid_stride=1)
    keys = sampled.load_state_dict(block.state_dict(), strict=False)
    assert keys.unexpected_keys == []
    assert all(k.startswith(("samplers.", "interpolations.")) for k in keys.missing_keys)
    x = torch.randn(1, 12, 9, 9)
    assert_close(sampled(x), block(x))


def test_modes_are_kept():
    block = make_block("bottleneck").train()
    block.bn2.eval()
    sampled = convert(block)
    assert sampled.training and sampled.samplers.training and sampled.samplers[0].training
    assert not sampled.bn2.training and sampled.bn1.training


def test_one_interpolation_per_decision_and_none_shared():
    given = RBFInterpolation(width=2.0)
    sampled = convert(make_block("bottleneck"), fill=given)
    assert len(sampled.interpolations) == len(sampled.samplers) == 2
    assert len({id(m) for m in sampled.interpolations} | {id(given)}) == 3
    assert all(m.width == 2.0 for m in sampled.interpolations)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fill", FILLS[:3])
def test_every_parameter_gets_a_gradient(kind, layout, fill):
    sampled = convert(make_block(kind), layout, fill, bias=0.0).train()
    sampled(torch.randn(2, 12, 13, 18)).square().mean().backward()
    for name, parameter in sampled.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        assert parameter.grad.isfinite().all(), name


def test_forward_keeps_no_state():
    sampled = convert(make_block("bottleneck")).train()
    before = {name: set(vars(module)) for name, module in sampled.named_modules()}
    sampled(torch.randn(1, 12, 9, 9))
    assert before == {name: set(vars(module)) for name, module in sampled.named_modules()}


@pytest.mark.parametrize(
    ("kind", "training"),
    [
        ("basic strided", True),
        ("resnext", False),
        ("deformable v2 strided", False),
        ("deformable v2 strided", True),
    ],
)
def test_compiles_without_a_graph_break(kind, training):
    sampled = convert(make_block(kind), bias=0.0).train(training)
    x = torch.randn(2, 12, 9, 9)
    compiled = torch.compile(copy.deepcopy(sampled), backend="eager", fullgraph=True)
    torch.manual_seed(0)
    expected = sampled(x)
    torch.manual_seed(0)
    assert torch.allclose(compiled(x), expected, atol=1e-5)


def test_overfits_a_synthetic_batch_within_a_budget():
    """The task loss falls fivefold, and the probability to its budget of one half."""
    torch.manual_seed(0)
    sampled = convert(Bottleneck(16, 4), bias=2.0).train()
    head = nn.Conv2d(16, 2, 1)
    x = torch.randn(2, 16, 10, 10)
    target = (x[:, 0] > 0).long()
    optimiser = torch.optim.Adam([*sampled.parameters(), *head.parameters()], lr=0.05)
    losses = []
    for step in range(60):
        for sampler in sampled.samplers:
            sampler.temperature = max(0.1, 0.95**step)
        task = F.cross_entropy(head(sampled(x)), target)
        cost = torch.stack([s(x).probability.mean() for s in sampled.samplers]).mean()
        optimiser.zero_grad()
        (task + 5 * (cost - 0.5) ** 2).backward()
        optimiser.step()
        losses.append(task.item())
    assert losses[-1] < losses[0] / 5
    assert abs(cost - 0.5) < 0.1


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(12, 5, 5), ValueError, r"shape \(12, 5, 5\)"),
        (torch.zeros(1, 3, 5, 5), ValueError, r"3 channels"),
        (torch.zeros(1, 12, 5, 5).double(), TypeError, r"torch.float64"),
        (torch.full((1, 12, 5, 5), torch.nan), ValueError, r"NaN"),
    ],
)
def test_bad_features_are_refused(x, error, message):
    with pytest.raises(error, match=message):
        convert(make_block("bottleneck"))(x)


def test_unknown_layout_is_refused():
    with pytest.raises(ValueError, match=r"SampledBlock: layout is 'd'.*pass 'b'"):
        convert(make_block("bottleneck"), "d")


@pytest.mark.parametrize("layout", ["a", "b", "c"])
@pytest.mark.parametrize("cls", [BasicBlock, Bottleneck])
def test_joined_heads_decide_and_learn_as_single_ones(cls, layout, monkeypatch):
    """One convolution for all heads of a stride: the same masks, records and gradients."""
    torch.manual_seed(0)
    source = cls(16, 16 if cls is BasicBlock else 4)
    block = SampledBlock(source, layout=layout, sampler=Sampler, interpolation=RBFInterpolation())
    for sampler in block.samplers:
        torch.nn.init.normal_(sampler.head.weight, std=0.1)
    x = torch.randn(2, 16, 9, 8)
    results = []
    for joins in (True, False):
        if not joins:
            single = [None] * len(block.samplers)
            monkeypatch.setattr(SampledBlock, "_joined_logits", lambda *_, single=single: single)
        block.zero_grad()
        torch.manual_seed(1)
        with record_sampling(block) as record:
            block.train()(x).square().mean().backward()
        grads = [p.grad for p in block.parameters()]
        results.append(([d.mask for d in record.decisions], grads))
    (masks, grads), (single_masks, single_grads) = results
    assert len(masks) == len(block.samplers)
    assert all(torch.equal(a, b) for a, b in zip(masks, single_masks, strict=True))
    for a, b in zip(grads, single_grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_heads_with_hooks_or_of_other_strides_stay_single():
    x = torch.randn(1, 4, 8, 8)
    samplers = [Sampler(4), Sampler(4, stride=2), Sampler(4)]
    joined = join_heads(samplers, x)
    assert joined[1] is None and joined[0].shape == joined[2].shape == (1, 1, 8, 8)
    samplers[0].head.register_forward_hook(lambda *args: None)
    assert join_heads(samplers, x) == [None, None, None]
    assert join_heads([sampler.eval() for sampler in samplers], x) == [None, None, None]


def kept_maps(block, x):
    """Storages of whole maps that a step of training keeps, by shape."""
    kept = {}

    def keep(tensor):
        if tensor.ndim == 4 and tensor.shape[0] == len(x) and tensor.shape[1] > 1:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = block(x)
    found = collections.Counter(tuple(tensor.shape) for tensor in kept.values())
    return found, out


@pytest.mark.parametrize("kind", ["basic", "basic strided", "bottleneck", "bottleneck strided"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_keeps_as_many_maps_as_the_dense_block(kind, layout):
    x = torch.randn(5, 12, 9, 10)
    expected, _ = kept_maps(make_block(kind).train(), x)
    found, _ = kept_maps(convert(make_block(kind), layout, bias=0.0).train(), x)
    assert found == expected


@pytest.mark.parametrize("kind", ["basic strided", "bottleneck"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_block_that_is_watched_computes_the_same_step_by_step(kind, layout):
    """A hook sees the norm's output, which is not made where norm and fill are one step."""
    plain = convert(make_block(kind), layout, bias=0.0).train()
    watched = copy.deepcopy(plain)
    seen = []
    for norm in (m for m in watched.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    x = torch.randn(2, 12, 9, 10)
    results = []
    for block in (plain, watched):
        torch.manual_seed(0)
        out = block(x)
        out.square().sum().backward()
        results.append([out, *[p.grad for p in block.parameters()], *block.buffers()])
    assert len(seen) == len(plain.convolutions()) + 1
    for expected, value in zip(*results, strict=True):
        assert torch.equal(value, expected)
