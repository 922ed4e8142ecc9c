import json
from dataclasses import replace

import pytest
import torch

from sparsight.compress import prune_channels, prune_filters
from sparsight.convert import freeze
from sparsight.nn import SampledBlock, Sampler
from sparsight.nn.pooling import PooledConv2d
from sparsight.train.architecture import (
    Architecture,
    DetectorArchitecture,
    ProposalArchitecture,
    Sampling,
    architecture_from_json,
    at_size,
    build_dense,
    convert,
    pruned_architecture,
)
from sparsight.train.checkpoint import load_checkpoint, save_checkpoint
from sparsight.train.initial_weights import with_widths_of

SMALL = Architecture(num_classes=3, fpn_channels=8, head_channels=8, size=(32, 48))


def test_json_gives_the_same_architecture_back():
    for architecture in (SMALL, replace(SMALL, sampling=Sampling(noise="blue", grid_stride=None))):
        text = json.dumps(architecture.to_json())
        assert Architecture.from_json(json.loads(text)) == architecture


@pytest.mark.parametrize(
    ("model", "task"),
    [
        ("semantic_fpn", "segmentation"),
        ("deeplabv3_resnet50", "segmentation"),
        ("frrn_b", "segmentation"),
        ("light_weight_refinenet", "segmentation"),
        ("resnet", "classification"),
        ("resnet_cifar", "classification"),
        ("small_c3d", "video"),
    ],
)
def test_a_model_says_what_it_is_for(model, task):
    assert replace(SMALL, model=model).task == task
    assert DETECTOR.task == "detection"


def test_a_pruned_architecture_is_rebuilt_as_narrow_as_it_is():
    cifar = replace(SMALL, model="resnet_cifar", backbone="resnet8", size=(16, 16))
    image = torch.randn(1, 3, 16, 16)
    smaller = prune_filters(build_dense(cifar), image, ratio=0.5)
    pruned = pruned_architecture(cifar, smaller)
    assert pruned.widths is not None and pruned.widths["layer1.0.conv1.weight"] == [8, 16, 3, 3]
    assert "conv1.weight" not in pruned.widths  # as wide as ever
    text = json.dumps(pruned.to_json())
    again = Architecture.from_json(json.loads(text))
    assert again == pruned
    rebuilt = build_dense(again)
    rebuilt.load_state_dict(smaller.state_dict())
    assert torch.equal(rebuilt.eval()(image), smaller.eval()(image))
    sampled = convert(build_dense(pruned), replace(pruned, sampling=Sampling(grid_stride=None)))
    assert sampled.eval()(image).shape == (1, 3)
    assert pruned_architecture(pruned, smaller) == pruned
    assert cifar.differences(pruned) == ["it is pruned"]
    assert pruned.differences(cifar) == ["its layers have other widths"]
    assert pruned_architecture(cifar, build_dense(cifar)) == cifar


@pytest.mark.parametrize("field", ["widths", "selected", "channels"])
def test_json_of_before_there_were_other_widths_is_read(field):
    values = SMALL.to_json()
    del values[field]
    assert Architecture.from_json(values) == SMALL


def test_json_of_another_version_is_refused():
    values = SMALL.to_json() | {"colour": 1}
    with pytest.raises(ValueError, match=r"from_json: fields .*colour.* another version"):
        Architecture.from_json(values)


def test_json_from_before_poolings_were_chosen_is_of_ones_own():
    values = SMALL.to_json()
    del values["pooling"], values["pools_strides"]
    assert Architecture.from_json(values) == SMALL


def test_poolings_are_of_the_kind_it_says():
    soft = replace(SMALL, pooling="soft")
    model = build_dense(soft)
    assert repr(model.backbone.maxpool) == "SoftPool2d(kernel_size=3, stride=2, padding=1)"
    assert not any(isinstance(module, PooledConv2d) for module in model.modules())
    pooled = build_dense(replace(soft, pools_strides=True))
    # The stem, and of each of three stages the first convolution and its shortcut's.
    assert sum(isinstance(module, PooledConv2d) for module in pooled.modules()) == 7
    with torch.no_grad():
        assert pooled.eval()(torch.zeros(1, 3, 32, 48))["out"].shape == (1, 3, 32, 48)
    names = [list(each.state_dict()) for each in (build_dense(SMALL), model, pooled)]
    assert names[0] == names[1] == names[2]


def test_pooled_strides_stay_dense_in_a_sampled_model():
    pooled = replace(SMALL, pooling="soft", pools_strides=True, sampling=Sampling())
    model = convert(build_dense(pooled), pooled)
    assert sum(isinstance(m, SampledBlock) for m in model.modules()) == 5  # of 8; 3 step
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, 32, 48))["out"].shape == (1, 3, 32, 48)


def test_a_sampled_architecture_is_what_it_says():
    sampled = replace(SMALL, sampling=Sampling(layout="a", noise="none", grid_stride=7))
    model = convert(build_dense(sampled), sampled)
    blocks = [m for m in model.modules() if isinstance(m, SampledBlock)]
    samplers = [m for m in model.modules() if isinstance(m, Sampler)]
    assert len(blocks) == len(samplers) == 8  # layout a: one mask a block
    assert {(s.noise, s.grid_stride) for s in samplers} == {("none", 7)}
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, 32, 48))["out"].shape == (1, 3, 32, 48)


