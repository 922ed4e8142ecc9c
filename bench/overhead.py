"""What a block costs beside its convolutions: one call, and the parts that sampling adds.

    python bench/overhead.py --out runs/bench/today
    python bench/overhead.py --only calls 64             of calls and the stages by planes
    python bench/overhead.py --quick

call    one call of the block operator on a 1x1 map with an empty mask, masks given: nothing to
        compute but one pixel of residual. The module's forward, whose heads decide, beside it.
share   sampler heads, site lists and interpolation of a block at density 0.3: their share of the
        block's time over their share of its multiply-adds.

The operator is one call, so that its parts are differences between calls, measured in turns:
heads = the block that decides - the same block with those masks given; interpolation = masks given
- the same with holes left at zero; the site lists are timed as a call of their own, for both masks.
A difference of two medians is noisy where the part is small; the spread of both is shown.
"""

import functools
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

import sparsight
from harness.models import STAGES, block_input, dense_block, sampler_at
from harness.possible import share_ratio
from harness.script import Settings, argument_parser, compare, run_script, settings_of
from harness.stages import Row, Stage
from sparsight.measure import Latency, MacCount, count_macs
from sparsight.nn import ZeroFill
from sparsight.nn.frozen_block import FrozenBlock
from sparsight.nn.frozen_sampler import FrozenSampler
from sparsight.ops import sites_from_mask
from sparsight.ops.block import sampled_block

DENSITY = 0.3
CALLS = 100  # in one sample of the empty call


def frozen_block(planes: int, density: float, x: Tensor, *, fill: bool) -> FrozenBlock:
    """A frozen bottleneck; without `fill`, holes stay zero."""
    source = sparsight.sparsify(
        nn.Sequential(dense_block(planes)),
        sampler=sampler_at(density),
        interpolation=None if fill else ZeroFill,
    ).eval()
    block = sparsight.freeze(source, example=x).get_submodule("0")
    assert isinstance(block, FrozenBlock)
    return block


def operator(block: FrozenBlock, x: Tensor, masks: list[Tensor] | None) -> Callable[..., Tensor]:
    """One call of the operator: masks given, or decided by the heads; returns all masks."""
    batch, channels, height, width = x.shape
    count = len(block.samplers)
    noise: list[Tensor | None] = [None] * count
    if masks is None:
        samplers = cast("list[FrozenSampler]", list(block.samplers))
        noise = [sampler.noise(batch, height, width) for sampler in samplers]
    given: list[Tensor | None] = [None] * count if masks is None else list(masks)

    def call(*_: Tensor) -> Tensor:
        made = sampled_block(
            x,
            x,
            noise,
            given,
            block.params,
            block.spec,
            output_shape=(batch, channels, height, width),
            mask_positions=count * height * width,
        )
        return made[1]

    return call


def call_rows(settings: Settings) -> list[Row]:
    """The overhead of a call, in microseconds."""
    planes = 64
    x = block_input(planes, (1, 1))
    block = frozen_block(planes, 0.0, x, fill=True)
    empty = [torch.zeros(1, 1, 1, 1, dtype=torch.bool)] * len(block.samplers)
    calls = {
        "block operator, masks given": operator(block, x, empty),
        "block operator, heads decide": operator(block, x, None),
        "FrozenBlock.forward": block,
    }

    def often(call: Callable[..., Tensor]) -> Callable[..., None]:
        def run(x: Tensor) -> None:
            for _ in range(CALLS):
                call(x)

        return run

    times = compare(settings, {name: often(call) for name, call in calls.items()}, x)
    rows: list[Row] = []
    for name, latency in times.items():
        assert isinstance(latency, Latency)
        rows.append(
            {
                "what": f"{name}, 1x1 map, empty mask",
                "planes": planes,
                "n": latency.num_samples,
                "us per call": latency.latency_ms / CALLS * 1e3,
                "IQR us": latency.iqr_ms / CALLS * 1e3,
            }
        )
    return rows


def share_row(planes: int, size: tuple[int, int], settings: Settings) -> Row:
    """What sampling adds to one block, in time and in multiply-adds."""
    x = block_input(planes, size)
    block = frozen_block(planes, DENSITY, x, fill=True)
    unfilled = frozen_block(planes, DENSITY, x, fill=False)
    decide = operator(block, x, None)
    with torch.inference_mode():
        masks = [m.view(1, 1, *size).clone() for m in decide().chunk(len(block.samplers), dim=1)]
    times = compare(
        settings,
        {
            "heads decide": decide,
            "masks given": operator(block, x, masks),
            "holes zero": operator(unfilled, x, masks),
            "lists": lambda _: [sites_from_mask(mask) for mask in masks],
        },
        x,
    )
    ms: dict[str, float] = {}
    spread: dict[str, float] = {}
    for name, latency in times.items():
        assert isinstance(latency, Latency)
        ms[name], spread[name] = latency.latency_ms, latency.iqr_ms
    heads_ms = ms["heads decide"] - ms["masks given"]
    fill_ms = ms["masks given"] - ms["holes zero"]
    counted = count_macs(nn.Sequential(block).eval(), x)
    added_macs = added_by_sampling(counted)
    added_ms = heads_ms + fill_ms + ms["lists"]
    return {
        "what": "heads, site lists and interpolation",
        "planes": planes,
        "map": f"{size[0]}x{size[1]}",
        "density": sum(float(mask.float().mean()) for mask in masks) / len(masks),
        "MMACs": counted.total / 1e6,
        "block ms": ms["heads decide"],
        "block IQR ms": spread["heads decide"],
        "masks given ms": ms["masks given"],
        "masks given IQR ms": spread["masks given"],
        "heads ms": heads_ms,
        "lists ms": ms["lists"],
        "interpolation ms": fill_ms,
        "share of time": added_ms / ms["heads decide"],
        "share of MACs": added_macs / counted.total,
        "time/MACs": share_ratio(added_ms, ms["heads decide"], added_macs, counted.total),
    }


def added_by_sampling(counted: MacCount) -> int:
    """Multiply-adds that the dense block does not have: heads and interpolation."""
    return sum(layer.total for layer in counted.layers if not layer.dense)


def main() -> None:
    """Measure calls and shares."""
    settings = settings_of(argument_parser(__doc__).parse_args(), budget_s=1.5)
    stages = [Stage("calls", lambda: call_rows(settings))]
    shrink = 8 if settings.quick else 1
    for planes in (64,) if settings.quick else STAGES:
        size = STAGES[planes][0] // shrink, STAGES[planes][1] // shrink
        share = functools.partial(share_row, planes, size, settings)
        stages.append(Stage(str(planes), lambda share=share: [share()]))
    run_script(
        settings,
        "overhead",
        stages,
        title="What a block costs beside its convolutions",
        notes=(
            "Shares are of the operator's time and MACs; the parts are differences between calls "
            "(see bench/overhead.py). float32, batch 1, white noise, no grid."
        ),
    )


if __name__ == "__main__":
    main()
