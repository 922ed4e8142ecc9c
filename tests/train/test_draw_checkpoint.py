"""Pictures of checkpoints of each task: what is in them, and what is left out of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import sparsight.train.draw_checkpoint as room
from sparsight.nn import record_sampling
from sparsight.train.architecture import build_dense
from sparsight.train.checkpoint import load_checkpoint, read_architecture, save_checkpoint
from sparsight.train.draw_checkpoint import draw_checkpoint
from sparsight.train.evaluation_data import open_evaluation_data
from sparsight.train.pictures import colour_classes

NUM_SAMPLERS = {"camvid": 16, "cifar10": 6, "coco": 16}


@pytest.fixture
def drawn(monkeypatch):
    """What was drawn, by file name, instead of the files."""
    figures = {}

    def draw_panels(panels, path, *, num_columns=None, classes=None):
        figures[path.name] = {"panels": list(panels), "columns": num_columns, "classes": classes}

    monkeypatch.setattr(room, "draw_panels", draw_panels)
    return figures


@pytest.mark.parametrize("name", NUM_SAMPLERS)
def test_pictures_are_written(name, checkpoint_of, tmp_path):
    weights, root = checkpoint_of(name)
    written = draw_checkpoint(weights, data=root, images=[0, 3], out=tmp_path, per_sampler=False)
    assert [path.name for path in written] == ["overview.png"]
    assert written[0].stat().st_size > 10_000


@pytest.mark.parametrize("name", NUM_SAMPLERS)
def test_the_share_of_a_pixel_is_that_of_the_models_masks(name, checkpoint_of, drawn, tmp_path):
    weights, root = checkpoint_of(name)
    written = draw_checkpoint(weights, data=root, images=[1], out=tmp_path)
    assert [path.name for path in written] == list(drawn) and len(drawn) == 2
    overview, each = drawn.values()
    assert overview["panels"][-1].is_share and len(overview["panels"]) == overview["columns"]
    assert len(each["panels"]) == len(overview["panels"]) + NUM_SAMPLERS[name]
    model, architecture = load_checkpoint(weights)
    images = open_evaluation_data(
        name, root, split="val", num_classes=architecture.num_classes, size=architecture.size
    )
    with torch.no_grad(), record_sampling(model.eval()) as record:
        model(images.example(1))
    share = overview["panels"][-1].pixels
    assert share.shape == overview["panels"][0].pixels.shape[:2]
    # Everything is at whole multiples here but for the detector's resizing and padding.
    mean = np.mean([float(d.mask.float().mean()) for d in record.decisions])
    assert share.mean() == pytest.approx(mean, abs=0.03 if name == "coco" else 1e-6)
    assert each["panels"][-1].title.endswith(
        f"{float(record.decisions[-1].mask.float().mean()):.0%} computed"
    )


@pytest.mark.parametrize("name", NUM_SAMPLERS)
def test_without_data_no_photograph_and_no_annotation_is_shown(
    name, checkpoint_of, drawn, tmp_path
):
    """The pictures do not change with what is not to be seen: only masks and predictions count."""
    weights, root = checkpoint_of(name)
    draw_checkpoint(weights, data=root, images=[0], out=tmp_path / "a", shows_data=True)
    shown = dict(drawn)
    draw_checkpoint(weights, data=root, images=[0], out=tmp_path / "b")
    with_data, without = (figures["overview.png"]["panels"] for figures in (shown, drawn))
    num_more = {"camvid": 2, "cifar10": 1, "coco": 1}[name]
    assert len(with_data) == len(without) + num_more
    assert np.array_equal(with_data[-1].pixels, without[-1].pixels)
    architecture = read_architecture(weights)
    images = open_evaluation_data(
        name, root, split="val", num_classes=architecture.num_classes, size=architecture.size
    )
    photograph = with_data[0].pixels
    if name == "coco":
        expected = (images.view[0][0] * 255).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(photograph, expected)
        assert len(with_data[0].boxes) == len(images.view[0][1]["boxes"]) > 0
    assert photograph.std() > 10
    for panel in drawn["overview.png"]["panels"] + list(drawn.values())[1]["panels"]:
        if name == "camvid" and not panel.is_share:
            # Colours of the prediction, or these darkened; no others.
            assert len(np.unique(panel.pixels.reshape(-1, 3), axis=0)) <= 2 * 11
        elif not panel.is_share:
            assert set(np.unique(panel.pixels)) <= {200, 40}
        assert "annotation" not in panel.title and "(is " not in panel.title


def test_segmentation_has_a_legend_of_its_classes(checkpoint_of, drawn, tmp_path):
    weights, root = checkpoint_of("camvid")
    draw_checkpoint(weights, data=root, images=[0], out=tmp_path, per_sampler=False)
    classes = drawn["overview.png"]["classes"]
    assert len(classes) == 11 and list(classes)[:2] == ["Sky", "Building"]


def test_a_classified_image_says_what_it_is_taken_for(checkpoint_of, drawn, tmp_path):
    weights, root = checkpoint_of("cifar10")
    draw_checkpoint(weights, data=root, images=[2], out=tmp_path, per_sampler=False)
    model, _ = load_checkpoint(weights)
    images = open_evaluation_data("cifar10", root, split="val", num_classes=10, size=(32, 32))
    with torch.no_grad():
        predicted = int(model.eval()(images.example(2)).argmax())
    (panel,) = drawn["overview.png"]["panels"]
    assert panel.title.startswith(f"image2: {images.classes[predicted]} ")
    draw_checkpoint(weights, data=root, images=[2], out=tmp_path, shows_data=True)
    assert drawn["overview.png"]["panels"][0].title.endswith("(is bird)")


def test_only_what_is_found_with_confidence_is_boxed(checkpoint_of, drawn, tmp_path, monkeypatch):
    weights, root = checkpoint_of("coco")

    class Certain(nn.Module):
        """The detector's masks, and two boxes of its own."""

        def __init__(self, model):
            super().__init__()
            self.model, self.transform = model, model.transform

        def forward(self, images):
            self.model(images)
            boxes = torch.tensor([[1.0, 2, 30, 40], [0, 0, 5, 5]])
            scores, labels = torch.tensor([0.8, 0.4]), torch.tensor([2, 1])
            return [{"boxes": boxes, "scores": scores, "labels": labels}]

    def load(path):
        model, architecture = load_checkpoint(path)
        return Certain(model), architecture

    monkeypatch.setattr(room, "load_checkpoint", load)
    draw_checkpoint(weights, data=root, images=[0], out=tmp_path, per_sampler=False)
    panel = drawn["overview.png"]["panels"][0]
    assert [(box.corners, box.text) for box in panel.boxes] == [((1, 2, 30, 40), "car 0.80")]
    assert panel.title == "000000000100: 1 found at 0.5 or more"


