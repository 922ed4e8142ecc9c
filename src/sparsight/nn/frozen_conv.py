"""The inference form of a dense convolution: packed weights, activation in the last store."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparsight.ops import block as block_ops
from sparsight.ops import cpu

__all__ = [
    "FrozenConv2d",
    "check_features",
    "dtype_note",
    "padding_of",
    "refusal_of_conv",
    "refusal_of_pool",
]

_MAX_POOLED_WEIGHTS = 1 << 16


class FrozenConv2d(nn.Module):
    """A dense convolution for inference on the CPU, with the kernel of the sampled ones.

    torch's own convolution repacks its weight at every call, and reads and writes the map once more
    for the activation and once for the pooling after it. Made by :func:`sparsight.freeze`.

    Attributes:
        source_conv: the convolution's shape, on no device: what `measure` counts.
        params: packed weight and bias, flat float32 buffer.
        spec: flat int64 buffer that describes them.
        dtype: what is computed in, torch.float32 or torch.bfloat16 (with float32 sums).
        output_dtype: what is returned: torch.float32, or `dtype`. May be set.

    Args:
        conv: a plain convolution, norm folded in already; not changed.
        relu: whether a ReLU follows.
        pool: the max pooling that follows, or None; only one that `refusal_of_pool` lets pass.
        dtype: see attributes.
    """

    params: Tensor
    spec: Tensor

    def __init__(
        self,
        conv: nn.Conv2d,
        *,
        relu: bool = False,
        pool: nn.MaxPool2d | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        reason = refusal_of_conv(conv)
        if reason is None and pool is not None:
            reason = refusal_of_pool(conv, pool)
        if reason is not None:
            raise ValueError(
                f"FrozenConv2d: the convolution cannot be frozen because {reason}; "
                "keep it as it is."
            )
        bias = conv.bias
        stage = block_ops.StageSpec(
            weight=conv.weight.detach(),
            bias=torch.zeros(conv.out_channels) if bias is None else bias.detach(),
            mask=-1,
            relu=relu,
            stride=(conv.stride[0], conv.stride[1]),
            padding=padding_of(conv),
            dilation=(conv.dilation[0], conv.dilation[1]),
            groups=conv.groups,
        )
        self.pool = None if pool is None else _pool_spec(pool)
        params, spec = block_ops.pack_block([], [stage], relu=relu, dtype=dtype, pool=self.pool)
        self.register_buffer("params", params)
        self.register_buffer("spec", spec)
        self.relu = relu
        self.dtype, self.output_dtype = dtype, torch.float32
        self.shape = block_ops.StageShape.of(stage)
        self.source_conv = self.shape
        self.settings = conv.extra_repr()
        self.eval()

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B O Ho Wo"]:
        """Convolve.

        Args:
            x: (B, C, H, W) float32, or bfloat16 where that is computed in; channels-last of the
                same dtype is read in place, everything else is copied.

        Returns:
            (B, O, Ho, Wo) channels-last, `output_dtype`.

        Raises:
            TypeError: `x` is of another dtype.
            ValueError: rank, channels, size or device are wrong.
            RuntimeError: a gradient is asked for.
        """
        check_features("FrozenConv2d", x, self.shape.in_channels, self.dtype)
        (size,) = block_ops.block_sizes([self.shape], (x.shape[2], x.shape[3]))
        if min(size) < 1:
            raise ValueError(
                f"FrozenConv2d: a {x.shape[2]}x{x.shape[3]} input is smaller than the kernel "
                f"{self.shape.kernel_size} with its padding; use a larger input."
            )
        size = size if self.pool is None else self.pool.output_size(size)
        if min(size) < 1:
            raise ValueError(
                f"FrozenConv2d: a {x.shape[2]}x{x.shape[3]} input leaves nothing of the pooling "
                f"after it, {self.pool}; use a larger input."
            )
        out, _, _ = block_ops.sampled_block(
            x.to(self.dtype),
            None,
            [],
            [],
            self.params,
            self.spec,
            output_shape=(x.shape[0], self.shape.out_channels, *size),
            mask_positions=0,
            output_dtype=self.output_dtype,
        )
        return out

    def extra_repr(self) -> str:
        """What was packed, for repr."""
        settings = self.settings + (", relu=True" if self.relu else "")
        if self.pool is not None:
            settings += f", max_pool={self.pool.kernel_size}, pool_stride={self.pool.stride}"
            settings += f", pool_padding={self.pool.padding}"
        return settings + dtype_note(self.dtype, self.output_dtype)

    def positions(self, x: Tensor) -> int:
        """Output positions of the convolution itself, over the batch, for `measure`."""
        (size,) = block_ops.block_sizes([self.shape], (x.shape[2], x.shape[3]))
        return x.shape[0] * size[0] * size[1]


def dtype_note(dtype: torch.dtype, output_dtype: torch.dtype) -> str:
    """What repr says of a layer that is not float32 throughout."""
    if dtype == torch.float32:
        return ""
    return f", dtype={dtype}, output_dtype={output_dtype}"


def check_features(layer: str, x: Tensor, in_channels: int, dtype: torch.dtype) -> None:
    """Raise unless a frozen layer can take `x`.

    Args:
        layer: class name, for the message.
        x: the features.
        in_channels: channels that the layer was built for.
        dtype: that the layer computes in; float32 is taken everywhere.

    Raises:
        TypeError: `x` is neither float32 nor `dtype`.
        ValueError: rank, channels or device are wrong.
        RuntimeError: a gradient is asked for.
    """
    if x.ndim != 4 or x.shape[1] != in_channels:
        raise ValueError(
            f"{layer}: features have shape {tuple(x.shape)}, but (B, {in_channels}, height, width) "
            "is needed; give it what the source layer takes."
        )
    if x.dtype not in (torch.float32, dtype):
        raise TypeError(
            f"{layer}: features have dtype {x.dtype}, but the layer was frozen for {dtype}; "
            "convert the input with x.float()."
        )
    if x.device.type != "cpu":
        raise ValueError(
            f"{layer}: features are on {x.device}, but the frozen layer runs on the CPU; move them "
            "with x.cpu(), or run the converted model on the device."
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{layer}: a gradient is asked for, but a frozen model is for inference; call it under "
            "torch.inference_mode(), and train the converted model."
        )


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _pool_spec(pool: nn.MaxPool2d) -> block_ops.PoolSpec:
    return block_ops.PoolSpec(_pair(pool.kernel_size), _pair(pool.stride), _pair(pool.padding))


def refusal_of_pool(conv: nn.Conv2d, pool: nn.MaxPool2d) -> str | None:
    """Why a max pooling cannot be computed in the call of the convolution before it, or None.

    A convolution of many weights would read them anew for every few rows: it stays by itself.
    """
    if pool.ceil_mode or pool.return_indices or _pair(pool.dilation) != (1, 1):
        return "its pooling has ceil_mode, return_indices or a dilation"
    if any(2 * p > k for p, k in zip(_pair(pool.padding), _pair(pool.kernel_size), strict=True)):
        return "its pooling pads by more than half a window"
    if math.prod(_pair(pool.kernel_size)) > cpu.MAX_TAPS:
        return f"its pooling window has more than {cpu.MAX_TAPS} positions"
    if conv.weight.numel() > _MAX_POOLED_WEIGHTS:
        return "it has too many weights to read them for every few rows that are pooled"
    return None


def refusal_of_conv(conv: nn.Conv2d) -> str | None:
    """Why a convolution cannot be packed, or None when it can."""
    if conv.weight.dtype != torch.float32:
        return f"its weights are {conv.weight.dtype} and the kernels are float32"
    if conv.weight.device.type != "cpu":
        return f"it is on {conv.weight.device} and the kernels run on the CPU"
    if conv.padding_mode != "zeros":
        return f"its padding_mode is {conv.padding_mode!r} and the kernels pad with zeros"
    if conv.kernel_size[0] * conv.kernel_size[1] > cpu.MAX_TAPS:
        return f"its kernel {conv.kernel_size} has more than {cpu.MAX_TAPS} taps"
    if conv.padding == "same" and any(
        d * (k - 1) % 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)
    ):
        return "padding='same' with an even kernel pads one side more than the other"
    return None


def padding_of(conv: nn.Conv2d) -> tuple[int, int]:
    """Zero padding of a convolution, vertical and horizontal, also where it is given by name."""
    if conv.padding == "valid":
        return 0, 0
    if conv.padding == "same":
        down, right = (
            d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)
        )
        return down, right
    down, right = conv.padding
    return int(down), int(right)