def test_a_dense_architecture_is_left_alone():
    dense = build_dense(SMALL)
    assert convert(dense, SMALL) is dense


@pytest.mark.parametrize(
    ("wanted", "stored", "found"),
    [
        (SMALL, SMALL, []),
        (SMALL, replace(SMALL, size=(64, 64)), []),
        (SMALL, replace(SMALL, pooling="soft"), ["pooling is 'soft', not 'own'"]),
        (
            replace(SMALL, pooling="max", pools_strides=True),
            replace(SMALL, pooling="soft"),
            ["pooling is 'soft', not 'max'", "pools_strides is False, not True"],
        ),
        (replace(SMALL, sampling=Sampling()), SMALL, []),
        (SMALL, replace(SMALL, sampling=Sampling()), ["it is sampled, not dense"]),
        (SMALL, replace(SMALL, backbone="resnet34"), ["backbone is 'resnet34', not 'resnet18'"]),
        (
            replace(SMALL, sampling=Sampling(layout="a")),
            replace(SMALL, num_classes=4, sampling=Sampling(layout="b")),
            ["num_classes is 4, not 3", "layout is 'b', not 'a'"],
        ),
    ],
)
def test_differences_name_what_keeps_weights_from_fitting(wanted, stored, found):
    assert wanted.differences(stored) == found


DETECTOR = DetectorArchitecture(num_classes=3, backbone="resnet18", size=(64, 96))
SMALL_DETECTOR = replace(DETECTOR, fpn_channels=8, head_channels=16)


def test_json_says_which_kind_of_model_it_describes():
    for architecture in (SMALL, DETECTOR, replace(DETECTOR, sampling=Sampling(noise="blue"))):
        text = json.dumps(architecture.to_json())
        assert architecture_from_json(json.loads(text)) == architecture
    with pytest.raises(ValueError, match=r"DetectorArchitecture\.from_json: .* another version"):
        architecture_from_json(DETECTOR.to_json() | {"colour": 1})


def test_a_detector_is_what_it_says():
    model = build_dense(
        replace(DETECTOR, deformable=True, is_norm_frozen=True, fpn_channels=8, head_channels=16)
    )
    assert model.transform.min_size == (64,)
    assert model.transform.max_size == 96
    body = model.backbone.body
    assert type(body.bn1).__name__ == "FrozenBatchNorm2d"
    assert type(body.layer4[1]).__name__ == "DeformableBlock"
    assert model.roi_heads.box_predictor.cls_score.weight.shape == (3, 16)


def test_a_detector_resizes_to_the_size_it_is_told():
    model = build_dense(replace(DETECTOR, fpn_channels=8, head_channels=16))
    assert at_size(model, DETECTOR, None) == DETECTOR
    assert at_size(model, DETECTOR, (32, 60)) == replace(DETECTOR, size=(32, 60))
    images, _ = model.transform([torch.zeros(3, 40, 50)])
    assert images.image_sizes == [(32, 40)]
    segmenter = build_dense(SMALL)
    assert at_size(segmenter, SMALL, (64, 64)) == replace(SMALL, size=(64, 64))
    with pytest.raises(ValueError, match=r"at_size: size=64x7; at least 8 pixels a side"):
        at_size(segmenter, SMALL, (64, 7))


@pytest.mark.parametrize(("first", "expected"), [(1, 8), (2, 6), (4, 2)])
@pytest.mark.parametrize("deformable", [False, True])
def test_detectors_are_sampled_from_a_layer_on(first, expected, deformable):
    architecture = replace(
        DETECTOR, deformable=deformable, first_sampled_layer=first, sampling=Sampling()
    )
    model = convert(build_dense(architecture), architecture)
    names = [name for name, m in model.named_modules() if isinstance(m, SampledBlock)]
    assert len(names) == expected
    assert names[0] == f"backbone.body.layer{first}.0"


@pytest.mark.parametrize(
    ("wanted", "stored", "found"),
    [
        (DETECTOR, replace(DETECTOR, size=(800, 1333), trainable_layers=3), []),
        (replace(DETECTOR, is_norm_frozen=True), DETECTOR, []),
        (
            DETECTOR,
            replace(DETECTOR, is_norm_frozen=True),
            ["is_norm_frozen is True, not False"],
        ),
        (replace(DETECTOR, sampling=Sampling(), first_sampled_layer=2), DETECTOR, []),
        (
            replace(DETECTOR, sampling=Sampling(), first_sampled_layer=2),
            replace(DETECTOR, sampling=Sampling()),
            ["first_sampled_layer is 1, not 2"],
        ),
        (DETECTOR, SMALL, ["model is 'semantic_fpn', not 'faster_rcnn'"]),
    ],
)
def test_what_keeps_a_detectors_weights_from_fitting_is_named(wanted, stored, found):
    assert wanted.differences(stored) == found


