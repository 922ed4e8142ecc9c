"""FrozenConv2d equals the convolution it was made from."""

import pytest
import torch
from torch import nn

from sparsight.nn.frozen_conv import (
    FrozenConv2d,
    padding_of,
    refusal_of_conv,
    refusal_of_pool,
)
from sparsight.ops import cpu

CASES = [
    (nn.Conv2d(3, 64, 7, 2, 3, bias=False), (67, 101)),  # rows merged: a stem
    (nn.Conv2d(3, 16, 3, padding=1), (9, 8)),
    (nn.Conv2d(1, 8, (3, 5), padding=(1, 2)), (5, 7)),
    (nn.Conv2d(3, 5, (5, 2)), (6, 4)),
    (nn.Conv2d(3, 8, 3, dilation=2, padding=2), (9, 11)),
    (nn.Conv2d(64, 256, 1), (20, 30)),
    (nn.Conv2d(40, 21, 1), (5, 7)),
    (nn.Conv2d(32, 48, 3, 2, 1), (21, 33)),
    (nn.Conv2d(32, 32, 3, 1, 2, 2, groups=4), (21, 33)),
    (nn.Conv2d(20, 20, 3, padding="same", groups=20), (4, 9)),
]


@pytest.mark.parametrize(("conv", "size"), CASES, ids=str)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_frozen_equals_source(conv, size, relu, batch) -> None:
    torch.manual_seed(0)
    x = torch.randn(batch, conv.in_channels, *size)
    with torch.no_grad():
        exact = nn.functional.conv2d(
            x.double(),
            conv.weight.double(),
            None if conv.bias is None else conv.bias.double(),
            conv.stride,
            padding_of(conv),
            conv.dilation,
            conv.groups,
        )
        # Twice the error of torch's own convolution, and an ULP of the largest value.
        bound = 2 * (conv(x) - exact).abs().max() + 1.2e-7 * exact.abs().max()
        if relu:
            exact = exact.relu()
        y = FrozenConv2d(conv, relu=relu)(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert (y - exact).abs().max() <= bound


def test_bad_input_is_named() -> None:
    frozen = FrozenConv2d(nn.Conv2d(3, 4, 5))
    with pytest.raises(ValueError, match=r"\(B, 3, height, width\) is needed"):
        frozen(torch.randn(1, 4, 9, 9))
    with pytest.raises(ValueError, match="use a larger input"):
        frozen(torch.randn(1, 3, 4, 9))
    with pytest.raises(TypeError, match=r"convert the input with x.float\(\)"):
        frozen(torch.randn(1, 3, 9, 9).double())


def test_reasons_for_refusal() -> None:
    assert refusal_of_conv(nn.Conv2d(3, 4, 3)) is None
    assert "more than" in str(refusal_of_conv(nn.Conv2d(3, 4, 12)))
    assert "reflect" in str(refusal_of_conv(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")))
    assert "one side" in str(refusal_of_conv(nn.Conv2d(3, 4, 2, padding="same")))
    assert "float64" in str(refusal_of_conv(nn.Conv2d(3, 4, 3).double()))
    with pytest.raises(ValueError, match="keep it as it is"):
        FrozenConv2d(nn.Conv2d(3, 4, 12))


POOLS = [
    nn.MaxPool2d(3, 2, 1),
    nn.MaxPool2d(2),
    nn.MaxPool2d((3, 2), (1, 3), (1, 0)),
    nn.MaxPool2d(2, 5),  # rows between the windows that nobody reads
    nn.MaxPool2d(5, 1, 2),
]
NARROW = pytest.mark.skipif(not cpu.has_bfloat16(), reason="this CPU has no AVX-512 BF16")
DTYPES = [
    (torch.float32, torch.float32),
    pytest.param(torch.bfloat16, torch.float32, marks=NARROW),
    pytest.param(torch.bfloat16, torch.bfloat16, marks=NARROW),
]


@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize(("dtype", "output_dtype"), DTYPES)
def test_pooling_is_that_of_torch_bit_for_bit(pool, dtype, output_dtype) -> None:
    """A maximum rounds nothing. Sizes below and above what a worker pools at a time."""
    torch.manual_seed(0)
    for conv, size in [*CASES, (nn.Conv2d(3, 70, 3, 1, 1), (200, 301))]:
        if min(size) < 5:
            continue
        x = torch.randn(2, conv.in_channels, *size)
        plain = FrozenConv2d(conv, relu=True, dtype=dtype)
        pooled = FrozenConv2d(conv, relu=True, pool=pool, dtype=dtype)
        plain.output_dtype = pooled.output_dtype = output_dtype
        try:
            expected = pool(plain(x))
        except RuntimeError:
            with pytest.raises(ValueError, match="leaves nothing of the pooling"):
                pooled(x)
            continue
        made = pooled(x)
        assert made.dtype == output_dtype
        # The plain layer rounds to its output's dtype, the pooled one before it pools.
        if dtype == torch.bfloat16:
            expected = expected.bfloat16().to(output_dtype)
        assert torch.equal(made, expected), conv


@pytest.mark.parametrize("isa", cpu.available_isas())
def test_every_instruction_set_pools_alike_on_any_number_of_threads(isa) -> None:
    torch.manual_seed(0)
    conv, pool = nn.Conv2d(3, 21, 3, 2, 1), nn.MaxPool2d(3, 2, 1)
    x = torch.randn(2, 3, 151, 93).contiguous(memory_format=torch.channels_last)
    x[1, 2, 70, 40] = torch.nan
    layer = FrozenConv2d(conv, pool=pool)
    plain = FrozenConv2d(conv)
    results = []
    for threads in (1, 2, 3, 50):
        out, _, _ = cpu.sampled_block(
            x, None, [], [], layer.params, layer.spec, [2, 21, 38, 24], 0, isa=isa,
            num_threads=threads,
        )  # fmt: skip
        results.append(out)
        torch.testing.assert_close(out, results[0], rtol=0, atol=0, equal_nan=True)
    dense, _, _ = cpu.sampled_block(
        x, None, [], [], plain.params, plain.spec, [2, 21, 76, 47], 0, isa=isa, num_threads=1
    )
    torch.testing.assert_close(results[0], pool(dense), rtol=0, atol=0, equal_nan=True)
    assert results[0].isnan().any()


def test_reasons_to_leave_a_pooling_alone() -> None:
    conv = nn.Conv2d(3, 4, 3)
    assert refusal_of_pool(conv, nn.MaxPool2d(3, 2, 1)) is None
    for pool in (
        nn.MaxPool2d(2, ceil_mode=True),
        nn.MaxPool2d(2, return_indices=True),
        nn.MaxPool2d(2, dilation=2),
    ):
        assert "ceil_mode, return_indices or a dilation" in str(refusal_of_pool(conv, pool))
    assert "more than" in str(refusal_of_pool(conv, nn.MaxPool2d(12)))
    assert "too many weights" in str(refusal_of_pool(nn.Conv2d(256, 256, 3), nn.MaxPool2d(2)))
    with pytest.raises(ValueError, match="cannot be frozen because its pooling has ceil_mode"):
        FrozenConv2d(conv, pool=nn.MaxPool2d(2, ceil_mode=True))
