"""Laws of `assemble_windows` and `windows_inside`, and of the kernels for the CPU.

Truth is `assemble_reference`, which has its own test against the definition. A copy must be the
very numbers; a gradient as near to the sum in float64 as the table of tolerances says.
"""

import pytest
import torch
from torch import nn

from sparsight.measure import count_macs
from sparsight.ops import assemble as door
from sparsight.ops import assemble_reference as reference
from sparsight.ops import assemble_windows, cpu, windows_inside

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]
# As whole numbers of the same size: what is copied may be NaN.
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

# opcheck reads .grad of tensors that it made itself.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def bits(x):
    return x.contiguous().view(BITS[x.itemsize])


def as_patches(maps, windows, size):
    """What one writes without the operator: a window, and a bin of it, after another."""
    k = round(maps.shape[1] ** 0.5)
    edges = [-(-(2 * size * g - k) // (2 * k)) for g in range(k + 1)]
    out = maps.new_zeros(len(windows), size, size)
    for w, (image, top, left) in enumerate(windows.tolist()):
        for gy in range(k):
            for gx in range(k):
                i = slice(max(edges[gy], -top, 0), max(edges[gy + 1], 0))
                j = slice(max(edges[gx], -left, 0), max(edges[gx + 1], 0))
                part = maps[image, gy * k + gx][
                    max(top + i.start, 0) : max(top + i.stop, 0),
                    max(left + j.start, 0) : max(left + j.stop, 0),
                ]
                out[w, i.start : i.start + part.shape[0], j.start : j.start + part.shape[1]] = part
    return out


def test_equals_a_loop_over_windows_and_bins(draw):
    """On the maps of the paper's image, and for sizes that k does not divide."""
    d = draw(0)
    for k, size, height, width in (
        (5, 21, 75, 112),
        (3, 21, 40, 30),
        (7, 20, 33, 41),
        (4, 9, 8, 9),
    ):
        maps = d.normal(2, k * k, height, width)
        corner = d.uniform(60, 2) * torch.tensor([height + size, width + size]) - size
        image = (d.uniform(60, 1) * 2).floor()
        windows = torch.cat([image, corner.floor()], dim=1).long()
        assert torch.equal(
            assemble_windows(maps, windows, size=size), as_patches(maps, windows, size)
        )


# ---- the kernels ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_copy_is_that_of_the_reference_in_every_layout(
    draw, random_window_case, layouts, dtype
):
    for seed in range(20):
        case = random_window_case(draw(seed))
        maps = case.maps.to(dtype)
        truth = reference.assemble_windows(maps, *case.numbers())
        for name, place in layouts.items():
            for num_threads in (1, 3):
                # A map of NaN between NaN, as for the other kernels.
                out = layouts["guarded"](torch.full((1, *truth.shape), torch.nan, dtype=dtype))
                out = out.as_strided(truth.shape, truth.stride())
                made = cpu.assemble_windows(
                    place(maps), *case.numbers(), num_threads=num_threads, out=out
                )
                assert made is out
                assert torch.equal(made, truth), f"{name}, {case}"
                beside = made.as_strided((truth.numel() + 512,), (1,), made.storage_offset() - 256)
                assert beside[:256].isnan().all() and beside[-256:].isnan().all()


def test_any_strides_are_read_without_a_copy(draw):
    maps = draw(1).normal(3, 9, 6, 7)
    windows = torch.tensor([[0, 1, 1], [2, -1, 4], [1, 5, 6]])
    for strided in (
        maps.permute(0, 1, 3, 2),
        maps.flip(0)[:, :, ::2],
        maps[:1].expand(3, 9, 6, 7),
        maps[:, :1].expand(3, 9, 6, 7),
        maps[..., :1].expand(3, 9, 6, 7),
    ):
        truth = reference.assemble_windows(strided, windows, 5, True)
        assert torch.equal(cpu.assemble_windows(strided, windows, 5, True), truth)
    swapped = windows.flip(0)
    assert torch.equal(
        assemble_windows(maps, swapped, size=5), assemble_windows(maps, windows, size=5).flip(0)
    )
    columns = windows.t().contiguous().t()
    assert torch.equal(
        assemble_windows(maps, columns, size=5), assemble_windows(maps, windows, size=5)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_is_copied_as_it_is(dtype):
    """Infinities, and NaN with all of its bits."""
    words = torch.arange(-(2**15), 2**15)
    whole = {2: words, 4: words << 16 | 77, 8: words << 48 | 77}[dtype.itemsize]
    maps = whole.to(BITS[dtype.itemsize]).view(dtype).view(1, 1, 256, 256)
    made = assemble_windows(maps, torch.tensor([[0, 0, 0]]), size=256)
    assert torch.equal(bits(made), bits(maps[0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_is_within_its_bound_and_the_same_for_any_threads(
    draw, random_window_case, assert_within_bound, dtype
):
    rounding = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0.0
    for seed in range(20, 45):
        d = draw(seed)
        case = random_window_case(d)
        grad = d.normal(len(case.windows), case.size, case.size).to(dtype)
        numbers = case.backward_numbers()
        truth = reference.assemble_windows_backward(grad.double(), *numbers)
        twin = reference.assemble_windows_backward(grad.float(), *numbers)
        scale = reference.assemble_windows_backward(grad.double().abs(), *numbers)
        for memory_format in FORMATS:
            results = []
            for num_threads in (1, 2, 7):
                out = torch.full(case.maps.shape, torch.nan, dtype=dtype)
                out = out.contiguous(memory_format=memory_format)
                windows, shape, centred = numbers
                made = cpu.assemble_windows_backward(
                    grad, windows, shape, memory_format, centred, num_threads=num_threads, out=out
                )
                assert made is out
                results.append(made)
            # One rounding of a narrow dtype, of the sum; the table is that of float32.
            widest = scale + scale * rounding / (16 * torch.finfo(torch.float32).eps)
            assert_within_bound(
                "assemble_windows_backward", results[0], truth, twin, widest, f"{dtype}, {case}"
            )
            assert all(torch.equal(made, results[0]) for made in results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_several_bands_is_whole(draw, dtype):
    """Whole numbers, whose sums are exact; of more rows than one block of sums has."""
    d = draw(3)
    maps = torch.zeros(2, 25, 75, 112, dtype=dtype)
    corner = (d.uniform(120, 2) * torch.tensor([96.0, 133.0]) - 21).floor()
    windows = torch.cat([(d.uniform(120, 1) * 2).floor(), corner], dim=1).long()
    grad = (d.uniform(120, 21, 21) * 9 - 4).round().to(dtype)
    truth = reference.assemble_windows_backward(grad.double(), windows, maps.shape, True)
    for memory_format in FORMATS:
        for num_threads in (1, 2, 16):
            made = cpu.assemble_windows_backward(
                grad, windows, maps.shape, memory_format, True, num_threads=num_threads
            )
            assert made.is_contiguous(memory_format=memory_format)
            assert torch.equal(made.double(), truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32_and_rounded_once(draw, dtype):
    """Every number alone, and random pairs of them, as torch rounds."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    order = (draw(4).uniform(2**16)).argsort()
    pair = torch.stack([every, every[order]]).view(2, 256, 256)
    one, two = torch.tensor([[0, 0, 0]]), torch.zeros(2, 3, dtype=torch.int64)
    alone = cpu.assemble_windows_backward(
        pair[:1], one, (1, 1, 256, 256), torch.contiguous_format, True
    )
    together = cpu.assemble_windows_backward(
        pair, two, (1, 1, 256, 256), torch.contiguous_format, True
    )
    torch.testing.assert_close(alone[0], pair[:1], rtol=0, atol=0, equal_nan=True)
    expected = pair.float().sum(0, keepdim=True).to(dtype)
    torch.testing.assert_close(together[0], expected, rtol=0, atol=0, equal_nan=True)
    assert expected.isinf().sum() > pair.isinf().any(0).sum(), "no sum has overflowed"


def test_offsets_beyond_int32_are_right(tmp_path):
    """The third image lies 4 GiB after the first; in a sparse file."""
    count, far = 2**31 + 64, 2**30 + 16
    memory = torch.from_file(str(tmp_path / "map"), True, count, dtype=torch.float16)
    maps = memory.as_strided((3, 4, 2, 2), (far, 4, 2, 1))
    maps.copy_(torch.arange(48.0).view(3, 4, 2, 2))
    windows = torch.tensor([[2, 0, 0], [0, 0, 1], [2, -1, 1]])
    truth = reference.assemble_windows(maps.clone(), windows, 2, True)
    assert truth.any(dim=(1, 2)).all()
    assert torch.equal(assemble_windows(maps, windows, size=2), truth)


@pytest.mark.parametrize("image", [-1, 2, 2**62])
def test_a_window_that_names_no_image_is_refused(image):
    windows = torch.tensor([[0, 0, 0], [image, 0, 0]])
    with pytest.raises(ValueError, match=f"window 1 names image {image}, but score_maps hold 2"):
        assemble_windows(torch.zeros(2, 4, 5, 5), windows)
    with pytest.raises(ValueError, match=f"window 1 names image {image}"):
        cpu.assemble_windows_backward(
            torch.zeros(2, 3, 3), windows, (2, 4, 5, 5), torch.channels_last, True
        )


# ---- windows ----


def test_cells_outside_of_the_map_are_zero_and_told(draw, random_window_case):
    for seed in range(50, 65):
        case = random_window_case(draw(seed))
        maps = case.maps.abs() + 1
        bins = "centred" if case.centred else "floor"
        made = assemble_windows(maps, case.windows, size=case.size, bins=bins)
        height, width = maps.shape[2:]
        inside = windows_inside(case.windows, size=case.size, height=height, width=width)
        assert inside.shape == made.shape
        assert torch.equal(inside, made != 0)


def test_windows_wholly_outside_are_zero_wherever_they_lie():
    far = torch.iinfo(torch.int64)
    places = (far.min, -(2**33), -21, 9, 2**33, far.max)
    windows = torch.tensor([[0, y, x] for y in places for x in (3, *places)])
    maps = torch.ones(1, 9, 9, 9, requires_grad=True)
    made = assemble_windows(maps, windows)
    assert not made.any()
    made.sum().backward()
    assert maps.grad is not None and not maps.grad.any()


@pytest.mark.parametrize("k", [1, 3, 5, 7])
@pytest.mark.parametrize("size", [1, 6, 20, 21])
def test_centred_bins_mirror_with_the_image_for_odd_k(draw, k, size):
    """Mirrored maps, in mirrored order, give mirrored windows."""
    height, width = 24, 31
    maps = draw(k).normal(1, k * k, height, width)
    windows = torch.tensor([[0, 1, 2], [0, -5, 20], [0, 9, -3]])
    swapped = maps.unflatten(1, (k, k)).flip(2, 4).flatten(1, 2)
    across = windows.clone()
    across[:, 2] = width - size - windows[:, 2]
    made = assemble_windows(swapped, across, size=size)
    assert torch.equal(made, assemble_windows(maps, windows, size=size).flip(2))


def test_bins_are_the_one_asked_for(draw):
    maps = torch.arange(25.0).view(1, 25, 1, 1).expand(1, 25, 21, 21)
    windows = torch.tensor([[0, 0, 0]])
    first = [assemble_windows(maps, windows, bins=b)[0, 0] for b in ("centred", "floor")]
    assert first[0].long().bincount().tolist() == [4, 4, 5, 4, 4]
    assert first[1].long().bincount().tolist() == [5, 4, 4, 4, 4]


def test_neighbouring_windows_differ_only_where_a_cell_crosses_a_border(draw):
    """The paper's local coherence: of 21 columns, four change their map."""
    maps = draw(6).normal(1, 25, 40, 40)
    one, two = assemble_windows(maps, torch.tensor([[0, 8, 8], [0, 8, 9]]))
    # The same place in the image is one column further left in the second.
    differs = one[:, 1:] != two[:, :-1]
    assert differs.all(0).nonzero().flatten().tolist() == [3, 7, 12, 16]
    assert differs.any(0).sum() == 4


def test_a_window_smaller_than_k_reads_some_of_the_maps():
    maps = torch.arange(9.0).view(1, 9, 1, 1)
    assert assemble_windows(maps, torch.tensor([[0, 0, 0]]), size=1).item() == 4.0
    assert assemble_windows(maps, torch.tensor([[0, 0, 0]]), size=1, bins="floor").item() == 0.0


def test_no_windows_give_an_empty_result_with_a_gradient():
    windows = torch.empty(0, 3, dtype=torch.int64)
    for shape in ((2, 9, 5, 5), (0, 9, 5, 5), (1, 9, 0, 5)):
        for dtype in DTYPES:
            maps = torch.ones(shape, dtype=dtype, requires_grad=True)
            made = assemble_windows(maps, windows, size=7)
            assert made.shape == (0, 7, 7)
            made.sum().backward()
            assert maps.grad is not None
            assert maps.grad.shape == shape and not maps.grad.any()
    assert windows_inside(windows, size=7, height=5, width=5).shape == (0, 7, 7)


def test_maps_without_cells_are_outside_of_every_window():
    for shape in ((1, 4, 0, 5), (1, 4, 5, 0)):
        maps = torch.ones(shape, requires_grad=True)
        made = assemble_windows(maps, torch.tensor([[0, 0, 0]]), size=3)
        assert torch.equal(made, torch.zeros(1, 3, 3))
        made.sum().backward()
        assert maps.grad is not None and maps.grad.shape == shape


# ---- the door ----


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"maps": [1.0]}, TypeError, r"score_maps is list.*score_maps\.float\(\)"),
        ({"maps": torch.zeros(1, 4, 5, 5).long()}, TypeError, r"score_maps is torch\.int64"),
        ({"maps": torch.zeros(4, 5, 5)}, ValueError, r"shape \(4, 5, 5\); \(N, k \* k, H, W\)"),
        ({"maps": torch.zeros(1, 24, 5, 5)}, ValueError, r"24 channels; k \* k of them"),
        ({"maps": torch.zeros(1, 0, 5, 5)}, ValueError, r"0 channels; k \* k of them"),
        ({"windows": [[0, 0, 0]]}, TypeError, r"windows is list; a torch.int64 tensor"),
        ({"windows": torch.zeros(1, 3)}, TypeError, r"windows is torch.float32.*windows.long"),
        ({"windows": torch.zeros(3).long()}, ValueError, r"windows has shape \(3,\); \(M, 3\)"),
        ({"windows": torch.zeros(1, 4).long()}, ValueError, r"windows has shape \(1, 4\)"),
        ({"windows": torch.zeros(1, 3, device="meta").long()}, ValueError, "windows lie on meta"),
        ({"size": 0}, ValueError, "size is 0; an integer >= 1"),
        ({"size": 2.5}, ValueError, "size is 2.5"),
        ({"size": True}, ValueError, "size is True"),
        ({"bins": "round"}, ValueError, "bins is 'round'; 'centred' or 'floor' is needed"),
    ],
)
def test_messages_name_the_argument_and_what_came(change, error, words):
    given = {"maps": torch.zeros(1, 4, 5, 5), "windows": torch.zeros(1, 3).long()} | change
    maps, windows = given.pop("maps"), given.pop("windows")
    with pytest.raises(error, match=f"assemble_windows: .*{words}"):
        assemble_windows(maps, windows, **given)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"windows": torch.zeros(1, 3)}, TypeError, "windows is torch.float32"),
        ({"windows": torch.zeros(3, 1).long()}, ValueError, r"windows has shape \(3, 1\)"),
        ({"size": 0}, ValueError, "size is 0"),
        ({"height": -1}, ValueError, "height is -1; an integer >= 0"),
        ({"width": 3.0}, ValueError, "width is 3.0"),
    ],
)
def test_messages_of_windows_inside(change, error, words):
    given = {"windows": torch.zeros(1, 3).long(), "size": 3, "height": 4, "width": 5} | change
    with pytest.raises(error, match=f"windows_inside: {words}"):
        windows_inside(given.pop("windows"), **given)