def test_branches_that_read_a_part_of_the_stream_are_rebuilt(tmp_path):
    """Saved, loaded, sampled and frozen: what `prune_channels(branch_inputs=True)` returns."""
    torch.manual_seed(0)
    cifar = replace(SMALL, model="resnet_cifar", backbone="resnet8", size=(16, 16))
    images = torch.randn(16, 3, 16, 16)
    ratio = {"layer1.0.conv1:in": 0.5, "layer3.0.conv1:in": 0.25, "layer2.0.conv1": 0.5}
    dense = build_dense(cifar).eval()
    smaller = prune_channels(dense, images, ratio=ratio, branch_inputs=True)
    pruned = pruned_architecture(cifar, smaller)
    assert pruned.selected == {"layer1.0.conv1": 8, "layer3.0.conv1": 24}
    assert pruned.widths is not None
    assert pruned.widths["layer1.0.conv1.layer.weight"] == [16, 8, 3, 3]
    assert not any("select" in name for name in pruned.widths)
    assert Architecture.from_json(json.loads(json.dumps(pruned.to_json()))) == pruned
    assert cifar.differences(pruned) == ["it is pruned"]
    assert pruned_architecture(pruned, smaller) == pruned

    save_checkpoint(tmp_path / "pruned.safetensors", smaller, pruned)
    loaded, stored = load_checkpoint(tmp_path / "pruned.safetensors")
    assert stored == pruned
    expected = smaller(images)
    assert torch.equal(loaded.eval()(images), expected)
    frozen = freeze(loaded, example=images[:1])
    torch.testing.assert_close(frozen(images), expected, rtol=1e-4, atol=1e-4)
    assert with_widths_of(cifar, tmp_path / "pruned.safetensors") == pruned

    sampled = replace(pruned, sampling=Sampling(grid_stride=None, window=3))
    network, _ = load_checkpoint(tmp_path / "pruned.safetensors", expected=sampled)
    blocks = [name for name, m in network.named_modules() if isinstance(m, SampledBlock)]
    assert blocks == ["layer2.0"]  # what selects channels stays dense
    save_checkpoint(tmp_path / "sampled.safetensors", network, sampled)
    again, _ = load_checkpoint(tmp_path / "sampled.safetensors")
    assert torch.equal(again.eval()(images), network.eval()(images))
    frozen = freeze(again, example=images[:1])
    torch.testing.assert_close(frozen(images), again(images), rtol=1e-4, atol=1e-4)


def test_a_detectors_blocks_that_select_channels_stay_dense():
    small = replace(
        SMALL_DETECTOR,
        selected={"backbone.body.layer2.1.conv1": 40},
        widths={"backbone.body.layer2.1.conv1.layer.weight": [128, 40, 3, 3]},
    )
    sampled = replace(small, sampling=Sampling())
    model = convert(build_dense(sampled), sampled)
    names = [name for name, m in model.named_modules() if isinstance(m, SampledBlock)]
    assert len(names) == 7 and "backbone.body.layer2.1" not in names
    assert pruned_architecture(SMALL_DETECTOR, build_dense(small)) == small


PROPOSALS = ProposalArchitecture(
    backbone="resnet18", num_stages=2, k=3, m=9, head_channels=8, size=(64, 96), scales=(0.5, 1.0)
)


def test_a_model_that_proposes_masks_is_what_it_says():
    text = json.dumps(replace(PROPOSALS, sampling=Sampling()).to_json())
    architecture = architecture_from_json(json.loads(text))
    assert architecture == replace(PROPOSALS, sampling=Sampling())
    assert (architecture.task, architecture.num_classes) == ("proposals", 2)
    model = convert(build_dense(architecture), architecture)
    assert (model.k, model.m, model.min_size, model.max_size) == (3, 9, 64, 96)
    assert model.scales == (0.5, 1.0) and model.network.masks[2].out_channels == 9
    assert sum(isinstance(module, SampledBlock) for module in model.modules()) == 4
    assert not hasattr(model.network.backbone, "layer3")


def test_it_resizes_to_the_size_it_is_told():
    model = build_dense(PROPOSALS)
    assert at_size(model, PROPOSALS, (32, 80)).size == (32, 80)
    assert (model.min_size, model.max_size) == (32, 80)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"size": (32, 48), "scales": (1.0,)}, []),
        ({"k": 5}, ["k is 5, not 3"]),
        ({"backbone": "vgg16"}, ["backbone is 'vgg16', not 'resnet18'"]),
        ({"is_norm_frozen": True}, ["is_norm_frozen is True, not False"]),
    ],
)
def test_what_keeps_its_weights_from_fitting_is_named(changes, found):
    assert PROPOSALS.differences(replace(PROPOSALS, **changes)) == found
    frozen = replace(PROPOSALS, is_norm_frozen=True)
    assert frozen.differences(PROPOSALS) == []
    assert PROPOSALS.differences(DETECTOR) == ["model is 'faster_rcnn', not 'instance_fcn'"]
