import pytest
import torch
from safetensors.torch import save_file
from torch import nn

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


@pytest.mark.parametrize("form", ["zip", "before torch 1.6", "safetensors"])
def test_every_form_gives_the_same_tensors(tmp_path, form):
    expected = {"weight": torch.randn(3, 2), "counts": torch.arange(3)}
    stored = {f"module.{name}": value for name, value in expected.items()}
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file(stored, path)
    else:
        torch.save(stored, path, _use_new_zipfile_serialization=form == "zip")
    found = read_state_dict(path)
    assert set(found) == set(expected)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"epoch": 3}, "its 'epoch' is a int"),
        ({3: torch.zeros(1)}, "its 3 is a Tensor"),
        ([torch.zeros(1)], "it holds a list"),
        (nn.Linear(2, 2), "it holds more than tensors, or torch did not write it"),
    ],
)
def test_what_a_file_holds_instead_is_said(tmp_path, content, reason):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=rf"read_state_dict: .*w\.pt' holds no .* \({reason}\); t"):
        read_state_dict(tmp_path / "w.pt")


@pytest.mark.parametrize("form", ["zip", "before torch 1.6", "safetensors"])
def test_a_file_cut_anywhere_is_refused(tmp_path, form):
    """pickle's errors, and those of the code around it, are of a dozen kinds."""
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    state = {"a.weight": torch.zeros(3, 3), "b": torch.zeros(2)}
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    step = 17 if form == "zip" else 1
    for length in range(0, len(whole), step):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"read_state_dict: .* holds no state_dict \(.+\); t"):
            read_state_dict(path)


def test_other_content_is_refused_without_torchs_advice(tmp_path):
    """torch's own message on it recommends to execute what the file says."""
    for content in (b"", b"no weights", b"<html>404</html>", b"\x89PNG\r\n", b"{}"):
        (tmp_path / "w.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"w\.pt' holds no state_dict") as caught:
            read_state_dict(tmp_path / "w.pt")
        assert "weights_only" not in str(caught.value)


def test_a_missing_file_is_named_with_the_callers_advice(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"read_state_dict: .*pt' does not exist; tensors"):
        read_state_dict(tmp_path / "w.pt")
    with pytest.raises(FileNotFoundError, match=r"^caller: .*\.pt' does not exist; ask\.$"):
        read_state_dict(tmp_path / "w.pt", name="caller", advice="ask")


@pytest.mark.parametrize("error", [PermissionError, MemoryError])
def test_what_the_machine_refuses_is_no_fault_of_the_file(tmp_path, monkeypatch, error):
    def load(*_, **__):
        raise error

    torch.save({}, tmp_path / "w.pt")
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(error):
        read_state_dict(tmp_path / "w.pt")
