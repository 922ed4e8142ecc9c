"""The operator namespace: schemas, fake kernels, gradients, compile, export."""

import pytest
import torch
from torch import nn

from sparsight.ops import interpolate, sampled_conv2d, sites_from_mask

# opcheck reads .grad of tensors that it made itself.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

# Every pair of eps, kind of mask and dtype.
INTERPOLATIONS = [
    (None, True, torch.float32),
    (None, False, torch.float64),
    (1e-5, True, torch.float64),
    (1e-5, False, torch.float32),
]
OPCHECKED = ("sites_from_mask", "sampled_conv2d", "interpolate", "interpolate_backward")


class SampledLayer(nn.Module):
    """Sites, a sampled convolution and a fill, as a converted network chains them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.log_kernel = nn.Parameter(-torch.rand(5, 5))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y = sampled_conv2d(
            x,
            self.conv.weight,
            self.conv.bias,
            sites=sites_from_mask(mask),
            stride=2,
            padding=1,
            activation="relu",
        )
        return interpolate(y, mask, self.log_kernel)


@pytest.fixture
def layer_input(draw):
    d = draw(0)
    return d.normal(2, 4, 9, 7), d.mask(2, 5, 4, 0.4)


def operators():
    """Names of all operators that exist in the namespace."""
    return {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("sparsight::")
    }


def test_the_operators_opchecked_here_exist():
    assert set(OPCHECKED) <= operators()


@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_sites_from_mask_passes_opcheck(draw, density):
    mask = draw(1).mask(2, 5, 4, density)
    torch.library.opcheck(torch.ops.sparsight.sites_from_mask.default, (mask,))


@pytest.mark.parametrize(
    ("groups", "relu", "dtype"),
    [
        (1, False, torch.float32),
        (4, True, torch.float32),
        (1, True, torch.float64),
        (4, False, torch.float64),
    ],
)
def test_sampled_conv2d_passes_opcheck(draw, groups, relu, dtype):
    d = draw(2)
    sites = sites_from_mask(d.mask(2, 5, 4, 0.4))
    x, weight, bias, residual = (
        d.normal(*shape).to(dtype).requires_grad_()
        for shape in ((2, 4, 9, 7), (8, 4 // groups, 3, 3), (8,), (2, 8, 5, 4))
    )
    numbers = ([5, 4], [2, 2], [1, 1], [1, 1], groups)
    operator = torch.ops.sparsight.sampled_conv2d.default
    lists = (sites.index, sites.count, *numbers)
    torch.library.opcheck(operator, (x, weight, bias, *lists, residual, relu))
    torch.library.opcheck(operator, (x, weight, None, *lists, None, relu))


@pytest.mark.parametrize(("eps", "hard", "dtype"), INTERPOLATIONS)
def test_interpolate_passes_opcheck(draw, eps, hard, dtype):
    d = draw(3)
    features = d.normal(2, 3, 5, 4).to(dtype).requires_grad_()
    log_kernel = d.normal(3, 3).to(dtype).requires_grad_()
    mask = d.mask(2, 5, 4, 0.4) if hard else d.uniform(2, 1, 5, 4).to(dtype).requires_grad_()
    operator = torch.ops.sparsight.interpolate.default
    torch.library.opcheck(operator, (features, mask, log_kernel, eps))


@pytest.mark.parametrize(("eps", "hard", "dtype"), INTERPOLATIONS)
def test_interpolate_backward_passes_opcheck(draw, eps, hard, dtype):
    d = draw(4)
    grad, features = d.normal(2, 3, 5, 4).to(dtype), d.normal(2, 3, 5, 4).to(dtype)
    mask = d.mask(2, 5, 4, 0.4) if hard else d.uniform(2, 1, 5, 4).to(dtype)
    operator = torch.ops.sparsight.interpolate_backward.default
    torch.library.opcheck(operator, (grad, features, mask, d.normal(3, 3).to(dtype), eps))


def test_compiled_module_equals_eager_with_gradients_and_one_graph(layer_input):
    layer = SampledLayer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    results = []
    for module in (layer, compiled):
        layer.zero_grad()
        y = module(*layer_input)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in layer.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_graph_serves_every_mask_of_a_size(draw, layer_input):
    layer = SampledLayer().eval()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=False)
    with torch.no_grad():
        for density in (0.0, "one", 0.3, 1.0):
            mask = draw(5).mask(2, 5, 4, density)
            torch.testing.assert_close(compiled(layer_input[0], mask), layer(layer_input[0], mask))
    assert counter.frame_count == 1


def test_exported_module_equals_eager_for_every_mask(draw, layer_input):
    layer = SampledLayer().eval()
    exported = torch.export.export(layer, layer_input)
    called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert {f"sparsight.{name}.default" for name in OPCHECKED[:3]} <= called
    run = exported.module()
    for density in (0.0, "one", 0.3, 1.0):
        mask = draw(6).mask(2, 5, 4, density)
        assert torch.equal(run(layer_input[0], mask), layer(layer_input[0], mask))


def test_fake_tensors_have_the_shape_dtype_and_layout_of_real_ones(layer_input):
    x, mask = layer_input
    layer = SampledLayer()
    real = layer(x, mask)
    fake = SampledLayer().to("meta")(x.to("meta"), mask.to("meta"))
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
