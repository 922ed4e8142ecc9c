"""Laws of the compiled kernels, every instruction set forced by argument.

Truth is `ops.reference` in float64; outputs start as NaN where the kernel must write and lie in
NaN-filled guards, so that a missed element, a read or a write beside an array shows.
"""

import pytest
import torch

from sparsight.ops import cpu, reference, sites_from_mask

LANE_EDGES = (1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65)


def check(case, isa, assert_within_bound):
    assert_within_bound(
        "sampled_conv2d",
        case.run_kernel(isa),
        case.run_reference(torch.float64),
        case.run_reference(torch.float32),
        case.scale(),
        f"{isa}: {case}",
    )


@pytest.mark.parametrize("seeds", [range(k, k + 40) for k in range(0, 200, 40)], ids=str)
def test_conv_equals_reference_on_random_cases(
    draw, random_conv_case, assert_within_bound, isa, seeds
):
    for seed in seeds:
        check(random_conv_case(draw(seed)), isa, assert_within_bound)


@pytest.mark.parametrize("out_channels", LANE_EDGES)
def test_conv_is_right_at_lane_edges(draw, conv_case, assert_within_bound, isa, out_channels):
    for in_channels in (1, 15, 16, 17):
        case = conv_case(
            draw(out_channels),
            batch=1,
            in_channels=in_channels,
            out_channels=out_channels,
            size=(5, 6),
            kernel=(3, 3),
            padding=(1, 1),
            density=0.5,
            residual=True,
            relu=True,
        )
        check(case, isa, assert_within_bound)


@pytest.mark.parametrize("channels", LANE_EDGES)
@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise_is_right_at_lane_edges(
    draw, conv_case, assert_within_bound, isa, channels, multiplier
):
    case = conv_case(
        draw(channels),
        batch=2,
        in_channels=channels,
        out_channels=channels * multiplier,
        size=(6, 7),
        kernel=(3, 3),
        stride=(2, 1),
        padding=(1, 1),
        groups=channels,
        density=0.5,
        residual=True,
    )
    check(case, isa, assert_within_bound)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 8, 16, 32])
@pytest.mark.parametrize("groups", [2, 3, 8])
def test_grouped_conv_is_right_at_every_width(
    draw, conv_case, assert_within_bound, isa, groups, width
):
    case = conv_case(
        draw(width),
        batch=1,
        in_channels=groups * width,
        out_channels=groups * width,
        size=(5, 5),
        kernel=(3, 3),
        padding=(2, 2),
        dilation=(2, 2),
        groups=groups,
        density=0.5,
        relu=True,
    )
    check(case, isa, assert_within_bound)


@pytest.mark.parametrize("sites", [1, 2, 3, 4, 5, 8, 9, 11, 12, 13, 24, 25])
def test_conv_is_right_for_every_tile_remainder(draw, conv_case, assert_within_bound, isa, sites):
    case = conv_case(
        draw(sites),
        batch=1,
        in_channels=5,
        out_channels=34,
        size=(6, 6),
        kernel=(3, 3),
        padding=(1, 1),
        density=0.0,
    )
    chosen = torch.randperm(36, generator=torch.Generator().manual_seed(sites))[:sites]
    case.mask.view(-1)[chosen] = True
    check(case, isa, assert_within_bound)


def test_conv_with_a_kernel_at_the_tap_limit(draw, conv_case, assert_within_bound, isa):
    assert cpu.MAX_TAPS == 128
    case = conv_case(
        draw(0),
        batch=1,
        in_channels=3,
        out_channels=5,
        size=(10, 20),
        kernel=(8, 16),
        padding=(4, 8),
        density=0.5,
    )
    check(case, isa, assert_within_bound)


def test_padding_wider_than_the_map(draw, conv_case, assert_within_bound, isa):
    case = conv_case(
        draw(1),
        batch=2,
        in_channels=3,
        out_channels=4,
        size=(1, 1),
        kernel=(3, 3),
        padding=(4, 5),
        density=1.0,
    )
    check(case, isa, assert_within_bound)


@pytest.mark.parametrize("num_threads", [2, 3, 5])
def test_conv_on_one_thread_equals_n_threads_bit_for_bit(draw, random_conv_case, isa, num_threads):
    for seed in range(300, 340):
        case = random_conv_case(draw(seed))
        assert torch.equal(case.run_kernel(isa, 1), case.run_kernel(isa, num_threads)), str(case)


