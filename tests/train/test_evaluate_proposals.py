"""Recall, MACs and densities on the same images."""

import pytest
import torch
from torch import nn

from sparsight.convert import freeze
from sparsight.nn import Sampler
from sparsight.train.architecture import ProposalArchitecture, Sampling, build_dense, convert
from sparsight.train.data import (
    Coco,
    SeededView,
    collate_proposals,
    proposal_transform,
    write_synthetic_coco,
)
from sparsight.train.evaluate_proposals import measured_network_share, score_proposals
from sparsight.train.proposal_task import count_over_scales

pytestmark = pytest.mark.usefixtures("narrow_resnet18")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Coco:
    root = write_synthetic_coco(tmp_path_factory.mktemp("coco"), num_images=4, size=(48, 64))
    return Coco(root, with_masks=True)


@pytest.fixture(scope="module")
def batches(data):
    view = SeededView(data, proposal_transform())
    return [collate_proposals([view[0], view[1]]), collate_proposals([view[2]])]


@pytest.fixture(scope="module")
def sampled():
    architecture = ProposalArchitecture(
        backbone="resnet18",
        num_stages=2,
        k=3,
        m=7,
        head_channels=8,
        size=(48, 64),
        scales=(0.5, 1.0),
        sampling=Sampling(window=3),
    )
    torch.manual_seed(0)
    model = convert(build_dense(architecture), architecture).eval()
    for module in model.modules():
        if isinstance(module, Sampler):
            nn.init.constant_(module.head.bias, 0.0)
    model.max_proposals = 20
    return model


def test_the_cost_is_that_of_all_scales_image_by_image(sampled, data, batches):
    score = score_proposals(sampled, batches, data=data)
    assert score.num_images == 3 and 0 < score.num_proposals <= 20
    counted = [count_over_scales(sampled, [image]) for images, _ in batches for image in images]
    assert score.macs_total == sum(c.total for c in counted) / 3
    assert score.macs_dense == sum(c.dense for c in counted) / 3
    assert score.share == score.macs_total / score.macs_dense
    one_by_one = [[image] for images, _ in batches for image in images]
    assert measured_network_share(sampled, one_by_one) == pytest.approx(score.share)
    assert len(score.density) == 2 * 4 + 1
    assert next(iter(score.figures)) == "ar100" and len(score.figures) == 6
    assert "AR@100" in str(score) and f"{score.share:.3f} of the dense" in str(score)


def test_a_frozen_model_scores_as_its_source(sampled, data, batches):
    frozen = freeze(sampled, example=batches[0][0][:1])
    expected, arrived = (score_proposals(m, batches, data=data) for m in (sampled, frozen))
    assert arrived.macs_total == expected.macs_total
    assert arrived.density == expected.density
    assert arrived.metrics.ar100 == pytest.approx(expected.metrics.ar100, abs=0.05)


def test_no_batch_is_refused(sampled, data):
    with pytest.raises(ValueError, match="score_proposals: no batch arrived; at least one image"):
        score_proposals(sampled, [], data=data)
