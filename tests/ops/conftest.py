"""What the tests of the ops room share: the tolerance table, the ISA axis, random cases.

A kernel is judged against `ops.reference` in float64. Its error may be twice that of plain torch in
float32 on the same input, plus a stated number of float32 ULPs of a scale that each test names.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsight.ops import cpu, reference, sites_from_mask
from sparsight.ops.conv import output_size

ULP = torch.finfo(torch.float32).eps

# The one table of tolerances: ULPs of the scale, on top of twice torch's own error.
TOLERANCE_ULPS = {
    "sampled_conv2d": 2.0,  # scale: sum |x| |w| + |bias| + |residual|, per element
    "interpolate": 8.0,  # scale: largest feature in the map; a mean of at most 225 of them
    "interpolate_backward.features": 16.0,  # scale: largest gradient; sums over 225 windows
    "interpolate_backward.mask": 16.0,  # scale: mask_gradient_scale, per element
    "interpolate_backward.log_kernel": 32.0,  # the same as features; entries sum over the map
    "sampled_block": 4.0,  # scale: largest value of the output, after three convolutions
    "sampled_deform_conv2d": 4.0,  # scale: as sampled_conv2d, over the mixed |x| |modulation|
    "conv_backward": 4.0,  # torch's own backward on the masked gradient
    "assemble_windows_backward": 16.0,  # scale: sum |grad| of a cell, of 30 windows at most
}


ISAS = ("scalar", "avx2", "avx512")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    if request.param not in cpu.available_isas():
        pytest.skip(f"{request.param}: not available on this CPU or build")
    return request.param


def check_within_bound(
    op: str, actual: Tensor, truth: Tensor, twin: Tensor, scale: Tensor | float, note: object = ""
) -> None:
    """Raise AssertionError unless `actual` is as near to `truth` as the table demands.

    Args:
        op: row of TOLERANCE_ULPS.
        actual: what the kernel made, float32.
        truth: the reference in float64.
        twin: the reference in float32: what plain torch loses.
        scale: what an ULP is taken of, a number or per element.
        note: the case, for the message.
    """
    assert actual.shape == truth.shape, f"{op}: shape {actual.shape} != {truth.shape}, {note}"
    assert actual.isfinite().all(), f"{op}: {int((~actual.isfinite()).sum())} not finite, {note}"
    if not actual.numel():
        return
    torch_error = (twin.double() - truth).abs().max()
    bound = 2 * torch_error + TOLERANCE_ULPS[op] * ULP * torch.as_tensor(scale).double()
    error = (actual.double() - truth).abs()
    excess = (error - bound).max().item()
    assert excess <= 0, (
        f"{op}: error {error.max().item():.3g} is {excess:.3g} over its bound, {note}"
    )


@pytest.fixture
def assert_within_bound() -> Callable[..., None]:
    return check_within_bound


def guarded(x: Tensor) -> Tensor:
    """A channels-last copy of `x` inside a NaN-filled buffer: reading past its ends brings NaN."""
    margin = 256
    buffer = torch.full((x.numel() + 2 * margin,), torch.nan, dtype=x.dtype)
    b, c, h, w = x.shape
    view = buffer[margin : margin + x.numel()].view(b, h, w, c).permute(0, 3, 1, 2)
    return view.copy_(x)


def guard_is_intact(x: Tensor) -> bool:
    """Whether nothing was written beside a tensor made by `guarded`."""
    whole = torch.as_strided(x, (x.numel() + 512,), (1,), x.storage_offset() - 256)
    return bool(whole[:256].isnan().all() and whole[-256:].isnan().all())


@pytest.fixture
def is_intact() -> Callable[[Tensor], bool]:
    return guard_is_intact


def as_channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def as_slice(x: Tensor) -> Tensor:
    """The same values as a view into a larger map whose other entries are NaN."""
    b, c, h, w = x.shape
    big = torch.full((b, c + 3, h + 2, 2 * w), torch.nan, dtype=x.dtype)
    view = big[:, 1 : c + 1, 1 : h + 1, ::2]
    return view.copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels_last": as_channels_last,
    "guarded": guarded,
    "sliced": as_slice,
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.fixture
def layouts() -> dict[str, Callable[[Tensor], Tensor]]:
    return LAYOUTS


@dataclass
class Draw:
    """Seeded choices: the same seed gives the same case on any machine."""

    seed: int
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def one_of(self, *choices):
        return choices[int(torch.randint(len(choices), (), generator=self.generator))]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    def mask(self, batch: int, height: int, width: int, density: float | str) -> Tensor:
        """(B, 1, H, W) bool; density is a share, or "one" for a single site in each image."""
        if density == "one":
            mask = torch.zeros(batch, height * width, dtype=torch.bool)
            site = torch.randint(height * width, (batch, 1), generator=self.generator)
            return mask.scatter_(1, site, True).view(batch, 1, height, width)
        return self.uniform(batch, 1, height, width) < density


@pytest.fixture
def draw() -> Callable[[int], Draw]:
    return Draw


DENSITIES = (0.0, "one", 0.01, 0.5, 1.0)


@dataclass
class ConvCase:
    """One sampled convolution: tensors, numbers, and its truth in float64."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    mask: Tensor
    relu: bool
    numbers: dict
    layout: str = "contiguous"

    @property
    def size(self) -> tuple[int, int]:
        return self.mask.shape[2], self.mask.shape[3]

    def __str__(self) -> str:
        density = self.mask.float().mean().item()
        return (
            f"x {tuple(self.x.shape)} {self.layout}, weight {tuple(self.weight.shape)}, "
            f"{self.numbers}, bias {self.bias is not None}, residual {self.residual is not None}, "
            f"relu {self.relu}, density {density:.3g}"
        )

    def run_reference(self, dtype: torch.dtype) -> Tensor:
        x, weight, bias, residual = (
            None if t is None else t.to(dtype)
            for t in (self.x, self.weight, self.bias, self.residual)
        )
        return reference.sampled_conv2d(
            x, weight, bias, self.mask, residual=residual, relu=self.relu, **self.numbers
        )

    def scale(self) -> Tensor:
        """sum |x| |w| + |bias| + |residual| in float64: what rounding errors are relative to."""
        x, weight, bias, residual = (
            None if t is None else t.double().abs()
            for t in (self.x, self.weight, self.bias, self.residual)
        )
        return reference.sampled_conv2d(
            x, weight, bias, torch.ones_like(self.mask), residual=residual, **self.numbers
        )

    def run_kernel(self, isa: str = "auto", num_threads: int | None = 1) -> Tensor:
        """The kernel on an output that is NaN where it must write, in guarded memory."""
        sites = sites_from_mask(self.mask)
        shape = (self.x.shape[0], self.weight.shape[0], *self.size)
        out = guarded(torch.where(self.mask, torch.nan, torch.zeros(shape)))
        place = LAYOUTS[self.layout]
        made = cpu.sampled_conv2d(
            place(self.x),
            self.weight,
            self.bias,
            sites.index,
            sites.count,
            self.size,
            residual=None if self.residual is None else place(self.residual),
            relu=self.relu,
            isa=isa,
            num_threads=num_threads,
            out=out,
            **self.numbers,
        )
        assert made is out
        assert guard_is_intact(out), f"written beside the output: {self}"
        return out


