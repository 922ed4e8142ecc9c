"""Channel pruning of whole networks: what it keeps, what it loses, and what it refuses."""

import copy
import warnings

import pytest
import torch
import torchvision
from torch import nn

import sparsight
from sparsight.compress import prune_channels
from sparsight.measure import count_macs
from sparsight.models import faster_rcnn, resnet_cifar, semantic_fpn
from sparsight.nn import ChannelSelect


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def relative_error(pruned, net, x):
    with torch.no_grad():
        expected = net(x)
        return ((pruned(x) - expected).square().sum() / expected.square().sum()).item()


def test_ratio_zero_is_a_copy_bit_for_bit(net, pictures):
    for options in ({"ratio": 0.0}, {"ratio": {"a1": 0.0}}, {"speedup": 1.0}):
        pruned = prune_channels(net, pictures(30), **options)
        assert pruned is not net
        assert same_state(pruned, net)
        assert torch.equal(pruned(pictures(2)), net(pictures(2)))
        assert pruned.pruning_report.speedup == 1


def test_source_is_not_touched_and_modes_are_kept(net, pictures):
    before = copy.deepcopy(net.state_dict())
    net.train()
    net.a1_norm.eval()
    pruned = prune_channels(net, pictures(30), speedup=1.5)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    modes = {name: module.training for name, module in net.named_modules()}
    assert modes == {name: module.training for name, module in pruned.named_modules()}
    assert modes["a1"] and not modes["a1_norm"]
    assert all(p.grad is None for p in net.parameters())


def test_speedup_is_reached_as_measure_counts(net, pictures):
    x = pictures(2)
    for speedup in (1.3, 2.0):
        pruned = prune_channels(net, pictures(40), speedup=speedup, round_to=1)
        counted = count_macs(net, x).total / count_macs(pruned, x).total
        assert counted >= speedup
        assert counted < 1.15 * speedup
        assert counted == pytest.approx(pruned.pruning_report.speedup)
        assert pruned.pruning_report.macs_after == count_macs(pruned, x).total


def test_error_falls_after_least_squares_in_every_layer(net, pictures):
    report = prune_channels(net, pictures(60), ratio=0.5, num_positions=20).pruning_report
    assert [layer.name for layer in report.layers] == ["a1", "b1", "b2"]
    for layer in report.layers:
        assert 0 < layer.refitted_error < layer.error, layer


def test_better_with_reconstruction_than_without_and_than_a_random_choice(net, pictures):
    images, x = pictures(60), pictures(40, seed=9)
    fitted = prune_channels(net, images, ratio=0.5, where=lambda name, _: name != "b2")
    removed = prune_channels(
        net, images, ratio=0.5, where=lambda name, _: name != "b2", reconstruct=False
    )
    assert relative_error(fitted, net, x) < 0.6 * relative_error(removed, net, x)


def with_copies(net):
    """The network with the second half of some channels a copy of the first, read half as much."""
    with torch.no_grad():
        for producer, reader in ((net.a1, net.a2), (net.b1, net.b2)):
            half = producer.out_channels // 2
            producer.weight[half:] = producer.weight[:half]
            if producer.bias is not None:
                producer.bias[half:] = producer.bias[:half]
            reader.weight[:, half:] = 0.5 * reader.weight[:, :half]
        for value in net.a1_norm.state_dict().values():
            if value.ndim:
                value[4:] = value[:4]
    return net


def test_copies_of_channels_are_pruned_without_loss(net, pictures):
    net = with_copies(net)
    options = {"ratio": {"a1": 0.5, "b1": 0.5}, "round_to": 1, "num_positions": 20}
    pruned = prune_channels(net, pictures(60), **options)
    assert (pruned.a1.out_channels, pruned.b1.out_channels) == (4, 6)
    assert relative_error(pruned, net, pictures(20, seed=9)) < 1e-6
    plain = prune_channels(net, pictures(60), **options, reconstruct=False)
    assert relative_error(plain, net, pictures(20, seed=9)) > 1e-3, "the readers had to be refitted"


def test_the_seed_decides_bit_for_bit(net, pictures):
    images = pictures(40)
    first = prune_channels(net, images, speedup=1.7)
    assert same_state(first, prune_channels(net, images, speedup=1.7))
    assert not same_state(first, prune_channels(net, images, speedup=1.7, seed=1))


