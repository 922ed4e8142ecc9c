import pytest
import torch

from sparsight.models import read_state_dict, torchvision_resnet


def test_weights_of_torchvision_load(tmp_path):
    source = torchvision_resnet("resnet18", num_classes=3).eval()
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}},
        tmp_path / "w.pth",
    )
    model = torchvision_resnet("resnet18", num_classes=3).eval()
    model.load_state_dict(read_state_dict(tmp_path / "w.pth"))
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(image), source(image))


def test_a_file_without_tensors_is_refused(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"read_state_dict: .*w\.pt' holds a dict that is no"):
        read_state_dict(tmp_path / "w.pt")
    with pytest.raises(FileNotFoundError, match=r"read_state_dict: .*a state_dict saved with"):
        read_state_dict(tmp_path / "other.pt")
