"""Random cases of the kernels against the float64 reference, until one misses its bound.

    python tests/fuzz/run.py --cases 300               what .ci/run does
    python tests/fuzz/run.py --cases 100000 --seed 7   the long run, by hand
    python tests/fuzz/run.py --case 4711               one case again

Case number n is a convolution, an interpolation, a block (deformable or not), a pooling, an
assembling of windows or a merging of maps, drawn from (seed, n) alone: shape, stride, dilation,
groups, density, layout and alignment of the inputs; of a pooling (forward and backward) also rank,
padding, ceil_mode, infinities and NaN; of an assembling (forward, exact, and backward) also the
windows, inside, across and outside of the map, and any dtype. Every instruction set of this machine
runs it on one thread, within the bound of the table in tests/ops/conftest.py, and on two threads,
bit for bit the same. Outputs start as NaN between guards. Where the CPU has bfloat16 instructions,
cases are also bfloat16 blocks, half of them of whole numbers that must be exact, and bfloat16
weights read back from a packed convolution; poolings run in bfloat16, too. Exits with 1 at the
first miss.
"""

import argparse
import importlib.util
import math
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import get_args

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from sparsight.nn import (
    DeformableBlock,
    DeformableConv2d,
    RBFInterpolation,
    SampledBlock,
    ZeroFill,
)
from sparsight.nn.frozen_block import FrozenBlock
from sparsight.ops import assemble_reference, assemble_windows, cpu, pool_reference, reference
from sparsight.ops.merge import Resizing, merge_maps_plain

TESTS = Path(__file__).resolve().parents[1]
MARGIN = 256  # numbers on each side of a guarded map