def make_conv_case(
    draw: Draw,
    *,
    batch: int,
    in_channels: int,
    out_channels: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    density: float | str,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    bias: bool = True,
    residual: bool = False,
    relu: bool = False,
    layout: str = "contiguous",
) -> ConvCase:
    out = output_size(size, kernel, stride, padding, dilation)
    return ConvCase(
        x=draw.normal(batch, in_channels, *size),
        weight=draw.normal(out_channels, in_channels // groups, *kernel),
        bias=draw.normal(out_channels) if bias else None,
        residual=draw.normal(batch, out_channels, *out) if residual else None,
        mask=draw.mask(batch, *out, density),
        relu=relu,
        numbers={"stride": stride, "padding": padding, "dilation": dilation, "groups": groups},
        layout=layout,
    )


@pytest.fixture
def conv_case() -> Callable[..., ConvCase]:
    return make_conv_case


def draw_conv_case(draw: Draw) -> ConvCase:
    """Any convolution: odd sizes, lane edges, every kind of grouping, every density."""
    one_of = draw.one_of
    while True:
        groups = one_of(1, 1, 1, 2, 4, 8, 32)
        per_group = one_of(1, 2, 3, 4, 8, 15, 16, 17, 33) if groups < 32 else one_of(1, 2)
        out_per_group = one_of(per_group, per_group, 1, 5, 8, 16, 31, 32, 40)
        numbers = {
            "kernel": (one_of(1, 3, 3, 5), one_of(1, 2, 3, 3)),
            "stride": (one_of(1, 2), one_of(1, 2, 3)),
            "padding": (one_of(0, 1, 2), one_of(0, 1, 3)),
            "dilation": (one_of(1, 2), one_of(1, 4)),
        }
        size = (one_of(1, 5, 7, 12, 16), one_of(1, 4, 9, 17, 30))
        fits = min(output_size(size, *numbers.values())) >= 1
        if fits:
            break
    return make_conv_case(
        draw,
        batch=one_of(1, 3),
        in_channels=per_group * groups,
        out_channels=out_per_group * groups,
        size=size,
        density=one_of(*DENSITIES),
        groups=groups,
        bias=one_of(True, False),
        residual=one_of(True, False),
        relu=one_of(True, False),
        layout=one_of(*LAYOUTS),
        **numbers,
    )


@pytest.fixture
def random_conv_case() -> Callable[[Draw], ConvCase]:
    return draw_conv_case


def rbf(window: int, width: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logarithm of the published kernel without its constant: -width^2 d^2 / 2."""
    offset = torch.arange(window) - window // 2
    squared = offset[:, None] ** 2 + offset[None, :] ** 2
    return -(width**2) * squared.to(dtype) / 2


@pytest.fixture
def rbf_log_kernel() -> Callable[..., Tensor]:
    return rbf


@dataclass
class FillCase:
    """One interpolation: features, a mask of either kind, a kernel."""

    features: Tensor
    mask: Tensor
    log_kernel: Tensor
    eps: float | None
    layout: str = "contiguous"

    @property
    def hard(self) -> bool:
        return self.mask.dtype == torch.bool

    def __str__(self) -> str:
        return (
            f"features {tuple(self.features.shape)} {self.layout}, mask {self.mask.dtype} "
            f"mean {self.mask.float().mean().item():.3g}, window {self.log_kernel.shape[0]}, "
            f"eps {self.eps}"
        )

    def at(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        mask = self.mask if self.hard else self.mask.to(dtype)
        return self.features.to(dtype), mask, self.log_kernel.to(dtype)

    def poisoned(self) -> Tensor:
        """The features in the case's layout, NaN where a bool mask says that nobody reads."""
        x = torch.where(self.mask, self.features, torch.nan) if self.hard else self.features
        return LAYOUTS[self.layout](x)


def draw_fill_case(draw: Draw, *, channels: tuple[int, ...] = (1, 3, 15, 16, 17, 33, 64, 100)):
    one_of = draw.one_of
    height, width = one_of(1, 2, 7, 20), one_of(1, 3, 9, 23)
    batch = one_of(1, 3)
    hard = one_of(True, False)
    if hard:
        mask = draw.mask(batch, height, width, one_of(0.0, "one", 0.01, 0.1, 0.5, 1.0))
    else:
        spread = one_of(1.0, 4.0, 10.0)
        mask = torch.sigmoid(draw.normal(batch, 1, height, width) * spread)
        if one_of(True, False):
            mask = torch.where(mask < 0.3, 0.0, torch.where(mask > 0.9, 1.0, mask))
    window = one_of(1, 3, 7, 9, 15)
    log_kernel = one_of(
        rbf(window, one_of(0.3, 1.0, 3.0, 6.0)),
        draw.normal(window, window),
        torch.zeros(window, window),
    )
    features = draw.normal(batch, one_of(*channels), height, width)
    return FillCase(features, mask, log_kernel, one_of(None, None, 1e-5), one_of(*LAYOUTS))


@pytest.fixture
def random_fill_case() -> Callable[..., FillCase]:
    return draw_fill_case


def mask_gradient_scale(case: FillCase, grad: Tensor) -> Tensor:
    """sum_p dI_p/dM_q (|g_p| . |Y_q| + |g_p| . |I_p|): what cancels in the mask's gradient.

    dI/dM grows like 1/M, so that a rounding error of the difference does too.
    """
    features, mask, log_kernel = case.at(torch.float64)
    log_mask = mask.double().log()
    side, (height, width) = log_kernel.shape[0], features.shape[-2:]
    radius = side // 2
    padded_log = F.pad(log_mask, (radius,) * 4, value=-torch.inf)
    padded_features = F.pad(features.abs(), (radius,) * 4)
    windows = {
        (dy, dx): (..., slice(dy, dy + height), slice(dx, dx + width))
        for dy in range(side)
        for dx in range(side)
    }
    log_total = torch.stack([padded_log[w] + log_kernel[t] for t, w in windows.items()]).logsumexp(
        0
    )
    if case.eps is not None:
        log_total = log_total.logaddexp(torch.tensor(case.eps).double().log())
    filled = reference.interpolate(
        features.abs(), torch.zeros_like(log_mask) + mask, log_kernel, case.eps
    )
    through = (grad.double().abs() * filled).sum(1, keepdim=True)
    scale = torch.zeros_like(padded_log)
    for tap, window in windows.items():
        unit = (log_kernel[tap] - log_total).exp().clamp_max(2.0**80)
        direct = (grad.double().abs() * padded_features[window]).sum(1, keepdim=True)
        scale[window] += unit * (direct + through)
    inside = scale[..., radius : radius + height, radius : radius + width]
    return inside + through + (grad.abs() * features.abs()).sum(1, keepdim=True)


@pytest.fixture
def scale_of_mask_gradient() -> Callable[[FillCase, Tensor], Tensor]:
    return mask_gradient_scale


@dataclass
class WindowCase:
    """Score maps and windows that lie inside, across and wholly outside of them."""

    maps: Tensor
    windows: Tensor
    size: int
    centred: bool

    def __str__(self) -> str:
        return (
            f"maps {tuple(self.maps.shape)}, {len(self.windows)} windows of {self.size}, "
            f"centred {self.centred}"
        )

    def numbers(self) -> tuple[Tensor, int, bool]:
        """What the operator takes after the maps."""
        return self.windows, self.size, self.centred

    def backward_numbers(self) -> tuple[Tensor, tuple[int, ...], bool]:
        """What the reference of its gradient takes after the gradient."""
        return self.windows, tuple(self.maps.shape), self.centred


def draw_window_case(draw: Draw) -> WindowCase:
    k, size = draw.one_of(1, 2, 3, 5, 5, 7), draw.one_of(1, 2, 4, 6, 7, 9, 21)
    images, height, width = draw.one_of(1, 2, 3), draw.one_of(1, 4, 9, 26), draw.one_of(1, 5, 8, 27)
    count = draw.one_of(0, 1, 2, 9, 30)
    corners = [
        [
            draw.one_of(*range(images)),
            draw.one_of(*range(-size - 1, height + 2)),
            draw.one_of(*range(-size - 1, width + 2)),
        ]
        for _ in range(count)
    ]
    return WindowCase(
        draw.normal(images, k * k, height, width),
        torch.tensor(corners, dtype=torch.int64).view(count, 3),
        size,
        draw.one_of(True, False),
    )


@pytest.fixture
def random_window_case() -> Callable[[Draw], WindowCase]:
    return draw_window_case