def test_what_cannot_be_drawn_is_refused(checkpoint_of, tmp_path):
    weights, root = checkpoint_of("cifar10")
    with pytest.raises(ValueError, match=r"cifar10: image 4 of 4; 0 to 3 is required"):
        draw_checkpoint(weights, data=root, images=[4], out=tmp_path)
    with pytest.raises(ValueError, match=r"images is empty; at least one is required"):
        draw_checkpoint(weights, data=root, images=[], out=tmp_path)
    dense = replace(read_architecture(weights), sampling=None)
    save_checkpoint(tmp_path / "dense.safetensors", build_dense(dense), dense)
    with pytest.raises(ValueError, match=r"has no samplers"):
        draw_checkpoint(tmp_path / "dense.safetensors", data=root, images=[0], out=tmp_path)


def test_proposals_are_drawn_with_the_masks_of_the_largest_scale(checkpoint_of, drawn, tmp_path):
    weights, root = checkpoint_of("voc")
    options = {"data": root, "dataset": "voc", "images": [1]}
    draw_checkpoint(weights, **options, out=tmp_path / "a", shows_data=True)
    overview, each = drawn.values()
    prediction = overview["panels"][1]
    assert len(overview["panels"]) == 3 and "best 10 of" in prediction.title
    assert len(each["panels"]) == 3 + 2 * 4 + 1
    model, architecture = load_checkpoint(weights)
    images = open_evaluation_data(
        "voc", root, split="val", num_classes=2, size=architecture.size, task="proposals"
    )
    image, _ = images.view[1]
    assert prediction.pixels.shape == (*image.shape[1:], 3)
    tensors, _ = model.eval().prepare([image], [1.0])
    with torch.no_grad(), record_sampling(model.network) as record:
        model.network(tensors)
    last = float(record.decisions[-1].mask.float().mean())
    assert each["panels"][-1].title.endswith(f"{last:.0%} computed")
    draw_checkpoint(weights, **options, out=tmp_path / "b")
    assert len(drawn["overview.png"]["panels"]) == 2


