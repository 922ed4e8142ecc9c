"""Whole networks, frozen and sampled, against the same networks dense.

    python bench/network.py --out runs/bench/today     ResNet-50 features, FCN and Faster R-CNN
    python bench/network.py --only features            some of features, fcn, fcn-body, detector
                                                       and detector-body
    python bench/network.py --quick                    small networks on small images
    python bench/network.py --dtype bfloat16 --only features
    python bench/network.py --without compile          faster to build, and said so in the table

features   the four stage outputs of a ResNet-50 at 512x1024, at every density, against OpenVINO,
           ONNX Runtime, torch.compile with freezing and eager channels-last.
fcn        torchvision's fcn_resnet50 at 512x1024, density 0.3.
detector   torchvision's fasterrcnn_resnet50_fpn on an image of 800x1216, density 0.3.

The last two have a row for the whole model against dense torch.compile (of the detector only its
backbone is compiled: every number of proposals would compile the rest anew) and, in the stage
`-body`, one for the sampled part by itself. That part is the ResNet that is sampled, stem, shortcut
convolutions and all, on the input that the model gives it, without neck and heads. Its theory is
the time of the same part in dense torch.compile, measured in the same run, times its MAC ratio:
multiply-adds of all of its layers, those that are not sampled, sampler heads and interpolation
included, over those of the dense part. "frozen dense" is our own packed dense model: what the
layers that are not sampled cost.

In bfloat16 every candidate takes float32 images and returns float32; the dense detector's backbone
alone computes in bfloat16, with its proposals and boxes in float32.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.segmentation.fcn import FCN, FCNHead

from harness.models import Maps, frozen, liven_norms, resnet, sampled_at
from harness.possible import possible_ms, realised_share
from harness.rivals import (
    as_tensors,
    check_agrees,
    compiled,
    dense_rivals,
    folded,
    in_dtype,
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
from sparsight.models.resnet_stages import ResNetStages

DENSITIES = (1.0, 0.5, 0.3, 0.1)
DENSITY = 0.3
TINY = (1, 1, 1, 1)
LAYERS = (3, 4, 6, 3)


def image_of(height: int, width: int) -> Tensor:
    """(1, 3, height, width), normalised as networks expect, channels-last."""
    torch.manual_seed(1)
    return torch.randn(1, 3, height, width).to(memory_format=torch.channels_last)


def street_image(settings: Settings) -> Tensor:
    """The image of everything but the detector."""
    return image_of(*((64, 96) if settings.quick else (512, 1024)))


def ours_of(
    model: nn.Module, density: float, x: Tensor, settings: Settings
) -> tuple[nn.Module | str, MacCount]:
    """The frozen network, checked against the converted one, and its multiply-adds."""
    source = sampled_at(model, density)
    counted = count_macs(source, x)
    made = frozen(source, x, settings.dtype)
    if not isinstance(made, str):
        with torch.inference_mode():
            check_agrees(
                f"ours at {density}", as_tensors(made(x)), as_tensors(source(x)), settings.dtype
            )
    return made, counted


def network_row(
    network: str,
    x: Tensor,
    density: float | str,
    counted: MacCount,
    times: dict[str, Latency | str],
    ours: str,
    rivals: tuple[str, ...],
    against: tuple[str, ...],
    settings: Settings,
) -> Row:
    """One line: a network at a density.

    Args:
        network: what the row is about.
        x: the image.
        density: that was asked for.
        counted: multiply-adds of ours and of the dense network.
        times: of all candidates.
        ours: name of the candidate that the row is about.
        rivals: candidates that are shown.
        against: those of them whose fastest is the dense time.
        settings: of the run.
    """
    row: Row = {
        "network": network,
        "image": f"{x.shape[-2]}x{x.shape[-1]}",
        "dtype": settings.dtype_name,
        "asked density": density,
        "GMACs": counted.total / 1e9,
        "MAC ratio": counted.ratio,
    }
    for name in rivals:
        row |= cells(name, times[name])
    latency = times[ours]
    row |= cells("ours", latency)
    dense_ms = fastest_ms(times, *against)
    row["against"] = next(
        (n for n in against if fastest_ms(times, n) == dense_ms), f"no {' or '.join(against)}"
    )
    if dense_ms is None:
        return row
    possible = possible_ms(dense_ms, counted.ratio)
    row["possible speed-up"] = dense_ms / possible
    if not isinstance(latency, str):
        row["n"] = latency.num_samples
        row["speed-up"] = dense_ms / latency.latency_ms
        row["realised/possible"] = realised_share(dense_ms, latency.latency_ms, possible)
    return row


def feature_rows(settings: Settings) -> list[Row]:
    """The stage outputs of a ResNet at every density."""
    x = street_image(settings)
    body = Maps(ResNetStages(resnet(TINY if settings.quick else LAYERS))).eval()
    densities = (1.0, DENSITY) if settings.quick else DENSITIES
    candidates = dense_rivals(body, x, settings)
    rivals = tuple(candidates)
    counts = {}
    for density in densities:
        candidates[f"ours at {density}"], counts[density] = ours_of(body, density, x, settings)
    times = compare(settings, candidates, x)
    return [
        network_row(
            "ResNet-50 features",
            x,
            density,
            counts[density],
            times,
            f"ours at {density}",
            rivals,
            ("openvino", "openvino nhwc"),
            settings,
        )
        for density in densities
    ]


def body_rows(
    name: str, build: Callable[[Settings], tuple[nn.Module, Tensor]], settings: Settings
) -> list[Row]:
    """The sampled part of a model by itself, against its MAC ratio.

    Args:
        name: of the model.
        build: makes the part, and its input.
        settings: of the run.
    """
    body, x = build(settings)
    body = Maps(body).eval()
    # The goal is against torch.compile; exports would take a minute, and features has them.
    candidates = dense_rivals(body, x, settings, exported=())
    rivals = tuple(candidates)
    candidates["ours"], counted = ours_of(body, DENSITY, x, settings)
    times = compare(settings, candidates, x)
    return [
        network_row(
            f"{name}, sampled part",
            x,
            DENSITY,
            counted,
            times,
            "ours",
            rivals,
            against_of(settings),
            settings,
        )
    ]


def against_of(settings: Settings) -> tuple[str, ...]:
    """torch.compile; eager where that was not built, which the report takes for no goal."""
    return ("eager",) if settings.left_out("compile") else ("compile",)


def fcn(settings: Settings) -> FCN:
    """torchvision's fcn_resnet50 without its auxiliary head; a small body with --quick."""
    body = resnet(TINY if settings.quick else LAYERS, dilate=True)
    torch.manual_seed(2)
    model = FCN(IntermediateLayerGetter(body, {"layer4": "out"}), FCNHead(2048, 21))
    liven_norms(model)
    return model


