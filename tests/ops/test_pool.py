"""Laws of `soft_pool1d`, `soft_pool2d`, `soft_pool3d` and of their kernels.

The eight defects of the published implementation (alexandrosstergiou/SoftPool) have a test each,
`test_defect_<n>`. Truth is `pool_reference` in float64, or torch.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsight.ops import cpu, soft_pool1d, soft_pool2d, soft_pool3d
from sparsight.ops import pool_reference as reference

SOFT_POOL = {1: soft_pool1d, 2: soft_pool2d, 3: soft_pool3d}
MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
FORMATS = {
    1: [torch.contiguous_format],
    2: [torch.contiguous_format, torch.channels_last],
    3: [torch.contiguous_format, torch.channels_last_3d],
}
INF = math.inf
ULP = torch.finfo(torch.float32).eps

# opcheck reads .grad of tensors that it made itself.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def random_case(d, rank):
    """An input size, channels, and numbers for a window that fits."""
    one_of = d.one_of
    while True:
        kernel = [one_of(1, 2, 3, 4) for _ in range(rank)]
        numbers = (
            kernel,
            [one_of(1, 2, 3, 4) for _ in range(rank)],
            [one_of(*range(k // 2 + 1)) for k in kernel],
            [one_of(1, 1, 2, 3) for _ in range(rank)],
            one_of(True, False),
        )
        size = [one_of(1, 2, 5, 9) for _ in range(rank - 1)] + [one_of(1, 3, 16, 33, 70)]
        if min(reference.output_size(size, *numbers)) >= 1:
            channels = one_of(1, 3, 8, 17, 40) if rank < 3 else one_of(1, 5, 16)
            return (one_of(1, 2), channels, *size), numbers


def in_torch(x, numbers):
    """The formula as one writes it in torch, in the dtype of x: what its own error is."""
    u = reference._windows(x, -INF, *numbers)
    return torch.where(u.isinf(), 0.0, u.softmax(-1) * u).sum(-1)


# ---- the eight defects ----


def test_defect_1_weights_are_per_channel_on_every_path(draw):
    """The published CPU path weighs by the sum of exp over channels, its CUDA path per channel."""
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]]])
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        y = soft_pool1d(x.to(dtype), 4).flatten().tolist()
        assert y == pytest.approx([3.4926527, 3.4926527], rel=4e-3 if dtype.itemsize == 2 else 1e-6)
    x = draw(0).normal(2, 64, 6, 6)
    alone = torch.cat([soft_pool2d(c, 2) for c in x.split(1, dim=1)], dim=1)
    torch.testing.assert_close(soft_pool2d(x, 2), alone, rtol=1e-6, atol=1e-6)


def test_defect_2_negative_outputs_are_not_clamped():
    y = soft_pool1d(torch.tensor([[-1.0, -2.0, -3.0, -4.0]]), 4)
    assert y.item() == pytest.approx(-1.5073473, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_defect_3_large_values_neither_overflow_nor_vanish(draw, dtype):
    for value in (-1e4, -104.0, 12.0, 89.0, 1e4):
        x = torch.full((1, 3, 4, 4), value, dtype=dtype).requires_grad_()
        y = soft_pool2d(x, 2)
        assert (y == x.detach()[..., ::2, ::2]).all()
        (sent,) = torch.autograd.grad(y.sum(), x)
        assert (sent == 0.25).all()
    steps = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=dtype)
    base = 512.0 if dtype.itemsize == 2 else 1e4
    shifted, plain = soft_pool1d(steps[None] + base, 4), soft_pool1d(steps[None], 4)
    torch.testing.assert_close(shifted.double() - base, plain.double(), rtol=0, atol=base * 2**-8)


def test_defect_4_the_gradient_is_the_true_one(draw):
    for rank, soft_pool in SOFT_POOL.items():
        x = draw(rank).normal(2, 2, *[4] * rank).double().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x, soft_pool=soft_pool: soft_pool(x, 3, stride=2, padding=1, ceil_mode=True), x
        )
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]], requires_grad=True)
    soft_pool1d(x, 4).backward()
    expected = torch.tensor([[-0.0478524, -0.0429319, 0.1201818, 0.9706024]])
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-6)


def test_defect_4_the_published_gradient_is_there_when_asked_for(draw):
    x = draw(4).normal(2, 3, 8).requires_grad_()
    grad = draw(5).normal(2, 3, 2)
    y = soft_pool1d(x, 4, gradient="detached")
    (sent,) = torch.autograd.grad(y, x, grad)
    weights = x.detach().view(2, 3, 2, 4).softmax(-1)
    torch.testing.assert_close(sent, (weights * grad[..., None]).view(2, 3, 8))


@pytest.mark.parametrize("kernel", [2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_defect_5_windows_that_overlap_are_indexed_as_they_are_sized(draw, kernel, stride):
    """The published CUDA kernels write out of bounds for kernel 3, stride 2 on even sizes."""
    for size in ((7, 8), (8, 7), (12, 33)):
        x = draw(kernel).normal(3, 5, *size)
        numbers = ([kernel] * 2, [stride] * 2, [0, 0], [1, 1], False)
        truth = reference.soft_pool(x.double(), *numbers)
        for fmt in FORMATS[2]:
            y = soft_pool2d(x.contiguous(memory_format=fmt), kernel, stride=stride)
            assert y.shape == F.max_pool2d(x, kernel, stride).shape
            torch.testing.assert_close(y.double(), truth, rtol=0, atol=1e-6)


def test_defect_6_it_imports_and_runs_without_cuda():
    """The published package cannot be imported before its CUDA extension is built."""
    assert soft_pool2d(torch.ones(1, 1, 2, 2), 2).item() == 1.0
    assert cpu.available_isas()
    assert torch.cuda.is_available() or not torch.cuda.is_initialized()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_defect_7_options_and_dtypes_of_max_pool_and_the_input_is_left_alone(draw, rank, dtype):
    x = draw(rank).normal(3, *[7] * rank).to(dtype)
    before, version = x.clone(), x._version
    numbers = ([3] * rank, [2] * rank, [1] * rank, [2] * rank, True)
    options = {"stride": 2, "padding": 1, "dilation": 2, "ceil_mode": True}
    y = SOFT_POOL[rank](x, 3, **options)
    assert x.shape == before.shape
    assert x._version == version
    assert torch.equal(x, before)
    assert y.dtype == dtype
    truth = reference.soft_pool(x.double()[None], *numbers)[0]
    bound = {2: 2**-8, 4: 2**-22, 8: 1e-14}[dtype.itemsize]
    torch.testing.assert_close(y.double(), truth, rtol=bound, atol=bound)
    assert torch.equal(SOFT_POOL[rank](x[None], 3, **options)[0], y)


def test_defect_8_paths_agree_to_rounding_not_to_a_mean_of_0_2(draw, isa):
    x = draw(8).uniform(2, 16, 12, 12)
    truth = reference.soft_pool(x.double(), [2, 2], [2, 2], [0, 0], [1, 1], False)
    other = F.avg_pool2d(x.double(), 2)
    assert (truth - other).abs().mean() < 0.2  # what that tolerance cannot tell apart
    for fmt in FORMATS[2]:
        y = cpu.soft_pool(x, (6, 6), [2, 2], [2, 2], [0, 0], [1, 1], fmt, isa=isa, num_threads=1)
        assert (y.double() - truth).abs().max() < 4 * ULP


# ---- kernels ----


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_kernels_equal_the_reference_on_every_isa(draw, isa, rank):
    """At most twice the error of the formula in torch, plus 4 ULP of the largest value."""
    for seed in range(40):
        d = draw(seed)
        shape, numbers = random_case(d, rank)
        x = d.normal(*shape) * d.one_of(0.1, 1.0, 8.0)
        truth = reference.soft_pool(x.double(), *numbers)
        finite = truth.isfinite()
        twin = in_torch(x, numbers).double()
        lost = (twin - truth)[finite].abs().max() if finite.any() else 0.0
        grad = d.normal(*truth.shape)
        detached = d.one_of(True, False)
        sent_truth = reference.soft_pool_backward(grad.double(), x.double(), *numbers, detached)
        windows = reference.soft_pool_backward(
            grad.double().abs(), x.double(), *numbers, True
        )  # sum of |g| w
        scale = windows.max() * (1 + 2 * x.abs().max())
        for fmt in FORMATS[rank]:
            size = truth.shape[2:]
            out = torch.full(truth.shape, torch.nan).contiguous(memory_format=fmt)
            cpu.soft_pool(x, size, *numbers[:4], fmt, isa=isa, num_threads=1, out=out)
            note = f"{shape} {numbers} {fmt}"
            assert torch.equal(out[~finite].double(), truth[~finite]), note
            error = (out.double() - truth)[finite].abs()
            assert (error <= 2 * lost + 4 * ULP * x.abs().max()).all(), note
            made = torch.full(shape, torch.nan).contiguous(memory_format=fmt)
            cpu.soft_pool_backward(
                grad, x, *numbers[:4], fmt, detached=detached, isa=isa, num_threads=1, out=made
            )
            assert ((made.double() - sent_truth).abs() <= 16 * ULP * scale).all(), note


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("num_threads", [2, 3, 7])
def test_one_thread_equals_n_threads_bit_for_bit(draw, isa, rank, num_threads):
    for seed in range(100, 115):
        d = draw(seed)
        shape, numbers = random_case(d, rank)
        x = d.normal(*shape)
        size = reference.output_size(shape[2:], *numbers)
        grad = d.normal(*shape[:2], *size)
        for fmt in FORMATS[rank]:
            made = [
                (
                    cpu.soft_pool(x, size, *numbers[:4], fmt, isa=isa, num_threads=n),
                    cpu.soft_pool_backward(
                        grad, x, *numbers[:4], fmt, detached=False, isa=isa, num_threads=n
                    ),
                )
                for n in (1, num_threads)
            ]
            assert torch.equal(made[0][0], made[1][0]), f"{shape} {numbers} {fmt}"
            assert torch.equal(made[0][1], made[1][1]), f"{shape} {numbers} {fmt}"


def test_maps_of_many_blocks_are_right(draw, isa):
    """Larger than the scratch of one block, in both layouts and along both split axes."""
    for shape, numbers in (
        ((1, 2, 200, 700), ([3, 3], [2, 2], [1, 1], [1, 1], False)),
        ((1, 1, 9, 60, 130), ([3, 2, 3], [2, 1, 2], [1, 1, 1], [1, 1, 1], True)),
    ):
        x = draw(0).normal(*shape)
        truth = reference.soft_pool(x.double(), *numbers)
        grad = draw(1).normal(*truth.shape)
        sent = reference.soft_pool_backward(grad.double(), x.double(), *numbers, False)
        for fmt in FORMATS[len(shape) - 2]:
            y = cpu.soft_pool(x, truth.shape[2:], *numbers[:4], fmt, isa=isa, num_threads=2)
            torch.testing.assert_close(y.double(), truth, rtol=0, atol=2e-6)
            made = cpu.soft_pool_backward(
                grad, x, *numbers[:4], fmt, detached=False, isa=isa, num_threads=2
            )
            torch.testing.assert_close(made.double(), sent, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_are_split_over_threads_where_outputs_are_few(draw, isa, dtype):
    """A global pooling, two overlapping windows and two side by side, of 200 channels."""
    if dtype == torch.bfloat16 and (isa != "avx512" or not cpu.has_bfloat16()):
        pytest.skip("bfloat16 has kernels for AVX-512 BF16 only")
    fmt = torch.channels_last
    for size, numbers in (
        ((7, 7), ([7, 7], [7, 7], [0, 0], [1, 1], False)),
        ((3, 5), ([3, 3], [2, 2], [0, 0], [1, 1], False)),
        ((3, 7), ([2, 3], [2, 3], [0, 0], [1, 1], False)),
    ):
        x = draw(0).normal(1, 200, *size).to(dtype).contiguous(memory_format=fmt)
        truth = reference.soft_pool(x.double(), *numbers)
        grad = draw(1).normal(*truth.shape).to(dtype)
        sent = reference.soft_pool_backward(grad.double(), x.double(), *numbers, False)
        rounding = 2**-8 if dtype == torch.bfloat16 else 0.0
        for num_threads in (1, 2, 5):
            options = {"isa": isa, "num_threads": num_threads}
            out = torch.full_like(truth, torch.nan, dtype=dtype).contiguous(memory_format=fmt)
            cpu.soft_pool(x, truth.shape[2:], *numbers[:4], fmt, **options, out=out)
            torch.testing.assert_close(out.double(), truth, rtol=rounding, atol=2e-6)
            made = torch.full_like(x, torch.nan)
            cpu.soft_pool_backward(grad, x, *numbers[:4], fmt, detached=False, **options, out=made)
            torch.testing.assert_close(made.double(), sent, rtol=rounding, atol=1e-5)


def test_windows_of_more_taps_than_are_kept(draw, isa):
    x = draw(2).normal(2, 5, 13, 11)
    numbers = ([13, 11], [1, 1], [0, 0], [1, 1], False)
    truth = reference.soft_pool(x.double(), *numbers)
    grad = draw(3).normal(*truth.shape)
    for detached in (False, True):
        sent = reference.soft_pool_backward(grad.double(), x.double(), *numbers, detached)
        for fmt in FORMATS[2]:
            y = cpu.soft_pool(x, (1, 1), *numbers[:4], fmt, isa=isa, num_threads=1)
            torch.testing.assert_close(y.double(), truth, rtol=0, atol=2e-6)
            made = cpu.soft_pool_backward(
                grad, x, *numbers[:4], fmt, detached=detached, isa=isa, num_threads=1
            )
            torch.testing.assert_close(made.double(), sent, rtol=0, atol=1e-6)


def test_exponentials_are_right_over_their_whole_range(isa):
    """Of a window (0, d) the gradient of the second is its weight, e^d / (1 + e^d)."""
    d = -torch.linspace(0.0, 86.0, 40_001)
    x = torch.stack([torch.zeros_like(d), d], dim=1).view(1, 1, -1)
    fmt = torch.contiguous_format
    grad = torch.ones(1, 1, d.numel())
    sent = cpu.soft_pool_backward(
        grad, x, [2], [2], [0], [1], fmt, detached=True, isa=isa, num_threads=1
    )
    expected = torch.sigmoid(d.double())
    relative = (sent.view(-1, 2)[:, 1].double() / expected - 1).abs().max().item()
    assert relative < 4 * ULP


def test_bfloat16_is_read_and_written_as_it_is_and_summed_in_float32(draw):
    if not cpu.has_bfloat16():
        pytest.skip("no AVX-512 BF16 on this CPU or in this build")
    for rank in (1, 2, 3):
        for seed in range(15):
            d = draw(seed)
            shape, numbers = random_case(d, rank)
            x = d.normal(*shape).bfloat16()
            size = reference.output_size(shape[2:], *numbers)
            grad = d.normal(*shape[:2], *size).bfloat16()
            truth = reference.soft_pool(x.double(), *numbers)
            sent = reference.soft_pool_backward(grad.double(), x.double(), *numbers, False)
            for fmt in FORMATS[rank]:
                y = cpu.soft_pool(x, size, *numbers[:4], fmt, num_threads=2)
                assert y.dtype == torch.bfloat16
                # Half a unit in the last place: one rounding, of the sum.
                torch.testing.assert_close(y.double(), truth, rtol=2**-8, atol=1e-5)
                made = cpu.soft_pool_backward(
                    grad, x, *numbers[:4], fmt, detached=False, num_threads=2
                )
                torch.testing.assert_close(made.double(), sent, rtol=2**-8, atol=1e-5)


# ---- extremes ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 20])
def test_infinities_have_a_defined_result_and_gradient(dtype, channels):
    windows = torch.tensor(
        [[INF, 1, INF, -INF], [-INF, -INF, 1, 2], [-INF] * 4, [INF, 5, 6, 7]], dtype=dtype
    )
    x = windows.view(1, 1, 16).expand(1, channels, 16)
    weight = torch.tensor([1.0, 2.0]).softmax(0)
    y1 = (weight * torch.tensor([1.0, 2.0])).sum().item()
    slopes = (weight * (1 + torch.tensor([1.0, 2.0]) - y1)).tolist()
    for as_map in (x, x.unsqueeze(2).contiguous(memory_format=torch.channels_last)):
        as_map = as_map.clone().requires_grad_()
        pool = soft_pool1d if as_map.ndim == 3 else soft_pool2d
        y = pool(as_map, 4 if as_map.ndim == 3 else (1, 4))
        bound = 8e-3 if dtype == torch.bfloat16 else 1e-6
        assert y.flatten()[:4].tolist() == pytest.approx([INF, y1, -INF, INF], rel=bound)
        (sent,) = torch.autograd.grad(y, as_map, torch.ones_like(y))
        expected = [0.5, 0, 0.5, 0, 0, 0, *slopes, *[0.25] * 4, 1, 0, 0, 0]
        assert sent[0, -1].flatten().tolist() == pytest.approx(expected, abs=bound)


def test_padding_beside_minus_infinity_still_wins_no_weight():
    """A window of -inf only shares its gradient among its real positions."""
    for fmt in FORMATS[2]:
        x = torch.full((1, 20, 3, 3), -INF).contiguous(memory_format=fmt).requires_grad_()
        y = soft_pool2d(x, 2, stride=2, padding=1)
        assert (y == -INF).all()
        (sent,) = torch.autograd.grad(y, x, torch.ones_like(y))
        expected = torch.tensor([[1.0, 0.5, 0.5], [0.5, 0.25, 0.25], [0.5, 0.25, 0.25]])
        assert torch.equal(sent[0, 7], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_nan_reaches_the_windows_that_max_pool_says_and_no_others(draw, rank, dtype):
    for seed in range(10):
        d = draw(seed)
        shape, numbers = random_case(d, rank)
        x = d.normal(*shape).to(dtype)
        x = torch.where(d.uniform(*shape) < 0.1, torch.nan, x)
        x = torch.where(d.uniform(*shape) < 0.05, INF, x)
        names = dict(zip(("stride", "padding", "dilation", "ceil_mode"), numbers[1:], strict=True))
        for fmt in FORMATS[rank]:
            y = SOFT_POOL[rank](x.contiguous(memory_format=fmt), numbers[0], **names)
            assert torch.equal(y.isnan(), MAX_POOL[rank](x, *numbers).isnan())


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_an_empty_batch_gives_an_empty_result_with_a_gradient(rank):
    for fmt in FORMATS[rank]:
        x = torch.zeros(0, 3, *[6] * rank).contiguous(memory_format=fmt).requires_grad_()
        y = SOFT_POOL[rank](x, 2)
        assert y.shape == MAX_POOL[rank](x, 2).shape
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_what_max_pool_refuses_is_refused_with_its_error(rank):
    for x, options in (
        (torch.zeros(1, 1, *[2] * rank), {"kernel_size": 3}),
        (torch.zeros(1, 1, *[9] * rank), {"kernel_size": 3, "stride": 1, "padding": 2}),
        (torch.zeros(1, 0, *[9] * rank), {"kernel_size": 2}),
        (torch.zeros(1, 1, *[9] * rank), {"kernel_size": 5, "dilation": 3}),
    ):
        for pool in (MAX_POOL[rank], SOFT_POOL[rank]):
            with pytest.raises(RuntimeError):
                pool(x, **options)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"kernel_size": 0}, ValueError, "kernel_size is 0"),
        ({"kernel_size": (2, 2, 2)}, ValueError, r"kernel_size is \(2, 2, 2\)"),
        ({"kernel_size": 2, "stride": 0}, ValueError, "stride is 0"),
        ({"kernel_size": 2, "padding": -1}, ValueError, "padding is -1"),
        ({"kernel_size": 2, "dilation": 1.5}, ValueError, "dilation is 1.5"),
        ({"kernel_size": 2, "weights": "sum"}, ValueError, "weights is 'sum'.*'channel' or"),
        ({"kernel_size": 2, "gradient": "none"}, ValueError, "gradient is 'none'"),
        ({"kernel_size": 9}, RuntimeError, r"does not fit an input of \(4, 4\)"),
    ],
)
def test_messages_name_the_argument_and_what_came(options, error, words):
    with pytest.raises(error, match=f"soft_pool2d: .*{words}"):
        soft_pool2d(torch.zeros(1, 1, 4, 4), **options)


def test_tensors_that_cannot_be_pooled_are_refused():
    with pytest.raises(TypeError, match=r"x is torch\.int64"):
        soft_pool2d(torch.zeros(1, 1, 4, 4, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match=r"\(B, C, H, W\) or \(C, H, W\)"):
        soft_pool2d(torch.zeros(4, 4), 2)


# ---- properties ----


def test_output_lies_between_mean_and_maximum_and_follows_shifts(draw):
    x = draw(0).normal(2, 7, 9, 10) * 3
    y = soft_pool2d(x, 3, stride=2)
    assert (y >= F.avg_pool2d(x, 3, 2) - 1e-6).all()
    assert (y <= F.max_pool2d(x, 3, 2) + 1e-6).all()
    torch.testing.assert_close(soft_pool2d(x + 2.5, 3, stride=2), y + 2.5, rtol=0, atol=3e-6)


@pytest.mark.parametrize("rank", [2, 3])
def test_memory_format_of_the_output_is_that_of_max_pool(draw, rank):
    odd = [(2, 4, 6, 7, 5), (1, 1, 4, 6, 4), (2, 3, 1, 1, 1), (1, 4, 6, 1, 6)]
    for shape in (s[: rank + 2] for s in odd):
        x = draw(0).normal(*shape)
        swapped = x.transpose(-1, -2).contiguous().transpose(-1, -2)
        for place in (
            *(x.contiguous(memory_format=f) for f in FORMATS[rank]),
            x[..., ::2],
            swapped,
        ):
            y, like = SOFT_POOL[rank](place, 1), MAX_POOL[rank](place, 1)
            assert y.stride() == like.stride(), f"{place.shape} {place.stride()}"


def test_shared_weights_through_the_door(draw):
    x = draw(3).normal(2, 5, 8, 6)
    e = x.exp().sum(1, keepdim=True)
    listing = F.avg_pool2d(x * e, 2) / F.avg_pool2d(e, 2)
    torch.testing.assert_close(soft_pool2d(x, 2, weights="shared"), listing)
    torch.testing.assert_close(soft_pool2d(x[0], 2, weights="shared"), listing[0])
    one = x[:, :1]
    torch.testing.assert_close(soft_pool2d(one, 2, weights="shared"), soft_pool2d(one, 2))


# ---- the operator ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_operators_pass_opcheck(draw, rank, dtype):
    x = draw(0).normal(2, 3, *[5] * rank).to(dtype)
    numbers = ([3] * rank, [2] * rank, [1] * rank, [1] * rank, True)
    for fmt in FORMATS[rank]:
        place = x.clone().contiguous(memory_format=fmt).requires_grad_()
        torch.library.opcheck(torch.ops.sparsight.soft_pool.default, (place, *numbers, False))
    grad = draw(1).normal(2, 3, *[3] * rank).to(dtype)
    operator = torch.ops.sparsight.soft_pool_backward.default
    torch.library.opcheck(operator, (grad, x, *numbers, True))


class Pooled(nn.Module):
    """A convolution between two poolings."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(soft_pool2d(x, 2, stride=1))
        return soft_pool2d(y, 3, stride=2, padding=1, ceil_mode=True, gradient="detached")


