"""SoftPool against torch's own poolings, and against its formula written in torch operators.

    python bench/pool.py --out runs/bench/today
    python bench/pool.py --only forward            some of forward, train, memory and error
    python bench/pool.py --quick

forward   of 8x64x112x112 and 1x256x64x128, window and stride 2 and 3, contiguous and channels-last,
          float32; "formula" is unfold, softmax, multiply and sum.
train     forward and backward of the same.
memory    MiB that each keeps for its backward; the input, which all of them keep, counts.
error     largest error against the formula in float64, of ours and of the formula, same dtype.

"slower pool" is the slower one of avg_pool2d and max_pool2d, which forward is held against; forward
and backward are held against max_pool2d. "asked" is what the column before it should be at most.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.script import (
    Settings,
    argument_parser,
    cells,
    compare,
    run_script,
    settings_of,
)
from harness.stages import Row, Stage
from sparsight.measure import Latency
from sparsight.ops import soft_pool2d

SHAPES = ((8, 64, 112, 112), (1, 256, 64, 128))
QUICK_SHAPES = ((2, 16, 12, 12),)
WINDOWS = (2, 3)
FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}

# What is asked of time over torch's pooling, and of the error over the formula's.
MOST_TIME, MOST_ERROR = 1.5, 2.0

Pool = Callable[[Tensor], Tensor]


def formula(x: Tensor, window: int) -> Tensor:
    """SoftPool as one writes it: all windows, their softmax, a weighted sum."""
    u = x.unfold(2, window, window).unfold(3, window, window).flatten(4)
    return (u.softmax(-1) * u).sum(-1)


def pools(window: int) -> dict[str, Pool]:
    """The candidates by name."""
    return {
        "ours": lambda x: soft_pool2d(x, window),
        "avg_pool2d": lambda x: F.avg_pool2d(x, window),
        "max_pool2d": lambda x: F.max_pool2d(x, window),
        "formula": lambda x: formula(x, window),
    }


def with_gradient(window: int) -> dict[str, Pool]:
    """The candidates whose training is compared."""
    return {name: pool for name, pool in pools(window).items() if name != "avg_pool2d"}


def cases(settings: Settings) -> Iterator[tuple[Row, Tensor, int]]:
    """Every shape, window and layout: the first columns of its row, its input, its window."""
    for shape in QUICK_SHAPES if settings.quick else SHAPES:
        for window in WINDOWS:
            for name, memory_format in FORMATS.items():
                torch.manual_seed(0)
                x = torch.randn(shape).contiguous(memory_format=memory_format)
                yield (
                    {"map": "x".join(map(str, shape)), "window": window, "layout": name},
                    x,
                    window,
                )


def milliseconds(times: dict[str, Latency | str]) -> dict[str, float]:
    """Medians by name; none of these candidates is ever missing."""
    return {name: t.latency_ms for name, t in times.items() if isinstance(t, Latency)}


def forward_rows(settings: Settings) -> Iterator[Row]:
    """Inference, against the slower of torch's poolings and against the formula."""
    for row, x, window in cases(settings):
        times = compare(settings, pools(window), x)
        ms = milliseconds(times)
        for name, latency in times.items():
            row.update(cells(name, latency))
        row["ours / slower pool"] = ms["ours"] / max(ms["avg_pool2d"], ms["max_pool2d"])
        row["asked"] = verdict(row["ours / slower pool"], MOST_TIME)
        row["formula / ours"] = ms["formula"] / ms["ours"]
        yield row


def verdict(value: float, most: float) -> str:
    """What was asked for, and whether it was met."""
    return f"<= {most:g}: {'met' if value <= most else 'MISSED'}"


def kept_mib(pool: Pool, x: Tensor) -> float:
    """What a pooling keeps for its backward, in MiB; its input, which somebody else holds, too."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    leaf = x.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = pool(leaf)
    del held
    return sum(kept.values()) / 2**20


def training(pool: Pool, x: Tensor) -> Callable[..., Tensor]:
    """A call of forward and backward."""
    leaf = x.detach().requires_grad_()
    grad = torch.ones_like(pool(x))

    def run(*_: Tensor) -> Tensor:
        # Samples are taken in inference mode, which records no gradient.
        with torch.inference_mode(False), torch.enable_grad():
            return torch.autograd.grad(pool(leaf), leaf, grad)[0]

    return run


def training_rows(settings: Settings) -> Iterator[Row]:
    """Forward and backward, against max_pool2d and the formula."""
    for row, x, window in cases(settings):
        times = compare(settings, {n: training(p, x) for n, p in with_gradient(window).items()}, x)
        ms = milliseconds(times)
        for name, latency in times.items():
            row.update(cells(name, latency))
        row["ours / max_pool2d"] = ms["ours"] / ms["max_pool2d"]
        row["asked"] = verdict(row["ours / max_pool2d"], MOST_TIME)
        row["formula / ours"] = ms["formula"] / ms["ours"]
        yield row


def memory_rows(settings: Settings) -> Iterator[Row]:
    """What is kept between forward and backward."""
    for row, x, window in cases(settings):
        for name, pool in with_gradient(window).items():
            row[f"{name} keeps MiB"] = kept_mib(pool, x)
        share = row["ours keeps MiB"] / row["formula keeps MiB"]
        row["ours / formula"] = share
        row["asked"] = f"< 1: {'met' if share < 1 else 'MISSED'}"
        yield row


def error_rows(settings: Settings) -> Iterator[Row]:
    """Largest absolute error against float64, in each dtype; values are N(0, 1)."""
    for row, x, window in cases(settings):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            narrow = x.to(dtype)
            truth = formula(narrow.double(), window)
            ours = (soft_pool2d(narrow, window).double() - truth).abs().max().item()
            theirs = (formula(narrow, window).double() - truth).abs().max().item()
            yield {
                **row,
                "dtype": str(dtype).removeprefix("torch."),
                "ours, error": ours,
                "formula, error": theirs,
                "error ratio": ours / theirs,
                "asked": verdict(ours / theirs, MOST_ERROR),
            }


def main() -> None:
    """Measure forward, training, memory and error."""
    settings = settings_of(argument_parser(__doc__).parse_args())
    run_script(
        settings,
        "pool",
        [
            Stage("forward", lambda: forward_rows(settings)),
            Stage("train", lambda: training_rows(settings)),
            Stage("memory", lambda: memory_rows(settings)),
            Stage("error", lambda: error_rows(settings)),
        ],
        title="SoftPool against torch's poolings",
        notes=(
            "Stride is the window, no padding. The formula is unfold, softmax, multiply and sum "
            "(see bench/pool.py). What is kept for the backward counts the input, too. Times are "
            'medians, IQR is the distance of the quartiles; "slower pool" is the slower one of '
            "avg_pool2d and max_pool2d in the same row."
        ),
    )


if __name__ == "__main__":
    main()
