import copy

import pytest
import torch
from torch import nn

from sparsight.compress import record_features
from sparsight.compress.features import check_recorded, tensors_in


class Pyramid(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.down = nn.MaxPool2d(2)
        self.levels = Levels(self.down)

    def forward(self, x):
        return self.levels(self.stem(x))


class Compiled(nn.Module):
    """As torch.compile wraps a module, without its compiler's seconds of import."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module


class Levels(nn.Module):
    def __init__(self, down):
        super().__init__()
        self.down = down

    def forward(self, x):
        return {"0": x, "pool": self.down(x)}


def test_what_layers_return_is_recorded_with_its_gradient():
    torch.manual_seed(0)
    net = Pyramid()
    x = torch.randn(2, 3, 8, 8)
    with record_features(net, ["stem", "levels"]) as features:
        output = net(x)
    assert list(features) == ["stem", "levels['0']", "levels['pool']"]
    assert torch.equal(features["levels['pool']"], output["pool"])
    features["stem"].sum().backward()
    assert net.stem.bias.grad is not None
    assert net.stem.bias.grad.tolist() == [128.0] * 4


def test_the_model_is_left_as_it_was():
    """Outputs bit for bit, random state, no hook and no attribute, also after an error."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(), nn.ReLU())
    before = {name: dict(vars(module)) for name, module in net.named_modules()}
    keys = {name: set(found) for name, found in before.items()}
    x = torch.randn(1, 3, 4, 4)
    torch.manual_seed(2)
    wanted = net(x)
    torch.manual_seed(2)
    with record_features(net, ["0", "2"]):
        found = net(x)
    assert torch.equal(found, wanted)
    with pytest.raises(RuntimeError), record_features(net, ["0"]):
        net(x[:, :2])
    for name, module in net.named_modules():
        assert set(vars(module)) == keys[name]
        assert not module._forward_hooks
    copy.deepcopy(net)


def test_no_name_records_nothing():
    with record_features(nn.ReLU(), []) as features:
        pass
    assert features == {}


def test_layers_that_cannot_be_recorded_are_refused():
    net = Pyramid()
    with (
        pytest.raises(ValueError, match=r"no layer 'steam'; .*close to it are 'stem'"),
        record_features(net, ["steam"]),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"layer 'stem' ran twice inside the block"),
        record_features(net, ["stem"]),
    ):
        net(torch.zeros(1, 3, 4, 4))
        net(torch.zeros(1, 3, 4, 4))
    with (
        pytest.raises(ValueError, match=r"wrapped by torch\.compile"),
        record_features(Compiled(net), ["stem"]),
    ):
        pass


def test_outputs_are_taken_apart_by_name():
    one, two = torch.zeros(1), torch.ones(1)
    assert tensors_in(one, "x") == {"x": one}
    assert tensors_in((one, two), "x") == {"x[0]": one, "x[1]": two}
    assert tensors_in({"out": two}, "x") == {"x['out']": two}
    for wrong in ("text", 3, (), {"a": [one]}):
        with pytest.raises(TypeError, match=r"'x' returned a \w+; a tensor, or a mapping"):
            tensors_in(wrong, "x")


def test_what_did_not_run_is_named():
    check_recorded(["a", "b"], {"a": torch.zeros(1), "b[0]": torch.zeros(1)}, of="student")
    with pytest.raises(ValueError, match=r"'c' of the student did not run .*name the block around"):
        check_recorded(["a", "c"], {"a": torch.zeros(1)}, of="student")