@pytest.fixture(scope="module")
def dense_of(checkpoint_of, tmp_path_factory):
    """By name of a data set, a dense checkpoint for it of other weights."""

    def make(name, **changed):
        sampled = read_architecture(checkpoint_of(name)[0])
        architecture = replace(sampled, sampling=None, **changed)
        torch.manual_seed(5)
        path = tmp_path_factory.mktemp(f"dense-{name}") / "weights.safetensors"
        save_checkpoint(path, build_dense(architecture), architecture)
        return path

    return make


@pytest.mark.parametrize("shows_data", [True, False])
def test_a_dense_prediction_stands_beside_the_sampled_one(
    shows_data, checkpoint_of, dense_of, drawn, tmp_path
):
    weights, root = checkpoint_of("camvid")
    keywords = {"data": root, "images": [0, 2], "out": tmp_path, "per_sampler": False}
    draw_checkpoint(weights, shows_data=shows_data, **keywords)
    alone = drawn.pop("overview.png")
    dense = dense_of("camvid", size=(64, 64))  # is drawn at the size of the other
    draw_checkpoint(weights, dense=dense, shows_data=shows_data, **keywords)
    both = drawn["overview.png"]
    assert both["columns"] == alone["columns"] + 1 == (5 if shows_data else 3)
    names = ["dense prediction", "sampled prediction"]
    for start in (0, both["columns"]):
        row = both["panels"][start : start + both["columns"]]
        titles = [panel.title for panel in row[-3:-1]]
        assert [
            title.removeprefix("scene0: ").removeprefix("scene2: ") for title in titles
        ] == names
        if shows_data:
            assert row[1].title == "annotation"
        assert row[-1].is_share
    model, _ = load_checkpoint(dense)
    size = read_architecture(weights).size
    images = open_evaluation_data("camvid", root, split="val", num_classes=11, size=size)
    with torch.no_grad():
        classes = model.eval()(images.example(2))["out"][0].argmax(0)
    expected = colour_classes(classes, num_classes=11, ignore_index=255)
    assert np.array_equal(both["panels"][-3].pixels, expected)
    assert np.array_equal(both["panels"][-2].pixels, alone["panels"][-2].pixels)


def test_a_dense_detector_is_drawn_too(checkpoint_of, dense_of, tmp_path):
    weights, root = checkpoint_of("coco")
    (written,) = draw_checkpoint(
        weights, data=root, dense=dense_of("coco"), images=[0], out=tmp_path, per_sampler=False
    )
    assert written.stat().st_size > 10_000


def test_what_is_no_dense_counterpart_is_refused(checkpoint_of, dense_of, tmp_path):
    weights, root = checkpoint_of("camvid")

    def draw(dense, weights=weights, root=root):
        draw_checkpoint(weights, data=root, dense=dense, images=[0], out=tmp_path)

    with pytest.raises(ValueError, match="but it is sampled; a dense checkpoint for segmentation"):
        draw(weights)
    with pytest.raises(ValueError, match="but it is for segmentation with 19 classes"):
        draw(dense_of("cityscapes"))
    small, images = checkpoint_of("cifar10")
    with pytest.raises(ValueError, match="but a prediction for whole images is no picture"):
        draw(dense_of("cifar10"), small, images)
