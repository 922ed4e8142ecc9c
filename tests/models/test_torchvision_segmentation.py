import pytest
import torch

from sparsight.models import torchvision_segmentation


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50"])
def test_logits_have_the_size_of_the_input(name):
    model = torchvision_segmentation(name, num_classes=3).eval()
    with torch.no_grad():
        out = model(torch.zeros(1, 3, 32, 40))
    assert out["out"].shape == (1, 3, 32, 40)
    assert "aux" not in out


def test_another_name_is_refused():
    with pytest.raises(ValueError, match=r"name='unet'; one of fcn_resnet50, deeplabv3_resnet50"):
        torchvision_segmentation("unet", num_classes=3)