def load(name: str, folder: Path) -> ModuleType:
    """A module of the tests, which are no package."""
    spec = importlib.util.spec_from_file_location(f"{folder.name}_{name}", folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


shared = load("conftest", TESTS / "ops")
blocks = load("test_block", TESTS / "ops")
pooling = load("test_pool", TESTS / "ops")
narrow = load("rounding", TESTS / "bfloat16")


def fuzz_convolution(draw) -> str:
    """One sampled convolution; now and then one of several panels and tiles."""
    if draw.one_of(*range(12)) == 0:
        groups = draw.one_of(1, 1, 2)
        case = shared.make_conv_case(
            draw,
            batch=1,
            in_channels=draw.one_of(48, 64, 96, 130),
            out_channels=draw.one_of(64, 80, 128),
            size=(draw.one_of(20, 33), draw.one_of(24, 47)),
            kernel=draw.one_of((1, 1), (3, 3)),
            density=draw.one_of(*shared.DENSITIES),
            stride=draw.one_of((1, 1), (2, 2)),
            padding=(1, 1),
            groups=groups,
            residual=draw.one_of(True, False),
            relu=draw.one_of(True, False),
            layout=draw.one_of(*shared.LAYOUTS),
        )
    else:
        case = shared.draw_conv_case(draw)
    truth, twin = (case.run_reference(dtype) for dtype in (torch.float64, torch.float32))
    scale = case.scale()
    for isa in cpu.available_isas():
        made = case.run_kernel(isa, 1)
        shared.check_within_bound("sampled_conv2d", made, truth, twin, scale, f"{isa}, {case}")
        check_same(made, case.run_kernel(isa, 2), f"{isa}, {case}")
    return "convolution"


def fuzz_interpolation(draw) -> str:
    """One interpolation, hard or soft, with NaN in what must not be read."""
    case = shared.draw_fill_case(draw)
    truth = reference.interpolate(*case.at(torch.float64), case.eps)
    twin = reference.interpolate(*case.at(torch.float32), case.eps)
    # A convex combination is no larger than the largest feature in the map.
    scale = case.features.abs().max()
    for isa in cpu.available_isas():
        results = []
        for num_threads in (1, 2):
            out = shared.guarded(torch.full_like(case.features, torch.nan))
            cpu.interpolate(
                case.poisoned(),
                case.mask,
                case.log_kernel,
                case.eps,
                isa=isa,
                num_threads=num_threads,
                out=out,
            )
            assert shared.guard_is_intact(out), f"written beside the output: {isa}, {case}"
            results.append(out)
        shared.check_within_bound("interpolate", results[0], truth, twin, scale, f"{isa}, {case}")
        check_same(*results, f"{isa}, {case}")
    return "interpolation"


def draw_block(draw, fills=None) -> tuple[SampledBlock, str]:
    """A residual block of torchvision without norms, converted, its masks given.

    One in three has a conv2 whose taps move, by about two pixels. `fills` replaces the choice of
    interpolations.
    """
    one_of = draw.one_of
    cls = one_of(BasicBlock, Bottleneck, Bottleneck)
    stride, dilation, groups, width = one_of(1, 1, 2), 1, 1, 64
    planes = one_of(3, 8, 9, 16, 17, 20)
    if cls is Bottleneck:
        dilation, groups = one_of(1, 1, 2), one_of(1, 1, 2, 4)
        # torchvision's inner width is int(planes * base_width / 64) * groups.
        width = one_of(64, 128)
    out_channels = planes * cls.expansion
    in_channels = out_channels if stride == 1 and one_of(True, False) else one_of(5, 16, 33)
    shortcut = None
    if stride != 1 or in_channels != out_channels:
        shortcut = nn.Conv2d(in_channels, out_channels, 1, stride)
    block = cls(
        in_channels,
        planes,
        stride,
        shortcut,
        groups,
        width,
        dilation,
        norm_layer=lambda channels: nn.Identity(),
    )
    moves = "no offsets"
    if one_of(True, False, False):
        channels = block.conv2.in_channels
        options = {
            "offset_groups": one_of(*(n for n in (1, 1, 2, 3) if channels % n == 0)),
            "is_modulated": one_of(True, False),
        }
        if block.conv1.stride == (1, 1) and one_of(True, True, False):
            moves = f"guided offsets {options}"
            block = DeformableBlock(block, **options)
        else:
            moves = f"own offsets {options}"
            block.conv2 = DeformableConv2d.from_conv(block.conv2, **options)
    with torch.no_grad():
        for module in block.modules():
            if isinstance(module, nn.Conv2d):
                fan_in = module.weight[0].numel()
                module.weight.copy_(draw.normal(*module.weight.shape) / math.sqrt(fan_in))
                module.bias = nn.Parameter(draw.normal(module.out_channels))
    fill = one_of(
        *fills
        or (
            RBFInterpolation(),
            RBFInterpolation(width=one_of(0.5, 0.7, 1.5), window=one_of(3, 7, 9)),
            RBFInterpolation(width=0.7, eps=1e-2),
            ZeroFill(),
        )
    )
    layout = one_of("a", "b", "c")
    made = SampledBlock(
        block.eval(),
        layout=layout,
        sampler=lambda in_channels, *, stride: blocks.GivenMask(),
        interpolation=fill,
    )
    note = (
        f"{cls.__name__}({in_channels}, {planes}), stride {stride}, dilation {dilation}, "
        f"groups {groups}, width {width}, {moves}, layout {layout}, {fill}"
    )
    return made, note


def fuzz_block(draw) -> str:
    """One whole block, heads left out: its masks are given."""
    source, note = draw_block(draw)
    packed = blocks.Packed(source)
    # Written down by what `freeze` uses, not by the tests' own writer.
    frozen = FrozenBlock(source)
    packed.params, packed.spec = frozen.params, frozen.spec
    size = draw.one_of(1, 3, 8, 13), draw.one_of(1, 2, 9, 22)
    x = draw.normal(draw.one_of(1, 2), source.conv1.in_channels, *size)
    density = draw.one_of(*shared.DENSITIES)
    given = blocks.given_masks(packed, x, draw, density)
    note = f"{note}, x {tuple(x.shape)}, density {density}"
    with torch.no_grad():
        truth = packed.truth(x, given, torch.float64)
        twin = packed.truth(x, given, torch.float32)
        x_, shortcut, *rest = packed.arguments(x, given)
    place, place_shortcut = (shared.LAYOUTS[draw.one_of(*shared.LAYOUTS)] for _ in range(2))
    for isa in cpu.available_isas():
        results = []
        for num_threads in (1, 2):
            out = shared.guarded(torch.full_like(twin, torch.nan))
            _, masks, _ = cpu.sampled_block(
                place(x_),
                place_shortcut(shortcut),
                *rest,
                isa=isa,
                num_threads=num_threads,
                out=out,
            )
            assert shared.guard_is_intact(out), f"written beside the output: {isa}, {note}"
            assert torch.equal(masks, blocks.all_masks(packed, given)), f"masks: {isa}, {note}"
            results.append(out)
        shared.check_within_bound(
            "sampled_block", results[0], truth, twin, truth.abs().max(), f"{isa}, {note}"
        )
        check_same(*results, f"{isa}, {note}")
    return "block"


def fuzz_narrow_block(draw) -> str:
    """One bfloat16 block: of whole numbers, exact, or of any, within the bound of its tests."""
    is_whole = draw.one_of(True, False)
    source, note = draw_block(draw, [ZeroFill()] if is_whole else None)
    if is_whole:
        narrow.make_weights_whole(source, draw)
    packed = blocks.Packed(source, dtype=torch.bfloat16)
    frozen = FrozenBlock(source, dtype=torch.bfloat16)
    packed.params, packed.spec = frozen.params, frozen.spec
    size = draw.one_of(1, 3, 8, 13), draw.one_of(1, 2, 9, 22)
    batch = draw.one_of(1, 2)
    if is_whole:
        x = narrow.whole_features(packed, draw, size, batch)
    else:
        x = draw.normal(batch, source.conv1.in_channels, *size)
    density = draw.one_of(*shared.DENSITIES)
    given = blocks.given_masks(packed, x, draw, density)
    output_dtype = draw.one_of(torch.bfloat16, torch.float32)
    note = f"{note}, x {tuple(x.shape)}, density {density}, {output_dtype}, whole {is_whole}"
    place = [shared.LAYOUTS[draw.one_of(*shared.LAYOUTS)] for _ in range(2)]
    with torch.no_grad():
        truth = narrow.as_output(narrow.truth_of(packed, x, given), output_dtype)
        results = []
        for num_threads in (1, 2):
            out = shared.guarded(torch.full_like(truth, torch.nan).to(output_dtype))
            _, masks, _ = narrow.run(
                packed, x, given, output_dtype, num_threads=num_threads, out=out, place=place
            )
            assert shared.guard_is_intact(out), f"written beside the output: {note}"
            assert torch.equal(masks, blocks.all_masks(packed, given)), f"masks: {note}"
            results.append(out)
    check_same(*results, note)
    if is_whole:
        assert torch.equal(results[0].double(), truth), f"over its bound of nothing: {note}"
    else:
        narrow.check_narrow(results[0], truth, note, narrow.RELATIVE_NORM_OF_MEANS)
    return "bfloat16 block"


def fuzz_narrow_weights(draw) -> str:
    """Weights of any width, packed in bfloat16 and read back with one-hot features."""
    groups = draw.one_of(1, 1, 2, 3, 5, 16)
    inside, outside = draw.one_of(1, 2, 3, 8, 15, 17, 33), draw.one_of(1, 2, 7, 8, 31, 33, 65)
    narrow.check_weights_are_read_back(draw, groups, inside, outside)
    return "bfloat16 weight"


def guarded_map(shape, dtype: torch.dtype, fmt: torch.memory_format) -> torch.Tensor:
    """A map of NaN inside a buffer of NaN, of any rank and format."""
    like = torch.empty(shape, dtype=dtype, memory_format=fmt)
    buffer = torch.full((like.numel() + 2 * MARGIN,), torch.nan, dtype=dtype)
    return buffer.as_strided(like.shape, like.stride(), MARGIN)


def is_beside_intact(made: torch.Tensor) -> bool:
    """Whether all around a guarded map is still NaN."""
    buffer = made.as_strided((made.numel() + 2 * MARGIN,), (1,), 0)
    return bool(buffer[:MARGIN].isnan().all() and buffer[-MARGIN:].isnan().all())


def check_pooled(made: torch.Tensor, truth: torch.Tensor, bound: torch.Tensor, note: str) -> None:
    """Raise AssertionError unless finite values are within the bound and the others the same."""
    made, finite = made.double(), truth.isfinite()
    same = torch.equal(made[~finite].nan_to_num(3.0), truth[~finite].nan_to_num(3.0))
    assert same, f"over its bound, an infinity or NaN: {note}"
    excess = ((made - truth).abs() - bound)[finite]
    assert not excess.numel() or excess.max() <= 0, (
        f"over its bound by {excess.max().item():.3g}: {note}"
    )


def with_extremes(draw, x: torch.Tensor) -> torch.Tensor:
    """Some values replaced by infinities, NaN and numbers near the largest of float16."""
    for value in (math.inf, -math.inf, math.nan, 6e4, -6e4):
        x = torch.where(draw.uniform(*x.shape) < draw.one_of(0.0, 0.02, 0.3), value, x)
    return x


def fuzz_pooling(draw) -> str:
    """One SoftPool forward and backward: every kernel and dtype, and through autograd."""
    rank = draw.one_of(1, 2, 3)
    shape, numbers = pooling.random_case(draw, rank)
    if draw.one_of(True, False):  # windows side by side have a backward of their own
        tiled = (numbers[0], numbers[0], numbers[2], [1] * rank, numbers[4])
        if min(pool_reference.output_size(shape[2:], *tiled)) >= 1:
            numbers = tiled
    fmt = draw.one_of(*pooling.FORMATS[rank])
    detached = draw.one_of(True, False)
    wide = draw.normal(*shape) * draw.one_of(0.1, 1.0, 8.0, 1e4)
    if draw.one_of(True, False, False):
        wide = with_extremes(draw, wide)
    size = pool_reference.output_size(shape[2:], *numbers)
    wide_grad = draw.normal(*shape[:2], *size)
    dtypes = [torch.float32, draw.one_of(torch.float64, torch.float16, torch.bfloat16)]
    if cpu.has_bfloat16() and torch.bfloat16 not in dtypes:
        dtypes.append(torch.bfloat16)
    for dtype in dtypes:
        note = f"{shape} {numbers} {fmt} {dtype}, detached {detached}"
        x = guarded_map(shape, dtype, fmt).copy_(wide)
        grad = guarded_map(wide_grad.shape, dtype, fmt).copy_(wide_grad)
        truth, bound, sent, sent_bound = pooled_truth(x, grad, numbers, detached)
        isas = cpu.available_isas() if dtype == torch.float32 else []
        if dtype == torch.bfloat16 and cpu.has_bfloat16():
            isas = ["auto"]
        for isa in isas:
            pairs = []
            for num_threads in (1, 2):
                options = {"isa": isa, "num_threads": num_threads}
                out = guarded_map(truth.shape, dtype, fmt)
                cpu.soft_pool(x, size, *numbers[:4], fmt, **options, out=out)
                made = guarded_map(shape, dtype, fmt)
                cpu.soft_pool_backward(
                    grad, x, *numbers[:4], fmt, detached=detached, **options, out=made
                )
                is_intact = is_beside_intact(out) and is_beside_intact(made)
                assert is_intact, f"written beside the output: {isa}, {note}"
                pairs.append((out, made))
            check_pooled(pairs[0][0], truth, bound, f"soft_pool, {isa}, {note}")
            check_pooled(pairs[0][1], sent, sent_bound, f"backward, {isa}, {note}")
            for one, two in zip(*pairs, strict=True):
                check_same(one.nan_to_num(3.0), two.nan_to_num(3.0), f"{isa}, {note}")
        names = dict(zip(("stride", "padding", "dilation", "ceil_mode"), numbers[1:], strict=True))
        leaf = x.detach().requires_grad_()
        y = pooling.SOFT_POOL[rank](
            leaf, numbers[0], **names, gradient="detached" if detached else "exact"
        )
        check_pooled(y.detach(), truth, bound, f"through autograd, {note}")
        check_pooled(
            torch.autograd.grad(y, leaf, grad)[0], sent, sent_bound, f"through autograd, {note}"
        )
    return "pooling"


def pooled_truth(
    x: torch.Tensor, grad: torch.Tensor, numbers: tuple, detached: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output and gradient in float64, and after each what it may be off by."""
    truth = pool_reference.soft_pool(x.double(), *numbers)
    sent = pool_reference.soft_pool_backward(grad.double(), x.double(), *numbers, detached)
    ulp = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    # One rounding to a narrow dtype, of which float16 has no small normal numbers.
    info = torch.finfo(x.dtype)
    rounding = (info.eps / 2, info.smallest_normal * info.eps) if x.itemsize == 2 else (0.0, 0.0)
    largest = x[x.isfinite()].double().abs().max() if x.isfinite().any() else 0.0
    twin = pooling.in_torch(x.to(torch.promote_types(x.dtype, torch.float32)), numbers).double()
    lost = (twin - truth)[truth.isfinite() & twin.isfinite()].abs()
    bound = (2 * lost.max() if lost.numel() else 0.0) + 4 * ulp * largest
    # Of an input: sum of |g| w over its windows.
    weighed = pool_reference.soft_pool_backward(grad.double().abs(), x.double(), *numbers, True)
    scale = weighed.nan_to_num(0.0).max() * (1 + 2 * largest)
    return (
        truth,
        bound + rounding[0] * truth.abs() + rounding[1],
        sent,
        16 * ulp * scale + rounding[0] * sent.abs() + rounding[1],
    )


def fuzz_assembling(draw) -> str:
    """Windows of score maps, forward and backward: the kernels, and through autograd."""
    case = shared.draw_window_case(draw)
    dtype = draw.one_of(torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
    layout, fmt = draw.one_of(*shared.LAYOUTS), draw.one_of(*pooling.FORMATS[2])
    note = f"{case}, {layout}, {fmt}, {dtype}"
    maps = shared.LAYOUTS[layout](case.maps.to(dtype))
    truth = assemble_reference.assemble_windows(maps, *case.numbers())
    grad = draw.normal(*truth.shape).to(dtype)
    windows, shape, centred = case.backward_numbers()
    sums = [
        assemble_reference.assemble_windows_backward(g, windows, shape, centred)
        for g in (grad.double(), grad.float(), grad.double().abs())
    ]
    # One rounding to a narrow dtype; the table is of float32.
    rounding = torch.finfo(dtype).eps / (32 * shared.ULP) if dtype.itemsize == 2 else 0.0
    scale = (1 + rounding) * sums.pop()
    pairs = []
    for num_threads in (1, 2):
        out = guarded_map(truth.shape, dtype, torch.contiguous_format)
        cpu.assemble_windows(maps, *case.numbers(), num_threads=num_threads, out=out)
        made = guarded_map(shape, dtype, fmt)
        cpu.assemble_windows_backward(
            grad, windows, shape, fmt, centred, num_threads=num_threads, out=made
        )
        is_intact = is_beside_intact(out) and is_beside_intact(made)
        assert is_intact, f"written beside the output: {note}"
        pairs.append((out, made))
    leaf = maps.detach().requires_grad_()
    bins = "centred" if centred else "floor"
    y = assemble_windows(leaf, windows, size=case.size, bins=bins)
    pairs.append((y.detach(), torch.autograd.grad(y, leaf, grad)[0]))
    shared.check_within_bound("assemble_windows_backward", pairs[0][1], *sums, scale, note)
    for out, made in pairs:
        assert torch.equal(out, truth), f"assemble_windows, over its bound of nothing: {note}"
        check_same(made, pairs[0][1], note)
    return "assembling"


def fuzz_merging(draw) -> str:
    """Maps of any sizes merged: every instruction set, and bfloat16 where the CPU has it."""
    num_maps, batch = draw.one_of(*range(1, 6)), draw.one_of(1, 1, 2, 3)
    sums = draw.one_of(False, True)
    resizing = draw.one_of("nearest", "bilinear", "bilinear_corners")
    widths = (1, 3, 8, 16, 17, 31, 32, 48, 64, 96, 100)
    channels = [draw.one_of(*widths) for _ in range(num_maps)]
    channels = channels[:1] * num_maps if sums else channels
    sides = (1, 2, 3, 4, 5, 7, 8, 12, 19)
    sizes = [(draw.one_of(*sides), draw.one_of(*sides)) for _ in range(num_maps + 1)]
    size = draw.one_of(sizes[0], sizes[-1])
    layouts = [draw.one_of(*shared.LAYOUTS) for _ in range(num_maps)]
    maps = [
        shared.LAYOUTS[layout](draw.normal(batch, c, *s))
        for layout, c, s in zip(layouts, channels, sizes, strict=False)
    ]
    merging = "sum" if sums else "concatenate"
    note = f"{channels} of {sizes}, batch {batch}, {merging}, {resizing}, {layouts}"
    number = get_args(Resizing).index(resizing)
    kinds = [(isa, torch.float32) for isa in cpu.available_isas()]
    kinds += [("auto", torch.bfloat16)] if cpu.has_bfloat16() else []
    for isa, dtype in kinds:
        given = [x.to(dtype) for x in maps]
        truth = merge_maps_plain(
            [x.double() for x in given], merging=merging, resizing=resizing, size=size
        )
        made = []
        for num_threads in (1, 2):
            out = guarded_map(truth.shape, dtype, torch.channels_last)
            options = {"isa": isa, "num_threads": num_threads}
            cpu.merge_maps(given, size, sums, number, **options, out=out)
            assert is_beside_intact(out), f"written beside the output: {isa}, {note}"
            made.append(out)
        # Positions are chosen in float32: where one lies at a whole number it may be one ulp off.
        largest = num_maps * max(float(x.abs().max()) for x in given)
        bound = 64 * shared.ULP * largest + torch.finfo(dtype).eps / 2 * truth.abs()
        off = (made[0].double() - truth).abs()
        is_within = bool((off <= bound + (0 if dtype == torch.float32 else 1e-6)).all())
        assert is_within, f"merge_maps, over its bound by {(off - bound).max()}: {isa}, {note}"
        check_same(*made, f"{isa}, {note}")
    return "merging"


def check_same(one: torch.Tensor, two: torch.Tensor, note: str) -> None:
    """Raise AssertionError unless one and two threads agree bit for bit."""
    assert torch.equal(one, two), f"two threads differ from one: {note}"


KINDS = (
    fuzz_convolution,
    fuzz_interpolation,
    fuzz_block,
    fuzz_pooling,
    fuzz_assembling,
    fuzz_merging,
)
NARROW_KINDS = (fuzz_narrow_block, fuzz_narrow_weights)


def run_case(seed: int, number: int) -> str:
    """Draw and check one case; returns its kind."""
    # Far apart, so that no two (seed, number) of a run share a generator.
    draw = shared.Draw(seed * 1_000_003_000 + number)
    # Drawn apart, so that every other case is the same on a CPU without bfloat16.
    apart = shared.Draw(seed * 1_000_003_000 + number + 500_000_000)
    if cpu.has_bfloat16() and apart.one_of(*range(3)) == 0:
        return apart.one_of(NARROW_KINDS[0], NARROW_KINDS[0], NARROW_KINDS[1])(apart)
    return draw.one_of(*KINDS)(draw)


def main() -> int:
    """Run the cases; 0 if none missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", type=int, help="run this one only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    numbers = range(args.first, args.first + args.cases)
    if args.case is not None:
        numbers = range(args.case, args.case + 1)
    counts: Counter[str] = Counter()
    start = last = time.monotonic()
    for number in numbers:
        try:
            counts[run_case(args.seed, number)] += 1
        except Exception:
            traceback.print_exc()
            print(f"fuzz: seed {args.seed}, case {number} missed; again: --seed {args.seed} "
                  f"--case {number}", file=sys.stderr)  # fmt: skip
            return 1
        if time.monotonic() - last > 60:
            last = time.monotonic()
            rate = counts.total() / (last - start)
            print(f"fuzz: {counts.total()} cases, {rate:.0f} a second", flush=True)
    elapsed = time.monotonic() - start
    kinds = ", ".join(f"{count} {kind}s" for kind, count in sorted(counts.items()))
    isas = cpu.available_isas() + ["avx512bf16"] * cpu.has_bfloat16()
    print(
        f"fuzz: seed {args.seed}, {counts.total()} cases ({kinds}), ISAs "
        f"{' '.join(isas)}, 1 and 2 threads: no miss, "
        f"{counts.total() / elapsed:.0f} cases a second"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