def test_images_in_batches_with_labels_are_the_same(net, pictures):
    images = pictures(40)
    first = prune_channels(net, images, speedup=1.7, batch_size=20)
    batches = ((part, torch.zeros(20)) for part in images.split(20))
    assert same_state(first, prune_channels(net, batches, speedup=1.7))


def test_multi_branch_helps_where_the_shortcut_has_lost(pictures, settle):
    torch.manual_seed(0)
    model = settle(resnet_cifar(20))
    images = pictures(60)
    errors = []
    for multi_branch in (True, False):
        pruned = prune_channels(
            model, images, ratio=0.5, num_positions=60, multi_branch=multi_branch
        )
        features = []
        for network in (model, pruned):
            hook = network.layer3.register_forward_hook(
                lambda *args, seen=features: seen.append(args[2])
            )
            network(images)
            hook.remove()
        errors.append((features[0] - features[1]).square().mean().item())
    assert errors[0] < 0.95 * errors[1]


def test_branch_inputs_are_selected(net, pictures):
    pruned = prune_channels(net, pictures(40), ratio={"a1:in": 0.5, "a1": 0.25}, branch_inputs=True)
    assert isinstance(pruned.a1.select, ChannelSelect)
    assert pruned.a1.layer.in_channels == 4
    assert pruned.a1.layer.out_channels == 6
    assert pruned.stem.out_channels == 8
    assert pruned(pictures(2)).shape == (2, 5)
    for layer in pruned.pruning_report.layers:
        assert layer.refitted_error < layer.error
    frozen = sparsight.freeze(pruned.eval(), example=pictures(2))
    torch.testing.assert_close(frozen(pictures(2)), pruned(pictures(2)), rtol=1e-3, atol=1e-4)


ZOO = {
    "vgg11_bn": lambda: torchvision.models.vgg11_bn(num_classes=5),
    "resnet18": lambda: torchvision.models.resnet18(num_classes=5),
    "resnet50": lambda: torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [2, 1, 1, 1], num_classes=5, width_per_group=16
    ),
    "resnext": lambda: torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], 5, groups=8, width_per_group=2
    ),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=5, width_mult=0.25),
    "densenet": lambda: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=5),
    "resnet_cifar": lambda: resnet_cifar(8, num_classes=5),
}


@pytest.mark.parametrize("name", ZOO)
def test_architectures(name, pictures, settle):
    torch.manual_seed(0)
    model = ZOO[name]()
    if name in ("vgg11_bn", "resnet18"):
        shrink(model, 8)
    model = settle(model)
    images = pictures(40, size=32)
    pruned = prune_channels(
        model, images, speedup=1.5, num_positions=20, where=lambda n, m: not n.startswith("class")
    )
    x = images[:2]
    assert type(pruned) is type(model)
    assert pruned(x).shape == model(x).shape
    assert count_macs(model, x).total / count_macs(pruned, x).total >= 1.5
    for layer in pruned.pruning_report.layers:
        assert layer.refitted_error <= layer.error + 1e-9, layer
    assert relative_error(pruned, model, pictures(8, size=32, seed=9)) < 0.7


