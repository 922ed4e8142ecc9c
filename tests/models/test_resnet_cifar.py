import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsight
from sparsight.models import load_resnet_cifar, resnet_cifar
from sparsight.models.resnet_cifar import PaddedShortcut
from sparsight.nn import SampledBlock, Sampler

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def randomised(depth: int, num_classes: int = 10) -> nn.Module:
    torch.manual_seed(depth)
    model = resnet_cifar(depth, num_classes=num_classes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.0)
    return model.eval()


def published_forward(state, x):
    """The network written out over its state_dict: option A with zeros on both sides."""

    def conv_norm(name, norm, x, stride=1):
        x = F.conv2d(x, state[f"{name}.weight"], stride=stride, padding=1)
        parts = (state[f"{norm}.{part}"] for part in ("running_mean", "running_var"))
        return F.batch_norm(x, *parts, state[f"{norm}.weight"], state[f"{norm}.bias"])

    x = conv_norm("conv1", "bn1", x).relu()
    for stage in (1, 2, 3):
        block = 0
        while f"layer{stage}.{block}.conv1.weight" in state:
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            branch = conv_norm(f"{name}.conv1", f"{name}.bn1", x, stride).relu()
            branch = conv_norm(f"{name}.conv2", f"{name}.bn2", branch)
            if stride == 2:
                quarter = branch.shape[1] // 4
                x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, quarter, quarter))
            x = (branch + x).relu()
            block += 1
    x = F.avg_pool2d(x, x.shape[-2:]).flatten(1)
    return F.linear(x, state["linear.weight"], state["linear.bias"])


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (56, 853_018)])
def test_size_and_logits_are_those_of_the_published_network(depth, parameters):
    """Parameters as printed by He et al. (table 6: 0.27 M, 0.85 M) to their two digits."""
    model = randomised(depth).double()
    assert sum(p.numel() for p in model.parameters()) == parameters
    image = torch.randn(2, 3, 17, 24, dtype=torch.float64)
    expected = published_forward(model.state_dict(), image)
    assert torch.allclose(model(image), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("depth", [-4, 2, 18, 57])
def test_another_depth_is_refused(depth):
    with pytest.raises(ValueError, match=rf"resnet_cifar: depth={depth}; 6n \+ 2 with n >= 1"):
        resnet_cifar(depth)


def test_no_class_is_refused():
    with pytest.raises(ValueError, match=r"resnet_cifar: num_classes=0; at least one class"):
        resnet_cifar(20, num_classes=0)


def test_the_shortcut_puts_an_odd_zero_behind():
    out = PaddedShortcut(2, 5, stride=2)(torch.ones(1, 2, 3, 5))
    assert out.shape == (1, 5, 2, 3)
    assert out[0, :, 0, 0].tolist() == [0, 1, 1, 0, 0]


@pytest.mark.parametrize("layout", ["a", "b"])
def test_every_block_is_sampled_frozen_and_counted(layout):
    dense = randomised(8)
    model = sparsight.sparsify(dense, layout=layout)
    assert sum(isinstance(module, SampledBlock) for module in model.modules()) == 3
    assert model.sampling_report.left_dense == ()
    for i, module in enumerate(m for m in model.modules() if isinstance(m, Sampler)):
        torch.manual_seed(i)
        nn.init.normal_(module.head.weight, std=0.05)
        nn.init.constant_(module.head.bias, 0.0)
    image = torch.randn(2, 3, 32, 32)
    frozen = sparsight.freeze(model, example=image)
    with torch.no_grad():
        expected, arrived = model(image), frozen(image)
    assert torch.allclose(arrived, expected, atol=1e-4 * float(expected.abs().max()))
    counted, frozen_count = (sparsight.measure.count_macs(m, image) for m in (model, frozen))
    assert counted.dense == sparsight.measure.count_macs(dense, image).total
    assert counted.total == frozen_count.total < counted.dense


@pytest.mark.parametrize("depth", [20, 56])
def test_the_dense_cost_is_the_documented_one(depth):
    macs = sparsight.measure.count_macs(resnet_cifar(depth).eval(), torch.zeros(1, 3, 32, 32))
    assert f"{macs.total / 1e6:.1f}" in resnet_cifar.__doc__


@pytest.mark.parametrize("form", ["plain", "published"])
def test_weights_are_loaded_whatever_wraps_them(tmp_path, form):
    source = randomised(14, num_classes=7)
    state = source.state_dict()
    if form == "published":
        # As on the authors' page: wrapped for parallel training, older than num_batches_tracked.
        state = {
            "best_prec1": 91.5,
            "state_dict": {
                f"module.{k}": v for k, v in state.items() if "num_batches_tracked" not in k
            },
        }
    torch.save(state, tmp_path / "weights.pt")
    model = load_resnet_cifar(tmp_path / "weights.pt")
    assert model.depth == 14
    assert not model.training
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(image), source(image))


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def break_state(state, how):
    if how == "one tensor less":
        del state["layer2.0.bn2.bias"]
    elif how == "another width":
        state["layer3.0.conv1.weight"] = torch.zeros(64, 16, 3, 3)
    elif how == "a trained shortcut":
        state["layer2.0.shortcut.0.weight"] = torch.zeros(32, 16, 1, 1)
    elif how == "another network":
        state = {"fc.weight": torch.zeros(2, 2)}
    elif how == "a list":
        state = [torch.zeros(2)]
    elif how == "code":
        state = Evil()
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("one tensor less", r"not those of a ResNet-8 .*Missing key.*layer2\.0\.bn2\.bias"),
        ("another width", r"not those of a ResNet-8 .*size mismatch for layer3\.0\.conv1\.weight"),
        ("a trained shortcut", r"Unexpected key.*layer2\.0\.shortcut\.0\.weight"),
        ("another network", r"has 1 tensors but no layer1\.\* or no linear\.weight"),
        ("a list", r"holds no state_dict \(it holds a list\)"),
        ("code", r"holds no state_dict \(it holds more than tensors"),
    ],
)
def test_other_files_are_refused_with_the_reason(tmp_path, capsys, how, message):
    torch.save(break_state(randomised(8).state_dict(), how), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=rf"(?s)load_resnet_cifar: .*w\.pt.*{message}.*akamaster"):
        load_resnet_cifar(tmp_path / "w.pt")
    assert capsys.readouterr().out == ""


