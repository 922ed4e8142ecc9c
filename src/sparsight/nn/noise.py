"""Where the randomness of a sampling mask comes from: logistic noise, white, blue or none.

A position is computed when ``logit + noise >= 0`` with logistic noise, that is with probability
``sigmoid(logit)``. At inference the noise is counter-based: a pure function of (seed, layer, image,
y, x), so that the same image gets the same mask in any thread count and on any device. In training
it is drawn from torch's global generator.
"""

import functools
import math
from typing import Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["NoiseKind", "blue_noise_ranks", "blue_noise_tile", "sampling_noise", "training_noise"]

NoiseKind = Literal["white", "blue", "none"]

# Side of the void-and-cluster tile that masks are cut from. 64 * 64 ranks of 12 bits, plus 12 bits
# of dither within a rank, fill the 24 bits of a float32 mantissa exactly.
TILE_SIZE = 64

_WORD = 0xFFFFFFFF
_SMALLEST_UNIFORM = 2.0**-24
_IntOrTensor = TypeVar("_IntOrTensor", int, Tensor)


def _mix(value: _IntOrTensor) -> _IntOrTensor:
    """Avalanche a 32-bit word held in an int64 tensor or a Python int (values in [0, 2^32)).

    This is the finaliser "lowbias32" (C. Wellons, hash-prospector, 2018, public domain). Its second
    multiplier, 0x846CA68B, is written minus 2^32: the product is the same modulo 2^32 and its
    magnitude stays below 2^63, so that int64 arithmetic never overflows and every backend gives the
    same bits.
    """
    value = value ^ (value >> 16)
    value = (value * 0x7FEB352D) & _WORD
    value = value ^ (value >> 15)
    value = (value * -0x7B935975) & _WORD
    return value ^ (value >> 16)


def _layer_key(seed: int, layer: int) -> int:
    """Fold a 64-bit seed and a layer index into one word."""
    key = _mix(seed & _WORD)
    key = _mix(key ^ ((seed >> 32) & _WORD))
    return _mix(key ^ _mix((layer + 0x9E3779B9) & _WORD))


def _image_keys(
    seed: int, layer: int, batch: int, device: torch.device | str | None
) -> Int[Tensor, " B"]:
    images = torch.arange(batch, dtype=torch.int64, device=device)
    return _mix(_mix(images + 1) ^ _layer_key(seed, layer))


def _to_uniform(word: Tensor) -> Tensor:
    """Map 32-bit words to the centres of 2^23 equal cells of (0, 1), exactly, in float32.

    One bit more would need 25 bits of mantissa: the topmost cell would round to 1, its noise to
    infinity.
    """
    return ((word >> 9).to(torch.float32) + 0.5) * 2.0**-23


def _logistic(uniform: Tensor) -> Tensor:
    return torch.log(uniform) - torch.log1p(-uniform)


def _hashed_uniform(
    seed: int, layer: int, batch: int, height: int, width: int, device: torch.device | str | None
) -> Float[Tensor, "B 1 H W"]:
    rows = torch.arange(height, dtype=torch.int64, device=device).view(1, 1, height, 1)
    # Columns are mixed before they are combined, so that two rows never are shifted copies of one
    # another.
    columns = _mix(torch.arange(width, dtype=torch.int64, device=device) + 0x7F4A7C15).view(
        1, 1, 1, width
    )
    keys = _image_keys(seed, layer, batch, device).view(batch, 1, 1, 1)
    return _to_uniform(_mix(_mix(keys ^ _mix(rows + 0x3C6EF372)) ^ columns))


def _tiled_uniform(
    ranks: Int[Tensor, "T T"],
    shift_y: Int[Tensor, " B"],
    shift_x: Int[Tensor, " B"],
    dither: Float[Tensor, " B"],
    height: int,
    width: int,
) -> Float[Tensor, "B 1 H W"]:
    """Cut a (height, width) map per image from the periodic tile, shifted by (shift_y, shift_x)."""
    size = ranks.shape[0]
    y = (torch.arange(height, device=ranks.device) + shift_y[:, None]) % size  # (B, H)
    x = (torch.arange(width, device=ranks.device) + shift_x[:, None]) % size  # (B, W)
    cut = ranks[y[:, :, None], x[:, None, :]].to(torch.float32)  # (B, H, W)
    # The dither spreads a rank over its cell, which makes the marginal of a pixel uniform rather
    # than one of size^2 levels. Low ranks become large values: a sparse mask then holds the tile's
    # first ranks, the ones that void-and-cluster placed best.
    uniform = 1.0 - (cut + dither[:, None, None]) / float(size * size)
    return uniform.clamp(_SMALLEST_UNIFORM, 1.0 - _SMALLEST_UNIFORM).unsqueeze(1)


