"""Only norms that alone read a convolution are folded."""

import pytest
import torch
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from sparsight.convert.fold import fold_norms, fuse_pools, fuse_relus


class Net(nn.Module):
    def __init__(self, use, norm=nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv, self.norm, self.use = nn.Conv2d(3, 4, 3), norm(4), use
        self.other = nn.Conv2d(4, 4, 1)
        for values in (self.norm.running_mean, self.norm.running_var):
            values.uniform_(0.5, 1.5)

    def forward(self, x):
        return self.use(self, x)


def check(use, folded, norm=nn.BatchNorm2d) -> None:
    torch.manual_seed(0)
    net = Net(use, norm).eval().requires_grad_(False)
    x = torch.randn(2, 3, 9, 9)
    expected = net(x)
    assert fold_norms(net, x) == folded
    assert isinstance(net.norm, nn.Identity) == bool(folded)
    torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-5)


PAIR = [("conv", "norm")]


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
def test_a_norm_that_alone_reads_the_convolution_is_folded(norm) -> None:
    check(lambda n, x: n.norm(n.conv(x)).relu(), PAIR, norm)


def test_an_in_place_activation_after_the_norm_is_no_hindrance() -> None:
    check(lambda n, x: n.norm(n.conv(x)).relu_(), PAIR)


def test_a_functional_reader_beside_the_norm_prevents_it() -> None:
    def use(n, x):
        y = n.conv(x)
        return n.norm(y) + y.sigmoid()

    check(use, [])


def test_a_module_that_reads_it_too_prevents_it() -> None:
    def use(n, x):
        y = n.conv(x)
        return n.norm(y) + n.other(y)

    check(use, [])


def test_an_operation_between_prevents_it() -> None:
    check(lambda n, x: n.norm(n.conv(x).relu()), [])


def test_a_convolution_that_runs_twice_is_left() -> None:
    check(lambda n, x: n.norm(n.conv(x)) + n.norm(n.conv(x + 1)), [])


def test_a_convolution_without_a_norm_is_left() -> None:
    check(lambda n, x: n.other(n.conv(x)), [])


def test_an_affine_free_norm_is_folded() -> None:
    check(lambda n, x: n.norm(n.conv(x)), PAIR, lambda c: nn.BatchNorm2d(c, affine=False))


class Activated(nn.Module):
    def __init__(self, use, *, inplace) -> None:
        super().__init__()
        self.conv, self.relu, self.use = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=inplace), use
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        return self.use(self, x)


@pytest.mark.parametrize("inplace", [False, True])
def test_an_activation_that_alone_reads_the_convolution_is_taken_out(inplace) -> None:
    net = Activated(lambda n, x: n.pool(n.relu(n.conv(x))), inplace=inplace).eval()
    assert fuse_relus(net, torch.randn(1, 3, 9, 9)) == ["conv"]
    assert isinstance(net.relu, nn.Identity)


@pytest.mark.parametrize(
    "use",
    [
        lambda n, x: n.conv(x) + n.relu(n.conv(x)),
        lambda n, x: n.relu(n.pool(n.conv(x))),
        lambda n, x: n.pool(n.conv(x)).sigmoid(),
        lambda n, x: n.relu(n.relu(n.conv(x))),
    ],
)
def test_any_other_use_keeps_the_activation(use) -> None:
    net = Activated(use, inplace=False).eval()
    assert fuse_relus(net, torch.randn(1, 3, 9, 9)) == []
    assert isinstance(net.relu, nn.ReLU)


def test_an_activation_read_before_the_convolution_was_done_with_is_kept() -> None:
    def use(n, x):
        y = n.conv(x)
        return n.relu(y) - y

    net = Activated(use, inplace=False).eval()
    assert fuse_relus(net, torch.randn(1, 3, 9, 9)) == []


class Pooled(nn.Module):
    def __init__(self, use) -> None:
        super().__init__()
        self.conv, self.pool, self.use = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), use

    def forward(self, x):
        return self.use(self, x)


def fused_pools(use, allowed=lambda name, pool: True) -> dict:
    net = Pooled(use).eval().requires_grad_(False)
    pool = net.pool
    found = fuse_pools(net, torch.randn(1, 3, 9, 9), allowed=allowed)
    assert isinstance(net.pool, nn.Identity) == bool(found)
    assert all(taken is pool for taken in found.values())
    return found


def test_a_pooling_that_alone_reads_the_convolution_is_taken_out() -> None:
    assert list(fused_pools(lambda n, x: n.pool(n.conv(x)))) == ["conv"]


def test_a_pooling_that_is_not_alone_or_not_allowed_stays() -> None:
    def beside(n, x):
        y = n.conv(x)
        return n.pool(y).sum() + y.sum()

    assert fused_pools(beside) == {}
    assert fused_pools(lambda n, x: n.pool(n.conv(x).relu())) == {}
    assert fused_pools(lambda n, x: n.pool(n.pool(n.conv(x)))) == {}
    assert fused_pools(lambda n, x: n.pool(n.conv(x)), lambda name, pool: False) == {}