def test_compiled_module_equals_eager_with_gradients_and_one_graph(draw):
    layer, x = Pooled(), draw(0).normal(2, 3, 9, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    results = []
    for module in (layer, compiled):
        layer.zero_grad()
        y = module(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in layer.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_exported_module_equals_eager(draw):
    layer, x = Pooled().eval(), draw(0).normal(2, 3, 9, 8)
    exported = torch.export.export(layer, (x,))
    called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert "sparsight.soft_pool.default" in called
    assert torch.equal(exported.module()(x), layer(x))


def test_one_export_serves_every_size(draw):
    layer, x = Pooled().eval(), draw(0).normal(2, 3, 9, 8)
    size = {2: torch.export.Dim("height", min=6, max=64), 3: torch.export.Dim("width", min=6)}
    run = torch.export.export(layer, (x,), dynamic_shapes=({**size},), strict=False).module()
    for height, width in ((9, 8), (12, 17)):
        x = draw(1).normal(2, 3, height, width)
        assert torch.equal(run(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_leaves_the_dtype_alone_as_for_max_pool(draw, dtype):
    x = draw(0).normal(1, 4, 6, 6).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y, like = soft_pool2d(x, 2), F.max_pool2d(x, 2)
    assert y.dtype == like.dtype == dtype
    assert torch.equal(y, soft_pool2d(x, 2))
