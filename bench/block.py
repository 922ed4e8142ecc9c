"""One residual block, frozen and sampled, against the same block dense.

    python bench/block.py --out runs/bench/today     every stage of a ResNet-50 at 512x1024
    python bench/block.py --quick                    tiny maps, no torch.compile: does it work?
    python bench/block.py --dtype bfloat16           the same rows in half precision

All candidates of a stage take turns in one run, on the same input, with the same number of threads:
the dense block in OpenVINO (bound to NCHW and to channels-last maps; the faster of the two is the
one that counts), ONNX Runtime, torch.compile with freezing and eager channels-last, and ours at
every density. "openvino in a chain" is a quarter of the time of four such blocks in one network,
where the conversion to OpenVINO's own layout at both ends is shared.

The possible time is the larger of the dense OpenVINO time times the MAC ratio, sampler heads and
interpolation counted, and one in-place addition of two tensors of the block's input size.
"""

import copy

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
from harness.possible import geometric_mean, possible_ms, realised_share
from harness.rivals import (
    as_tensors,
    check_agrees,
    dense_rivals,
    exported_rivals,
    folded,
)
from harness.script import (
    Candidate,
    Row,
    Settings,
    argument_parser,
    cells,
    compare,
    fastest_ms,
    publish,
    settings_of,
)
from sparsight.measure import Latency, count_macs

DENSITIES = (1.0, 0.5, 0.3, 0.1)
CHAIN = 4


def ours_at(block: nn.Module, density: float, x: Tensor, settings: Settings) -> nn.Module | str:
    """The frozen block, checked against the converted one in float32."""
    source = sampled_at(block, density)
    made = frozen(source, x, settings.dtype)
    if not isinstance(made, str):
        with torch.inference_mode():
            check_agrees(
                f"ours at {density}", as_tensors(made(x)), as_tensors(source(x)), settings.dtype
            )
    return made


def chain_rival(block: nn.Module, x: Tensor, settings: Settings) -> Candidate:
    """Several copies of the block in one OpenVINO network."""
    chain = nn.Sequential(*(copy.deepcopy(block) for _ in range(CHAIN)))
    liven_norms(chain)
    with torch.inference_mode():
        truth = as_tensors(chain(x))
    return exported_rivals(folded(chain), x, settings, truth, names=("openvino",))["openvino"]


def addition(x: Tensor, dtype: torch.dtype) -> Candidate:
    """What any residual block must move: read two maps of the input's size and write one."""
    left, right = x.to(dtype, copy=True), torch.full_like(x, 1e-6, dtype=dtype)
    return lambda _: left.add_(right)


def stage_rows(
    planes: int, size: tuple[int, int], densities: tuple[float, ...], settings: Settings
) -> list[Row]:
    """All densities of one stage, measured in one run."""
    block, x = dense_block(planes), block_input(planes, size)
    candidates = dense_rivals(block, x, settings)
    chained = "left out by --quick" if settings.quick else chain_rival(block, x, settings)
    candidates[f"{CHAIN} in a chain"] = chained
    candidates["addition"] = addition(x, settings.dtype)
    ours = {density: ours_at(block, density, x, settings) for density in densities}
    candidates |= {f"ours at {density}": made for density, made in ours.items()}
    times = compare(settings, candidates, x)
    return [
        block_row(planes, size, density, made, x, times, settings) for density, made in ours.items()
    ]


def block_row(
    planes: int,
    size: tuple[int, int],
    density: float,
    made: nn.Module | str,
    x: Tensor,
    times: dict[str, Latency | str],
    settings: Settings,
) -> Row:
    """One line of the table."""
    row: Row = {
        "planes": planes,
        "map": f"{size[0]}x{size[1]}",
        "dtype": settings.dtype_name,
        "asked density": density,
    }
    latency = times[f"ours at {density}"]
    if isinstance(made, str) or isinstance(latency, str):
        return {**row, "ours ms": made}
    counted = count_macs(made, x)
    gated = [layer for layer in counted.layers if layer.positions and layer.dense]
    row["density"] = sum(layer.total for layer in gated) / sum(layer.dense for layer in gated)
    row["MMACs"], row["MAC ratio"] = counted.total / 1e6, counted.ratio
    row["n"] = latency.num_samples
    for name in ("openvino", "openvino nhwc", "onnxruntime", "compile", "eager", "addition"):
        row |= cells(name, times[name])
    row |= cells("ours", latency)
    dense_ms = fastest_ms(times, "openvino", "openvino nhwc")
    added_ms = fastest_ms(times, "addition")
    if dense_ms is None or added_ms is None:
        row["possible ms"] = "needs openvino"
        return row
    possible = possible_ms(dense_ms, counted.ratio, added_ms)
    row["possible ms"] = possible
    row["possible speed-up"] = dense_ms / possible
    row["speed-up"] = dense_ms / latency.latency_ms
    row["realised/possible"] = realised_share(dense_ms, latency.latency_ms, possible)
    chained = times[f"{CHAIN} in a chain"]
    if isinstance(chained, str):
        row["openvino in a chain ms"] = chained
    else:
        chain_ms = chained.latency_ms / CHAIN
        row["openvino in a chain ms"] = chain_ms
        row["realised/possible in a chain"] = realised_share(
            chain_ms, latency.latency_ms, possible_ms(chain_ms, counted.ratio, added_ms)
        )
    return row


def main() -> None:
    """Measure every stage."""
    settings = settings_of(argument_parser(__doc__).parse_args(), repeats=30)
    shrink = 8 if settings.quick else 1
    densities = (1.0, 0.3) if settings.quick else DENSITIES
    rows = []
    for planes in (64, 128) if settings.quick else STAGES:
        size = STAGES[planes][0] // shrink, STAGES[planes][1] // shrink
        rows += stage_rows(planes, size, densities, settings)
    for column in ("realised/possible", "realised/possible in a chain"):
        shares = [row[column] for row in rows if column in row]
        if shares:
            print(f"{column}: geometric mean {geometric_mean(shares):.3f}, worst {min(shares):.3f}")
    publish(
        settings,
        "block",
        rows,
        title="A residual block: frozen and sampled against dense",
        notes=(
            "MACs of the block, sampler heads and interpolation included. Batch 1, white noise, no "
            "grid. Speed-ups are against the faster of the two OpenVINO columns."
        ),
    )


if __name__ == "__main__":
    main()
