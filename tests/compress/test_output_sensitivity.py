"""The sensitivity of an output is the squared Jacobian of the network's outputs, in expectation."""

import torch
from torch import nn

from sparsight.compress.output_sensitivity import output_sensitivity


def test_equals_the_jacobian_of_a_linear_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 50000)).eval()
    found = output_sensitivity(net, [torch.randn(3, 4)], ["0"], seed=1)
    assert found is not None
    with torch.no_grad():
        variance = net(torch.randn(2000, 4)).var()
    expected = net[1].weight.detach().double().square().sum(0) / variance
    # A random projection of 3 images: right in expectation, here within what 3 draws allow.
    assert 0.05 < (found["0"] / expected).mean() < 5


def test_what_nothing_listens_to_counts_nothing(net):
    with torch.no_grad():
        net.b2.weight[:, 3] = 0
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = output_sensitivity(net, images.split(2), ["b1", "a2"], seed=0)
    assert found is not None
    assert found["b1"][3] == 0
    assert (found["b1"][:3] > 0).all()
    assert (found["a2"] > 0).all()
    assert all(parameter.grad is None for parameter in net.parameters())


def test_none_where_no_gradient_arrives(net):
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x).argmax(1)

    assert output_sensitivity(Detached(), [torch.randn(2, 3, 16, 16)], ["net.a1"], seed=0) is None
