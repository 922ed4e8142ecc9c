import pytest
import torch

from sparsight.train.architecture import build_dense
from sparsight.train.data import SyntheticScenes
from sparsight.train.segmentation_choices import (
    pixel_loss,
    segmentation_architecture,
    segmentation_transform,
)

FLAGS = {
    "num_classes": 3,
    "size": (32, 48),
    "backbone": "resnet18",
    "is_dilated": True,
    "fpn_channels": 8,
    "head_channels": 16,
}


@pytest.mark.parametrize(
    ("model", "kept"),
    [
        ("semantic_fpn", {"backbone", "is_dilated", "fpn_channels", "head_channels"}),
        ("fcn_resnet50", {"is_dilated"}),
        ("frrn_a", set()),
        ("refinenet", {"backbone"}),
        ("light_weight_refinenet", {"backbone"}),
    ],
)
def test_an_architecture_has_what_its_model_has(model, kept):
    made = segmentation_architecture(model=model, **FLAGS)
    for name in ("backbone", "is_dilated", "fpn_channels", "head_channels"):
        assert getattr(made, name) == (FLAGS[name] if name in kept else made_empty(name)), name
    assert (made.model, made.num_classes, made.size) == (model, 3, (32, 48))
    assert made.task == "segmentation"


def made_empty(name):
    return False if name.startswith("is_") else None


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "timm:resnet10t"])
def test_a_light_weight_refinenet_is_built_on_others_than_resnets(backbone):
    if backbone.startswith("timm:"):
        pytest.importorskip("timm")
    flags = FLAGS | {"backbone": backbone}
    made = segmentation_architecture(model="light_weight_refinenet", channels=8, **flags)
    again = type(made).from_json(made.to_json())
    assert again == made and again.backbone == backbone
    with torch.no_grad():
        out = build_dense(again).eval()(torch.zeros(1, 3, 32, 48))["out"]
    assert out.shape == (1, 3, 32, 48)


@pytest.mark.parametrize("model", ["frrn_a", "frrn_b", "refinenet", "light_weight_refinenet"])
@pytest.mark.usefixtures("narrow_resnet18")
def test_a_width_is_built(model):
    made = segmentation_architecture(model=model, channels=8, **FLAGS)
    network = build_dense(made).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 32, 48))["out"].shape == (1, 3, 32, 48)
    last = network.classifier.in_channels
    assert last == 8


def test_a_width_of_another_model_is_refused():
    with pytest.raises(ValueError, match=r"channels=8 with model='semantic_fpn'; only FRRN and"):
        segmentation_architecture(model="semantic_fpn", channels=8, **FLAGS)


def test_a_backbone_that_the_model_does_not_take_is_refused_by_the_model():
    made = segmentation_architecture(model="semantic_fpn", **(FLAGS | {"backbone": "resnet101"}))
    with pytest.raises(ValueError, match="semantic_fpn: backbone='resnet101'; one of"):
        build_dense(made)


def test_the_loss_of_the_task_is_its_own_unless_asked_otherwise():
    assert pixel_loss("cross_entropy", ignore_index=7) is None
    loss = pixel_loss("bootstrapped", ignore_index=7)
    logits, labels = torch.zeros(1, 2, 4, 4), torch.full((1, 4, 4), 7)
    labels[0, 0, 0] = 1
    assert loss(logits, labels).item() == pytest.approx(0.6931, abs=1e-4)


@pytest.mark.parametrize("kind", ["default", "refinenet", "frrn"])
def test_augmented_pairs_have_the_size_of_the_crop(kind):
    image, labels = SyntheticScenes(1, size=(48, 64))[0]
    for crop in (None, (24, 24)):
        transform = segmentation_transform(
            kind, (32, 40), model="frrn_a", ignore_index=255, crop=crop
        )
        torch.manual_seed(0)
        shown, truth = transform(image, labels)
        assert shown.shape == (3, *(crop or (32, 40))) and truth.shape == shown.shape[1:]


def test_frrn_b_moves_further():
    moved = []
    for model in ("frrn_a", "frrn_b"):
        transform = segmentation_transform("frrn", (100, 100), model=model, ignore_index=255)
        largest = 0
        for seed in range(20):
            torch.manual_seed(seed)
            image, labels = SyntheticScenes(1, size=(100, 100))[0]
            _, truth = transform(image, labels)
            largest = max(largest, int((truth == 255).all(1).sum()))
        moved.append(largest)
    assert 20 < moved[0] <= 30 < moved[1] <= 40
