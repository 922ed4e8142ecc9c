"""For all tests: one torch thread, unless a test asks for more; threads sleep while they wait.

On a shared machine OpenMP's spinning pool makes tiny operators hundreds of times slower.
"""

import os
import sys
from collections.abc import Iterator

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read once, when torch loads libgomp

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """What one test compiled does not count towards the recompilation limit of the next."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(scope="module")
def narrow_resnet18() -> Iterator[None]:
    """The ResNet-18 that models are built on by name has an eighth of its channels.

    A 64th of the weights to draw, update and store, for tests of what lies around the network.
    """
    from torchvision.models import resnet as zoo

    wide = zoo.resnet18
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "resnet18", lambda **keywords: narrowed(wide(**keywords), 8))
        yield


def narrowed(model: nn.Module, factor: int) -> nn.Module:
    """Replace the layers of `model`, in place, by fresh ones of fewer channels; images keep 3."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Conv2d):
                inside = (
                    layer.in_channels if layer.in_channels == 3 else layer.in_channels // factor
                )
                fresh: nn.Module = nn.Conv2d(
                    inside,
                    layer.out_channels // factor,
                    layer.kernel_size,
                    layer.stride,
                    layer.padding,
                    bias=False,
                )
                nn.init.kaiming_normal_(fresh.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(layer, nn.Linear):
                fresh = nn.Linear(layer.in_features // factor, layer.out_features)
            elif hasattr(layer, "running_var"):
                fresh = type(layer)(layer.running_var.numel() // factor)
            else:
                continue
            setattr(parent, name, fresh)
    if hasattr(model, "inplanes"):  # where torchvision's pyramids read a ResNet's width
        model.inplanes //= factor  # type: ignore[operator]  # an int beside the modules
    return model
