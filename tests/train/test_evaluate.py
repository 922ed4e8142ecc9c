import pytest
import torch
from torch import nn

from sparsight.convert import freeze
from sparsight.measure import count_macs
from sparsight.nn import Sampler
from sparsight.train.architecture import Architecture, Sampling, build_dense, convert
from sparsight.train.evaluate import measured_share, score

CLASSES = ("a", "b", "c")
IGNORE = 9


class Oracle(nn.Module):
    """Predicts the class written in the red channel."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, image):
        self.conv(image)
        logits = torch.nn.functional.one_hot(image[:, 0].long(), 3).permute(0, 3, 1, 2).float()
        return {"out": logits}


def image_of(class_map):
    return torch.stack([class_map.float(), class_map * 0.0, class_map * 0.0], 1)


def test_a_perfect_prediction_scores_one_and_absent_classes_do_not_count():
    labels = torch.tensor([[[0, 0, 1, 1]] * 4])
    result = score(
        Oracle().eval(), [(image_of(labels), labels)], classes=CLASSES, ignore_index=IGNORE
    )
    assert result.miou == 1.0
    assert result.class_iou == {"a": 1.0, "b": 1.0, "c": None}
    assert result.num_images == 1
    assert result.macs_dense == result.macs_total == 9 * 16
    assert result.density == result.class_density == {}


def test_ignored_pixels_do_not_count_and_batches_add_up():
    truth = torch.tensor([[[0, 0], [1, 1]], [[2, 2], [2, 2]]])
    predicted = torch.tensor([[[0, 1], [1, 1]], [[2, 2], [0, 0]]])
    truth[1, 1] = IGNORE
    batches = [(image_of(predicted[i : i + 1]), truth[i : i + 1]) for i in range(2)]
    together = [(image_of(predicted), truth)]
    one, two = (
        score(Oracle().eval(), b, classes=CLASSES, ignore_index=IGNORE) for b in (batches, together)
    )
    assert one.class_iou == pytest.approx({"a": 1 / 2, "b": 2 / 3, "c": 1.0})
    assert one == two


def test_scores_are_counted_at_the_annotations_size():
    labels = torch.zeros(1, 8, 8, dtype=torch.int64)
    labels[:, :, 4:] = 1
    small = image_of(labels[:, ::2, ::2])
    result = score(Oracle().eval(), [(small, labels)], classes=CLASSES, ignore_index=IGNORE)
    assert result.miou == 1.0


def test_no_batch_is_refused():
    with pytest.raises(ValueError, match="score: no batch arrived; at least one image"):
        score(Oracle().eval(), [], classes=CLASSES, ignore_index=IGNORE)


@pytest.fixture(scope="module")
def sampled():
    architecture = Architecture(
        num_classes=3, fpn_channels=8, head_channels=8, size=(64, 64), sampling=Sampling()
    )
    torch.manual_seed(0)
    model = convert(build_dense(architecture), architecture).eval()
    for module in model.modules():
        if isinstance(module, Sampler):
            nn.init.constant_(module.head.bias, 0.0)
    return model


def test_the_share_is_what_count_macs_counts(sampled):
    images = torch.randn(2, 3, 64, 64)
    labels = torch.randint(0, 3, (2, 64, 64))
    result = score(sampled, [(images, labels)], classes=CLASSES, ignore_index=IGNORE)
    counted = count_macs(sampled, images)
    assert result.macs_total == counted.total / 2
    assert result.macs_dense == counted.dense / 2
    assert result.share == counted.total / counted.dense == measured_share(sampled, [images])
    assert len(result.density) == 16
    assert sum(result.density.values()) / 16 == pytest.approx(0.55, abs=0.1)
    assert set(result.class_density) == set(CLASSES)
    assert f"{result.share:.3f} of the dense" in str(result)


def test_a_frozen_model_scores_as_its_source(sampled):
    images = torch.randn(1, 3, 64, 64)
    labels = torch.randint(0, 3, (1, 64, 64))
    results = [
        score(model, [(images, labels)], classes=CLASSES, ignore_index=IGNORE)
        for model in (sampled, freeze(sampled, example=images))
    ]
    assert results[0].macs_total == results[1].macs_total
    assert results[0].miou == pytest.approx(results[1].miou, abs=2e-3)