# ---- the operator ----


@pytest.mark.parametrize("bins", ["centred", "floor"])
def test_gradients_are_the_true_ones_to_the_second_order(draw, bins):
    windows = torch.tensor([[0, 0, 0], [1, -1, 2], [1, 1, 1], [1, 1, 2], [0, 40, 3]])
    for memory_format in FORMATS:
        maps = draw(7).normal(2, 4, 3, 4).double().contiguous(memory_format=memory_format)
        maps.requires_grad_()

        def assembled(maps):
            return assemble_windows(maps, windows, size=3, bins=bins)

        assert torch.autograd.gradcheck(assembled, maps)
        # It is linear: only what stands around it has a second derivative.
        assert torch.autograd.gradgradcheck(lambda maps: assembled(maps).square(), maps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_pass_opcheck(draw, dtype):
    windows = torch.tensor([[0, 0, 0], [1, -2, 3], [1, 2, 2]])
    for memory_format in FORMATS:
        maps = draw(8).normal(2, 9, 5, 6).to(dtype).contiguous(memory_format=memory_format)
        operator = torch.ops.sparsight.assemble_windows.default
        torch.library.opcheck(operator, (maps.requires_grad_(), windows, 4, True))
        operator = torch.ops.sparsight.assemble_windows_backward.default
        grad = draw(9).normal(3, 4, 4).to(dtype).requires_grad_()
        is_rows = memory_format == torch.channels_last
        torch.library.opcheck(operator, (grad, windows, [2, 9, 5, 6], is_rows, True))


@pytest.mark.parametrize("shape", [(2, 9, 5, 6), (1, 4, 1, 1), (1, 1, 3, 3), (2, 4, 1, 3)])
def test_the_gradient_has_the_memory_format_of_the_maps(shape):
    windows = torch.tensor([[0, 0, 0]])
    for memory_format in FORMATS:
        maps = torch.ones(shape).contiguous(memory_format=memory_format).requires_grad_()
        (sent,) = torch.autograd.grad(assemble_windows(maps, windows, size=3).sum(), maps)
        assert sent.is_contiguous(memory_format=memory_format)


def test_nothing_of_the_maps_is_kept_for_the_gradient():
    maps, windows = torch.ones(1, 4, 5, 5, requires_grad=True), torch.tensor([[0, 1, 1]])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        assemble_windows(maps, windows, size=3)
    assert [x.data_ptr() for x in kept] == [windows.data_ptr()]


class Assembled(nn.Module):
    """The last layer before the assembling module, and a loss of its mask."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 9, 3, padding=1)

    def forward(self, x: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        maps = self.conv(x)
        height, width = maps.shape[2:]
        inside = windows_inside(windows, size=5, height=height, width=width)
        return assemble_windows(maps, windows, size=5).sigmoid() * inside


class Whole(nn.Module):
    """The same with windows of its own."""

    def __init__(self, inner: Assembled) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, WINDOWS)


WINDOWS = torch.tensor([[0, 1, 1], [1, -2, 4], [0, 6, 6]])


def test_compiled_module_equals_eager_with_gradients_and_one_graph(draw):
    layer, x = Assembled(), draw(0).normal(2, 3, 9, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    results = []
    for module in (layer, compiled):
        layer.zero_grad()
        y = module(x, WINDOWS)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in layer.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_compiled_module_refuses_a_window_of_no_image(draw):
    compiled = torch.compile(Assembled(), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="names image 2"):
        compiled(draw(0).normal(2, 3, 9, 8), torch.tensor([[2, 0, 0]]))


def test_one_export_serves_every_size_and_any_number_of_windows(draw):
    layer, x = Assembled().eval(), draw(0).normal(2, 3, 9, 8)
    dims = {
        "x": {
            2: torch.export.Dim("height", min=3, max=64),
            3: torch.export.Dim("width", min=3, max=64),
        },
        "windows": {0: torch.export.Dim("windows", max=4096)},
    }
    exported = torch.export.export(layer, (x, WINDOWS), dynamic_shapes=dims, strict=False)
    called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert "sparsight.assemble_windows.default" in called
    run = exported.module()
    for height, width, count in ((9, 8, 3), (12, 17, 2)):
        x = draw(1).normal(2, 3, height, width)
        windows = WINDOWS[:count]
        assert torch.equal(run(x, windows), layer(x, windows))


@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_leaves_the_dtype_alone(draw, dtype):
    maps = draw(0).normal(1, 4, 6, 6).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        made = assemble_windows(maps, WINDOWS[:1], size=3)
    assert torch.equal(made, assemble_windows(maps, WINDOWS[:1], size=3))


def test_it_multiplies_nothing(draw):
    layer, x = Assembled().eval(), draw(0).normal(2, 3, 9, 8)
    assert count_macs(Whole(layer).eval(), x).total == count_macs(layer.conv, x).total > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_torch_runs_where_there_is_no_kernel(draw, random_window_case, dtype):
    for seed in range(70, 80):
        d = draw(seed)
        case = random_window_case(d)
        maps = case.maps.to(dtype)
        truth = cpu.assemble_windows(maps, *case.numbers())
        assert torch.equal(door._assemble_any(maps, *case.numbers()), truth)
        grad = (d.uniform(*truth.shape) * 9).round().to(dtype)
        windows, shape, centred = case.backward_numbers()
        for is_rows, memory_format in enumerate(FORMATS):
            made = door._backward_any(grad, windows, shape, bool(is_rows), centred)
            sent = cpu.assemble_windows_backward(grad, windows, shape, memory_format, centred)
            assert torch.equal(made, sent) and made.stride() == sent.stride()
