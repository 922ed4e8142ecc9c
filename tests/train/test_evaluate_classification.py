import pytest
import torch
from torch import nn

from sparsight.measure import count_macs
from sparsight.models import resnet_cifar
from sparsight.nn import Sampler
from sparsight.train.evaluate_classification import score_classification
from sparsight.train.sampling import Sampling, apply_sampling


@pytest.mark.parametrize("is_sampled", [False, True])
def test_the_score_is_that_of_all_images_and_what_they_cost(is_sampled):
    torch.manual_seed(0)
    model = resnet_cifar(8, num_classes=6).eval()
    dense = count_macs(model, torch.zeros(1, 3, 16, 16)).total
    if is_sampled:
        model = apply_sampling(model, Sampling())
        for module in model.modules():
            if isinstance(module, Sampler):
                nn.init.constant_(module.head.bias, 0.0)
    images, labels = torch.randn(10, 3, 16, 16), torch.arange(10) % 6
    # Noise depends on the place in the batch: predictions are taken from the same batches.
    batches = list(zip(images.split(4), labels.split(4), strict=True))
    with torch.no_grad():
        logits = torch.cat(
            [model(x.contiguous(memory_format=torch.channels_last)) for x, _ in batches]
        )
    score = score_classification(model, batches, num_classes=6)
    best = logits.argsort(1, descending=True)
    assert score.num_images == 10
    assert score.top1 == pytest.approx(float((best[:, 0] == labels).float().mean()))
    assert score.top5 == pytest.approx(
        float((best[:, :5] == labels[:, None]).any(1).float().mean())
    )
    assert score.macs_dense == dense
    assert len(score.density) == (6 if is_sampled else 0)
    if is_sampled:
        assert 0.4 < sum(score.density.values()) / 6 < 0.6
    else:
        assert score.share == 1.0
    assert f"top-1 {100 * score.top1:.2f}, top-5" in str(score)


def test_no_images_are_refused():
    with pytest.raises(ValueError, match=r"score_classification: no batch arrived"):
        score_classification(resnet_cifar(8).eval(), [], num_classes=10)