def detector(settings: Settings) -> FasterRCNN:
    """torchvision's fasterrcnn_resnet50_fpn; with --quick a small body, image and proposals."""
    body = resnet(TINY if settings.quick else LAYERS)
    stages = {f"layer{i}": str(i - 1) for i in (1, 2, 3, 4)}
    torch.manual_seed(2)
    backbone = BackboneWithFPN(body, stages, [256, 512, 1024, 2048], 256)
    side = 64 if settings.quick else 800
    proposals = 20 if settings.quick else 1000
    model = FasterRCNN(
        backbone, 91, min_size=side, max_size=2 * side, rpn_post_nms_top_n_test=proposals
    )
    liven_norms(model)
    return model


def fcn_body(settings: Settings) -> tuple[nn.Module, Tensor]:
    """The part of the FCN that is sampled, and its input."""
    return fcn(settings).backbone, street_image(settings)


def detector_image(settings: Settings) -> Tensor:
    """(1, 3, H, W) whose short side is the 800 px that the detector scales images to."""
    return image_of(*((64, 96) if settings.quick else (800, 1216)))


def detector_body(settings: Settings) -> tuple[nn.Module, Tensor]:
    """The part of the detector that is sampled, and its input: scaled, normalised, padded."""
    model = detector(settings)
    images, _ = model.transform([detector_image(settings)[0]])
    padded = images.tensors.contiguous(memory_format=torch.channels_last)
    backbone = model.backbone
    assert isinstance(backbone, nn.Module)
    return backbone.get_submodule("body"), padded