@pytest.mark.parametrize(
    "shape",
    [
        # (channels, outputs, size): split over sites, split over panels (few sites, many outputs)
        (16, 32, (40, 40)),
        (256, 512, (4, 4)),
    ],
)
def test_both_ways_to_split_a_conv_are_bit_equal_to_one_thread(draw, conv_case, isa, shape):
    in_channels, out_channels, size = shape
    case = conv_case(
        draw(2),
        batch=1,
        in_channels=in_channels,
        out_channels=out_channels,
        size=size,
        kernel=(3, 3),
        padding=(1, 1),
        density=0.7,
        residual=True,
        relu=True,
    )
    one = case.run_kernel(isa, 1)
    assert all(torch.equal(one, case.run_kernel(isa, n)) for n in (2, 3, 5))


def nan_output(case):
    x = case.features.contiguous(memory_format=torch.channels_last)
    return torch.full_like(x, torch.nan)


def run_fill(case, isa, num_threads=1):
    return cpu.interpolate(
        case.poisoned(),
        case.mask,
        case.log_kernel,
        case.eps,
        isa=isa,
        num_threads=num_threads,
        out=nan_output(case),
    )


def run_fill_backward(case, grad, isa, num_threads=1):
    return cpu.interpolate_backward(
        grad,
        case.poisoned(),
        case.mask,
        case.log_kernel,
        case.eps,
        isa=isa,
        num_threads=num_threads,
    )


@pytest.mark.parametrize("seeds", [range(0, 30), range(30, 60)], ids=str)
def test_interpolate_equals_reference_on_random_cases(
    draw, random_fill_case, assert_within_bound, isa, seeds
):
    for seed in seeds:
        case = random_fill_case(draw(seed))
        assert_within_bound(
            "interpolate",
            run_fill(case, isa),
            reference.interpolate(*case.at(torch.float64), case.eps),
            reference.interpolate(*case.at(torch.float32), case.eps),
            case.features.abs().max(),
            f"{isa}, seed {seed}: {case}",
        )


@pytest.mark.parametrize("seeds", [range(100, 125), range(125, 150)], ids=str)
def test_interpolate_backward_equals_reference_on_random_cases(
    draw, random_fill_case, assert_within_bound, scale_of_mask_gradient, isa, seeds
):
    for seed in seeds:
        d = draw(seed)
        case = random_fill_case(d, channels=(1, 8, 17, 33))
        grad = d.normal(*case.features.shape)
        made = run_fill_backward(case, grad, isa)
        truth = reference.interpolate_backward(grad.double(), *case.at(torch.float64), eps=case.eps)
        twin = reference.interpolate_backward(grad, *case.at(torch.float32), eps=case.eps)
        names = ("features", "mask", "log_kernel")
        for name, a, b, c in zip(names, made, truth, twin, strict=True):
            largest = b.abs().max().clamp_min(grad.abs().max())
            soft = name == "mask" and not case.hard
            assert_within_bound(
                f"interpolate_backward.{name}",
                a,
                b,
                c,
                scale_of_mask_gradient(case, grad) if soft else largest,
                f"{isa}, seed {seed}: {case}",
            )


@pytest.mark.parametrize("channels", LANE_EDGES)
@pytest.mark.parametrize("hard", [True, False])
def test_interpolate_is_right_at_lane_edges(
    draw, assert_within_bound, rbf_log_kernel, isa, channels, hard
):
    d = draw(channels)
    features = d.normal(1, channels, 6, 5)
    mask = d.mask(1, 6, 5, 0.4) if hard else d.uniform(1, 1, 6, 5)
    kernel = rbf_log_kernel(7, 1.0)
    out = torch.full_like(features, torch.nan).contiguous(memory_format=torch.channels_last)
    made = cpu.interpolate(features, mask, kernel, None, isa=isa, out=out)
    truth = reference.interpolate(
        features.double(), mask if hard else mask.double(), kernel.double(), None
    )
    twin = reference.interpolate(features, mask, kernel, None)
    assert_within_bound("interpolate", made, truth, twin, features.abs().max())


@pytest.mark.parametrize("num_threads", [2, 3, 5])
def test_interpolate_on_one_thread_equals_n_threads_bit_for_bit(
    draw, random_fill_case, isa, num_threads
):
    for seed in range(200, 215):
        d = draw(seed)
        case = random_fill_case(d, channels=(1, 17, 64))
        grad = d.normal(*case.features.shape)
        assert torch.equal(run_fill(case, isa), run_fill(case, isa, num_threads)), str(case)
        one = run_fill_backward(case, grad, isa)
        many = run_fill_backward(case, grad, isa, num_threads)
        assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True)), str(case)


def test_an_isa_that_is_not_there_is_refused(draw):
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="isa 'avx1024' does not run on this machine"):
        cpu.interpolate(draw(0).normal(1, 1, 2, 2), mask, torch.zeros(3, 3), None, isa="avx1024")


