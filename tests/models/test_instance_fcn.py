"""InstanceFCN: its published counts, its contract, what it proposes, sampled and frozen."""

import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock

import sparsight
from sparsight.models import instance_fcn
from sparsight.models.stride8_trunks import VGG16Trunk
from sparsight.models.window_sampling import draw_windows
from sparsight.nn import SampledConv2d, Sampler

TOLERANCE = 1e-4  # relative to the largest output


class Narrow(nn.Module):
    """A stem of stride 8, and a residual block."""

    out_channels = 6

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 9, stride=8, padding=1, bias=False)
        self.block = BasicBlock(6, 6)

    def forward(self, x):
        return self.block(self.stem(x))


def drawn(**options) -> nn.Module:
    """A narrow network whose norms and branches do something."""
    torch.manual_seed(0)
    settings = {
        "backbone": Narrow(),
        "k": 3,
        "m": 7,
        "head_channels": 5,
        "min_size": 48,
        "max_size": 96,
        "scales": (0.5, 1.0),
    }
    model = instance_fcn(**(settings | options))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
    for branch in (model.network.masks, model.network.objectness):
        for layer in branch:
            if isinstance(layer, nn.Conv2d):  # N(0, 0.01) would leave nothing of so few channels
                nn.init.kaiming_normal_(layer.weight)
                nn.init.normal_(layer.bias, 0, 0.5)
    return model.eval()


def scene(num_objects=2, size=(48, 64)):
    """An image with bright rectangles, and their target."""
    image = 0.2 * torch.rand(3, *size, generator=torch.Generator().manual_seed(1))
    places = [(4, 8, 32, 30), (20, 34, 44, 62)][:num_objects]
    masks = torch.zeros(num_objects, *size, dtype=torch.bool)
    for mask, (y0, x0, y1, x1) in zip(masks, places, strict=True):
        mask[y0:y1, x0:x1] = True
        image[:, y0:y1, x0:x1] += 0.6
    boxes = torch.tensor([[x0, y0, x1, y1] for y0, x0, y1, x1 in places], dtype=torch.float32)
    return image, {"boxes": boxes.reshape(-1, 4), "masks": masks}


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameters_are_the_published_ones():
    with torch.device("meta"):
        model = instance_fcn()
        others = [instance_fcn(k=k) for k in (3, 7)]
    network = model.network
    assert num_parameters(model) == 17_452_890
    assert num_parameters(network.backbone) == 14_714_688
    assert [num_parameters(layer) for layer in network.masks] == [262_656, 0, 115_225]
    assert [num_parameters(layer) for layer in network.objectness] == [2_359_808, 0, 513]
    assert [other.network.masks[2].weight.numel() for other in others] == [41_472, 225_792]
    assert isinstance(network.backbone, VGG16Trunk)


