"""Laws of `sampled_deform_conv2d`: the kernels on every instruction set, and the public door."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d as torchvision_deform

from sparsight.ops import (
    cpu,
    deform_reference,
    sampled_conv2d,
    sampled_deform_conv2d,
    sites_from_mask,
)
from sparsight.ops.conv import output_size

OPERATOR = torch.ops.sparsight.sampled_deform_conv2d.default


@dataclass
class DeformCase:
    """One sampled deformable convolution: tensors, numbers, and its truth in float64."""

    x: Tensor
    offset: Tensor
    weight: Tensor
    bias: Tensor | None
    modulation: Tensor | None
    residual: Tensor | None
    mask: Tensor
    relu: bool
    numbers: dict
    layout: str = "contiguous"

    def __str__(self) -> str:
        return (
            f"x {tuple(self.x.shape)} {self.layout}, weight {tuple(self.weight.shape)}, offset "
            f"{tuple(self.offset.shape)} to {self.offset.abs().max():.3g} px, {self.numbers}, "
            f"bias {self.bias is not None}, modulation {self.modulation is not None}, residual "
            f"{self.residual is not None}, relu {self.relu}, "
            f"density {self.mask.float().mean().item():.3g}"
        )

    def tensors(self) -> list[Tensor | None]:
        return [self.x, self.offset, self.weight, self.bias, self.modulation, self.residual]

    def _reference(self, tensors, mask, relu) -> Tensor:
        x, offset, weight, bias, modulation, residual = tensors
        return deform_reference.sampled_deform_conv2d(
            x,
            offset,
            weight,
            bias,
            mask,
            modulation=modulation,
            residual=residual,
            relu=relu,
            **self.numbers,
        )

    def run_reference(self, dtype: torch.dtype) -> Tensor:
        tensors = [None if t is None else t.to(dtype) for t in self.tensors()]
        return self._reference(tensors, self.mask, self.relu)

    def scale(self) -> Tensor:
        """sum |x| |modulation| |w| + |bias| + |residual|, mixed as the convolution mixes."""
        tensors = [None if t is None else t.double().abs() for t in self.tensors()]
        tensors[1] = self.offset.double()
        return self._reference(tensors, torch.ones_like(self.mask), False)

    def poisoned(self, x: Tensor | None) -> Tensor | None:
        """NaN off the sites."""
        return None if x is None else torch.where(self.mask, x, torch.nan)

    def run_kernel(self, layouts, isa: str = "auto", num_threads: int = 1) -> Tensor:
        """The kernel on an output that is NaN where it must write, all else NaN off the sites."""
        sites = sites_from_mask(self.mask)
        shape = (self.x.shape[0], self.weight.shape[0], *self.mask.shape[2:])
        out = layouts["guarded"](torch.where(self.mask, torch.nan, torch.zeros(shape)))
        place = layouts[self.layout]
        offset, modulation, residual = (
            None if t is None else place(self.poisoned(t))
            for t in (self.offset, self.modulation, self.residual)
        )
        made = cpu.sampled_deform_conv2d(
            place(self.x),
            offset,
            self.weight,
            self.bias,
            modulation,
            sites.index,
            sites.count,
            residual=residual,
            relu=self.relu,
            isa=isa,
            num_threads=num_threads,
            out=out,
            **self.numbers,
        )
        assert made is out
        return out

    def run(self, **changes) -> Tensor:
        """The public operator."""
        arguments = {
            "bias": self.bias,
            "modulation": self.modulation,
            "residual": self.residual,
            "activation": "relu" if self.relu else "none",
            "sites": sites_from_mask(self.mask),
            **self.numbers,
            **changes,
        }
        return sampled_deform_conv2d(self.x, self.offset, self.weight, **arguments)


def make_case(
    d,
    *,
    batch: int = 2,
    channels: int = 8,
    out_channels: int = 12,
    size: tuple[int, int] = (9, 11),
    kernel: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    offset_groups: int = 1,
    reach: float = 1.5,
    density: float | str = 0.5,
    bias: bool = True,
    modulated: bool = False,
    residual: bool = False,
    relu: bool = False,
    layout: str = "contiguous",
) -> DeformCase:
    out = output_size(size, kernel, stride, padding, dilation)
    taps = kernel[0] * kernel[1]
    return DeformCase(
        x=d.normal(batch, channels, *size),
        offset=d.normal(batch, 2 * offset_groups * taps, *out) * reach,
        weight=d.normal(out_channels, channels // groups, *kernel),
        bias=d.normal(out_channels) if bias else None,
        modulation=d.uniform(batch, offset_groups * taps, *out) if modulated else None,
        residual=d.normal(batch, out_channels, *out) if residual else None,
        mask=d.mask(batch, *out, density),
        relu=relu,
        numbers={"stride": stride, "padding": padding, "dilation": dilation},
        layout=layout,
    )


def draw_case(d, layouts) -> DeformCase:
    """Any: v1 and v2, every grouping, lane edges, offsets that leave the map, every density."""
    one_of = d.one_of
    while True:
        groups, offset_groups = one_of(1, 1, 2, 4, 8), one_of(1, 1, 2, 4)
        channels = max(groups, offset_groups) * one_of(1, 2, 3, 4, 8, 15, 16, 17)
        numbers = {
            "kernel": (one_of(1, 3, 3, 5), one_of(1, 2, 3, 3)),
            "stride": (one_of(1, 2), one_of(1, 2, 3)),
            "padding": (one_of(0, 1, 2), one_of(0, 1, 3)),
            "dilation": (one_of(1, 2), one_of(1, 4)),
        }
        size = (one_of(1, 5, 7, 12, 16), one_of(1, 4, 9, 17, 30))
        if min(output_size(size, *numbers.values())) >= 1:
            break
    return make_case(
        d,
        batch=one_of(1, 3),
        channels=channels,
        out_channels=one_of(channels, groups * one_of(1, 5, 16, 31, 33)),
        size=size,
        groups=groups,
        offset_groups=offset_groups,
        reach=one_of(0.0, 0.3, 2.0, 50.0),
        density=one_of(0.0, "one", 0.1, 0.5, 1.0),
        bias=one_of(True, False),
        modulated=one_of(True, False),
        residual=one_of(True, False),
        relu=one_of(True, False),
        layout=one_of(*layouts),
        **numbers,
    )


@pytest.fixture
def check(assert_within_bound, layouts, is_intact):
    def run(case: DeformCase, isa: str) -> None:
        made = case.run_kernel(layouts, isa)
        assert is_intact(made), f"written beside the output: {case}"
        truth, twin = case.run_reference(torch.float64), case.run_reference(torch.float32)
        note = f"{isa}: {case}"
        assert_within_bound("sampled_deform_conv2d", made, truth, twin, case.scale(), note)

    return run


@pytest.mark.parametrize("modulated", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("reach", [0.0, 1.5, 40.0])
@pytest.mark.parametrize(("groups", "offset_groups"), [(1, 1), (1, 4), (4, 2), (8, 1), (16, 16)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 1)])
def test_full_mask_equals_torchvision(
    draw, assert_within_bound, stride, groups, offset_groups, reach, modulated
):
    case = make_case(
        draw(0),
        channels=32,
        out_channels=32,
        stride=stride,
        padding=(2, 1),
        dilation=(2, 1),
        groups=groups,
        offset_groups=offset_groups,
        reach=reach,
        density=1.0,
        modulated=modulated,
    )
    truth, twin = (
        torchvision_deform(
            case.x.to(t),
            case.offset.to(t),
            case.weight.to(t),
            case.bias.to(t),
            mask=None if case.modulation is None else case.modulation.to(t),
            **case.numbers,
        )
        for t in (torch.float64, torch.float32)
    )
    assert_within_bound("sampled_deform_conv2d", case.run(), truth, twin, case.scale(), str(case))


@pytest.mark.parametrize("seeds", [range(k, k + 40) for k in range(0, 160, 40)], ids=str)
def test_kernel_equals_reference_on_random_cases(draw, layouts, check, isa, seeds):
    for seed in seeds:
        check(draw_case(draw(seed), layouts), isa)


@pytest.mark.parametrize("channels", [1, 7, 8, 9, 15, 16, 17, 31, 33, 65])
def test_kernel_is_right_at_lane_edges(draw, check, isa, channels):
    case = make_case(draw(channels), channels=channels, out_channels=channels, residual=True)
    check(case, isa)
    check(make_case(draw(1), channels=2 * channels, offset_groups=2, modulated=True), isa)


@pytest.mark.parametrize("density", ["one", 1.0])
def test_blocks_of_sites_meet(draw, check, isa, density):
    """Rows of 9 x 2048 channels: a block holds 24 of the 130 positions."""
    check(make_case(draw(2), batch=1, channels=2048, size=(10, 13), density=density), isa)


@pytest.mark.parametrize("num_threads", [2, 3])
def test_one_thread_equals_n_threads_bit_for_bit(draw, layouts, isa, num_threads):
    cases = [draw_case(draw(seed), layouts) for seed in range(300, 330)]
    cases.append(make_case(draw(3), channels=512, out_channels=256, size=(9, 9), batch=1))
    for case in cases:
        one = case.run_kernel(layouts, isa, 1)
        assert torch.equal(one, case.run_kernel(layouts, isa, num_threads)), str(case)


@pytest.mark.parametrize("groups", [1, 2, 16])
def test_zero_offsets_are_an_ordinary_convolution_bit_for_bit(draw, groups):
    case = make_case(draw(20), channels=16, out_channels=32, groups=groups, reach=0.0)
    sites = sites_from_mask(case.mask)
    expected = sampled_conv2d(
        case.x, case.weight, case.bias, sites=sites, groups=groups, **case.numbers
    )
    assert torch.equal(case.run(), expected)


@pytest.mark.parametrize("density", [0.0, "one", 0.1])
def test_output_is_exactly_zero_off_the_sites(draw, density):
    case = make_case(draw(4), density=density, residual=True, modulated=True)
    assert not torch.where(case.mask, 0.0, case.run()).any()


def test_nan_where_nobody_reads_never_arrives(draw, isa, layouts):
    """Whole-pixel offsets read one pixel each; the three others have weight zero."""
    case = make_case(draw(5), batch=1, channels=17, size=(12, 12), density="one")
    case.offset = case.offset.round()
    y, x = case.mask[0, 0].nonzero()[0].tolist()
    read = torch.zeros(12, 12, dtype=torch.bool)
    for tap in range(9):
        at_y = y - 1 + tap // 3 + int(case.offset[0, 2 * tap, y, x])
        at_x = x - 1 + tap % 3 + int(case.offset[0, 2 * tap + 1, y, x])
        if 0 <= at_y < 12 and 0 <= at_x < 12:
            read[at_y, at_x] = True
    case.x = torch.where(read, case.x, torch.nan)
    made = case.run_kernel(layouts, isa)
    assert made.isfinite().all()
    truth = case.run_reference(torch.float64)
    torch.testing.assert_close(made.double(), truth, rtol=1e-5, atol=1e-4)
    assert truth[:, :, y, x].abs().min() > 0


@pytest.mark.parametrize("what", ["x", "offset"])
def test_nan_that_is_read_arrives_in_kernel_and_reference(draw, isa, layouts, what):
    case = make_case(draw(6), batch=1, size=(7, 7), density=1.0, relu=True)
    if what == "x":
        case.x[:, :, 3, 3] = torch.nan
    else:
        case.offset[:, 7, 2, 4] = torch.nan
    expected = case.run_reference(torch.float32).isnan()
    assert torch.equal(case.run_kernel(layouts, isa).isnan(), expected)
    assert 0 < expected.sum() < expected.numel()
    if what == "offset":
        assert torch.equal(expected.any(1)[0].nonzero(), torch.tensor([[2, 4]]))


@pytest.mark.parametrize("far", [torch.inf, -torch.inf, 1e30, -3e9])
def test_points_far_outside_read_nothing(draw, isa, layouts, far):
    case = make_case(draw(7), batch=1, bias=True, density=1.0)
    case.offset.fill_(far)
    made = case.run_kernel(layouts, isa)
    assert torch.equal(made, case.bias[:, None, None].expand_as(made))
    assert torch.equal(case.run_reference(torch.float32), made)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_run_the_reference(draw, dtype):
    case = make_case(draw(8), modulated=True, residual=True, relu=True)
    expected = case.run_reference(dtype)
    case.x, case.offset, case.weight, case.bias, case.modulation, case.residual = (
        t.to(dtype) for t in case.tensors()
    )
    assert torch.equal(case.run(), expected)


def test_kernel_larger_than_the_tap_limit_runs_the_reference(draw):
    case = make_case(
        draw(9), batch=1, channels=2, size=(16, 16), kernel=(12, 12), padding=(5, 5), bias=False
    )
    assert torch.equal(case.run(), case.run_reference(torch.float32))


@pytest.mark.parametrize("density", [0.0, "one", 0.5])
@pytest.mark.parametrize("modulated", [False, True], ids=["v1", "v2"])
def test_gradcheck_of_every_input(draw, modulated, density):
    case = make_case(
        draw(10),
        batch=2,
        channels=2,
        out_channels=2,
        size=(3, 3),
        kernel=(2, 1),
        stride=(2, 1),
        padding=(1, 0),
        groups=2,
        offset_groups=2,
        density=density,
        modulated=modulated,
        residual=True,
    )
    inputs = [t.double().requires_grad_() for t in case.tensors() if t is not None]

    def run(x, offset, weight, bias, *rest):
        return sampled_deform_conv2d(
            x,
            offset,
            weight,
            bias,
            sites=sites_from_mask(case.mask),
            modulation=rest[0] if modulated else None,
            residual=rest[-1],
            **case.numbers,
        )

    torch.autograd.gradcheck(run, inputs)


def test_gradients_through_relu_equal_autograd_of_the_reference(draw):
    case = make_case(draw(11), modulated=True, residual=True, relu=True)
    made, expected = (
        [t.double().requires_grad_() for t in case.tensors()] for _ in ("operator", "reference")
    )
    x, offset, weight, bias, modulation, residual = made
    y = sampled_deform_conv2d(
        x,
        offset,
        weight,
        bias,
        sites=sites_from_mask(case.mask),
        modulation=modulation,
        residual=residual,
        activation="relu",
        **case.numbers,
    )
    truth = case._reference(expected, case.mask, True)
    grad = draw(12).normal(*y.shape).double()
    pairs = zip(
        torch.autograd.grad(y, made, grad), torch.autograd.grad(truth, expected, grad), strict=True
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


# opcheck reads .grad of tensors that it made itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(("relu", "dtype"), [(False, torch.float32), (True, torch.float64)])
def test_operators_pass_opcheck(draw, relu, dtype):
    case = make_case(draw(13), modulated=True, residual=True, groups=2, offset_groups=2)
    x, offset, weight, bias, modulation, residual = (t.to(dtype) for t in case.tensors())
    sites = sites_from_mask(case.mask)
    lists = (sites.index, sites.count, *(list(n) for n in case.numbers.values()))
    inputs = [t.requires_grad_() for t in (x, offset, weight, bias, modulation)]
    torch.library.opcheck(OPERATOR, (*inputs, *lists, residual.requires_grad_(), relu))
    torch.library.opcheck(OPERATOR, (*inputs[:3], None, None, *lists, None, relu))
    backward = torch.ops.sparsight.sampled_deform_conv2d_backward.default
    grad = torch.where(case.mask, torch.ones_like(residual), 0.0).detach()
    x, offset, weight, _, modulation = (t.detach() for t in inputs)
    torch.library.opcheck(backward, (grad, x, offset, weight, modulation, *lists))
    torch.library.opcheck(backward, (grad, x, offset, weight, None, *lists))


class Deformed(nn.Module):
    """Offsets computed at the sites, then the deformable convolution, as a detector chains them."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Conv2d(4, 18, 3, padding=1)
        self.conv = nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        sites = sites_from_mask(mask)
        offset = sampled_conv2d(x, self.offset.weight, self.offset.bias, sites=sites, padding=1)
        return sampled_deform_conv2d(
            x, offset, self.conv.weight, self.conv.bias, sites=sites, padding=1, activation="relu"
        )


