"""The last shift onto the budget, on images of training."""

import pytest
import torch

from sparsight.measure import count_macs
from sparsight.nn import Sampler
from sparsight.train.architecture import Architecture, Sampling, build_dense, convert
from sparsight.train.data import SyntheticScenes, evaluation_transform, training_transform
from sparsight.train.recipe import Recipe
from sparsight.train.settling import settle

pytestmark = pytest.mark.usefixtures("narrow_resnet18")

SIZE = (32, 48)


class Untouchable(SyntheticScenes):
    def __getitem__(self, index):
        raise AssertionError("a validation image was looked at")


def test_the_levels_meet_the_budget_on_training_images_alone(tmp_path):
    architecture = Architecture(
        num_classes=6, fpn_channels=8, head_channels=8, size=SIZE, sampling=Sampling()
    )
    torch.manual_seed(0)
    network = convert(build_dense(architecture), architecture).eval()
    recipe = Recipe(
        train_data=SyntheticScenes(6, size=SIZE, seed=1),
        train_transform=training_transform(SIZE, ignore_index=255),
        val_data=Untouchable(2, size=SIZE, seed=2),
        val_transform=evaluation_transform(SIZE),
        out=tmp_path,
        epochs=1,
        batch_size=2,
    )
    found = settle(network, recipe, 0.75, num_images=4)
    assert found["settled_share"] == pytest.approx(0.75, abs=0.02)
    counts = [count_macs(network, images) for images, _ in recipe.measured_batches(4)]
    share = sum(c.total for c in counts) / sum(c.dense for c in counts)
    assert found["settled_share"] == share
    (bias,) = {m.head.bias.item() for m in network.modules() if isinstance(m, Sampler)}
    assert bias == pytest.approx(3.0 + found["settling_shift"], abs=1e-5)
