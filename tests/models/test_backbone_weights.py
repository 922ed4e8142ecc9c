"""Weights of torchvision's classifiers in the backbones of the models for dense prediction."""

from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import ResNet18_Weights
from torchvision.models import resnet as zoo

from sparsight.models import faster_rcnn, frrn_a, load_backbone_weights, refinenet, semantic_fpn

pytestmark = pytest.mark.usefixtures("narrow_resnet18")

BUILDS = {
    "semantic_fpn": lambda: semantic_fpn(
        "resnet18", num_classes=3, fpn_channels=8, head_channels=8
    ),
    "refinenet": lambda: refinenet(3, backbone="resnet18", channels=8),
    "faster_rcnn": lambda: faster_rcnn("resnet18", num_classes=3, fpn_channels=8, head_channels=8),
}


@pytest.fixture(scope="module")
def state():
    """What torchvision saves of a classifier, its norms unlike those of a new one."""
    torch.manual_seed(1)
    model = zoo.resnet18()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5)
        assert not name.startswith("features")
    return model.state_dict()


def body_of(model):
    return getattr(model.backbone, "body", model.backbone)


def written(state, folder, suffix=".pth"):
    path = folder / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", BUILDS)
def test_every_parameter_of_the_backbone_is_the_classifiers(name, suffix, state, tmp_path):
    model = BUILDS[name]()
    assert load_backbone_weights(model, written(state, tmp_path, suffix)) == []
    own = body_of(model).state_dict()
    assert set(own) == {key for key in state if not key.startswith("fc.")}
    assert all(torch.equal(value, state[key]) for key, value in own.items())


def test_a_map_of_the_backbone_is_the_classifiers(state, tmp_path):
    source = zoo.resnet18().eval()
    source.load_state_dict(state)
    model = BUILDS["semantic_fpn"]().eval()
    load_backbone_weights(model, written(state, tmp_path))
    image = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        x = source.maxpool(source.relu(source.bn1(source.conv1(image))))
        assert torch.equal(model.backbone(image)[0], source.layer1(x))


def test_both_scales_of_a_refinenet_get_them(state, tmp_path):
    model = refinenet(3, backbone="resnet18", channels=8, is_two_scale=True)
    load_backbone_weights(model, written(state, tmp_path))
    for backbone in (model.backbone, model.other_backbone):
        assert torch.equal(backbone.conv1.weight, state["conv1.weight"])


def test_constant_norms_have_no_counts_and_old_files_neither(state, tmp_path):
    model = refinenet(3, backbone="resnet18", channels=8, is_norm_frozen=True)
    old = {key: value for key, value in state.items() if "num_batches" not in key}
    for tensors in (state, old):
        assert load_backbone_weights(model, written(tensors, tmp_path)) == []
    assert load_backbone_weights(BUILDS["semantic_fpn"](), written(old, tmp_path)) == []


def test_offsets_of_deformable_convolutions_keep_their_values(tmp_path):
    state = zoo.resnet50().state_dict()
    model = semantic_fpn(
        "resnet50", num_classes=3, is_deformable=True, fpn_channels=8, head_channels=8
    )
    kept = load_backbone_weights(model, written(state, tmp_path))
    assert kept and all(".offset." in key for key in kept)
    weight = state["layer4.2.conv2.weight"]
    assert torch.equal(model.backbone.layer4[2].conv2.weight, weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: {k: v for k, v in s.items() if not k.startswith("layer4.1.conv2")},
            r"1 parameters are missing \(layer4\.1\.conv2\.weight\)",
        ),
        (
            lambda s: s | {"layer4.2.conv1.weight": torch.zeros(1)},
            r"1 are unknown \(layer4\.2\.conv1\.weight\)",
        ),
        (
            lambda s: s | {"conv1.weight": torch.zeros(4, 3, 7, 7)},
            r"1 have another shape \(conv1\.weight \(4, 3, 7, 7\), not \(8, 3, 7, 7\)\)",
        ),
        (
            lambda s: {f"model.{k}": v for k, v in s.items()},
            r"100 parameters are missing \(conv1\.weight, .* and 92 more\); 102 are unknown",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(change, message, state, tmp_path):
    model = BUILDS["semantic_fpn"]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"load_backbone_weights: .*{message}"):
        load_backbone_weights(model, written(change(state), tmp_path))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_weights_asked_for_by_name_are_torchvisions(state, monkeypatch):
    asked = []

    def get_state_dict(self, *args, **keywords):
        asked.append(self)
        return state

    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", get_state_dict)
    for name in ("IMAGENET1K_V1", "DEFAULT"):
        model = BUILDS["refinenet"]()
        assert load_backbone_weights(model, name, name="resnet18") == []
        assert torch.equal(model.backbone.conv1.weight, state["conv1.weight"])
    assert asked == [ResNet18_Weights.IMAGENET1K_V1] * 2


def test_features_of_timm_take_a_file_of_their_own(tmp_path):
    timm = pytest.importorskip("timm")
    source = timm.create_model("resnet10t", features_only=True, pretrained=False)
    model = refinenet(3, backbone="timm:resnet10t", channels=4)
    assert load_backbone_weights(model, written(source.state_dict(), tmp_path)) == []
    own = model.backbone.features.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in source.state_dict().items())


def test_without_a_network_it_says_what_to_fetch(monkeypatch, tmp_path):
    def unreachable(*args, **keywords):
        raise URLError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    message = (
        r"could not fetch IMAGENET1K_V1 of 'resnet18' from https://.*resnet18-.*\.pth \(.*no ro"
    )
    with pytest.raises(ConnectionError, match=message):
        load_backbone_weights(BUILDS["refinenet"](), "IMAGENET1K_V1", name="resnet18")


def test_a_file_of_that_name_is_read(state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(state, "IMAGENET1K_V1")
    assert load_backbone_weights(BUILDS["refinenet"](), "IMAGENET1K_V1") == []


@pytest.mark.parametrize(
    ("weights", "name", "message"),
    [
        ("IMAGENET1K_V9", "resnet18", "'IMAGENET1K_V9' of 'resnet18'; one of IMAGENET1K_V1, DEF"),
        ("IMAGENET1K_V1", None, "without the name of the backbone"),
        ("DEFAULT", "timm:resnet10t", "state_dict of timm.create_model.'resnet10t', features_only"),
        ("IMAGENET1K_V1", "resnet17", "torchvision has no model 'resnet17'"),
    ],
)
def test_a_name_that_torchvision_does_not_have_is_refused(weights, name, message):
    with pytest.raises(ValueError, match=message):
        load_backbone_weights(BUILDS["refinenet"](), weights, name=name)


def test_a_missing_file_and_a_missing_backbone_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"w\.pth' does not exist; .*as IMAGENET1K_V1; p"):
        load_backbone_weights(BUILDS["refinenet"](), tmp_path / "w.pth")
    model = frrn_a(3, channels=4, residual_channels=4)
    with pytest.raises(ValueError, match="FRRN has no backbone"):
        load_backbone_weights(model, tmp_path / "w.pth")