def test_compiled_module_equals_eager_with_gradients_and_one_graph(draw):
    layer = Deformed()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    x, mask = draw(14).normal(2, 4, 9, 7), draw(15).mask(2, 9, 7, 0.4)
    results = []
    for module in (layer, compiled):
        layer.zero_grad()
        y = module(x, mask)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in layer.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_fake_tensors_have_the_shape_dtype_and_layout_of_real_ones(draw):
    x, mask = draw(16).normal(2, 4, 9, 7), draw(17).mask(2, 9, 7, 0.4)
    real, fake = Deformed()(x, mask), Deformed().to("meta")(x.to("meta"), mask.to("meta"))
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


GOOD = {
    "x": torch.ones(2, 4, 8, 8),
    "offset": torch.zeros(2, 18, 8, 8),
    "weight": torch.ones(6, 4, 3, 3),
    "sites": sites_from_mask(torch.ones(2, 1, 8, 8, dtype=torch.bool)),
    "padding": 1,
}

BAD_INPUTS = {
    "x rank": ({"x": torch.ones(4, 8, 8)}, ValueError, r"x has shape \(4, 8, 8\).*unsqueeze"),
    "offset rank": (
        {"offset": torch.zeros(18, 8, 8)},
        ValueError,
        r"offset has shape \(18, 8, 8\); \(2, 18, 8, 8\), or 18 channels for each of G offset "
        r"groups that divide 4, is needed: a convolution with the stride",
    ),
    "offset channels": ({"offset": torch.zeros(2, 27, 8, 8)}, ValueError, r"offset has shape"),
    "offset groups": ({"offset": torch.zeros(2, 54, 8, 8)}, ValueError, r"groups that divide 4"),
    "offset of nothing": ({"offset": torch.zeros(2, 0, 8, 8)}, ValueError, r"offset has shape"),
    "offset size": ({"offset": torch.zeros(2, 18, 8, 7)}, ValueError, r"\(2, 18, 8, 8\), or"),
    "offset dtype": (
        {"offset": torch.zeros(2, 18, 8, 8).double()},
        TypeError,
        r"offset has dtype torch\.float64 but x has torch\.float32.*offset\.to\(x\.dtype\)",
    ),
    "modulation shape": (
        {"modulation": torch.ones(2, 18, 8, 8)},
        ValueError,
        r"modulation has shape \(2, 18, 8, 8\) but offset has 1 groups; \(2, 9, 8, 8\) is needed",
    ),
    "modulation device": (
        {"modulation": torch.ones(2, 9, 8, 8, device="meta")},
        ValueError,
        r"modulation is on meta but x is on cpu",
    ),
    "channels": (
        {"x": torch.ones(2, 6, 8, 8)},
        ValueError,
        r"x has 6 channels, weight has shape \(6, 4, 3, 3\)",
    ),
    "stride": ({"stride": 0}, ValueError, r"stride is 0; an integer >= 1"),
    "sites": ({"stride": 2}, ValueError, r"sites describe a 8x8 grid.*build the mask at output"),
    "activation": ({"activation": "gelu"}, ValueError, r"activation is 'gelu'; 'none' or 'relu'"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_refused_with_its_name_and_a_way_out(name):
    changes, error, message = BAD_INPUTS[name]
    arguments = {**GOOD, **changes}
    tensors = [arguments.pop(key) for key in ("x", "offset", "weight")]
    with pytest.raises(error, match=r"^sampled_deform_conv2d: .*" + message):
        sampled_deform_conv2d(*tensors, **arguments)
