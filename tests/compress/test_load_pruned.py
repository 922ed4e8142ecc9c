"""A pruned network's state_dict is all that is needed to build it again."""

import copy
import io

import pytest
import torch

from sparsight.compress import load_pruned, prune_channels
from sparsight.nn import ChannelSelect


@pytest.mark.parametrize("branch_inputs", [False, True])
def test_saved_and_loaded(net, pictures, branch_inputs):
    pruned = prune_channels(net, pictures(30), ratio=0.5, round_to=1, branch_inputs=branch_inputs)
    file = io.BytesIO()
    torch.save(pruned.state_dict(), file)
    file.seek(0)
    fresh = type(net)().eval()
    loaded = load_pruned(fresh, torch.load(file, weights_only=True))
    assert loaded is fresh
    x = pictures(3, seed=1)
    assert torch.equal(loaded(x), pruned(x))
    assert any(isinstance(m, ChannelSelect) for m in fresh.modules()) == branch_inputs
    assert sum(p.numel() for p in fresh.parameters()) < sum(p.numel() for p in net.parameters())


def test_what_was_not_pruned_loads_too(net):
    fresh = load_pruned(type(net)(), net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), net.parameters(), strict=True))


def test_another_architecture_is_refused(net):
    state = net.state_dict()
    with pytest.raises(ValueError, match="does not have"):
        load_pruned(type(net)(), {**state, "elsewhere.weight": torch.zeros(1)})
    wider = copy.deepcopy(state)
    wider["a1.weight"] = torch.zeros(9, 8, 3, 3)
    with pytest.raises(ValueError, match=r"a1\.weight"):
        load_pruned(type(net)(), wider)
    state.pop("b2.bias")
    with pytest.raises(ValueError, match=r"b2\.bias"):
        load_pruned(type(net)(), state)
