"""Laws of the SoftPool kernels for the GPU: each is run twice.

- On a GPU, where there is one; else a visible skip.
- On the CPU in Triton's interpreter: `test_every_law_holds_in_the_interpreter` runs this file once
  more, in a process of its own.

The interpreter does not check types: `test_kernels_compile` takes the kernels through the whole
compiler, to machine code, without a GPU. Truth is `pool_reference` in float64.
"""

import functools
import math
import os

import pytest
import torch
import torch.nn.functional as F

from sparsight.ops import pool as door
from sparsight.ops import pool_reference as reference
from sparsight.ops import soft_pool1d, soft_pool2d, soft_pool3d

pytest.importorskip("triton", reason="triton is not installed: it comes with torch's CUDA wheels")

from sparsight.ops.triton import launch
from sparsight.ops.triton import pool as kernels

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INF = math.inf
SOFT_POOL = {1: soft_pool1d, 2: soft_pool2d, 3: soft_pool3d}
MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
FORMATS = {
    1: [torch.contiguous_format],
    2: [torch.contiguous_format, torch.channels_last],
    3: [torch.contiguous_format, torch.channels_last_3d],
}
# One rounding to the dtype; the interpreter cuts bfloat16 off where a GPU rounds.
ROUNDING = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 0.0, torch.float64: 0.0}

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
# numpy, in the place of a GPU, says so when it makes NaN or infinity; 3.9 announces a default.
pytestmark = [
    pytest.mark.filterwarnings("ignore:(invalid|overflow|divide|All-NaN).*:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def few_tiles(monkeypatch) -> None:
    """A GPU wants many small tiles, the interpreter, which takes its time for each, few large ones.

    `test_maps_of_several_tiles` has its own.
    """
    if IS_INTERPRETED:
        monkeypatch.setattr(kernels, "THREADS", 2048)
        monkeypatch.setattr(kernels, "TILE", 8192)


outside_only = pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter's process: laws only")


@outside_only
def test_every_law_holds_in_the_interpreter(run_in_interpreter):
    run_in_interpreter(__file__, 65)


# ---- cases ----

# Kernel size, stride, padding, dilation, ceil_mode; one number for all axes.
WINDOWS = {
    "2 apart, the end not read": (2, 2, 0, 1, False),
    "2 apart, over the end": (2, 2, 0, 1, True),
    "3 padded": (3, 3, 1, 1, False),
    "3 padded, over the end": (3, 3, 1, 1, True),
    "1 in 3, gaps": (1, 3, 0, 1, False),
    "2 in 3, gaps, dilated taps": (2, 3, 1, 2, True),
    "3 overlapping": (3, 2, 1, 1, False),
    "3 overlapping, a window dropped": (3, 2, 0, 1, True),
    "3 at every position": (3, 1, 1, 1, False),
    "2 at every position, dilated": (2, 1, 1, 3, False),
    "4 interleaved": (4, 2, 2, 2, True),
    "1": (1, 1, 0, 1, False),
}
SIZES = {1: (37,), 2: (8, 11), 3: (4, 5, 7)}


def numbers_of(name: str, rank: int):
    *each, ceil_mode = WINDOWS[name]
    return (*([n] * rank for n in each), ceil_mode)


def in_torch(x, numbers):
    """The formula as one writes it in torch, in the dtype of x: what its own error is."""
    u = reference._windows(x, -INF, *numbers)
    return torch.where(u.isinf(), 0.0, u.softmax(-1) * u).sum(-1)


def as_given(x, device, memory_format=torch.contiguous_format):
    return x.to(device).contiguous(memory_format=memory_format)


def forward(x, numbers, memory_format):
    """The kernel, into memory that holds NaN."""
    size = reference.output_size(x.shape[2:], *numbers)
    out = torch.full((*x.shape[:2], *size), torch.nan, dtype=x.dtype, device=x.device)
    out = out.contiguous(memory_format=memory_format)
    assert kernels.soft_pool(x, size, *numbers[:4], memory_format, out=out) is out
    return out


def backward(grad, x, numbers, memory_format, detached):
    """The kernel, into memory that holds NaN."""
    out = torch.full(x.shape, torch.nan, dtype=x.dtype, device=x.device)
    out = out.contiguous(memory_format=memory_format)
    kernels.soft_pool_backward(grad, x, *numbers[:4], memory_format, detached=detached, out=out)
    return out


def check(x, grad, numbers, memory_format, detached):
    """Raise unless forward and backward are as near to the truth as a kernel must be.

    At most twice the error of the formula in torch plus 8 ULP of the largest value; the gradient 16
    ULP of the largest sum of |g| w (1 + 2 |x|).
    """
    ulp = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    rounding = ROUNDING[x.dtype]
    wide = x.cpu().double()
    truth = reference.soft_pool(wide, *numbers)
    finite = truth.isfinite()
    y = forward(x, numbers, memory_format)
    assert y.is_contiguous(memory_format=memory_format)
    y = y.cpu().double()
    assert torch.equal(y[~finite], truth[~finite])
    twin = in_torch(wide.to(torch.promote_types(x.dtype, torch.float32)), numbers).double()
    largest = wide.abs().max()
    error = (y - truth)[finite].abs()
    bound = 2 * (twin - truth)[finite].abs() + 8 * ulp * largest + rounding * truth[finite].abs()
    assert (error <= bound).all(), (error - bound).max()
    sent = reference.soft_pool_backward(grad.cpu().double(), wide, *numbers, detached)
    weights = reference.soft_pool_backward(grad.cpu().double().abs(), wide, *numbers, True)
    made = backward(grad, x, numbers, memory_format, detached)
    assert made.is_contiguous(memory_format=memory_format)
    error = (made.cpu().double() - sent).abs()
    bound = 16 * ulp * weights.max() * (1 + 2 * largest) + rounding * sent.abs()
    assert (error <= bound).all(), (error - bound).max()


# ---- laws ----


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        *((name, rank) for rank in (1, 2) for name in WINDOWS),
        *((name, 3) for name in ("2 apart, over the end", "2 in 3, gaps, dilated taps")),
        *((name, 3) for name in ("3 overlapping", "2 at every position, dilated")),
    ],
)
def test_kernels_equal_the_reference(draw, device, name, rank):
    numbers = numbers_of(name, rank)
    for number, memory_format in enumerate(FORMATS[rank]):
        d = draw(number)
        x = as_given(d.normal(2, 3, *SIZES[rank]) * 3, device, memory_format)
        size = reference.output_size(x.shape[2:], *numbers)
        grad = as_given(d.normal(2, 3, *size), device, memory_format)
        check(x, grad, numbers, memory_format, detached=(number + rank) % 2 == 0)


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize(
    "numbers",
    [
        ([7, 6], [7, 6], [0, 0], [1, 1], False),  # more taps than one by one
        ([7, 5], [1, 2], [3, 1], [1, 1], True),
        ([3, 5], [3, 5], [1, 0], [1, 1], True),  # more than are unrolled
        ([4, 4], [2, 3], [0, 1], [1, 1], False),
    ],
)
def test_windows_of_many_taps(draw, device, numbers, detached):
    for number, memory_format in enumerate(FORMATS[2]):
        d = draw(number)
        x = as_given(d.normal(1, 18, 8, 7), device, memory_format)
        grad = as_given(
            d.normal(1, 18, *reference.output_size((8, 7), *numbers)), device, memory_format
        )
        check(x, grad, numbers, memory_format, detached)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["2 apart, over the end", "2 at every position, dilated"])
