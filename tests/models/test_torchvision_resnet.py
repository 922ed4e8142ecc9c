import pytest
import torch

from sparsight.models import torchvision_resnet


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_logits_are_one_row_an_image(name):
    model = torchvision_resnet(name, num_classes=5).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 32, 40)).shape == (2, 5)


def test_another_name_is_refused():
    with pytest.raises(ValueError, match=r"name='vgg16'; one of resnet18, resnet34, resnet50"):
        torchvision_resnet("vgg16")
