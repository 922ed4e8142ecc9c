"""One residual block, frozen and sampled, against the same block dense.

    python bench/block.py --out runs/bench/today     every stage of a ResNet-50 at 512x1024
    python bench/block.py --only 64 512              some of them, by planes
    python bench/block.py --quick                    tiny maps, no torch.compile: does it work?
    python bench/block.py --dtype bfloat16           the same rows in half precision
    python bench/block.py --without compile          faster to build, and said so in the table

All candidates of a stage take turns in one run, on the same input, with the same number of threads:
the dense block in OpenVINO (bound to NCHW and to channels-last maps; the faster of the two is the
one that counts), ONNX Runtime, torch.compile with freezing and eager channels-last, and ours at
every density. "openvino in a chain" is a quarter of the time of four such blocks in one network,
where the conversion to OpenVINO's own layout at both ends is shared.

The possible time is the larger of the dense OpenVINO time times the MAC ratio, sampler heads and
interpolation counted, and one in-place addition of two tensors of the block's input size.

In bfloat16 everyone takes and returns float32 maps, as `freeze(dtype=torch.bfloat16)` does, and the
addition is of float32 maps. "ours in a chain" is the same block between two of its kind: it is
given a bfloat16 map and returns one; it is held against OpenVINO's chain and an addition of as many
bytes as bfloat16 maps have.
"""

import copy
import functools

import torch
from torch import Tensor, nn

from harness.models import (
    STAGES,
    block_input,
    dense_block,
    frozen,
    liven_norms,
    sampled_at,
)
from harness.possible import possible_ms, realised_share
from harness.rivals import (
    SHOWN,
    as_tensors,
    check_agrees,
    dense_rivals,
    exported_rivals,
    folded,
)
from harness.script import (
    Candidate,
    Settings,
    argument_parser,
    cells,
    compare,
    fastest_ms,
    run_script,
    settings_of,
)
from harness.stages import Row, Stage
from sparsight.measure import Latency, MacCount, count_macs

DENSITIES = (1.0, 0.5, 0.3, 0.1)
CHAIN = 4
CHAINED = "openvino in a chain"


def ours_at(
    block: nn.Module, density: float, x: Tensor, settings: Settings
) -> tuple[nn.Module | str, MacCount]:
    """The frozen block, checked against the converted one in float32, and its multiply-adds."""
    source = sampled_at(block, density)
    made = frozen(source, x, settings.dtype)
    if not isinstance(made, str):
        with torch.inference_mode():
            check_agrees(
                f"ours at {density}", as_tensors(made(x)), as_tensors(source(x)), settings.dtype
            )
    return made, count_macs(source, x)


def inside_chain(made: nn.Module | str, x: Tensor, dtype: torch.dtype) -> Candidate:
    """The frozen block between two of its kind: maps of `dtype` in and out."""
    if isinstance(made, str):
        return made
    block = copy.deepcopy(made.get_submodule("0"))
    if not hasattr(block, "output_dtype"):
        return f"{type(block).__name__} has no output_dtype"
    block.output_dtype = dtype  # pyright: ignore[reportArgumentType]  # a plain attribute
    narrow = x.to(dtype)
    with torch.inference_mode():
        out = block(narrow)
        check_agrees("ours in a chain", as_tensors(out), as_tensors(made(narrow.float())), dtype)
    if out.dtype != dtype:
        raise RuntimeError(
            f"ours in a chain: the block returned {out.dtype}, but {dtype} was asked for by its "
            "output_dtype; do not time something else."
        )
    return lambda _: block(narrow)


def chain_rival(block: nn.Module, x: Tensor, settings: Settings) -> Candidate:
    """Several copies of the block in one OpenVINO network."""
    reason = settings.left_out("chain")
    if reason is not None:
        return reason
    chain = nn.Sequential(*(copy.deepcopy(block) for _ in range(CHAIN)))
    liven_norms(chain)
    with torch.inference_mode():
        truth = as_tensors(chain(x))
    return exported_rivals(folded(chain), x, settings, truth, names=("openvino",))["openvino"]


def addition(x: Tensor, dtype: torch.dtype) -> Candidate:
    """What any residual block must move: read two maps of the input's size and write one.

    Of maps in bfloat16, the same bytes in float32 are added: torch's own addition in bfloat16
    converts for longer than it moves, and would be too easy a bound.
    """
    count = x.numel() * dtype.itemsize // torch.float32.itemsize
    left, right = torch.ones(count), torch.full((count,), 1e-6)
    return lambda _: left.add_(right)