def model_rows(
    name: str,
    model: nn.Module,
    x: Tensor,
    argument: Any,
    dense: Callable[[nn.Module], nn.Module],
    compile_dense: Callable[[nn.Module], nn.Module],
    settings: Settings,
) -> list[Row]:
    """A whole model at density 0.3.

    Args:
        name: of the model.
        model: dense.
        x: the image.
        argument: what the model takes.
        dense: from the folded model to the one in the dtype of the run.
        compile_dense: from that one to torch.compile of it, as far as that goes.
        settings: of the run.
    """
    source = sampled_at(model, DENSITY)
    counted = count_macs(source, argument)
    plain = dense(folded(model))
    candidates: dict[str, Candidate] = {
        "compile": settings.left_out("compile") or compile_dense(plain),
        "eager": settings.left_out("eager") or plain,
        "frozen dense": frozen(model, argument, settings.dtype),
        "ours": frozen(source, argument, settings.dtype),
    }
    rivals = ("compile", "eager", "frozen dense")
    if isinstance(argument, Tensor):
        # Boxes of a detector change places with the last bit; its body is checked by itself.
        check_all(candidates, {"ours": source}, model, argument, settings.dtype)
    times = compare(settings, candidates, argument)
    return [
        network_row(
            name, x, DENSITY, counted, times, "ours", rivals, against_of(settings), settings
        )
    ]


def check_all(
    candidates: dict[str, Candidate],
    sources: dict[str, nn.Module],
    model: nn.Module,
    x: Tensor,
    dtype: torch.dtype,
) -> None:
    """Hold every candidate against its source, `model` where `sources` names no other."""
    with torch.inference_mode():
        for name, candidate in candidates.items():
            if not isinstance(candidate, str):
                truth = as_tensors(sources.get(name, model)(x))
                check_agrees(name, as_tensors(candidate(x)), truth, dtype)


def fcn_rows(settings: Settings) -> list[Row]:
    """The whole FCN."""
    model, x = fcn(settings), street_image(settings)
    dense = functools.partial(in_dtype, dtype=settings.dtype)
    return model_rows("fcn_resnet50", model, x, x, dense, compiled, settings)


def detector_rows(settings: Settings) -> list[Row]:
    """The whole detector."""
    x = detector_image(settings)
    return model_rows(
        "fasterrcnn_resnet50_fpn (compile: its backbone)",
        detector(settings),
        x,
        [x[0]],
        lambda model: with_backbone(model, lambda b: in_dtype(b, settings.dtype)),
        lambda model: with_backbone(model, compiled),
        settings,
    )


def with_backbone(model: nn.Module, change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A detector around a changed backbone; the given one stays as it is."""
    backbone = model.backbone
    assert isinstance(backbone, nn.Module)
    model = copy.copy(model)
    model._modules = {**model._modules, "backbone": change(backbone)}
    return model


def main() -> None:
    """Measure the networks that were asked for."""
    settings = settings_of(argument_parser(__doc__, dtypes=True).parse_args())
    measures: dict[str, Callable[[], list[Row]]] = {
        "features": lambda: feature_rows(settings),
        "fcn": lambda: fcn_rows(settings),
        "fcn-body": lambda: body_rows("fcn_resnet50", fcn_body, settings),
        "detector": lambda: detector_rows(settings),
        "detector-body": lambda: body_rows("fasterrcnn_resnet50_fpn", detector_body, settings),
    }
    run_script(
        settings,
        "network",
        [Stage(name, measure) for name, measure in measures.items()],
        title=f"Networks in {settings.dtype_name}: frozen and sampled against dense",
        notes=(
            "MACs of what the row names, sampler heads and interpolation included; white noise, "
            "no grid, random weights. `possible speed-up` is one over the MAC ratio. Batch 1."
        ),
    )


if __name__ == "__main__":
    main()