def _check(function: str, kind: str, ranks: Tensor | None) -> None:
    if kind not in ("white", "blue", "none"):
        raise ValueError(
            f"{function}: kind is {kind!r}, but must be 'white' (the paper), 'blue' or 'none'; "
            "pass one of these."
        )
    if ranks is not None and (ranks.dim() != 2 or ranks.shape[0] != ranks.shape[1]):
        raise ValueError(
            f"{function}: ranks has shape {tuple(ranks.shape)}, but must be a square tile; "
            "build it with blue_noise_ranks(size)."
        )


def sampling_noise(
    kind: NoiseKind,
    *,
    seed: int,
    layer: int,
    batch: int,
    height: int,
    width: int,
    device: torch.device | str | None = None,
    ranks: Int[Tensor, "T T"] | None = None,
) -> Float[Tensor, "B 1 H W"]:
    """Logistic noise that is a pure function of its arguments: the noise of inference.

    ``sampling_noise(...) + logit >= 0`` holds with probability ``sigmoid(logit)`` at every pixel,
    over seeds. The hash is exact integer arithmetic, identical on every device; the two logarithms
    after it may differ between devices in the last bit.

    Args:
        kind: "white" draws every pixel on its own, as the paper does. "blue" cuts the map from a
            void-and-cluster tile at a random toroidal shift per (seed, layer, image): the same
            marginal, but neighbours repel, so that holes are smaller. "none" is zero: a mask is
            then the threshold of its logits at 0.
        seed: any integer; 64 bits of it count.
        layer: index of the layer in the model. Two layers have independent noise.
        batch: number of images B. Image b has the same noise in any batch.
        height: rows H of the map. Pixel (y, x) has the same noise in a map of any size.
        width: columns W of the map.
        device: where the result is made; default torch's.
        ranks: (T, T) integer tile of :func:`blue_noise_ranks` on `device`. Default: the 64 x 64
            one. Only "blue" reads it; passing it spares a copy to the device.

    Returns:
        (B, 1, H, W) float32, finite, within +-16.7.

    Raises:
        ValueError: if `kind` is unknown or `ranks` is not square.

    Source: counter-based generation follows Salmon et al., SC 2011 (Random123); the blue-noise
    threshold is Ulichney's dither array (1993) used as a sampling threshold, which the sampling
    paper (Xie et al., ECCV 2020, arXiv 2003.08866) does not do.
    """
    _check("sampling_noise", kind, ranks)
    if kind == "none":
        return torch.zeros(batch, 1, height, width, dtype=torch.float32, device=device)
    if kind == "white":
        return _logistic(_hashed_uniform(seed, layer, batch, height, width, device))
    if ranks is None:
        ranks = blue_noise_ranks(TILE_SIZE).to(device)
    size = ranks.shape[0]
    word = _image_keys(seed, layer, batch, ranks.device)
    shift_y = (_mix(word ^ 0x1B873593) * size) >> 32
    shift_x = (_mix(word ^ 0x2545F491) * size) >> 32
    dither = ((_mix(word ^ 0x5851F42D) >> 21).to(torch.float32) + 0.5) * 2.0**-11
    return _logistic(_tiled_uniform(ranks, shift_y, shift_x, dither, height, width))


def training_noise(
    kind: NoiseKind,
    *,
    batch: int,
    height: int,
    width: int,
    device: torch.device | str | None = None,
    ranks: Int[Tensor, "T T"] | None = None,
) -> Float[Tensor, "B 1 H W"]:
    """Logistic noise drawn from torch's global generator: the noise of training.

    The difference of the two Gumbel variables of the paper's two-class Gumbel-softmax is one
    logistic variable; drawing that directly is exact and needs half the random numbers.
    ``torch.manual_seed`` reproduces it.

    Args:
        kind: as in :func:`sampling_noise`. For "blue", each image draws its own shift of the tile.
        batch: number of images B.
        height: rows H of the map.
        width: columns W of the map.
        device: where the result is made; default torch's.
        ranks: as in :func:`sampling_noise`.

    Returns:
        (B, 1, H, W) float32, finite.

    Raises:
        ValueError: if `kind` is unknown or `ranks` is not square.

    Source: Xie et al., ECCV 2020, arXiv 2003.08866, section 3.2; their code adds 1e-8 inside each
    logarithm, which clips the logits at about 18.4, and this does not.
    """
    _check("training_noise", kind, ranks)
    if kind == "none":
        return torch.zeros(batch, 1, height, width, dtype=torch.float32, device=device)
    if kind == "white":
        uniform = torch.rand(batch, 1, height, width, dtype=torch.float32, device=device)
        return _logistic(uniform.clamp(_SMALLEST_UNIFORM, 1.0 - _SMALLEST_UNIFORM))
    if ranks is None:
        ranks = blue_noise_ranks(TILE_SIZE).to(device)
    shifts = torch.randint(ranks.shape[0], (2, batch), device=ranks.device)
    dither = torch.rand(batch, dtype=torch.float32, device=ranks.device)
    return _logistic(_tiled_uniform(ranks, shifts[0], shifts[1], dither, height, width))