def test_no_thread_at_all_is_refused(draw):
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="num_threads is 0; at least 1"):
        cpu.interpolate(draw(0).normal(1, 1, 2, 2), mask, torch.zeros(3, 3), None, num_threads=0)


def test_auto_is_the_last_available_isa(draw, conv_case):
    assert cpu.available_isas()[0] == "scalar"
    case = conv_case(
        draw(3), batch=1, in_channels=9, out_channels=9, size=(5, 5), kernel=(3, 3), density=0.5
    )
    assert torch.equal(case.run_kernel("auto"), case.run_kernel(cpu.available_isas()[-1]))


def test_kernels_share_the_openmp_runtime_of_torch():
    if "openmp" not in torch.__config__.parallel_info().lower():
        pytest.skip("this torch was built without OpenMP")
    assert cpu.threading_runtime().startswith(("libgomp", "libiomp", "libomp"))


def test_geometry_is_in_the_order_of_the_kernel(draw, conv_case, isa):
    """Each of the numbers differs, so that no two of them can be swapped unnoticed."""
    case = conv_case(
        draw(4),
        batch=1,
        in_channels=6,
        out_channels=4,
        size=(13, 17),
        kernel=(3, 2),
        stride=(2, 3),
        padding=(1, 0),
        dilation=(2, 5),
        groups=2,
        density=1.0,
    )
    truth = case.run_reference(torch.float64)
    torch.testing.assert_close(case.run_kernel(isa).double(), truth, rtol=1e-5, atol=1e-5)


def test_sliced_site_lists_are_read_right(draw, conv_case):
    case = conv_case(
        draw(5), batch=3, in_channels=4, out_channels=4, size=(6, 6), kernel=(1, 1), density=0.5
    )
    sites = sites_from_mask(case.mask)
    index = sites.index.repeat_interleave(2, 1)[:, ::2]
    count = sites.count.repeat_interleave(2)[::2]
    assert not count.is_contiguous()
    made = cpu.sampled_conv2d(
        case.x,
        case.weight,
        case.bias,
        index,
        count,
        case.size,
        residual=None,
        relu=False,
        **case.numbers,
    )
    assert torch.equal(made, case.run_kernel())


# The helpers above, on planted errors.


@pytest.fixture
def planted(draw, conv_case):
    return conv_case(
        draw(6),
        batch=1,
        in_channels=8,
        out_channels=17,
        size=(7, 7),
        kernel=(3, 3),
        padding=(1, 1),
        density=0.5,
    )


def judge(case, made, assert_within_bound):
    truth, twin = case.run_reference(torch.float64), case.run_reference(torch.float32)
    assert_within_bound("sampled_conv2d", made, truth, twin, case.scale())


def test_the_bound_accepts_the_right_output(planted, assert_within_bound):
    judge(planted, planted.run_kernel(), assert_within_bound)


def test_the_bound_rejects_one_element_off_by_a_few_ulps(planted, assert_within_bound):
    made = planted.run_kernel()
    y, x = planted.mask[0, 0].nonzero()[-1]
    made[0, 16, y, x] += 64 * torch.finfo(torch.float32).eps * planted.scale()[0, 16, y, x]
    with pytest.raises(AssertionError, match="over its bound"):
        judge(planted, made, assert_within_bound)


def test_the_bound_rejects_an_element_never_written(planted, assert_within_bound):
    made = planted.run_kernel()
    made[0, 0, 3, 3] = torch.nan
    with pytest.raises(AssertionError, match="1 not finite"):
        judge(planted, made, assert_within_bound)


def test_the_bound_rejects_a_value_off_the_sites(planted, assert_within_bound):
    made = planted.run_kernel()
    y, x = (~planted.mask[0, 0]).nonzero()[0]
    made[0, 0, y, x] = 1e-3
    with pytest.raises(AssertionError, match="over its bound"):
        judge(planted, made, assert_within_bound)


def test_the_bound_rejects_another_shape(planted, assert_within_bound):
    with pytest.raises(AssertionError, match="shape"):
        judge(planted, planted.run_kernel()[:, :16], assert_within_bound)


@pytest.mark.parametrize("beside", [-1, 0])
def test_the_guard_notices_a_write_beside_the_tensor(layouts, is_intact, beside):
    x = layouts["guarded"](torch.zeros(1, 3, 4, 5))
    assert is_intact(x)
    offset = x.storage_offset() + (x.numel() if beside == 0 else -1)
    torch.as_strided(x, (1,), (1,), offset).fill_(0.0)
    assert not is_intact(x)
