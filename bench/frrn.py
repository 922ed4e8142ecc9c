"""FRRN and RefineNet, frozen and sampled to a share of their multiply-adds, against dense ones.

    python bench/frrn.py --out runs/bench/today        FRRN-A, RefineNet-18 and RefineNet-50
    python bench/frrn.py --only frrn_a                 some of frrn_a, refinenet18, refinenet50
    python bench/frrn.py --quick                       narrow networks on small images
    python bench/frrn.py --without compile             faster to build, and said so in the table

One image of 360x480, 11 classes, whole models: image in, logits of the image's size out. Masks are
drawn at one density everywhere, the one at which the multiply-adds of the whole model, stem, 1x1
convolutions, sampler heads and interpolation included, are the asked share of the dense model's:
0.3 or 0.5.

The possible speed-up is one over the share that was then counted. Against each dense rival, and
against our own dense form, which has the same kernels and computes everywhere, a row has the
realised speed-up over the possible one. The goal is 0.85 at a share of 0.3, against torch.compile
and against the faster binding of OpenVINO.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from harness.models import Maps, frozen, liven_norms, sampled_at
from harness.possible import possible_ms, realised_share
from harness.rivals import as_tensors, check_agrees, dense_rivals
from harness.script import (
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
from sparsight.models import frrn_a, refinenet
from sparsight.nn.budget import sampler_levels, settle_on_budget

SHARES = (0.3, 0.5)
NUM_CLASSES = 11
EXPORTED = ("openvino", "openvino nhwc")
# What a row is held against: name in the columns -> candidates, of which the fastest counts.
AGAINST = {
    "compile": ("compile",),
    "openvino": EXPORTED,
    "frozen dense": ("frozen dense",),
}


def image_of(settings: Settings) -> Tensor:
    """(1, 3, H, W), normalised as networks expect, channels-last."""
    height, width = (48, 64) if settings.quick else (360, 480)
    torch.manual_seed(1)
    return torch.randn(1, 3, height, width).to(memory_format=torch.channels_last)


def frrn(settings: Settings) -> nn.Module:
    """FRRN-A; narrow with --quick."""
    torch.manual_seed(0)
    if settings.quick:
        return frrn_a(NUM_CLASSES, channels=8, residual_channels=8)
    return frrn_a(NUM_CLASSES)


def refine(backbone: str, settings: Settings) -> nn.Module:
    """RefineNet; with a narrow decoder with --quick."""
    torch.manual_seed(0)
    channels = 16 if settings.quick else 256
    return refinenet(NUM_CLASSES, backbone=backbone, channels=channels)  # pyright: ignore[reportArgumentType]


def sampled_to(model: nn.Module, share: float, x: Tensor) -> tuple[nn.Module, float, MacCount]:
    """The converted model at a share of the dense MACs, its density, and what was counted."""
    source = sampled_at(model, share)
    settle_on_budget(source, lambda: count_macs(source, x).ratio, share)
    logit = float(sampler_levels(source)[0].detach())  # one for all
    return source, 1 / (1 + math.exp(-logit)), count_macs(source, x)


def model_rows(name: str, build: Callable[[Settings], nn.Module], settings: Settings) -> list[Row]:
    """A network at every share.

    Args:
        name: of the network.
        build: makes it.
        settings: of the run.
    """
    x = image_of(settings)
    model = Maps(liven_norms(build(settings))).eval().requires_grad_(False)
    candidates = dense_rivals(model, x, settings, exported=EXPORTED)
    candidates["frozen dense"] = frozen(model, x, settings.dtype)
    with torch.inference_mode():
        truth = as_tensors(model(x))
    counted: dict[float, tuple[float, MacCount]] = {}
    sources: dict[str, list[Tensor]] = {"frozen dense": truth}
    for share in SHARES:
        source, density, macs = sampled_to(model, share, x)
        counted[share] = density, macs
        candidates[f"ours at {share}"] = frozen(source, x, settings.dtype)
        with torch.inference_mode():
            sources[f"ours at {share}"] = as_tensors(source(x))
    with torch.inference_mode():
        for candidate, expected in sources.items():
            run = candidates[candidate]
            if not isinstance(run, str):
                check_agrees(candidate, as_tensors(run(x)), expected, settings.dtype)
    times = compare(settings, candidates, x)
    return [
        share_row(name, x, share, *counted[share], times, settings=settings) for share in SHARES
    ]


def share_row(
    name: str,
    x: Tensor,
    share: float,
    density: float,
    counted: MacCount,
    times: Mapping[str, Latency | str],
    *,
    settings: Settings,
) -> Row:
    """One line: a network at a share, against every rival.

    Args:
        name: of the network.
        x: the image.
        share: of the dense multiply-adds that was asked for.
        density: at which masks were drawn.
        counted: multiply-adds of ours and of the dense network.
        times: of all candidates.
        settings: of the run.
    """
    row: Row = {
        "network": name,
        "image": f"{x.shape[-2]}x{x.shape[-1]}",
        "dtype": settings.dtype_name,
        "asked share": share,
        "density": density,
        "GMACs": counted.total / 1e9,
        "MAC ratio": counted.ratio,
    }
    for candidate in (*EXPORTED, "compile", "eager", "frozen dense"):
        row |= cells(candidate, times[candidate])
    latency = times[f"ours at {share}"]
    row |= cells("ours", latency)
    row["possible speed-up"] = 1 / counted.ratio
    if isinstance(latency, str):
        return row
    row["n"] = latency.num_samples
    for rival, names in AGAINST.items():
        dense_ms = fastest_ms(times, *names)
        if dense_ms is not None:
            possible = possible_ms(dense_ms, counted.ratio)
            row[f"speed-up, {rival}"] = dense_ms / latency.latency_ms
            row[f"realised/possible, {rival}"] = realised_share(
                dense_ms, latency.latency_ms, possible
            )
    return row


def stages(settings: Settings) -> Iterator[Stage]:
    """Of each network one."""
    builds: dict[str, Callable[[Settings], nn.Module]] = {
        "frrn_a": frrn,
        "refinenet18": functools.partial(refine, "resnet18"),
        "refinenet50": functools.partial(refine, "resnet50"),
    }
    for name, build in builds.items():
        yield Stage(name, functools.partial(model_rows, name, build, settings))


def main() -> None:
    """Measure the networks that were asked for."""
    settings = settings_of(argument_parser(__doc__, dtypes=True).parse_args())
    run_script(
        settings,
        "frrn",
        list(stages(settings)),
        title=f"FRRN and RefineNet in {settings.dtype_name}: frozen and sampled against dense",
        notes=(
            "MACs of the whole model, sampler heads and interpolation included; white noise, no "
            "grid, random weights, one density everywhere. `possible speed-up` is one over the MAC "
            "ratio; `realised/possible` has it by rival, OpenVINO's with the faster of its two "
            "bindings. Batch 1."
        ),
    )


if __name__ == "__main__":
    main()