def blue_noise_tile(size: int = TILE_SIZE) -> Float[Tensor, "T T"]:
    """A periodic dither tile: thresholding it at any density leaves evenly spread points.

    Args:
        size: side T of the tile in pixels, 2 to 128. Default 64, the tile that masks are cut from.
            Generated once per process: about 0.3 s for 64, 2 s for 128.

    Returns:
        (T, T) float32 on the CPU, a fresh copy. Holds each value (rank + 0.5) / T^2, rank = 0 ...
        T^2 - 1, exactly once. The positions with values below d are a blue-noise point set of
        density d.

    Raises:
        TypeError: if `size` is not an integer.
        ValueError: if `size` is outside 2 to 128.

    Example:
        >>> tile = blue_noise_tile(16)
        >>> int((tile < 0.25).sum())
        64

    Source: R. Ulichney, "The void-and-cluster method for dither array generation", 1993; Gaussian
    of sigma 1.9 on the torus. We measure the energy in integers, so that the tile is the same on
    every machine.
    """
    ranks = blue_noise_ranks(size)
    return (ranks.to(torch.float32) + 0.5) / float(size * size)


def blue_noise_ranks(size: int = TILE_SIZE) -> Int[Tensor, "T T"]:
    """The integer ranks behind :func:`blue_noise_tile`.

    Integers, because a model cast to half precision casts its float buffers and would lose ranks.

    Args:
        size: as in :func:`blue_noise_tile`.

    Returns:
        (T, T) int32 on the CPU, a fresh copy; each of 0 ... T^2 - 1 once.

    Raises:
        TypeError: if `size` is not an integer.
        ValueError: if `size` is outside 2 to 128.
    """
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(
            f"blue_noise_tile: size is {size!r} of type {type(size).__name__}, but must be an "
            f"integer from 2 to 128; pass for example size={TILE_SIZE}."
        )
    if not 2 <= size <= 128:
        raise ValueError(
            f"blue_noise_tile: size is {size}, but must lie between 2 and 128 (the cost grows as "
            "size^4); the tile is periodic, so repeat it to cover a larger map."
        )
    return _void_and_cluster(size).clone()


@functools.lru_cache(maxsize=8)
def _void_and_cluster(size: int) -> Tensor:
    """Rank the pixels of a torus: about 2 T^2 updates of a T x T energy."""
    num_pixels = size * size
    # Fixed point makes ties exact and the result independent of libm, vector width and the order of
    # updates.
    profile = [
        round(
            2**20
            * sum(math.exp(-((d + wrap * size) ** 2) / (2 * 1.9**2)) for wrap in range(-9, 10))
        )
        for d in range(size)
    ]
    line = torch.tensor(profile, dtype=torch.int64)
    kernel = torch.outer(line, line)
    # Repeated twice, a shifted kernel is a slice of it.
    kernel = kernel.repeat(2, 2)
    far_above = torch.iinfo(torch.int64).max

    energy = torch.zeros(size, size, dtype=torch.int64)
    is_point = torch.zeros(size, size, dtype=torch.bool)

    def toggle(index: int, sign: int) -> None:
        y, x = divmod(index, size)
        is_point[y, x] = sign > 0
        shifted = kernel[size - y : 2 * size - y, size - x : 2 * size - x]
        energy.add_(shifted, alpha=sign)

    def tightest_cluster() -> int:
        return int(torch.where(is_point, energy, -1).argmax())

    def largest_void() -> int:
        return int(torch.where(is_point, far_above, energy).argmin())

    num_initial = max(1, num_pixels // 10)
    order = _mix(torch.arange(num_pixels, dtype=torch.int64)).argsort(stable=True)
    for index in order[:num_initial].tolist():
        toggle(index, +1)
    # Move points from clusters to voids until the point moved is the one just placed. Every move
    # lowers the total energy or leaves it, so this ends; the bound only guards against a cycle
    # among exact ties.
    for _ in range(20 * num_pixels):
        cluster = tightest_cluster()
        toggle(cluster, -1)
        void = largest_void()
        toggle(void, +1)
        if void == cluster:
            break

    ranks = torch.empty(num_pixels, dtype=torch.int32)
    initial_energy, initial_points = energy.clone(), is_point.clone()
    for rank in range(num_initial - 1, -1, -1):
        cluster = tightest_cluster()
        ranks[cluster] = rank
        toggle(cluster, -1)
    energy.copy_(initial_energy)
    is_point.copy_(initial_points)
    # Ulichney's third phase looks for the tightest cluster of holes. Points and holes add up to a
    # constant energy on the torus, so that this is the same pixel as the largest void of the
    # points: one loop serves both.
    for rank in range(num_initial, num_pixels):
        void = largest_void()
        ranks[void] = rank
        toggle(void, +1)
    return ranks.view(size, size)
