import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsight.train.dense_inference import Averaged, DenseInference, Windowed, _starts


class Pixelwise(nn.Module):
    """Says of each pixel what its colour says, and remembers the sizes it was given."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 1)
        self.sizes = []

    def forward(self, x):
        self.sizes.append(tuple(x.shape[-2:]))
        return {"out": self.conv(x)}


class Leftmost(nn.Module):
    """Says class 1 of the left half of whatever it is given."""

    def forward(self, x):
        out = torch.zeros(len(x), 2, *x.shape[-2:])
        out[:, 1, :, : x.shape[-1] // 2] = 4.0
        return {"out": out}


@pytest.fixture
def image():
    torch.manual_seed(1)
    return torch.randn(2, 3, 24, 40)


def test_one_scale_and_a_window_of_the_image_are_the_model_itself(image):
    model = Pixelwise()
    expected = model(image)["out"]
    assert torch.equal(Averaged(model, scales=(1.0,), flip=False)(image)["out"], expected)
    assert torch.equal(Windowed(model, window=(24, 64), overlap=8)(image)["out"], expected)
    assert DenseInference().is_plain and DenseInference().wrap(model) is model


def test_what_does_not_depend_on_the_place_does_not_change(image):
    model = Pixelwise()
    expected = model(image)["out"].log_softmax(1)
    for wrapped in (
        Averaged(model, scales=(1.0,), flip=True),
        Windowed(model, window=(10, 16), overlap=3),
        Windowed(model, window=(24, 7), overlap=0),
    ):
        torch.testing.assert_close(wrapped(image)["out"], expected, atol=1e-5, rtol=1e-5)


def test_scales_are_averaged_as_probabilities(image):
    model = Pixelwise()
    found = Averaged(model, scales=(0.5, 1.0), flip=False)(image)["out"]
    assert model.sizes == [(12, 20), (24, 40)]
    small = F.interpolate(image, size=(12, 20), mode="bilinear", antialias=True)
    small = F.interpolate(model.conv(small).softmax(1), size=(24, 40), mode="bilinear")
    expected = (small + model.conv(image).softmax(1)) / 2
    torch.testing.assert_close(found, expected.log())
    torch.testing.assert_close(found.exp().sum(1), torch.ones(2, 24, 40))


def test_mirror_images_are_turned_back(image):
    found = Averaged(Leftmost(), scales=(1.0,), flip=True)(image)["out"]
    # Every pixel is once in the left half and once in the right.
    mean = (torch.tensor(4.0).sigmoid() + 0.5) / 2
    torch.testing.assert_close(found[:, 1].exp(), mean.expand(2, 24, 40))


@pytest.mark.parametrize(
    ("length", "window", "overlap"),
    [(100, 40, 10), (41, 40, 10), (40, 40, 0), (97, 7, 6), (5, 9, 1)],
)
def test_windows_cover_with_at_least_the_overlap(length, window, overlap):
    starts = _starts(length, window, overlap)
    assert starts[0] == 0 and starts[-1] == max(0, length - window)
    for a, b in pairwise(starts):
        assert 0 < b - a <= window - overlap
    assert len(starts) == max(1, math.ceil((length - overlap) / (window - overlap)))


def test_memory_is_that_of_a_window_and_borders_count_less(image):
    model = Pixelwise()
    Windowed(model, window=(16, 16), overlap=4)(image)
    assert set(model.sizes) == {(16, 16)} and len(model.sizes) == 2 * 3
    found = Windowed(Leftmost(), window=(24, 24), overlap=8)(image)["out"][0, :, 0].exp()
    # Windows begin at 0 and 16: column 16 is the first one's right half and the other's left end.
    says = [torch.tensor([0.0, 4.0]).softmax(0)[1], torch.tensor([0.0, 0.0]).softmax(0)[1]]
    weights = torch.tensor([1 / 9, 8 / 9])
    expected = (weights * torch.stack(says)).sum()
    assert float(found[1, 16]) == pytest.approx(float(expected))


def test_windows_of_scaled_images(image):
    model = Pixelwise()
    inference = DenseInference(scales=(1.0, 2.0), window=(24, 40), overlap=8)
    out = inference.wrap(model)(image)["out"]
    assert out.shape == (2, 4, 24, 40) and set(model.sizes) == {(24, 40)}
    assert not inference.is_plain and inference.example(torch.zeros(1, 3, 60, 60)).shape == (
        1,
        3,
        24,
        40,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": ()}, r"scales=\(\); one or more factors above 0"),
        ({"scales": (1.0, -0.5)}, r"scales=\(1.0, -0.5\)"),
        ({"window": (0, 4)}, "window=0x4 with overlap=64"),
        ({"window": (32, 64), "overlap": 32}, "window=32x64 with overlap=32; sides"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DenseInference(**options).wrap(Pixelwise())


def test_other_tasks_are_refused():
    DenseInference().check_task("evaluate", "detection")
    with pytest.raises(ValueError, match=r"evaluate: .*flip=True.* for detection; scales"):
        DenseInference(flip=True).check_task("evaluate", "detection")