def test_every_dtype_is_read_and_written_as_it_is(draw, device, name, dtype):
    numbers = numbers_of(name, 2)
    for memory_format in FORMATS[2]:
        d = draw(1)
        x = as_given(d.normal(2, 5, 9, 7).to(dtype), device, memory_format)
        grad = as_given(d.normal(2, 5, *reference.output_size((9, 7), *numbers)).to(dtype), device)
        assert forward(x, numbers, memory_format).dtype == dtype
        check(x, grad, numbers, memory_format, detached=False)


@pytest.mark.parametrize("is_many", [False, True])
@pytest.mark.parametrize("name", ["2 apart, over the end", "3 overlapping"])
def test_maps_of_several_tiles(draw, device, monkeypatch, name, is_many):
    """Of both sizes of tiles, none of which divides the map."""
    monkeypatch.setattr(kernels, "MANY", 1 if is_many else 10**9)
    monkeypatch.setattr(kernels, "TILE", 128)
    monkeypatch.setattr(kernels, "THREADS", 64)
    numbers = numbers_of(name, 2)
    for memory_format in FORMATS[2]:
        d = draw(2)
        x = as_given(d.normal(1, 5, 11, 13), device, memory_format)
        grad = as_given(
            d.normal(1, 5, *reference.output_size((11, 13), *numbers)), device, memory_format
        )
        assert grad.numel() > kernels.TILE and grad.numel() % kernels.THREADS
        check(x, grad, numbers, memory_format, detached=False)


