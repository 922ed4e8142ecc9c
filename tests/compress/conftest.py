"""Small trained-looking networks and images for what prunes them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn


def settled(model: nn.Module, seed: int = 2) -> nn.Module:
    """In eval mode, with norms that do something and keep a sane scale."""
    g = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data = 0.5 + torch.rand(module.num_features, generator=g)
            module.bias.data = 0.3 * torch.randn(module.num_features, generator=g)
            module.running_mean = 0.1 * torch.randn(module.num_features, generator=g)
            module.running_var = 0.5 + torch.rand(module.num_features, generator=g)
    return model.eval()


def draw_pictures(count: int, size: int = 16, seed: int = 5) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, size // 4, size // 4, generator=g)
    smooth = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    return smooth + 0.3 * torch.randn(count, 3, size, size, generator=g)


class Net(nn.Module):
    """A stem, a residual block with a projection, one without, a head on the flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.a1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.a1_norm = nn.BatchNorm2d(8)
        self.a2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.a2_norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.b1 = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.b2 = nn.Conv2d(12, 6, 1)
        self.head = nn.Linear(6 * 8 * 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        branch = self.a2_norm(self.a2(self.relu(self.a1_norm(self.a1(x)))))
        branch += x
        x = self.relu(branch)
        x = self.b2(torch.relu(self.b1(x)))
        return self.head(x.flatten(1))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return settled(Net())


@pytest.fixture
def settle() -> Callable[[nn.Module], nn.Module]:
    return settled


@pytest.fixture
def pictures() -> Callable[..., Tensor]:
    return draw_pictures
