"""A replayed model returns what the model returns, and runs only what may have changed."""

import pytest
import torch
import torchvision
from torch import nn

from sparsight.compress.replay import Replay
from sparsight.models import resnet_cifar


def compare(model, batches, order, *, max_bytes=1 << 30):
    """Change layers front to back; at each step the replay must equal the model. What ran each."""
    replay = Replay(model, batches[0][:1], max_bytes=max_bytes)
    ran = []
    for name in order:
        layer = model.get_submodule(name)
        called = set()
        hooks = [
            module.register_forward_hook(lambda *_, other=other, called=called: called.add(other))
            for other, module in model.named_modules()
            if not list(module.children())
        ]
        outputs = {}

        def run(i, batch, outputs=outputs):
            outputs[i] = model(batch)

        with torch.no_grad():
            replay.run(batches, changed=name, run=run)
            for hook in hooks:
                hook.remove()
            for i, batch in enumerate(batches):
                torch.testing.assert_close(outputs[i], model(batch), rtol=0, atol=0)
            layer.weight.mul_(1.1)
        ran.append(called)
    return ran


@pytest.fixture
def batches():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, 3, 16, 16, generator=g) for n in (3, 2)]


def test_a_residual_network_with_in_place_sums(net, batches):
    ran = compare(net, batches, ["stem", "a1", "a2", "b1", "b2", "head"])
    assert "stem" in ran[1], "the first pass that could leave it out is the one after"
    assert "stem" not in ran[2] or ran[2] >= {"a1"}


def test_blocks_in_sequences(batches):
    model = resnet_cifar(14).eval()
    order = [f"layer{i}.{j}.conv1" for i in (1, 2, 3) for j in (0, 1)]
    ran = compare(model, batches, order)
    inside = {name for name in ran[-1] if name.startswith("layer1.")}
    assert inside <= {"layer1.0", "layer1.1"}, "what lies before was not computed again"


def test_torchvision(batches):
    model = torchvision.models.mobilenet_v2(width_mult=0.25).eval()
    compare(model, batches, [f"features.{i}.conv.0.0" for i in (2, 5, 9)])


def test_bound_on_memory(net, batches):
    compare(net, batches, ["stem", "a1", "b1", "head"], max_bytes=0)
    compare(net, batches, ["stem", "a1", "b1", "head"], max_bytes=3 * 8 * 256 * 4)


def test_a_run_may_stop_midway(net, batches):
    replay = Replay(net, batches[0])
    seen = []

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    def run(i, batch):
        hook = net.b1.register_forward_hook(stop)
        try:
            net(batch)
        except Stop:
            seen.append(i)
        finally:
            hook.remove()

    with torch.no_grad():
        for _ in range(3):
            replay.run(batches, changed="b1", run=run)
        assert seen == [0, 1] * 3
        outputs = []
        replay.run(batches, changed="b1", run=lambda i, batch: outputs.append(net(batch)))
        for out, batch in zip(outputs, batches, strict=True):
            torch.testing.assert_close(out, net(batch), rtol=0, atol=0)


def test_outputs_that_are_no_tensor_and_functions_in_between(batches):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            y = self.conv(x)
            return {"y": y, "twice": 2 * y}

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.last, self.again = Pair(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            parts = self.pair(x)
            y = self.last(parts["twice"]) + parts["y"].mean((2, 3), keepdim=True)
            return self.again(self.again(y)) + y

    compare(Around().eval(), batches, ["pair.conv", "last", "again", "again"])