def test_a_missing_and_a_broken_file_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"w\.pt' does not exist; weights of a CIFAR"):
        load_resnet_cifar(tmp_path / "w.pt")
    for content in (b"", b"no weights"):
        (tmp_path / "w.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"w\.pt' holds no state_dict"):
            load_resnet_cifar(tmp_path / "w.pt")


def test_the_real_weights_classify_the_real_images():
    """Set SPARSIGHT_TEST_DATA to a folder that holds `weights` and `cifar10` to run this."""
    root = Path(os.environ.get("SPARSIGHT_TEST_DATA", ""))
    weights, images = root / "weights" / "cifar10_resnet20.pt", root / "cifar10"
    if not weights.is_file() or not (images / "cifar10_subset.npz").is_file():
        pytest.skip("SPARSIGHT_TEST_DATA names no folder with weights/ and cifar10/ in it")
    model = load_resnet_cifar(weights)
    assert model.depth == 20
    with np.load(images / "cifar10_subset.npz", allow_pickle=False) as stored:
        pixels = torch.from_numpy(stored["test_images"][:256]).permute(0, 3, 1, 2)
        labels = torch.from_numpy(stored["test_labels"][:256])
    with torch.no_grad():
        logits = model((pixels.float() / 255 - MEAN) / STD)
    assert (logits.argmax(1) == labels).float().mean() > 0.87
