import torch
from torch import nn
from torchvision.models import mobilenet_v2

from sparsight.models.mobilenet_stages import MobileNetV2Stages, is_mobilenet_v2


def test_the_maps_are_those_before_each_change_of_width():
    torch.manual_seed(0)
    source = mobilenet_v2(weights=None).eval()
    stages = MobileNetV2Stages(source)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps = stages(image)
        assert [m.shape[1] for m in maps] == [24, 32, 64, 96, 160, 320]
        assert [64 // m.shape[2] for m in maps] == [4, 8, 16, 16, 32, 32]
        # The last two layers of `features` are what the maps go through next.
        assert torch.equal(source.features[18](maps[-1]), source.features(image))
        assert torch.equal(source.features[:4](image), maps[0])


def test_the_published_encoder_has_its_parameters():
    """3,504,872 less the classifier of 1,281,000 and the convolution to 1280 channels."""
    with torch.device("meta"):
        stages = MobileNetV2Stages(mobilenet_v2(weights=None))
    assert sum(p.numel() for p in stages.parameters()) == 3_504_872 - 1_281_000 - 412_160
    names = set(mobilenet_v2(weights=None).state_dict())
    own = set(stages.state_dict())
    assert own < names and all(name.startswith(stages.left_out) for name in names - own)


def test_only_torchvisions_is_one():
    with torch.device("meta"):
        assert is_mobilenet_v2(mobilenet_v2(weights=None))
    assert not is_mobilenet_v2(nn.Sequential())
