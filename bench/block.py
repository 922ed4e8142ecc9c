"""One residual block: frozen and sampled, against the same block dense.

    python bench/block.py            every stage of a ResNet-50 at 512x1024, all densities
    python bench/block.py --quick    two stages at a quarter of the size, two densities, no
    torch.compile

Baselines: PyTorch eager, channels-last, norms folded; torch.compile with freezing, of the same. All
    candidates of a
row take turns on the same input with the same number of threads. `possible` is the speed-up that
the MACs allow, sampler heads and interpolation counted; `realised` is how much of it was reached
against the faster baseline. Below a realised speed-up of 1 the dense block is the better choice,
and the table says so.
"""

import argparse
import copy
import functools
import math
import shlex
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.resnet import Bottleneck

import sparsight
from sparsight.measure import count_macs, markdown_table, measure_latency, write_report
from sparsight.nn import Sampler

# planes -> height and width of the map, ResNet-50 on a 512x1024 image
STAGES = {64: (128, 256), 128: (64, 128), 256: (32, 64), 512: (16, 32)}
DENSITIES = (1.0, 0.5, 0.3, 0.1)


def dense_block(planes: int) -> Bottleneck:
    """A bottleneck without shortcut convolution, with statistics that keep its output in range."""
    torch.manual_seed(0)
    block = Bottleneck(4 * planes, planes).eval()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
    return block.to(memory_format=torch.channels_last)


def folded(block: Bottleneck) -> nn.Module:
    """The block with its norms folded into the convolutions: what a careful user of eager runs."""
    fused = copy.deepcopy(block)
    for index in "123":
        conv, norm = getattr(fused, f"conv{index}"), getattr(fused, f"bn{index}")
        setattr(fused, f"conv{index}", fuse_conv_bn_eval(conv, norm))
        setattr(fused, f"bn{index}", nn.Identity())
    return fused.to(memory_format=torch.channels_last)


def compiled(block: nn.Module) -> Callable[[Tensor], Tensor]:
    """The block in torch.compile with freezing, which packs the weights once."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    torch._dynamo.reset()
    return torch.compile(block)


def sampled(block: Bottleneck, density: float) -> nn.Module:
    """The block with samplers that keep a position with probability `density`; no grid."""
    bias = 30.0 if density == 1 else math.log(density / (1 - density))
    sampler = functools.partial(Sampler, bias=bias, grid_stride=None)
    return sparsight.sparsify(nn.Sequential(copy.deepcopy(block)), sampler=sampler).eval()


def measure_row(
    planes: int, size: tuple[int, int], density: float, args: argparse.Namespace
) -> dict[str, float | int | str]:
    block = dense_block(planes)
    torch.manual_seed(1)
    x = torch.randn(1, 4 * planes, *size).relu().to(memory_format=torch.channels_last)
    frozen = sparsight.freeze(sampled(block, density), example=x)
    candidates: dict[str, Callable[[Tensor], Tensor]] = {"eager": folded(block)}
    if not args.quick:
        candidates["compile"] = compiled(folded(block))
    candidates["ours"] = frozen
    times = measure_latency(
        candidates, x, repeats=args.repeats, warmup=args.warmup, min_time_s=args.min_time_s
    )
    counted = count_macs(frozen, x)
    gated = [row for row in counted.layers if row.positions and row.dense]
    best = min(row.latency_ms for row in times.rows if row.name != "ours")
    ours = times["ours"]
    row: dict[str, float | int | str] = {
        "planes": planes,
        "map": f"{size[0]}x{size[1]}",
        "asked density": density,
        "density": sum(r.total for r in gated) / sum(r.dense for r in gated),
        "MAC ratio": counted.ratio,
        "n": ours.num_samples,
    }
    for latency in times.rows:
        row[f"{latency.name} ms"] = latency.latency_ms
        row[f"{latency.name} IQR ms"] = latency.iqr_ms
    row["speed-up"] = best / ours.latency_ms
    row["possible"] = 1 / counted.ratio
    row["realised"] = row["speed-up"] * counted.ratio
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small maps, few samples")
    parser.add_argument("--repeats", type=int, help="samples of each candidate at least")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="stem of the report; default: below runs/bench")
    args = parser.parse_args()
    args.repeats = args.repeats or (3 if args.quick else 30)
    args.warmup, args.min_time_s = (1, 0.0) if args.quick else (5, 0.3)
    torch.set_num_threads(args.threads)

    shrink = 4 if args.quick else 1
    planes = (64, 256) if args.quick else tuple(STAGES)
    densities = (1.0, 0.3) if args.quick else DENSITIES
    rows = []
    for plane in planes:
        size = STAGES[plane][0] // shrink, STAGES[plane][1] // shrink
        for density in densities:
            rows.append(measure_row(plane, size, density, args))
    print(markdown_table(rows))
    now = datetime.now(UTC).strftime("%Y-%m-%d-%H%M%S")
    stem = args.out or Path("runs") / "bench" / f"{now}-block"
    _, page = write_report(
        stem,
        rows,
        title="A residual block: frozen and sampled against dense",
        command=f"python bench/block.py {shlex.join(sys.argv[1:])}".strip(),
        notes=(
            "MACs of the block, sampler heads and interpolation included. `speed-up` is against "
            "the faster of the dense candidates; `realised` is `speed-up` over `possible`. "
            "Batch 1, float32."
        ),
    )
    print(f"written: {page}")


if __name__ == "__main__":
    main()
