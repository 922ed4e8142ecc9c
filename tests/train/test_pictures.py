import numpy as np
import pytest
import torch
from PIL import Image

from sparsight.train.architecture import Architecture, Sampling, build_dense, convert
from sparsight.train.data.augment import normalised_picture
from sparsight.train.pictures import colour_classes, draw_masks, overlay_mask, to_pixels

pytestmark = pytest.mark.usefixtures("narrow_resnet18")

SMALL = Architecture(num_classes=3, fpn_channels=8, head_channels=8, sampling=Sampling())


def test_pixels_come_back_from_a_normalised_image():
    pixels = torch.randint(0, 256, (3, 6, 8), dtype=torch.uint8)
    back = to_pixels(normalised_picture(pixels, (6, 8)))
    assert np.array_equal(back, pixels.permute(1, 2, 0).numpy())


def test_classes_have_different_colours_and_ignored_pixels_are_black():
    picture = colour_classes(torch.tensor([[0, 1, 2, 9]]), num_classes=3, ignore_index=9)
    assert picture.shape == (1, 4, 3)
    assert len(np.unique(picture[0], axis=0)) == 4
    assert not picture[0, 3].any()


def test_what_is_not_computed_is_darkened():
    pixels = np.full((4, 4, 3), 100, dtype=np.uint8)
    mask = torch.tensor([[True, False], [False, True]])[None, None]
    shown = overlay_mask(pixels, mask)
    assert np.array_equal(shown[..., 0] == 100, np.kron([[1, 0], [0, 1]], np.ones((2, 2))) == 1)


def test_a_picture_is_written_with_a_panel_per_mask(tmp_path):
    model = convert(build_dense(SMALL), SMALL).eval()
    path = tmp_path / "new" / "masks.png"
    labels = torch.zeros(20, 24, dtype=torch.int64)
    draw_masks(
        model,
        torch.randn(3, 32, 48),
        labels,
        path=path,
        ignore_index=9,
        reference=build_dense(SMALL).eval(),
    )
    with Image.open(path) as picture:
        assert min(picture.size) > 500
        assert len(np.unique(np.array(picture.convert("L")))) > 20


def test_a_dense_model_has_no_masks(tmp_path):
    with pytest.raises(ValueError, match="has no samplers"):
        draw_masks(
            build_dense(SMALL).eval(),
            torch.randn(3, 32, 48),
            torch.zeros(32, 48, dtype=torch.int64),
            path=tmp_path / "masks.png",
            ignore_index=9,
        )


def test_pictures_without_data_do_not_depend_on_the_annotation(tmp_path):
    model = convert(build_dense(SMALL), SMALL).eval()
    image, written = torch.randn(3, 32, 48), []
    for label in (0, 1):
        path = tmp_path / f"{label}.png"
        labels = torch.full((32, 48), label)
        draw_masks(model, image, labels, path=path, ignore_index=9, shows_data=False)
        with Image.open(path) as picture:
            written.append(np.array(picture))
    assert np.array_equal(*written)
