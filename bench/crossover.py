"""The density above which the dense layer is faster, per layer shape, losses included.

    python bench/crossover.py --out runs/bench/today     the convolutions of ResNet-50, and others
    python bench/crossover.py --only "stage 3 conv2"     one of them, by name
    python bench/crossover.py --quick

A single frozen convolution with its mask given (in a block, layers share a decision), interpolation
of the holes included, against the same convolution dense in OpenVINO (NCHW or channels-last maps,
the faster one). The crossover is interpolated between the densities measured: above it, dense is
faster. "none" means that the sampled layer was faster up to density 1; 0 that it never was.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import sparsight
from harness.possible import crossover_density
from harness.rivals import as_tensors, exported_rivals
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
from sparsight.measure import Latency
from sparsight.nn import SamplingDecision

DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 1.0)


@dataclass(frozen=True)
class Layer:
    """Shape of a convolution with "same" padding, and of the map it reads."""

    name: str
    in_channels: int
    out_channels: int
    kernel: int
    size: tuple[int, int]
    stride: int = 1
    dilation: int = 1
    groups: int = 1

    def build(self) -> nn.Conv2d:
        """The convolution with random weights."""
        torch.manual_seed(0)
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel,
            self.stride,
            padding=self.dilation * (self.kernel - 1) // 2,
            dilation=self.dilation,
            groups=self.groups,
        )
        return conv.eval().requires_grad_(False)

    def __str__(self) -> str:
        extra = [f"stride {self.stride}"] if self.stride > 1 else []
        extra += [f"dilation {self.dilation}"] if self.dilation > 1 else []
        extra += [f"groups {self.groups}"] if self.groups > 1 else []
        shape = f"{self.kernel}x{self.kernel} {self.in_channels} -> {self.out_channels}"
        return ", ".join([shape, *extra])


def layers() -> list[Layer]:
    """What ResNet-50 has at 512x1024, and the kinds of convolution it lacks."""
    made = []
    for i, planes in enumerate((64, 128, 256, 512)):
        size = 128 >> i, 256 >> i
        stage = f"stage {i + 1}"
        made += [
            Layer(f"{stage} conv1", 4 * planes, planes, 1, size),
            Layer(f"{stage} conv2", planes, planes, 3, size),
            Layer(f"{stage} conv3", planes, 4 * planes, 1, size),
        ]
    return [
        *made,
        Layer("stage 2 conv2 of its first block", 128, 128, 3, (128, 256), stride=2),
        Layer("FCN stage 4 conv2", 512, 512, 3, (64, 128), dilation=4),
        Layer("ResNeXt stage 1 conv2", 128, 128, 3, (128, 256), groups=32),
        Layer("depthwise", 256, 256, 3, (64, 128), groups=256),
    ]


def layer_row(layer: Layer, densities: tuple[float, ...], settings: Settings) -> Row:
    """All densities of one shape, measured in one run."""
    conv = layer.build()
    torch.manual_seed(1)
    x = torch.randn(1, layer.in_channels, *layer.size).relu()
    x = x.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        truth = conv(x)
    names = ("openvino", "openvino nhwc")
    candidates = exported_rivals(conv, x, settings, as_tensors(truth), names)
    plain = conv.to(memory_format=torch.channels_last)
    candidates["eager"] = settings.left_out("eager") or plain
    source = sparsight.sparsify(nn.Sequential(conv), where=lambda name, module: name == "0")
    ours = sparsight.freeze(source.eval(), example=x).get_submodule("0")
    draw = torch.rand(1, 1, *truth.shape[2:])
    for density in densities:
        candidates[f"at {density}"] = given(ours, draw < density)
    times = compare(settings, candidates, x)
    row: Row = {
        "layer": layer.name,
        "shape": str(layer),
        "map": f"{layer.size[0]}x{layer.size[1]}",
        "dense MMACs": truth[0, 0].numel() * conv.weight.numel() / 1e6,
    }
    for name in (*names, "eager"):
        row |= cells(name, times[name])
    ours_ms = []
    for density in densities:
        latency = times[f"at {density}"]
        assert isinstance(latency, Latency)
        row["n"] = latency.num_samples
        row |= cells(f"at {density}", latency)
        ours_ms.append(latency.latency_ms)
    dense_ms = fastest_ms(times, *names)
    if dense_ms is None:
        return {**row, "crossover density": "needs openvino"}
    crossover = crossover_density(densities, ours_ms, dense_ms)
    return {**row, "crossover density": "none" if math.isinf(crossover) else crossover}


def given(conv: nn.Module, mask: Tensor) -> Candidate:
    """The frozen convolution with a decision made elsewhere."""
    decision = SamplingDecision(mask, mask.float(), None)
    return lambda x: conv(x, decision)


def main() -> None:
    """Measure every shape."""
    settings = settings_of(argument_parser(__doc__).parse_args(), budget_s=0.3)
    shapes = layers()
    if settings.quick:
        shapes = [
            Layer("3x3", 32, 32, 3, (16, 32)),
            Layer("depthwise", 32, 32, 3, (8, 16), groups=32),
        ]
    densities = (0.1, 0.5, 1.0) if settings.quick else DENSITIES
    stages = [
        Stage(layer.name, lambda layer=layer: [layer_row(layer, densities, settings)])
        for layer in shapes
    ]
    run_script(
        settings,
        "crossover",
        stages,
        title="Single convolutions: the density above which dense is faster",
        notes=(
            "`at d ms`: our frozen convolution at density d with its mask given, interpolation "
            "included, sampler head not. float32, batch 1, sites drawn independently."
        ),
    )


if __name__ == "__main__":
    main()