@pytest.mark.parametrize("name", ["2 apart, the end not read", "3 overlapping"])
def test_any_strides_are_read_where_they_lie(draw, device, name):
    numbers = numbers_of(name, 2)
    d = draw(3)
    big = as_given(d.normal(3, 8, 13, 30), device)
    size = reference.output_size((9, 11), *numbers)
    grads = (
        as_given(d.normal(1, 1, 1, 1), device).expand(2, 4, *size),
        as_given(d.normal(2, 4, *reversed(size)), device).transpose(2, 3),
    )
    views = (
        big[1:, 1::2, 2:11, 5:27:2],
        big[1:, 1::2, 2:13, 5:14].transpose(2, 3),
        big[:1, :4, :9, :11].expand(2, 4, 9, 11),
    )
    grads = (*grads, as_given(d.normal(2, 4, *size), device, torch.channels_last))
    for number, (x, grad) in enumerate(zip(views, grads, strict=True)):
        check(x, grad, numbers, FORMATS[2][number % 2], detached=False)


def test_features_of_any_size_neither_overflow_nor_vanish(device):
    values = torch.tensor([-1e4, -104.0, 12.0, 89.0, 1e4], device=device).view(1, 5, 1, 1)
    for dtype in ROUNDING:
        x = values.to(dtype).expand(1, 5, 4, 4)
        for name in ("2 apart, over the end", "3 overlapping"):
            y = forward(x, numbers_of(name, 2), torch.contiguous_format)
            assert (y == x[..., :2, :2]).all()
        numbers = numbers_of("2 apart, over the end", 2)
        sent = backward(torch.ones_like(y), x, numbers, torch.contiguous_format, False)
        assert (sent == 0.25).all()
    steps = torch.tensor([[[0.0, 1.0, 2.0, 3.0]]], device=device)
    numbers = ([4], [4], [0], [1], False)
    shifted, plain = (forward(x, numbers, torch.contiguous_format) for x in (steps + 1e4, steps))
    torch.testing.assert_close(shifted - 1e4, plain, rtol=0, atol=1e-3)
    ones = torch.ones(1, 1, 1, device=device)
    sent = [backward(ones, x, numbers, FORMATS[1][0], False) for x in (steps + 1e4, steps)]
    torch.testing.assert_close(sent[0], sent[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "numbers",
    [
        ([3, 2], [3, 2], [1, 0], [1, 1], True),
        ([3, 3], [2, 1], [1, 1], [1, 1], False),
        ([6, 7], [6, 7], [0, 0], [1, 1], False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinities_and_nan_are_those_of_the_reference(draw, device, numbers, dtype):
    """What is finite, too: infinities share, -inf and what underflows get exactly nothing."""
    d = draw(4)
    x = d.normal(2, 3, 12, 14)
    for value, share in ((INF, 0.05), (-INF, 0.3), (torch.nan, 0.02), (1e4, 0.1), (-1e4, 0.1)):
        x = torch.where(d.uniform(*x.shape) < share, value, x)
    x[0, 0] = -INF
    x[0, 1, :6] = torch.where(d.uniform(6, 14) < 0.2, INF, -INF)
    x = x.to(dtype)
    truth = reference.soft_pool(x.double(), *numbers)
    grad = d.normal(*truth.shape).to(dtype)
    bound = {"rtol": ROUNDING[dtype] + 1e-6, "atol": 1e-5, "equal_nan": True}
    for memory_format in FORMATS[2]:
        placed = as_given(x, device, memory_format)
        y = forward(placed, numbers, memory_format)
        torch.testing.assert_close(y.cpu().double(), truth, **bound)
        assert torch.equal(y.cpu().isnan(), F.max_pool2d(x, *numbers).isnan())
        for detached in (False, True):
            sent = reference.soft_pool_backward(grad.double(), x.double(), *numbers, detached)
            made = backward(as_given(grad, device), placed, numbers, memory_format, detached)
            torch.testing.assert_close(made.cpu().double(), sent, **bound)


def test_a_window_in_the_padding_altogether_is_minus_infinity_and_sends_nothing(device):
    """A map of two positions under a window with taps at -1 and 2."""
    x = torch.tensor([[[3.0, 5.0]]], device=device)
    numbers = ([2], [1], [1], [3], True)
    truth = reference.soft_pool(x.cpu(), *numbers)
    assert truth.shape[2] == 1 and truth.item() == -INF
    assert forward(x, numbers, torch.contiguous_format).item() == -INF
    for detached in (False, True):
        grad = torch.ones(1, 1, 1, device=device)
        sent = backward(grad, x, numbers, torch.contiguous_format, detached)
        assert (sent == 0).all()


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_an_empty_batch(device, rank):
    for memory_format in FORMATS[rank]:
        for name in ("2 apart, over the end", "3 overlapping"):
            numbers = numbers_of(name, rank)
            x = as_given(torch.zeros(0, 3, *SIZES[rank]), device, memory_format)
            y = forward(x, numbers, memory_format)
            assert y.shape == (0, 3, *reference.output_size(SIZES[rank], *numbers))
            assert backward(y, x, numbers, memory_format, False).shape == x.shape


@pytest.mark.parametrize("name", ["3 padded", "2 at every position, dilated"])
def test_wide_offsets_change_no_bit_and_neither_does_a_second_call(draw, device, monkeypatch, name):
    numbers = numbers_of(name, 2)
    d = draw(5)
    x, grad = d.normal(2, 3, 9, 10), d.normal(2, 3, *reference.output_size((9, 10), *numbers))
    for memory_format in FORMATS[2]:
        made = []
        for limit in (launch.MAX_INT32_OFFSET, launch.MAX_INT32_OFFSET, 0):
            monkeypatch.setattr(launch, "MAX_INT32_OFFSET", limit)
            placed = as_given(x, device, memory_format)
            y = forward(placed, numbers, memory_format)
            sent = backward(as_given(grad, device), placed, numbers, memory_format, False)
            made.append((y, sent))
        for y, sent in made[1:]:
            assert torch.equal(y, made[0][0])
            assert torch.equal(sent, made[0][1])
        monkeypatch.undo()


def test_offsets_beyond_int32_are_right(device, tmp_path):
    """The third image lies 4 GiB after the first, two strides that fit; in a sparse file."""
    count, far = 2**31 + 64, 2**30 + 16
    if device == "cpu":
        memory = torch.from_file(str(tmp_path / "map"), True, count, dtype=torch.float16)
    else:
        memory = torch.empty(count, dtype=torch.float16, device=device)
    x = memory.as_strided((3, 1, 8), (far, 8, 1))
    x.copy_(torch.arange(24.0).view(3, 1, 8))
    for name in ("2 apart, over the end", "3 overlapping"):
        numbers = numbers_of(name, 1)
        size = reference.output_size((8,), *numbers)
        check(x, torch.ones(3, 1, *size, device=device).half(), numbers, FORMATS[1][0], False)


def test_the_operators_run_the_kernels(draw, device, monkeypatch):
    """What torch calls on CUDA tensors, here on those of either device."""
    monkeypatch.setattr(door, "missing_for", lambda x: None)
    called = []
    for name in ("soft_pool", "soft_pool_backward"):
        real = getattr(kernels, name)
        monkeypatch.setattr(
            kernels, name, lambda *a, real=real, **k: called.append(real) or real(*a, **k)
        )
    numbers = numbers_of("3 overlapping, a window dropped", 2)
    for memory_format in FORMATS[2]:
        x = as_given(draw(6).normal(2, 3, 9, 10), device, memory_format)
        y = door._pool_cuda(x, *numbers, False)
        like = F.max_pool2d(x, *numbers)
        assert (y.shape, y.stride()) == (like.shape, like.stride())
        truth = reference.soft_pool(x.cpu().double(), *numbers)
        torch.testing.assert_close(y.cpu().double(), truth, rtol=0, atol=2e-6)
        sent = door._backward_cuda(torch.ones_like(y), x, *numbers, True)
        assert sent.stride() == x.stride()
        torch.testing.assert_close(sent.sum().item(), float(y.numel()), rtol=1e-5, atol=0)
    assert len(called) == 4


# ---- without a GPU, and outside the interpreter ----


@outside_only
@pytest.mark.parametrize(
    ("capability", "dtype", "is_int64"),
    [
        (75, torch.float16, False),
        (80, torch.bfloat16, True),
        (90, torch.float64, False),
    ],
)
def test_kernels_compile(monkeypatch, compile_only, capability, dtype, is_int64):
    """To machine code, with the arguments that the launchers give, but for the launch."""
    if is_int64:
        monkeypatch.setattr(launch, "MAX_INT32_OFFSET", 0)
    made = compile_only(capability)
    for name, memory_format in (
        ("2 apart, over the end", torch.channels_last),
        ("2 at every position, dilated", torch.contiguous_format),
    ):
        numbers = numbers_of(name, 2)
        x = torch.empty(1, 16, 9, 9, dtype=dtype).contiguous(memory_format=memory_format)
        size = reference.output_size((9, 9), *numbers)
        y = kernels.soft_pool(x, size, *numbers[:4], memory_format)
        kernels.soft_pool_backward(y, x, *numbers[:4], memory_format, detached=False)
    x = torch.empty(1, 16, 9, 9, dtype=dtype)
    kernels.soft_pool_backward(
        x[..., :1, :1], x, [9, 9], [9, 9], [0, 0], [1, 1], FORMATS[2][0], detached=True
    )
    names = [name for name, _ in made]
    assert names == [
        "soft_pool_kernel",
        "unpool_apart_kernel",
        "soft_pool_kernel",
        "soft_pool_kernel",
        "unpool_kernel",
        "unpool_apart_kernel",
    ]
    assert all(len(kernel.asm["cubin"]) > 0 for _, kernel in made)


# ---- on a GPU ----


def on_gpu(function):
    """Mark a test that only a GPU can run."""
    for mark in gpu:
        function = mark(function)
    return outside_only(function)


@on_gpu
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_operators_pass_opcheck_on_a_gpu(draw, rank):
    numbers = numbers_of("3 overlapping", rank)
    x = draw(8).normal(2, 3, *[5] * rank).cuda()
    for memory_format in FORMATS[rank]:
        place = x.clone().contiguous(memory_format=memory_format).requires_grad_()
        torch.library.opcheck(torch.ops.sparsight.soft_pool.default, (place, *numbers, False))
    operator = torch.ops.sparsight.soft_pool_backward.default
    grad = draw(9).normal(2, 3, *[3] * rank).cuda()
    torch.library.opcheck(operator, (grad, x, *numbers, True))


@on_gpu
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_gradient_is_the_true_one_on_a_gpu(draw, rank):
    x = draw(rank).normal(2, 2, *[4] * rank).double().cuda().requires_grad_()
    for stride in (2, 3):
        pool = functools.partial(SOFT_POOL[rank], kernel_size=3, stride=stride, padding=1)
        assert torch.autograd.gradcheck(pool, x)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_public_functions_run_the_kernels_on_a_gpu(draw, monkeypatch, dtype):
    """With the result and the memory format of max_pool; a fall-back would warn, an error here."""
    for rank, pool in SOFT_POOL.items():
        for memory_format in FORMATS[rank]:
            x = draw(rank).normal(2, 4, *SIZES[rank]).to(dtype).cuda()
            x = x.contiguous(memory_format=memory_format).requires_grad_()
            y = pool(x, 3, stride=2, padding=1)
            like = MAX_POOL[rank](x, 3, 2, 1)
            assert (y.dtype, y.shape, y.stride()) == (dtype, like.shape, like.stride())
            on_cpu = pool(x.detach().cpu().double(), 3, stride=2, padding=1)
            bound = {"rtol": ROUNDING[dtype], "atol": 2e-6 if dtype != torch.float64 else 1e-14}
            torch.testing.assert_close(y.detach().cpu().double(), on_cpu, **bound)
            y.sum().backward()
            assert x.grad is not None and x.grad.stride() == x.stride()


@on_gpu
def test_a_compiled_function_equals_eager_on_a_gpu(draw):
    x = draw(10).normal(2, 3, 9, 8).cuda().requires_grad_()
    pool = functools.partial(soft_pool2d, kernel_size=3, stride=2, padding=1)
    compiled = torch.compile(lambda x: pool(x).square(), fullgraph=True)
    sent = [torch.autograd.grad(f(x).sum(), x)[0] for f in (lambda x: pool(x).square(), compiled)]
    torch.testing.assert_close(sent[0], sent[1])


@on_gpu
def test_a_gpu_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    x = torch.ones(1, 1, 4, 4, device="cuda:1")
    assert (soft_pool2d(x, 2) == 1).all()
