import pytest
import torch
from torch import nn

from sparsight.convert import freeze
from sparsight.measure import count_macs
from sparsight.models import resnet_cifar
from sparsight.nn import Sampler, record_sampling
from sparsight.train.sampling import Sampling, apply_sampling
from sparsight.train.tally import ComputeTally


@pytest.fixture(scope="module")
def sampled():
    torch.manual_seed(0)
    model = apply_sampling(resnet_cifar(8), Sampling(noise="blue")).eval()
    for module in model.modules():
        if isinstance(module, Sampler):
            nn.init.normal_(module.head.weight, std=0.1)
            nn.init.constant_(module.head.bias, 0.0)
    return model


@pytest.mark.parametrize("is_frozen", [False, True])
@torch.no_grad()
def test_batches_of_any_size_add_up_to_means_over_images(sampled, is_frozen):
    model = freeze(sampled, example=torch.zeros(1, 3, 32, 32)) if is_frozen else sampled
    tally = ComputeTally(model)
    batches = torch.randn(5, 3, 32, 32).split([3, 2])
    for images in batches:
        output, decisions, counted = tally.run(images)
        assert torch.equal(output, model(images))
        assert counted.total == count_macs(model, images).total
        assert len(decisions) == 6 and len(decisions[0].mask) == len(images)
    counts = [count_macs(model, images) for images in batches]
    assert tally.num_images == 5
    assert tally.macs_total == sum(c.total for c in counts) / 5
    assert tally.macs_dense == sum(c.dense for c in counts) / 5
    assert tally.share == sum(c.total for c in counts) / sum(c.dense for c in counts) < 1
    with record_sampling(model) as record:
        for images in batches:
            model(images)
    masks = [d.mask for d in record.decisions if d.name == "layer2.0.samplers.1"]
    mean = torch.cat(masks).float().mean()
    assert tally.density["layer2.0.samplers.1"] == pytest.approx(float(mean), abs=1e-6)
    assert list(tally.density) == [d.name for d in record.decisions[:6]]


@torch.no_grad()
def test_a_dense_model_has_no_density():
    tally = ComputeTally(resnet_cifar(8).eval())
    _, decisions, _ = tally.run(torch.randn(2, 3, 16, 16))
    assert decisions == [] and tally.density == {} and tally.share == 1.0


def test_having_seen_nothing_is_refused():
    tally = ComputeTally(resnet_cifar(8).eval())
    with pytest.raises(ValueError, match="somewhere: no batch arrived; at least one image is"):
        tally.check("somewhere")
