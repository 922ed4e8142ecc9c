"""Whole networks, frozen and sampled, against the same networks dense.

    python bench/network.py --out runs/bench/today     ResNet-50 features, FCN and Faster R-CNN
    python bench/network.py --only features            one of features, fcn, detector
    python bench/network.py --quick                    small networks on small images

features   the four stage outputs of a ResNet-50 at 512x1024, at every density, against OpenVINO,
           ONNX Runtime, torch.compile with freezing and eager channels-last.
fcn        torchvision's fcn_resnet50 at 512x1024, density 0.3.
detector   torchvision's fasterrcnn_resnet50_fpn on an image of 800x1216, density 0.3.

The last two have three kinds of rows: the whole model against dense torch.compile; the same against
torch.compile of its backbone alone where the whole one cannot be compiled in one piece (the
detector: proposals); and the sampled part, its backbone, measured by itself against what the MAC
ratio of that part promises. "frozen dense" is our own packed dense model: what the layers
that are not sampled cost.
"""

import copy
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
from harness.rivals import as_tensors, check_agrees, compiled, dense_rivals, folded
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
from sparsight.measure import Latency, MacCount, count_macs
from sparsight.models.semantic_fpn import ResNetStages

DENSITIES = (1.0, 0.5, 0.3, 0.1)
DENSITY = 0.3
TINY = (1, 1, 1, 1)
LAYERS = (3, 4, 6, 3)


def image_of(height: int, width: int) -> Tensor:
    """(1, 3, height, width), normalised as networks expect, channels-last."""
    torch.manual_seed(1)
    return torch.randn(1, 3, height, width).to(memory_format=torch.channels_last)


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
    latency = times[ours]
    if isinstance(latency, str):
        return {**row, "ours ms": latency}
    row["n"] = latency.num_samples
    for name in rivals:
        row |= cells(name, times[name])
    row |= cells("ours", latency)
    dense_ms = fastest_ms(times, *against)
    row["against"] = next(
        (n for n in against if fastest_ms(times, n) == dense_ms), f"no {' or '.join(against)}"
    )
    if dense_ms is None:
        return row
    possible = possible_ms(dense_ms, counted.ratio)
    row["possible speed-up"] = dense_ms / possible
    row["speed-up"] = dense_ms / latency.latency_ms
    row["realised/possible"] = realised_share(dense_ms, latency.latency_ms, possible)
    return row


def feature_rows(settings: Settings) -> list[Row]:
    """The stage outputs of a ResNet at every density."""
    x = image_of(64, 96) if settings.quick else image_of(512, 1024)
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


def body_row(name: str, body: nn.Module, x: Tensor, settings: Settings) -> Row:
    """The sampled part of a model by itself, against its MAC ratio."""
    body = Maps(body).eval()
    candidates: dict[str, Candidate]
    # The exports take seconds, and with --quick `feature_rows` has tried them.
    candidates = {"eager": folded(body)} if settings.quick else dense_rivals(body, x, settings)
    rivals = tuple(candidates)
    candidates["ours"], counted = ours_of(body, DENSITY, x, settings)
    times = compare(settings, candidates, x)
    against = ("eager",) if settings.quick else ("compile",)
    return network_row(
        f"{name}, sampled part", x, DENSITY, counted, times, "ours", rivals, against, settings
    )


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


def model_rows(
    name: str,
    model: nn.Module,
    x: Tensor,
    argument: Any,
    compile_dense: Callable[[nn.Module], Candidate],
    body: tuple[nn.Module, Tensor],
    settings: Settings,
) -> list[Row]:
    """A whole model and its sampled part at density 0.3.

    Args:
        name: of the model.
        model: dense.
        x: the image.
        argument: what the model takes.
        compile_dense: the model in torch.compile, as far as that goes.
        body: the part that is sampled, and its input.
        settings: of the run.
    """
    source = sampled_at(model, DENSITY)
    counted = count_macs(source, argument)
    plain = folded(model)
    candidates: dict[str, Candidate] = {
        "compile": "left out by --quick" if settings.quick else compile_dense(plain),
        "eager": plain,
        "frozen dense": frozen(model, argument, settings.dtype),
        "ours": frozen(source, argument, settings.dtype),
    }
    rivals = ("compile", "eager", "frozen dense")
    against = ("eager",) if settings.quick else ("compile",)
    times = compare(settings, candidates, argument)
    whole = network_row(name, x, DENSITY, counted, times, "ours", rivals, against, settings)
    return [whole, body_row(name, *body, settings)]


def compiled_backbone(model: nn.Module) -> nn.Module:
    """A detector whose backbone is compiled: proposals, of data-dependent number, are left eager.

    Compiling the whole model recompiles for every number of proposals.
    """
    backbone = model.backbone
    assert isinstance(backbone, nn.Module)
    model = copy.copy(model)
    model._modules = {**model._modules, "backbone": compiled(backbone)}
    return model


def main() -> None:
    """Measure the networks that were asked for."""
    parser = argument_parser(__doc__)
    parser.add_argument("--only", choices=("features", "fcn", "detector"), help="leave out others")
    args = parser.parse_args()
    settings = settings_of(args, repeats=10)
    rows: list[Row] = []
    if args.only in (None, "features"):
        rows += feature_rows(settings)
    if args.only in (None, "fcn"):
        model = fcn(settings)
        x = image_of(64, 96) if settings.quick else image_of(512, 1024)
        rows += model_rows("fcn_resnet50", model, x, x, compiled, (model.backbone, x), settings)
    if args.only in (None, "detector"):
        model = detector(settings)
        x = image_of(64, 96) if settings.quick else image_of(800, 1216)
        # The detector resizes and normalises by itself; its body is given what it would make.
        images, _ = model.transform([x[0]])
        padded = images.tensors.contiguous(memory_format=torch.channels_last)
        body = model.backbone.get_submodule("body"), padded
        rows += model_rows(
            "fasterrcnn_resnet50_fpn (compile: its backbone)",
            model,
            x,
            [x[0]],
            compiled_backbone,
            body,
            settings,
        )
    publish(
        settings,
        "network" if args.only is None else f"network-{args.only}",
        rows,
        title="Networks: frozen and sampled against dense",
        notes=(
            "MACs of what the row names, sampler heads and interpolation included; white noise, "
            "no grid, random weights. `possible speed-up` is one over the MAC ratio. Batch 1."
        ),
    )


if __name__ == "__main__":
    main()