def shrink(model, factor):
    """An eighth of the channels, so that the network is small."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Conv2d):
                inside = (
                    layer.in_channels if layer.in_channels == 3 else layer.in_channels // factor
                )
                options = (layer.kernel_size, layer.stride, layer.padding)
                new = nn.Conv2d(inside, layer.out_channels // factor, *options)
                setattr(parent, name, new)
            elif isinstance(layer, nn.BatchNorm2d):
                setattr(parent, name, nn.BatchNorm2d(layer.num_features // factor))
    if hasattr(model, "avgpool") and hasattr(model, "classifier"):
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier = nn.Linear(512 // factor, 5)
    elif hasattr(model, "fc"):
        model.fc = nn.Linear(512 // factor, 5)


def test_grouped_convolutions_lose_whole_groups(pictures, settle):
    torch.manual_seed(0)
    pruned = prune_channels(settle(ZOO["resnext"]()), pictures(30, size=32), ratio=0.5)
    conv = pruned.layer1[0].conv2
    assert (conv.groups, conv.in_channels, conv.out_channels) == (4, 8, 8)
    assert pruned.layer1[0].conv3.in_channels == 8


def test_segmentation_and_detection(narrow_resnet18, pictures):
    torch.manual_seed(0)
    images = pictures(12, size=32)
    model = semantic_fpn("resnet18", num_classes=3, fpn_channels=8, head_channels=8).eval()
    pruned = prune_channels(model, images, ratio=0.5, num_positions=20)
    assert pruned(images[:2])["out"].shape == model(images[:2])["out"].shape
    assert pruned.pruning_report.speedup > 1.2

    detector = faster_rcnn(
        "resnet18", num_classes=3, min_size=32, max_size=48, fpn_channels=8, head_channels=16
    ).eval()
    batches = [[images[i], images[i + 1, :, :24]] for i in range(0, 10, 2)]
    pruned = prune_channels(
        detector, batches, ratio=0.5, num_positions=20, where=lambda name, _: "body" in name
    )
    assert set(pruned(batches[0])[0]) == {"boxes", "labels", "scores"}
    assert pruned.backbone.body.layer1[0].conv1.out_channels == 4
    assert "one map for each image" in dict(pruned.pruning_report.left).get(
        "roi_heads.box_head.fc6", "one map for each image"
    )


def test_sampled_frozen_and_exported(pictures, settle):
    torch.manual_seed(0)
    pruned = prune_channels(settle(resnet_cifar(8)), pictures(30), speedup=1.5)
    x = pictures(2)
    program = torch.export.export(pruned, (x,))
    torch.testing.assert_close(program.module()(x), pruned(x))
    frozen = sparsight.freeze(pruned, example=x)
    torch.testing.assert_close(frozen(x), pruned(x), rtol=1e-3, atol=1e-4)
    sampled = sparsight.sparsify(pruned, example=x)
    assert len(sampled.sampling_report.sampled) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frozen = sparsight.freeze(sampled.eval(), example=x)
    torch.testing.assert_close(frozen(x), sampled(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one"),
        ({"speedup": 2.0, "ratio": 0.5}, "exactly one"),
        ({"ratio": 1.0}, r"ratio is 1\.0; a share in \[0, 1\)"),
        ({"ratio": -0.1}, r"ratio is -0\.1"),
        ({"ratio": {"a1": 1.5}}, r"ratio for 'a1' is 1\.5"),
        ({"ratio": {"nowhere": 0.5}}, "'nowhere'.* no such layer"),
        ({"ratio": {"relu": 0.5}}, "'relu', which cannot be pruned alone"),
        ({"ratio": {"a2": 0.5}}, "'a2', which cannot be pruned alone: .* group 'stem'.*'a2'"),
        ({"ratio": {"head": 0.5}}, "'head', which cannot be pruned alone: .*output"),
        ({"speedup": 0.9}, r"speedup is 0\.9; 1 or more"),
        ({"speedup": float("nan")}, "speedup is nan"),
        ({"speedup": 50.0}, r"speedup is 50, but .* it is \d+\.?\d*; a speed-up up to that"),
        ({"speedup": 2.0, "round_to": 0}, "round_to is 0"),
        ({"speedup": 2.0, "num_positions": 0}, "num_positions is 0"),
        ({"speedup": 2.0, "where": lambda name, module: False}, "no channels of Net can be pruned"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_arguments(net, pictures, options, message):
    with pytest.raises(ValueError, match=message):
        prune_channels(net, pictures(30), **options)


def test_bad_images(net, pictures):
    with pytest.raises(ValueError, match=r"does not run on a batch \(2, 1, 16, 16\)"):
        prune_channels(net, torch.rand(4, 1, 16, 16), ratio=0.5)
    with pytest.raises(ValueError, match=r"3 samples of what 'a2' reads, fewer than the 8"):
        prune_channels(net, pictures(3), ratio={"a1": 0.5}, num_positions=1)
    net.a1.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="'a2' reads NaN"):
        prune_channels(net, pictures(30), ratio={"a1": 0.5})
    with pytest.raises(TypeError, match="model is a int"):
        prune_channels(3, pictures(3), ratio=0.5)
    assert not net.training


def test_progress_is_drawn_if_asked_for(net, pictures, capfd):
    prune_channels(net, pictures(30), ratio=0.5)
    assert capfd.readouterr().err == ""
    prune_channels(net, pictures(30), speedup=1.5, shows_progress=True)
    assert "prune_channels [" in capfd.readouterr().err