def test_new_layers_are_small_and_normal():
    model = instance_fcn(backbone="resnet18", num_stages=2)
    for layer in (model.network.masks[0], model.network.masks[2], model.network.objectness[0]):
        assert float(layer.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
        assert not layer.bias.any()


def test_the_published_settings_are_the_defaults():
    with torch.device("meta"):
        model = instance_fcn()
    sides = [model.resized(torch.zeros(3, 480, 640, device="meta"), s)[0] for s in model.scales]
    assert sides == [119, 178, 267, 400, 600, 900]
    assert (model.k, model.m, model.num_windows, model.nms_threshold) == (5, 21, 256, 0.8)


def test_images_are_resized_normalised_and_padded():
    model = drawn()
    images = [torch.rand(3, 48, 60), torch.rand(3, 30, 10)]
    batch, sizes = model.prepare(images, [1.0, 1.0])
    assert sizes == [(48, 60), (96, 32)] and batch.shape == (2, 3, 96, 64)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (images[0] - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(batch[0, :, :48, :60], expected)
    assert not batch[0, :, 48:].any() and not batch[0, :, :, 60:].any()
    assert not batch[1, :, :, 32:].any()


def test_training_returns_losses_of_images_of_any_size():
    model = drawn().train()
    image, target = scene()
    small, nothing = scene(0, size=(9, 20))
    losses = model([image, small], [target, nothing])
    assert set(losses) == {"loss_objectness", "loss_mask"}
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_same_seed_gives_the_same_losses():
    model = drawn(num_windows=8).train()
    image, target = scene()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(float(model([image], [target])["loss_objectness"].detach()))
    assert found[0] == found[1] != found[2]


def test_a_target_may_say_its_scale():
    model = drawn()
    seen = []
    model.network.register_forward_pre_hook(lambda m, args: seen.append(tuple(args[0].shape[2:])))
    model.train()
    image, target = scene()
    for scale in (0.5, 1.0):
        model([image], [{**target, "scale": scale}])
    assert seen == [(24, 32), (48, 64)]


def test_padding_to_the_largest_image_of_the_batch_gives_no_windows(monkeypatch):
    labelled = []

    def draw(labels, num_windows):
        labelled.append(tuple(labels.shape))
        return draw_windows(labels, num_windows)

    # By its name in sparsight.models the module is hidden behind its function.
    monkeypatch.setattr(sys.modules["sparsight.models.instance_fcn"], "draw_windows", draw)
    model = drawn().train()
    image, target = scene(0)
    _, wider = scene(0, size=(48, 96))
    targets = [{**target, "scale": 1.0}, {**wider, "scale": 1.0}]
    model([image, torch.rand(3, 48, 96)], targets)
    assert labelled == [(6, 8), (6, 12)]


@pytest.mark.parametrize("kind", ["nothing", "a pixel", "a crowd"])
def test_what_is_no_object_has_no_mask_to_learn(kind):
    model = drawn().train()
    image, target = scene(1)
    if kind == "nothing":
        _, target = scene(0)
    elif kind == "a pixel":
        target = {"boxes": torch.tensor([[5.0, 5, 6, 6]]), "masks": torch.zeros(1, 48, 64).bool()}
        target["masks"][0, 5, 5] = True
    else:
        target["iscrowd"] = torch.ones(1, dtype=torch.int64)
    losses = model([image], [{**target, "scale": 1.0}])
    assert losses["loss_mask"] == 0 and losses["loss_objectness"] > 0


def test_proposals_are_masks_with_their_boxes_best_first():
    model = drawn(max_proposals=5)
    images = [scene()[0], torch.rand(3, 33, 21)]
    with torch.no_grad():
        found = model(images)
    for image, one in zip(images, found, strict=True):
        n = len(one["scores"])
        assert 0 < n <= 5
        assert one["masks"].shape == (n, 1, *image.shape[1:]) and one["masks"].dtype == torch.bool
        assert one["scores"].tolist() == sorted(one["scores"].tolist(), reverse=True)
        assert ((one["scores"] >= 0) & (one["scores"] <= 1)).all()
        assert one["labels"].tolist() == [1] * n
        for mask, box in zip(one["masks"][:, 0], one["boxes"], strict=True):
            rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
            assert box.tolist() == [
                float(columns[0]),
                float(rows[0]),
                float(columns[-1] + 1),
                float(rows[-1] + 1),
            ]


def test_an_image_of_one_pixel_and_one_without_proposals_are_answered():
    model = drawn()
    with torch.no_grad():
        assert model([torch.rand(3, 1, 1)])[0]["masks"].shape[1:] == (1, 1, 1)
        nn.init.constant_(model.network.masks[2].bias, -1e4)
        (found,) = model([scene()[0]])
    assert found["masks"].shape == (0, 1, 48, 64) and found["boxes"].shape == (0, 4)


class Told(nn.Module):
    """A network that says that one window holds something, and which of its cells."""

    def forward(self, images):
        height, width = (side // 8 for side in images.shape[2:])
        score_maps = torch.full((len(images), 9, height, width), -5.0)
        score_maps[:, :, 2:5, 3:6] = 5.0
        objectness = torch.full((len(images), 1, height, width), -5.0)
        objectness[:, 0, 3, 4] = 2.0
        return score_maps, objectness


def test_windows_lie_where_the_image_lies():
    """Stride, centre and scale: cells of the resized image come back as pixels of the image."""
    model = drawn(scales=(1.0,), windows_per_scale=1)
    model.network = Told()
    (found,) = model([torch.rand(3, 96, 128)])  # seen at 48 x 64
    assert found["scores"].tolist() == pytest.approx([torch.tensor(2.0).sigmoid().item()])
    # Rows 2 to 5 and columns 3 to 6 of 16 pixels; probabilities fall to a half at their borders.
    assert found["boxes"].tolist() == [[48, 32, 96, 80]]
    assert found["masks"].sum() == pytest.approx(48 * 48, rel=0.05)  # round corners


def test_only_the_best_windows_of_a_scale_are_assembled():
    model = drawn(windows_per_scale=3, nms_threshold=1.0)
    with torch.no_grad():
        (found,) = model([scene()[0]])
    assert len(found["scores"]) <= 6


def test_sampled_everywhere_it_is_its_source():
    source, image = drawn(), scene()[0]
    full = partial(Sampler, bias=1e4)
    model = sparsight.sparsify(source, sampler=full, example=[image]).eval()
    assert model.sampling_report.sampled == (
        "network.backbone.block",
        "network.objectness.0",
    )
    assert not model.load_state_dict(source.state_dict(), strict=False).unexpected_keys
    batch, _ = source.prepare([image], [1.0])
    with torch.no_grad():
        for found, expected in zip(model.network(batch), source.network(batch), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * 10)
        (found,), (expected,) = model([image]), source([image])
    assert torch.equal(found["masks"], expected["masks"])


def test_vgg_is_sampled_convolution_by_convolution():
    with torch.device("meta"):
        source = instance_fcn(head_channels=8)
    model = sparsight.sparsify(source)
    convs = [name for name, m in model.named_modules() if isinstance(m, SampledConv2d)]
    assert len(convs) == 13 and "network.backbone.features.0" not in convs
    assert convs[-1] == "network.objectness.0"


def test_frozen_it_is_what_it_was_trained_to_be():
    make = partial(Sampler, bias=0.5, grid_stride=5)
    model = sparsight.sparsify(drawn(), sampler=make).eval()
    image = scene()[0]
    frozen = sparsight.freeze(model, example=[image])
    batch, _ = model.prepare([image, image], [1.0, 1.0])
    with torch.no_grad():
        for found, expected in zip(frozen.network(batch), model.network(batch), strict=True):
            assert (found - expected).abs().max() < TOLERANCE * expected.abs().max()
        (found,) = frozen([image])
        (expected,) = model([image])
    assert len(found["scores"]) == len(expected["scores"])
    counted, wanted = (sparsight.measure.count_macs(m, [image]) for m in (frozen, model))
    assert (counted.total, counted.dense) == (wanted.total, wanted.dense)
    assert counted.total != counted.dense


def test_it_learns_the_masks_of_one_image():
    """Windows of 7 cells, 56 pixels: objects of 32 are what they are for."""
    torch.manual_seed(0)
    model = drawn(scales=(1.0,), backbone=Narrow(), head_channels=16, max_proposals=20).train()
    image, target = scene(size=(48, 64))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(150):
        torch.manual_seed(step)
        losses = model([image], [target])
        optimiser.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimiser.step()
    with torch.no_grad():
        (found,) = model.eval()([image])
    masks, wanted = found["masks"][:, 0].flatten(1).float(), target["masks"].flatten(1).float()
    hits = masks @ wanted.T
    iou = hits / (masks.sum(1)[:, None] + wanted.sum(1)[None] - hits)
    assert (iou.max(0).values > 0.6).all(), iou.max(0).values


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "instance_fcn: k=0; at least 1"),
        ({"m": 3}, "instance_fcn: m=3; at least 5"),
        ({"m": 20}, "m=20; an odd number is required.*pass 21"),
        ({"scales": ()}, r"scales=\(\); at least one factor"),
        ({"min_size": 4}, "min_size=4; at least 8"),
        ({"max_size": 500}, "max_size=500; at least 600"),
        ({"normalize": "sum"}, "normalize='sum'; one of pixels, windows, none"),
        ({"mask_target": "soft"}, "mask_target='soft'; one of binary, share"),
        ({"backbone": "resnet9"}, "instance_fcn: backbone='resnet9'"),
        ({"backbone": nn.Identity()}, "instance_fcn: backbone Identity has no out_channels"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        instance_fcn(**arguments)


def test_what_is_no_image_and_no_target_is_refused():
    model = drawn()
    image, target = scene()
    for images, message in (
        ([], "the list of images is empty"),
        ([image[0]], r"an image has shape \(48, 64\); \(3, H, W\)"),
        ([(255 * image).byte()], "an image is torch.uint8; floating point"),
    ):
        with pytest.raises(ValueError, match=message):
            model(images)
    model.train()
    with pytest.raises(ValueError, match="none targets for 1 images"):
        model([image])
    for wrong in (
        {"boxes": target["boxes"]},
        {**target, "masks": F.pad(target["masks"], (0, 1))},
        {**target, "boxes": target["boxes"][:1]},
        {**target, "iscrowd": torch.zeros(3)},
    ):
        with pytest.raises(ValueError, match=r"a target has .* boxes \(N, 4\), masks \(N, H, W\)"):
            model([image], [wrong])
