"""Laws of the assembling kernels for the GPU: each is run twice.

- On a GPU, where there is one; else a visible skip.
- On the CPU in Triton's interpreter: `test_every_law_holds_in_the_interpreter` runs this file once
  more, in a process of its own.

The interpreter does not check types: `test_kernels_compile` takes the kernels through the whole
compiler, to machine code, without a GPU. Truth is `assemble_reference`; a copy is the same numbers.
"""

import os

import pytest
import torch

from sparsight.ops import assemble as door
from sparsight.ops import assemble_reference as reference
from sparsight.ops import assemble_windows, cpu

pytest.importorskip("triton", reason="triton is not installed: it comes with torch's CUDA wheels")

from sparsight.ops.triton import assemble as kernels
from sparsight.ops.triton import launch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]

pytestmark = [
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
outside_only = pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter's process: laws only")


@pytest.fixture(autouse=True)
def few_tiles(monkeypatch) -> None:
    """A GPU wants many small tiles, the interpreter, which takes its time for each, few large ones.

    `test_the_gradient_of_several_tiles_is_whole` has its own.
    """
    if IS_INTERPRETED:
        monkeypatch.setattr(kernels, "BLOCK", 8192)
        monkeypatch.setattr(kernels, "TILE_Y", 32)
        monkeypatch.setattr(kernels, "TILE_X", 32)


@outside_only
def test_every_law_holds_in_the_interpreter(run_in_interpreter):
    run_in_interpreter(__file__, 17)


def forward(maps, case):
    """The kernel, into memory that holds NaN."""
    shape = (len(case.windows), case.size, case.size)
    out = torch.full(shape, torch.nan, dtype=maps.dtype, device=maps.device)
    windows = case.windows.to(maps.device)
    assert kernels.assemble_windows(maps, windows, case.size, case.centred, out=out) is out
    return out


def backward(grad, case, memory_format):
    """The kernel, into memory that holds NaN."""
    shape = tuple(case.maps.shape)
    out = torch.full(shape, torch.nan, dtype=grad.dtype, device=grad.device)
    out = out.contiguous(memory_format=memory_format)
    windows = case.windows.to(grad.device)
    kernels.assemble_windows_backward(grad, windows, shape, memory_format, case.centred, out=out)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_copy_is_that_of_the_reference_in_every_layout(
    draw, device, random_window_case, layouts, dtype
):
    for seed in range(8):
        case = random_window_case(draw(seed))
        maps = case.maps.to(dtype).to(device)
        truth = reference.assemble_windows(case.maps.to(dtype), *case.numbers())
        for name in ("contiguous", "channels_last", "transposed"):
            assert torch.equal(forward(layouts[name](maps), case).cpu(), truth), f"{name}, {case}"
        every_second = maps.repeat_interleave(2, 3)[..., ::2]
        assert torch.equal(forward(every_second, case).cpu(), truth), str(case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_is_that_of_the_kernel_for_the_cpu(draw, device, random_window_case, dtype):
    """Bit for bit: both sum in the order of the windows, but for how the interpreter rounds."""
    for seed in range(20, 28):
        d = draw(seed)
        case = random_window_case(d)
        grad = d.normal(len(case.windows), case.size, case.size).to(dtype)
        if dtype.itemsize == 2:  # the interpreter cuts bfloat16 off: sums that need no rounding
            grad = (grad * 2).round().clamp(-8, 8)
        windows, shape, centred = case.backward_numbers()
        for memory_format in FORMATS:
            truth = cpu.assemble_windows_backward(grad, windows, shape, memory_format, centred)
            made = backward(grad.to(device), case, memory_format)
            assert made.is_contiguous(memory_format=memory_format)
            assert torch.equal(made.cpu(), truth), str(case)


def test_a_gradient_of_any_strides_is_read(draw, device, random_window_case):
    case = random_window_case(draw(23))
    case.windows = torch.tensor([[0, 0, 0], [0, 1, 1]])
    ones = torch.ones((), device=device).expand(2, case.size, case.size)
    made = backward(ones, case, torch.contiguous_format)
    windows, shape, centred = case.backward_numbers()
    truth = reference.assemble_windows_backward(ones.cpu(), windows, shape, centred)
    assert torch.equal(made.cpu(), truth)
    turned = draw(24).normal(2, case.size, case.size).to(device).transpose(1, 2)
    made = backward(turned, case, torch.contiguous_format)
    truth = reference.assemble_windows_backward(turned.cpu(), windows, shape, centred)
    torch.testing.assert_close(made.cpu(), truth)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_the_gradient_of_several_tiles_is_whole(draw, device, monkeypatch, memory_format):
    """Tiles that the map does not fill, and more channels than one block has."""
    monkeypatch.setattr(kernels, "BLOCK", 64)
    monkeypatch.setattr(kernels, "TILE_Y", 4)
    monkeypatch.setattr(kernels, "TILE_X", 8)
    windows = torch.tensor([[1, -3, 5], [0, 4, 9], [1, 2, 2], [1, 2, 3], [0, 30, 3]])
    shape = (2, 49, 9, 19)
    maps = draw(1).normal(*shape).to(device)
    truth = reference.assemble_windows(maps.cpu(), windows, 8, True)
    made = kernels.assemble_windows(maps, windows.to(device), 8, True)
    assert torch.equal(made.cpu(), truth)
    grad = draw(2).normal(5, 8, 8)
    truth = cpu.assemble_windows_backward(grad, windows, shape, memory_format, True)
    made = kernels.assemble_windows_backward(
        grad.to(device), windows.to(device), shape, memory_format, True
    )
    assert torch.equal(made.cpu(), truth)


def test_a_window_of_no_image_is_zero_and_sends_nothing(device):
    windows = torch.tensor([[-1, 0, 0], [2, 0, 0], [2**40, 1, 1], [1, 1, 1]], device=device)
    maps = torch.ones(2, 9, 5, 5, device=device)
    made = kernels.assemble_windows(maps, windows, 3, True).cpu()
    assert not made[:3].any() and made[3].all()
    sent = kernels.assemble_windows_backward(
        torch.ones(4, 3, 3, device=device), windows, maps.shape, torch.contiguous_format, True
    )
    assert sent.sum() == 9 and sent[1].sum() == 9


def test_windows_wholly_outside_are_zero_wherever_they_lie(device):
    far = torch.iinfo(torch.int64)
    places = (far.min, -(2**33), -21, 9, 2**33, far.max)
    windows = torch.tensor([[0, y, x] for y in places for x in (3, *places)], device=device)
    maps = torch.ones(1, 9, 9, 9, device=device)
    assert not kernels.assemble_windows(maps, windows, 21, True).any()
    grad = torch.ones(len(windows), 21, 21, device=device)
    sent = kernels.assemble_windows_backward(
        grad, windows, maps.shape, torch.contiguous_format, True
    )
    assert not sent.any()


def test_nothing_to_copy(device):
    no_windows = torch.empty(0, 3, dtype=torch.int64, device=device)
    one = torch.zeros(1, 3, dtype=torch.int64, device=device)
    for shape in ((2, 9, 5, 5), (1, 4, 0, 5), (0, 4, 5, 5)):
        maps = torch.ones(shape, device=device)
        for windows in (no_windows, one):
            made = kernels.assemble_windows(maps, windows, 7, True)
            assert made.shape == (len(windows), 7, 7)
            assert maps.numel() or not made.any()
            sent = kernels.assemble_windows_backward(made, windows, shape, FORMATS[0], True)
            assert sent.shape == shape
        sent = kernels.assemble_windows_backward(
            torch.ones(0, 7, 7, device=device), no_windows, shape, FORMATS[1], True
        )
        assert not sent.any()


def test_wide_offsets_change_no_bit_and_neither_does_a_second_call(
    draw, device, random_window_case, monkeypatch
):
    case = random_window_case(draw(34))
    maps = case.maps.to(device)
    grad = draw(35).normal(len(case.windows), case.size, case.size).to(device)
    assert len(grad)
    for memory_format in FORMATS:
        made = []
        for limit in (launch.MAX_INT32_OFFSET, launch.MAX_INT32_OFFSET, 0):
            monkeypatch.setattr(launch, "MAX_INT32_OFFSET", limit)
            made.append((forward(maps, case), backward(grad, case, memory_format)))
        for pair in made[1:]:
            assert all(torch.equal(*both) for both in zip(pair, made[0], strict=True))
        monkeypatch.undo()


def test_offsets_beyond_int32_are_right(device, tmp_path):
    """The third image lies 4 GiB after the first, two strides that fit; in a sparse file."""
    count, far = 2**31 + 64, 2**30 + 16
    if device == "cpu":
        memory = torch.from_file(str(tmp_path / "map"), True, count, dtype=torch.float16)
    else:
        memory = torch.empty(count, dtype=torch.float16, device=device)
    maps = memory.as_strided((3, 4, 2, 2), (far, 4, 2, 1))
    maps.copy_(torch.arange(48.0).view(3, 4, 2, 2))
    windows = torch.tensor([[2, 0, 0], [0, 0, 1], [2, -1, 1]])
    truth = reference.assemble_windows(maps.cpu().clone(), windows, 2, True)
    made = kernels.assemble_windows(maps, windows.to(device), 2, True)
    assert torch.equal(made.cpu(), truth)


def test_the_operators_run_the_kernels(draw, device, monkeypatch):
    """What torch calls on CUDA tensors, here on those of either device."""
    monkeypatch.setattr(door, "missing_for", lambda x: None)
    called = []
    for name in ("assemble_windows", "assemble_windows_backward"):
        real = getattr(kernels, name)
        monkeypatch.setattr(
            kernels, name, lambda *a, real=real, **k: called.append(real) or real(*a, **k)
        )
    maps = draw(6).normal(2, 9, 9, 10)
    windows = torch.tensor([[0, 1, 1], [1, -1, 8]])
    made = door._assemble_cuda(maps.to(device), windows.to(device), 4, True)
    assert torch.equal(made.cpu(), reference.assemble_windows(maps, windows, 4, True))
    for is_rows, memory_format in enumerate(FORMATS):
        sent = door._backward_cuda(made, windows.to(device), [2, 9, 9, 10], bool(is_rows), True)
        truth = cpu.assemble_windows_backward(
            made.cpu(), windows, (2, 9, 9, 10), memory_format, True
        )
        assert torch.equal(sent.cpu(), truth) and sent.stride() == truth.stride()
    assert len(called) == 3


# ---- without a GPU, and outside the interpreter ----


@outside_only
@pytest.mark.parametrize(
    ("capability", "dtype", "is_int64"),
    [
        (75, torch.float16, False),
        (80, torch.bfloat16, True),
        (90, torch.float64, False),
        (90, torch.float32, False),
    ],
)
def test_kernels_compile(monkeypatch, compile_only, capability, dtype, is_int64):
    """To machine code, with the arguments that the launchers give, but for the launch."""
    if is_int64:
        monkeypatch.setattr(launch, "MAX_INT32_OFFSET", 0)
    made = compile_only(capability)
    for (channels, size, centred), memory_format in zip(
        ((25, 21, True), (49, 20, False)), FORMATS, strict=True
    ):
        maps = torch.empty(2, channels, 9, 9, dtype=dtype).contiguous(memory_format=memory_format)
        windows = torch.zeros(3, 3, dtype=torch.int64)
        out = kernels.assemble_windows(maps, windows, size, centred)
        kernels.assemble_windows_backward(out, windows, maps.shape, memory_format, centred)
    assert [name for name, _ in made] == ["assemble_kernel", "disassemble_kernel"] * 2
    assert all(len(kernel.asm["cubin"]) > 0 for _, kernel in made)


# ---- on a GPU ----


@outside_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_public_function_runs_the_kernels_on_a_gpu(draw, device, dtype):
    """With the copy and the gradient of the CPU; a fall-back would warn, an error here."""
    d = draw(9)
    maps = d.normal(2, 25, 20, 30).to(dtype)
    windows = torch.tensor([[1, 2, 3], [0, -4, 5], [0, -3, 5], [1, 9, 20]])
    grad = d.normal(4, 21, 21).to(dtype)
    for memory_format in FORMATS:
        results = []
        for place in ("cpu", device):
            leaf = maps.to(place).contiguous(memory_format=memory_format).requires_grad_()
            made = assemble_windows(leaf, windows.to(place))
            (sent,) = torch.autograd.grad(made, leaf, grad.to(place))
            assert sent.stride() == leaf.stride()
            results.append((made.detach().cpu(), sent.cpu()))
        assert all(torch.equal(*both) for both in zip(*results, strict=True))


@outside_only
def test_operators_pass_opcheck_and_gradcheck_on_a_gpu(draw, device):
    windows = torch.tensor([[0, 0, 0], [1, -2, 3], [1, 2, 2]], device=device)
    for memory_format in FORMATS:
        maps = draw(8).normal(2, 9, 5, 6).double().to(device).contiguous(
            memory_format=memory_format
        ).requires_grad_()  # fmt: skip
        operator = torch.ops.sparsight.assemble_windows.default
        torch.library.opcheck(operator, (maps, windows, 4, True))
        assert torch.autograd.gradcheck(lambda maps: assemble_windows(maps, windows, size=4), maps)
        assert torch.autograd.gradgradcheck(
            lambda maps: assemble_windows(maps, windows, size=4), maps
        )
