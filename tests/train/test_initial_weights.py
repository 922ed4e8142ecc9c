from dataclasses import replace

import pytest
import torch

from sparsight.nn import SampledBlock
from sparsight.train.architecture import Architecture, DetectorArchitecture, build_dense
from sparsight.train.checkpoint import save_checkpoint
from sparsight.train.initial_weights import check_one_start, dense_network, initial_network
from sparsight.train.sampling import Sampling

DENSE = Architecture(
    model="resnet_cifar",
    backbone="resnet20",
    num_classes=3,
    fpn_channels=None,
    head_channels=None,
    size=(32, 32),
)
SAMPLED = replace(DENSE, sampling=Sampling(window=3))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("architecture", [DENSE, SAMPLED])
def test_dense_weights_of_either_form_start_either_network(tmp_path, suffix, architecture):
    torch.manual_seed(0)
    source = build_dense(DENSE)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(source.state_dict(), path)
    else:
        save_checkpoint(path, source, DENSE)
    network = initial_network(architecture, path)
    state = network.state_dict()
    assert all(torch.equal(state[name], value) for name, value in source.state_dict().items())
    blocks = [module for module in network.modules() if isinstance(module, SampledBlock)]
    assert len(blocks) == (0 if architecture is DENSE else 9)
    assert all(block.interpolations[0].window == 3 for block in blocks)


def test_without_weights_the_seed_decides():
    networks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        networks.append(initial_network(SAMPLED, None).state_dict()["linear.weight"])
    assert torch.equal(networks[0], networks[1])
    assert not torch.equal(networks[0], networks[2])


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save(build_dense(replace(DENSE, num_classes=4)).state_dict(), tmp_path / "w.pt")
    with pytest.raises(
        ValueError,
        match=r"(?s)initial_network: .*w\.pt' does not fit resnet_cifar resnet20 with 3 classes "
        r".*linear\.weight.*pass another file",
    ):
        initial_network(DENSE, tmp_path / "w.pt")
    with pytest.raises(FileNotFoundError, match=r"initial_network: .*x\.pt' does not exist"):
        initial_network(DENSE, tmp_path / "x.pt")


@pytest.mark.usefixtures("narrow_resnet18")
@pytest.mark.parametrize("kind", [Architecture, DetectorArchitecture])
def test_a_backbone_asked_for_by_name_is_fetched_by_its_own(kind, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "sparsight.train.initial_weights.load_backbone_weights",
        lambda model, weights, *, name: asked.append((weights, name)) or [],
    )
    dense_network(kind(backbone="resnet18", fpn_channels=8, head_channels=8), "DEFAULT")
    assert asked == [("DEFAULT", "resnet18")]


def test_a_model_of_torchvision_says_what_it_stands_on(monkeypatch):
    asked = []
    monkeypatch.setattr("sparsight.train.initial_weights.build_dense", lambda architecture: None)
    monkeypatch.setattr(
        "sparsight.train.initial_weights.load_backbone_weights",
        lambda model, weights, *, name: asked.append(name) or [],
    )
    dense_network(Architecture(model="fcn_resnet50", backbone=None), "DEFAULT")
    assert asked == ["resnet50"]


def test_one_start_or_none_is_fine_and_two_are_not():
    check_one_start("f", init=None, pretrained=None)
    check_one_start("f", init="a", pretrained=None)
    with pytest.raises(ValueError, match="f: init='a' and pretrained='b' were both given"):
        check_one_start("f", init="a", pretrained="b")
