"""The last shift onto the budget, on images of training."""

import pytest
import torch

from sparsight.measure import count_macs
from sparsight.nn import Sampler
from sparsight.train.architecture import Architecture, Sampling, build_dense, convert
from sparsight.train.data import SyntheticScenes, evaluation_transform, training_transform
from sparsight.train.recipe import Recipe
from sparsight.train.settling import measure_norms_again, settle

pytestmark = pytest.mark.usefixtures("narrow_resnet18")

SIZE = (32, 48)


class Untouchable(SyntheticScenes):
    def __getitem__(self, index):
        raise AssertionError("a validation image was looked at")


def make(tmp_path, **keywords):
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
        **keywords,
    )
    return network, recipe


def test_norms_are_measured_on_images_of_epochs_that_training_did_not_see(tmp_path):
    network, recipe = make(tmp_path)
    seen = []
    network.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    before = network.backbone.bn1.running_mean.clone()
    measure_norms_again(network, recipe, num_images=8)
    assert not torch.equal(network.backbone.bn1.running_mean, before)
    trained = [images for images, _ in recipe.training_batches()]
    assert len(seen) == 4 > len(trained)  # three batches of an epoch, one of the next
    for i, images in enumerate(seen):
        assert not any(torch.equal(images, other) for other in [*trained, *seen[:i]])
    assert not any(module.training for module in network.modules())


def test_norms_stay_where_that_is_asked_for(tmp_path):
    network, recipe = make(tmp_path, remeasures_norms=False)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    measure_norms_again(network, recipe, num_images=8)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_the_levels_meet_the_budget_on_training_images_alone(tmp_path):
    network, recipe = make(tmp_path)
    found = settle(network, recipe, 0.75, num_images=4)
    assert found["settled_share"] == pytest.approx(0.75, abs=0.02)
    counts = [count_macs(network, images) for images, _ in recipe.measured_batches(4)]
    share = sum(c.total for c in counts) / sum(c.dense for c in counts)
    assert found["settled_share"] == share
    (bias,) = {m.head.bias.item() for m in network.modules() if isinstance(m, Sampler)}
    assert bias == pytest.approx(3.0 + found["settling_shift"], abs=1e-5)
