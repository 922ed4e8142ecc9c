"""From tensors to kernel calls: layouts, pointers, instruction set and threads.

Arguments have passed the public door of the op; here only memory is arranged. `isa` is "auto" or
one of `available_isas()`, `num_threads` None takes `torch.get_num_threads()`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsight import _kernels

MAX_TAPS: int = _kernels.MAX_TAPS
MAX_WINDOW: int = _kernels.MAX_WINDOW
MAX_MERGED: int = _kernels.MAX_MERGED


def available_isas() -> list[str]:
    """Instruction sets that this machine runs, from the plainest to the fastest."""
    return _kernels.available_isas()


def has_bfloat16() -> bool:
    """Whether this CPU and this build have the kernels for bfloat16 maps (AVX-512 BF16)."""
    return _kernels.has_bfloat16()


def threading_runtime() -> str:
    """File name of the OpenMP runtime that the kernels share with torch, or "std::thread"."""
    return _kernels.threading_runtime()


def _threads(num_threads: int | None) -> int:
    if num_threads is None:
        return torch.get_num_threads()
    if num_threads < 1:
        raise ValueError(f"num_threads is {num_threads}; at least 1 is needed.")
    return num_threads


def _rows(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _new_map(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uninitialised (B, C, H, W) channels-last; large ones from buffers used before."""
    batch, channels, height, width = shape
    if batch * channels * height * width * dtype.itemsize < _kernels.POOLED_BYTES:
        return torch.empty(tuple(shape), dtype=dtype, memory_format=torch.channels_last)
    return _kernels.new_map(batch, channels, height, width, dtype == torch.bfloat16)


def drop_buffers() -> int:
    """Free the output buffers that are kept for the next call; returns how many bytes they held.

    At most 64 buffers and 1 GiB are kept.
    """
    return _kernels.drop_buffers()


def sites_from_mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Kernel form of `reference.sites_from_mask`."""
    mask = mask.contiguous()
    positions = mask.shape[2] * mask.shape[3]
    index = torch.empty((mask.shape[0], positions), dtype=torch.int32)
    count = torch.empty(mask.shape[0], dtype=torch.int32)
    _kernels.list_sites_and_holes(
        mask.data_ptr(), mask.shape[0], positions, index.data_ptr(), count.data_ptr()
    )
    return index, count


def geometry(
    weight_shape: tuple[int, ...],
    input_size: tuple[int, int],
    output_size: tuple[int, int],
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> list[int]:
    """The 15 integers of `ConvGeometry`, in its order."""
    out_channels, in_per_group, *kernel = weight_shape
    return [
        *input_size,
        *output_size,
        in_per_group * groups,
        out_channels,
        groups,
        *kernel,
        *stride,
        *padding,
        *dilation,
    ]


def sampled_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    count: Tensor,
    output_size: tuple[int, int],
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    residual: Tensor | None,
    relu: bool,
    isa: str = "auto",
    num_threads: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Float32 kernel form of `reference.sampled_conv2d`; `out` (channels-last) must hold zeros.

    Weights are packed at each call; `freeze` packs them once.
    """
    x = _rows(x)
    weight = weight.contiguous()
    index, count = index.contiguous(), count.contiguous()
    residual = None if residual is None else _rows(residual)
    if out is None:
        out = torch.zeros(
            (x.shape[0], weight.shape[0], *output_size),
            dtype=x.dtype,
        ).contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else bias.contiguous()
    numbers = geometry(
        tuple(weight.shape),
        (x.shape[2], x.shape[3]),
        output_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )
    _kernels.sampled_conv(
        x.data_ptr(),
        weight.data_ptr(),
        _pointer(bias),
        index.data_ptr(),
        count.data_ptr(),
        _pointer(residual),
        out.data_ptr(),
        x.shape[0],
        numbers,
        relu,
        isa,
        _threads(num_threads),
    )
    return out


