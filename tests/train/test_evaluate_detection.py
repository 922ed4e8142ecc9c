import pytest
import torch
from torch import nn

from sparsight.convert import freeze
from sparsight.measure import count_macs
from sparsight.nn import Sampler
from sparsight.train.architecture import DetectorArchitecture, Sampling, build_dense, convert
from sparsight.train.data import (
    Coco,
    SeededView,
    collate_detection,
    detection_transform,
    write_synthetic_coco,
)
from sparsight.train.detection_task import backbone_input
from sparsight.train.evaluate_detection import measured_backbone_share, score_detector

pytestmark = pytest.mark.usefixtures("narrow_resnet18")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Coco:
    root = write_synthetic_coco(tmp_path_factory.mktemp("coco"), num_images=4, size=(64, 96))
    return Coco(root)


@pytest.fixture(scope="module")
def batches(data):
    view = SeededView(data, detection_transform(is_training=False))
    return [collate_detection([view[0], view[1]]), collate_detection([view[2]])]


@pytest.fixture(scope="module")
def sampled():
    architecture = DetectorArchitecture(
        num_classes=3,
        backbone="resnet18",
        fpn_channels=8,
        head_channels=16,
        size=(64, 96),
        sampling=Sampling(),
    )
    torch.manual_seed(0)
    model = convert(build_dense(architecture), architecture).eval()
    for module in model.modules():
        if isinstance(module, Sampler):
            nn.init.constant_(module.head.bias, 0.0)
    return model


def test_the_cost_is_what_count_macs_counts(sampled, data, batches):
    score = score_detector(sampled, batches, data=data)
    assert score.num_images == 3
    counted = [
        count_macs(sampled.backbone.body, backbone_input(sampled, images)) for images, _ in batches
    ]
    assert score.macs_total == sum(c.total for c in counted) / 3
    assert score.macs_dense == sum(c.dense for c in counted) / 3
    assert score.share == score.macs_total / score.macs_dense
    assert score.share == measured_backbone_share(sampled, [images for images, _ in batches])
    assert score.detector_macs_total > score.macs_total
    assert len(score.density) == 16
    assert sum(score.density.values()) / 16 == pytest.approx(0.55, abs=0.1)
    assert f"{score.share:.3f} of the dense" in str(score)


def test_a_frozen_detector_scores_as_its_source(sampled, data, batches):
    frozen = freeze(sampled, example=batches[0][0])
    expected, arrived = (score_detector(m, batches, data=data) for m in (sampled, frozen))
    assert arrived.macs_total == expected.macs_total
    assert arrived.density == expected.density
    assert arrived.metrics.ap == pytest.approx(expected.metrics.ap, abs=2e-3)


def test_only_the_images_that_came_are_scored(data, batches):
    class Oracle(nn.Module):
        """Has a convolution, so that there is something to count."""

        def __init__(self):
            super().__init__()
            self.backbone = nn.ModuleDict({"body": nn.Sequential(nn.Conv2d(3, 1, 1))})
            self.targets = {}

        def forward(self, images):
            found = []
            for image in images:
                self.backbone["body"](image)
                target = self.targets[image.data_ptr()]
                found.append({**target, "scores": torch.ones(len(target["labels"]))})
            return found

    oracle = Oracle().eval()
    for images, targets in batches:
        oracle.targets |= {i.data_ptr(): t for i, t in zip(images, targets, strict=True)}
    assert score_detector(oracle, batches[:1], data=data).metrics.ap == pytest.approx(1.0)


def test_no_batch_is_refused(sampled, data):
    with pytest.raises(ValueError, match="score_detector: no batch arrived; at least one image"):
        score_detector(sampled, [], data=data)