def stage_rows(
    planes: int, size: tuple[int, int], densities: tuple[float, ...], settings: Settings
) -> list[Row]:
    """All densities of one stage, measured in one run."""
    block, x = dense_block(planes), block_input(planes, size)
    candidates = dense_rivals(block, x, settings)
    candidates[CHAINED] = chain_rival(block, x, settings)
    candidates["addition"] = addition(x, torch.float32)
    is_narrow = settings.dtype != torch.float32
    if is_narrow:
        candidates["addition in a chain"] = addition(x, settings.dtype)
    counts = {}
    for density in densities:
        made, counts[density] = ours_at(block, density, x, settings)
        candidates[f"ours at {density}"] = made
        if is_narrow:
            candidates[f"ours in a chain at {density}"] = inside_chain(made, x, settings.dtype)
    times = compare(settings, candidates, x)
    return [
        block_row(planes, size, density, counts[density], times, settings) for density in densities
    ]


def block_row(
    planes: int,
    size: tuple[int, int],
    density: float,
    counted: MacCount,
    times: dict[str, Latency | str],
    settings: Settings,
) -> Row:
    """One line of the table."""
    gated = [layer for layer in counted.layers if layer.positions and layer.dense]
    ours = times[f"ours at {density}"]
    # Inside a chain, float32 blocks are called as they are called alone.
    is_narrow = f"ours in a chain at {density}" in times
    chained = times[f"ours in a chain at {density}"] if is_narrow else ours
    row: Row = {
        "planes": planes,
        "map": f"{size[0]}x{size[1]}",
        "dtype": settings.dtype_name,
        "asked density": density,
        "density": sum(layer.total for layer in gated) / sum(layer.dense for layer in gated),
        "MMACs": counted.total / 1e6,
        "MAC ratio": counted.ratio,
    }
    for name in (*SHOWN, "addition"):
        row |= cells(name, times[name])
    row |= cells("ours", ours)
    if not isinstance(ours, str):
        row["n"] = ours.num_samples
    dense_ms = fastest_ms(times, "openvino", "openvino nhwc")
    added_ms = fastest_ms(times, "addition")
    assert added_ms is not None
    if dense_ms is None:
        row["possible ms"] = "needs openvino"
    else:
        possible = possible_ms(dense_ms, counted.ratio, added_ms)
        row["possible ms"] = possible
        row["possible speed-up"] = dense_ms / possible
        if not isinstance(ours, str):
            row["speed-up"] = dense_ms / ours.latency_ms
            row["realised/possible"] = realised_share(dense_ms, ours.latency_ms, possible)
    if is_narrow:
        row |= cells("addition in a chain", times["addition in a chain"])
        row |= cells("ours in a chain", chained)
    four = times[CHAINED]
    if isinstance(four, str):
        row[f"{CHAINED} ms"] = four
        return row
    chain_ms = four.latency_ms / CHAIN
    row[f"{CHAINED} ms"] = chain_ms
    if not isinstance(chained, str):
        added_ms = fastest_ms(times, "addition in a chain") or added_ms
        possible = possible_ms(chain_ms, counted.ratio, added_ms)
        row["speed-up in a chain"] = chain_ms / chained.latency_ms
        row["realised/possible in a chain"] = realised_share(chain_ms, chained.latency_ms, possible)
    return row


def main() -> None:
    """Measure every stage."""
    settings = settings_of(argument_parser(__doc__, dtypes=True).parse_args())
    shrink = 8 if settings.quick else 1
    densities = (1.0, 0.3) if settings.quick else DENSITIES
    stages = []
    for planes in (64, 128) if settings.quick else STAGES:
        size = STAGES[planes][0] // shrink, STAGES[planes][1] // shrink
        stages.append(
            Stage(str(planes), functools.partial(stage_rows, planes, size, densities, settings))
        )
    run_script(
        settings,
        "block",
        stages,
        title=f"A residual block in {settings.dtype_name}: frozen and sampled against dense",
        notes=(
            "MACs of the block, sampler heads and interpolation included. Batch 1, white noise, no "
            "grid. Speed-ups are against the faster of the two OpenVINO columns; in a chain, "
            "against a quarter of four such blocks in one OpenVINO network."
        ),
    )


if __name__ == "__main__":
    main()
