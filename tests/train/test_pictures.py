import numpy as np
import pytest
import torch
from PIL import Image

from sparsight.nn import RecordedDecision
from sparsight.train.architecture import Architecture, Sampling, build_dense, convert
from sparsight.train.data.augment import normalised_picture
from sparsight.train.pictures import (
    Box,
    Frame,
    Panel,
    colour_classes,
    colour_of,
    draw_masks,
    draw_panels,
    mask_panels,
    overlay_mask,
    share_panel,
    to_pixels,
)

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
    computed = np.kron([[1, 0], [0, 1]], np.ones((2, 2))) == 1
    shown = overlay_mask(pixels, computed)
    assert np.array_equal(shown[..., 0] == 100, computed)


def decision(mask, name="backbone.layer1.0.samplers.0"):
    mask = torch.tensor(mask, dtype=torch.bool)[None, None]
    return RecordedDecision(name, mask, mask.float(), None, macs=1)


def test_a_mask_covers_the_pixels_nearest_to_its_positions():
    mask = decision([[1, 0], [0, 1]]).mask
    fitted = Frame.plain((4, 6)).fit(mask)
    assert np.array_equal(fitted, np.kron([[1, 0], [0, 1]], np.ones((2, 3))) == 1)


def test_what_lies_over_padding_is_not_shown():
    """A picture of 2x3 that was enlarged to 4x6 and padded to 8x8: masks are of the 8x8."""
    frame = Frame(size=(2, 3), resized=(4, 6), padded=(8, 8))
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[..., 2:, :] = mask[..., 3:] = True  # below and to the right
    assert not frame.fit(mask).any()
    mask[..., 0, 2] = True
    assert np.array_equal(frame.fit(mask), [[0, 0, 1], [0, 0, 0]])


def test_the_share_is_the_mean_over_samplers_whatever_their_size():
    decisions = [decision([[1, 0], [0, 1]]), decision([[1]]), decision([[0, 0], [0, 0]])]
    panel = share_panel(decisions, Frame.plain((2, 2)), caption="cat\n")
    assert panel.is_share and np.allclose(panel.pixels, [[2 / 3, 1 / 3], [1 / 3, 2 / 3]])
    assert panel.title == "cat\ncomputed share: 50% in the mean"


def test_there_is_a_panel_for_each_sampler_under_a_short_name():
    pixels = np.full((2, 2, 3), 100, dtype=np.uint8)
    decisions = [decision([[1, 0]]), decision([[1]], "backbone.body.layer2.1.samplers.1")]
    panels = mask_panels(decisions, pixels, Frame.plain((2, 2)))
    assert [panel.title for panel in panels] == [
        "layer1.0.mask 0: 50% computed",
        "layer2.1.mask 1: 100% computed",
    ]
    assert np.array_equal(panels[0].pixels[..., 0], [[100, 20], [100, 20]])


def size_of(path):
    with Image.open(path) as picture:
        return picture.size, np.array(picture.convert("RGB"))


def test_shares_have_a_scale_and_classes_a_legend(tmp_path):
    half = np.full((4, 4), 0.5)
    rgb = np.full((4, 4, 3), 255, dtype=np.uint8)
    for name, panel, classes in (
        ("plain", Panel("", rgb), None),
        ("share", Panel("", half), None),
        ("legend", Panel("", rgb), {"road": (1, 2, 3)}),
    ):
        draw_panels([panel], tmp_path / f"{name}.png", classes=classes)
    for name in ("plain", "share"):  # a scale of colours beside the shares, and nothing else
        _, pixels = size_of(tmp_path / f"{name}.png")
        assert (np.ptp(pixels, axis=2) > 40).any() == (name == "share")
    _, legend = size_of(tmp_path / "legend.png")
    assert (legend == (1, 2, 3)).all(axis=2).any()


def test_rows_follow_from_the_columns_and_small_pictures_are_not_smoothed(tmp_path):
    checkered = np.kron([[0, 1] * 8, [1, 0] * 8] * 8, np.ones((1, 1)))[..., None]
    panels = [Panel("", (checkered * 255).astype(np.uint8).repeat(3, axis=2))] * 6
    draw_panels(panels, tmp_path / "wide.png", num_columns=6)
    draw_panels(panels, tmp_path / "tall.png", num_columns=1)
    (width, height), _ = size_of(tmp_path / "wide.png")
    (narrow, tall), pixels = size_of(tmp_path / "tall.png")
    assert width > 3 * height and tall > 3 * narrow
    grey = (pixels[..., 0] > 10) & (pixels[..., 0] < 245)
    assert grey.mean() < 0.05  # edges between enlarged pixels fall between those of the figure


def test_boxes_are_drawn_in_the_colour_of_their_class(tmp_path):
    blank = np.full((200, 200, 3), 255, dtype=np.uint8)
    box = Box((40.0, 50.0, 160.0, 150.0), "car 0.90", 2)
    draw_panels([Panel("", blank, [box])], tmp_path / "box.png")
    _, pixels = size_of(tmp_path / "box.png")
    assert (np.abs(pixels.astype(int) - colour_of(2)).max(axis=2) < 8).sum() > 200
    assert colour_of(2) == colour_of(22) != colour_of(3)


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
