"""SFP and FPGM while training: when filters are chosen, what trains in between, what is left."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparsight.cli import load_recipe
from sparsight.compress import prune_filters, weakest_filters
from sparsight.measure import count_macs
from sparsight.models import resnet_cifar
from sparsight.train.checkpoint import load_checkpoint, read_architecture
from sparsight.train.filter_pruning import FilterPruning, plan_filter_pruning

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "classification"
IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 10, 3, padding=1), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 8, 3)
    )


def zero_filters(layer: nn.Conv2d) -> list[int]:
    return (layer.weight.flatten(1) == 0).all(1).nonzero().flatten().tolist()


def at_epoch(epoch: int, *, max_epochs: int = 4) -> SimpleNamespace:
    return SimpleNamespace(
        current_epoch=epoch,
        max_epochs=max_epochs,
        sanity_checking=False,
        state=SimpleNamespace(fn="fit"),
    )


def test_the_weakest_are_zero_before_the_first_step():
    model = network()
    expected = [
        weakest_filters(model[i].weight.flatten(1), norm_ratio=0.3).nonzero().flatten().tolist()
        for i in (0, 3)
    ]
    FilterPruning(norm_ratio=0.3).on_train_start(at_epoch(0), SimpleNamespace(model=model))
    assert [zero_filters(model[0]), zero_filters(model[3])] == expected
    assert [len(found) for found in expected] == [3, 2]
    assert (model[0].bias[expected[0]] == 0).all()


@pytest.mark.parametrize(("every", "chosen_after"), [(1, [0, 1, 2, 3]), (3, [2, 3])])
def test_filters_are_chosen_again_after_some_epochs_and_the_last(every, chosen_after):
    model = network()
    task = SimpleNamespace(model=model)
    pruning = FilterPruning(norm_ratio=0.3, every_n_epochs=every)
    found = []
    for epoch in range(4):
        nn.init.normal_(model[0].weight)  # what an epoch of training did
        pruning.on_validation_start(at_epoch(epoch), task)
        if zero_filters(model[0]):
            found.append(epoch)
            before = model[0].weight.clone()
            pruning.on_train_epoch_end(at_epoch(epoch), task)
            assert torch.equal(model[0].weight, before)  # once an epoch
    assert found == chosen_after


def test_soft_filters_train_and_hard_ones_do_not():
    for is_soft in (True, False):
        model = network()
        nn.init.ones_(model[1].bias)  # behind a ReLU, only what is heard can learn
        pruning = FilterPruning(distance_ratio=0.3, is_soft=is_soft)
        task = SimpleNamespace(model=model)
        pruning.on_train_start(at_epoch(0), task)
        zero = zero_filters(model[0])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(IMAGE).square().sum().backward()
        pruning.on_before_optimizer_step(at_epoch(0), task, optimizer)
        optimizer.step()
        assert (zero_filters(model[0]) == zero) is not is_soft


def test_silenced_norms_say_nothing():
    model = network().eval()
    nn.init.normal_(model[1].bias)
    nn.init.normal_(model[1].running_mean)
    before = model[1].bias.clone()
    pruning = FilterPruning(norm_ratio=0.3, norms={"0": "1"})
    pruning.choose(model)
    assert torch.equal(model[1].bias, before)  # it may come back
    pruning.choose(model, is_last=True)
    features = model[:3](IMAGE)
    assert (features[:, zero_filters(model[0])] == 0).all()
    assert (features != 0).any()
    hard = FilterPruning(norm_ratio=0.5, is_soft=False, norms={"0": "1"})
    hard.choose(model)
    assert (model[:3](IMAGE)[:, zero_filters(model[0])] == 0).all()


def test_shortcuts_are_left_alone():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, 10, 1)
            self.downsample = nn.Sequential(nn.Conv2d(3, 10, 1))

    block = Block()
    FilterPruning(norm_ratio=0.5).choose(block)
    assert len(zero_filters(block.conv1)) == 5
    assert zero_filters(block.downsample[0]) == []


def test_a_resumed_run_goes_on_with_its_choice():
    model = network()
    task = SimpleNamespace(model=model)
    pruning = FilterPruning(norm_ratio=0.3, is_soft=False)
    pruning.on_train_start(at_epoch(0), task)
    pruning.on_train_epoch_end(at_epoch(0), task)
    stored = io.BytesIO()
    torch.save(pruning.state_dict(), stored)
    stored.seek(0)
    resumed = FilterPruning(norm_ratio=0.3, is_soft=False)
    resumed.load_state_dict(torch.load(stored, weights_only=True))
    nn.init.normal_(model[0].weight)
    before = model[0].weight.clone()
    resumed.on_train_start(at_epoch(1), task)
    assert torch.equal(model[0].weight, before)
    assert all(torch.equal(resumed.chosen[n], pruning.chosen[n]) for n in pruning.chosen)
    resumed.on_train_epoch_end(at_epoch(0), task)  # that epoch is done
    assert torch.equal(model[0].weight, before)


def test_equal_weights_give_equal_choices():
    first, second = network(), network()
    for model in (first, second):
        FilterPruning(norm_ratio=0.1, distance_ratio=0.2).choose(model)
    assert torch.equal(first[0].weight, second[0].weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "both 0"),
        ({"norm_ratio": 1.0}, "below 1"),
        ({"norm_ratio": 0.6, "distance_ratio": 0.5}, "below 1"),
        ({"norm_ratio": 0.3, "every_n_epochs": 0}, "at least 1"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FilterPruning(**arguments)


def test_nothing_that_takes_part_is_refused():
    with pytest.raises(ValueError, match="no convolution for which where"):
        FilterPruning(norm_ratio=0.3, where=lambda name, module: False).choose(network())


def test_flags_become_the_published_settings():
    model = resnet_cifar(8)
    sfp = plan_filter_pruning("sfp", model, IMAGE[:1], ratio=0.3)
    assert (sfp.norm_ratio, sfp.distance_ratio, sfp.is_soft) == (0.3, 0.0, True)
    assert sfp.norms["layer1.0.conv2"] == "layer1.0.bn2"
    mix = plan_filter_pruning("fpgm", model, IMAGE[:1], ratio=0.3, norm_ratio=0.1)
    assert (mix.norm_ratio, round(mix.distance_ratio, 9), mix.is_soft) == (0.1, 0.2, False)
    assert model.training


def test_a_budget_becomes_the_ratio_that_meets_it():
    model = resnet_cifar(8)
    pruning = plan_filter_pruning("sfp", model, IMAGE[:1], ratio=None, budget=0.7)
    smaller = prune_filters(model, IMAGE[:1], ratio=pruning.norm_ratio)
    share = count_macs(smaller.eval(), IMAGE).total / count_macs(model.eval(), IMAGE).total
    assert 0.65 < share <= 0.7


def test_outputs_and_what_does_not_learn_are_left_alone():
    model = nn.ModuleDict({"part": network(), "head": nn.Conv2d(8, 4, 1)})
    for parameter in model["part"][0].parameters():
        parameter.requires_grad_(False)
    model["part"].append(nn.Conv2d(8, 6, 1))
    pruning = plan_filter_pruning("sfp", model, IMAGE[:1], ratio=0.5, part="part")
    assert pruning.norms == {"part.0": "part.1"}
    pruning.choose(model)
    assert list(pruning.chosen) == ["part.3"]  # 0 does not learn, 4 is the output, head is outside


@pytest.mark.parametrize(
    ("method", "flags", "message"),
    [
        ("sfp", {"ratio": None}, "exactly one"),
        ("sfp", {"ratio": 0.3, "budget": 0.5}, "exactly one"),
        ("sfp", {"ratio": None, "budget": 1.0}, r"in \(0, 1\)"),
        ("sfp", {"ratio": 0.3, "norm_ratio": 0.1}, "--method fpgm"),
        ("fpgm", {"ratio": 0.3, "norm_ratio": 0.4}, "at most the ratio"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(method, flags, message):
    with pytest.raises(ValueError, match=message):
        plan_filter_pruning(method, resnet_cifar(8), IMAGE[:1], **flags)


def test_what_is_missing_for_removal_is_told_before_training(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"pip install \"sparsight\[compress\]\""):
        plan_filter_pruning("sfp", resnet_cifar(8), IMAGE[:1], ratio=0.3)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*deprecated")
@pytest.mark.parametrize("method", ["sfp", "fpgm"])
def test_what_is_saved_is_smaller_and_computes_what_was_trained(method, tmp_path):
    """The soft network of last.ckpt, with its zeros, and the saved one give the same logits."""
    cifar10 = load_recipe(RECIPES / "cifar10.py")
    result = cifar10(
        quick=True,
        depth=8,
        method=method,
        filter_ratio=0.3,
        remeasure_norms=False,  # last.ckpt has those of training
        out=str(tmp_path),
        progress_bar=False,
    )
    weights = tmp_path / "weights.safetensors"
    small, architecture = load_checkpoint(weights)
    assert architecture.widths["layer2.0.conv1.weight"] == [32 - 9, 16, 3, 3]
    assert 0.7 < result["pruned_share"] < 0.8
    soft = resnet_cifar(8)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    soft.load_state_dict(
        {name[6:]: value for name, value in state.items() if name.startswith("model.")}
    )
    assert len(zero_filters(soft.layer2[0].conv1)) == 9
    torch.testing.assert_close(small.eval()(IMAGE), soft.eval()(IMAGE), rtol=1e-4, atol=1e-4)
    if method == "sfp":  # a pruned network is fine-tuned as the dense one is, and stays pruned
        again = tmp_path / "again"
        cifar10(quick=True, depth=8, init=str(weights), out=str(again), progress_bar=False)
        assert read_architecture(again / "weights.safetensors") == architecture
