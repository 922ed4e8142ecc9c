"""FrozenConv2d equals the convolution it was made from."""

import pytest
import torch
from torch import nn

from sparsight.nn.frozen_conv import FrozenConv2d, padding_of, refusal_of_conv

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