def sampled_deform_conv2d(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    modulation: Tensor | None,
    index: Tensor,
    count: Tensor,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    residual: Tensor | None,
    relu: bool,
    isa: str = "auto",
    num_threads: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Float32 kernel form of `reference.sampled_deform_conv2d`; `out` as in `sampled_conv2d`."""
    x, offset = _rows(x), _rows(offset)
    modulation = None if modulation is None else _rows(modulation)
    residual = None if residual is None else _rows(residual)
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    index, count = index.contiguous(), count.contiguous()
    output_size = (offset.shape[2], offset.shape[3])
    if out is None:
        out = torch.zeros((x.shape[0], weight.shape[0], *output_size)).contiguous(
            memory_format=torch.channels_last
        )
    numbers = geometry(
        tuple(weight.shape),
        (x.shape[2], x.shape[3]),
        output_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=x.shape[1] // weight.shape[1],
    )
    _kernels.sampled_deform_conv(
        x.data_ptr(),
        offset.data_ptr(),
        _pointer(modulation),
        weight.data_ptr(),
        _pointer(bias),
        index.data_ptr(),
        count.data_ptr(),
        _pointer(residual),
        out.data_ptr(),
        x.shape[0],
        numbers,
        offset.shape[1] // (2 * weight.shape[2] * weight.shape[3]),
        relu,
        isa,
        _threads(num_threads),
    )
    return out


def interpolate(
    features: Tensor,
    mask: Tensor,
    log_kernel: Tensor,
    eps: float | None,
    *,
    isa: str = "auto",
    num_threads: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Kernel form of `reference.interpolate`, forward only.

    Features are float32; with a float mask also bfloat16, where there are kernels for it.
    """
    features = _rows(features)
    mask = mask.contiguous()
    log_kernel = log_kernel.contiguous()
    out = torch.empty_like(features) if out is None else out
    is_hard = mask.dtype == torch.bool
    kernel = _kernels.hard_fill if is_hard else _kernels.soft_fill
    batch, channels, height, width = features.shape
    kernel(
        features.data_ptr(),
        mask.data_ptr(),
        log_kernel.data_ptr(),
        batch,
        height,
        width,
        channels,
        log_kernel.shape[0],
        -1.0 if eps is None else eps,
        out.data_ptr(),
        *(() if is_hard else (features.dtype == torch.bfloat16,)),
        isa,
        _threads(num_threads),
    )
    return out


def interpolate_backward(
    grad: Tensor,
    features: Tensor,
    mask: Tensor,
    log_kernel: Tensor,
    eps: float | None,
    *,
    isa: str = "auto",
    num_threads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel form of `reference.interpolate_backward`; features as in `interpolate`."""
    hard = mask.dtype == torch.bool
    grad, features = _rows(grad), _rows(features)
    soft = mask.float().contiguous()
    log_kernel = log_kernel.contiguous()
    grad_features = torch.empty_like(features)
    grad_mask = None if hard else torch.empty_like(soft)
    grad_log_kernel = torch.empty_like(log_kernel)
    batch, channels, height, width = features.shape
    _kernels.soft_fill_backward(
        features.data_ptr(),
        soft.data_ptr(),
        log_kernel.data_ptr(),
        grad.data_ptr(),
        batch,
        height,
        width,
        channels,
        log_kernel.shape[0],
        -1.0 if eps is None else eps,
        hard,
        grad_features.data_ptr(),
        _pointer(grad_mask),
        grad_log_kernel.data_ptr(),
        features.dtype == torch.bfloat16,
        isa,
        _threads(num_threads),
    )
    return (
        grad_features,
        features.new_zeros(()) if grad_mask is None else grad_mask,
        grad_log_kernel,
    )


def _pool_numbers(
    x: Tensor,
    output_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    is_rows: bool,
) -> list[int]:
    """The 21 integers of a pooling: missing axes come first, with extent and window 1."""
    missing = 3 - len(kernel_size)
    ones, zeros = [1] * missing, [0] * missing
    return [
        x.shape[0],
        x.shape[1],
        int(is_rows),
        *ones,
        *x.shape[2:],
        *ones,
        *output_size,
        *ones,
        *kernel_size,
        *ones,
        *stride,
        *zeros,
        *padding,
        *ones,
        *dilation,
    ]


def soft_pool(
    x: Tensor,
    output_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    memory_format: torch.memory_format,
    *,
    isa: str = "auto",
    num_threads: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Kernel form of `pool_reference.soft_pool`, float32, or bfloat16 where there are kernels.

    Input and output are taken in `memory_format`, contiguous or channels-last.
    """
    x = x.contiguous(memory_format=memory_format)
    if out is None:
        shape = (x.shape[0], x.shape[1], *output_size)
        out = torch.empty(shape, dtype=x.dtype, memory_format=memory_format)
    is_rows = memory_format != torch.contiguous_format
    numbers = _pool_numbers(x, output_size, kernel_size, stride, padding, dilation, is_rows)
    _kernels.soft_pool(
        x.data_ptr(),
        out.data_ptr(),
        numbers,
        x.dtype == torch.bfloat16,
        isa,
        _threads(num_threads),
    )
    return out


def soft_pool_backward(
    grad: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    memory_format: torch.memory_format,
    *,
    detached: bool,
    isa: str = "auto",
    num_threads: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Kernel form of `pool_reference.soft_pool_backward`; dtypes and formats as in `soft_pool`."""
    grad = grad.contiguous(memory_format=memory_format)
    x = x.contiguous(memory_format=memory_format)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, memory_format=memory_format)
    is_rows = memory_format != torch.contiguous_format
    numbers = _pool_numbers(x, grad.shape[2:], kernel_size, stride, padding, dilation, is_rows)
    _kernels.soft_pool_backward(
        grad.data_ptr(),
        x.data_ptr(),
        out.data_ptr(),
        numbers,
        detached,
        x.dtype == torch.bfloat16,
        isa,
        _threads(num_threads),
    )
    return out


# As csrc's `Number` counts them.
_ASSEMBLED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _check_images(windows: Tensor, bad: int, images: int) -> None:
    """Raise if a kernel has found that window `bad`, -1 for none, names no image."""
    if bad < 0:
        return
    raise ValueError(
        f"assemble_windows: window {bad} names image {int(windows[bad, 0])}, but score_maps hold "
        f"{images}; the first column of windows must be the index of an image of the batch, from "
        "0: number the windows of each image by its place in the batch."
    )


def assemble_windows(
    score_maps: Tensor,
    windows: Tensor,
    size: int,
    centred: bool,
    *,
    num_threads: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Kernel form of `assemble_reference.assemble_windows`, of float32, float64, bfloat16, float16.

    The maps are read through their strides, whatever these are. ValueError where a window names no
    image.
    """
    windows = windows.contiguous()
    count = windows.shape[0]
    if out is None:
        out = torch.empty((count, size, size), dtype=score_maps.dtype)
    numbers = [*score_maps.shape, *score_maps.stride(), count, size, int(centred)]
    bad = _kernels.assemble(
        score_maps.data_ptr(),
        windows.data_ptr(),
        out.data_ptr(),
        numbers,
        score_maps.element_size(),
        _threads(num_threads),
    )
    _check_images(windows, bad, score_maps.shape[0])
    return out


def assemble_windows_backward(
    grad: Tensor,
    windows: Tensor,
    shape: Sequence[int],
    memory_format: torch.memory_format,
    centred: bool,
    *,
    num_threads: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Kernel form of `assemble_reference.assemble_windows_backward`; dtypes as forward.

    The result is in `memory_format`, contiguous or channels-last; half precision is summed in
    float32 and rounded once.
    """
    grad, windows = grad.contiguous(), windows.contiguous()
    if out is None:
        out = torch.empty(tuple(shape), dtype=grad.dtype, memory_format=memory_format)
    numbers = [*shape, 0, 0, 0, 0, *grad.shape[:2], int(centred)]
    bad = _kernels.assemble_backward(
        grad.data_ptr(),
        windows.data_ptr(),
        out.data_ptr(),
        numbers,
        memory_format == torch.channels_last,
        _ASSEMBLED.index(grad.dtype),
        _threads(num_threads),
    )
    _check_images(windows, bad, shape[0])
    return out


def sampled_block(
    x: Tensor,
    shortcut: Tensor | None,
    noise: list[Tensor | None],
    given: list[Tensor | None],
    params: Tensor,
    spec: Tensor,
    output_shape: list[int],
    mask_positions: int,
    output_dtype: torch.dtype = torch.float32,
    *,
    isa: str = "auto",
    num_threads: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel form of `ops.block.sampled_block`; there is one instruction set for bfloat16."""
    made = output_dtype if out is None else out.dtype
    if (
        x.dtype not in (torch.float32, torch.bfloat16)
        or made not in (torch.float32, x.dtype)
        or (shortcut is not None and shortcut.dtype != x.dtype)
        or params.dtype != torch.float32
    ):
        # Memory of another size would be read or written past its end.
        beside = None if shortcut is None else shortcut.dtype
        raise TypeError(
            f"sampled_block: x is {x.dtype}, shortcut {beside}, params {params.dtype}, the output "
            f"{made}, but x must be torch.float32 or torch.bfloat16, the shortcut the same, the "
            "output either that or torch.float32, and params the torch.float32 of pack_block; set "
            "output_dtype of a frozen layer to its dtype or torch.float32, and convert no frozen "
            "model with .to(dtype)."
        )
    # An image arrives in planes: a kernel that copies it anyway (csrc merge_rows) reads them.
    planar = not x.is_contiguous(memory_format=torch.channels_last) and x.is_contiguous()
    planar = planar and bool(spec[_kernels.ROW_MERGE_FIELD])
    x = x if planar else _rows(x)
    shortcut = None if shortcut is None else _rows(shortcut)
    batch, _, height, width = x.shape
    if out is None:
        out = _new_map(output_shape, output_dtype)
    masks = torch.empty((batch, mask_positions), dtype=torch.bool)
    logits = torch.empty((batch, mask_positions))
    noise = [None if n is None else n.contiguous() for n in noise]
    given = [None if g is None else g.contiguous() for g in given]
    bad_image = _kernels.sampled_block(
        x.data_ptr(),
        x.itemsize,
        planar,
        _pointer(shortcut),
        [_pointer(n) for n in noise],
        [_pointer(g) for g in given],
        params.data_ptr(),
        spec.data_ptr(),
        batch,
        height,
        width,
        out.data_ptr(),
        masks.data_ptr(),
        logits.data_ptr(),
        out.dtype == torch.float32,
        isa,
        _threads(num_threads),
    )
    if bad_image >= 0:
        raise ValueError(
            f"sampled_block: the sampler's logits of image {bad_image} hold NaN, but must be "
            "numbers; the features or the weights hold NaN or infinity: look for the first layer "
            "whose output is not finite."
        )
    return out, masks, logits


def merge_maps(
    maps: Sequence[Tensor],
    size: tuple[int, int],
    sums: bool,
    resizing: int,
    *,
    isa: str = "auto",
    num_threads: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Kernel form of `merge.merge_maps_plain`; resizing is the number of the word.

    `isa` is not looked at for bfloat16.
    """
    maps = [_rows(x) for x in maps]
    channels = maps[0].shape[1] if sums else sum(x.shape[1] for x in maps)
    batch, dtype = maps[0].shape[0], maps[0].dtype
    if out is None:
        out = _new_map((batch, channels, *size), dtype)
    numbers = [batch, *size, int(sums), resizing]
    for x in maps:
        numbers += x.shape[1:]
    _kernels.merge_maps(
        [x.data_ptr() for x in maps],
        numbers,
        out.data_ptr(),
        dtype == torch.bfloat16,
        isa,
        _threads(num_threads),
    )
    return out
