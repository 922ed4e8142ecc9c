"""Predictions as files: label maps, overlays and COCO's results."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from sparsight.train.checkpoint import load_checkpoint
from sparsight.train.data.augment import normalised_picture
from sparsight.train.data.camvid import read_image
from sparsight.train.data.mask_rle import decode_masks
from sparsight.train.dense_inference import DenseInference
from sparsight.train.pictures import colour_of
from sparsight.train.predict_checkpoint import categories_of, find_pictures, predict_checkpoint


@pytest.fixture
def pictures(tmp_path):
    """Two pictures of different sizes."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, size in (("b.png", (40, 50, 3)), ("a.jpg", (32, 48, 3))):
        Image.fromarray(generator.integers(0, 255, size, dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_label_maps_are_the_models_at_the_pictures_size(checkpoint_of, pictures, tmp_path):
    weights, _ = checkpoint_of("camvid")
    out = tmp_path / "out"
    written = predict_checkpoint(weights, images=pictures, out=out, frozen=False)
    names = [f"{stem}_{kind}.png" for stem in "ab" for kind in ("labels", "overlay")]
    assert [path.name for path in written] == names
    assert sorted(path.name for path in out.iterdir()) == sorted(names)  # nothing temporary is left
    pixels = read_image(pictures / "b.png")
    shown = normalised_picture(torch.from_numpy(pixels).permute(2, 0, 1), (32, 48))[None]
    model = load_checkpoint(weights)[0].eval()
    with torch.no_grad():
        logits = model(shown)["out"]
        expected = F.interpolate(logits, size=(40, 50), mode="bilinear")[0].argmax(0)
    labels = np.array(Image.open(out / "b_labels.png"))
    assert labels.dtype == np.uint8 and labels.shape == (40, 50)
    assert np.array_equal(labels, expected.numpy())
    overlay = np.array(Image.open(out / "b_overlay.png"))
    place = (20, 30)
    colour = np.array(colour_of(int(labels[place])))
    assert np.array_equal(overlay[place], (pixels[place].astype(int) + colour) // 2)


def test_scales_windows_and_sizes_are_those_asked_for(checkpoint_of, pictures, tmp_path):
    weights, _ = checkpoint_of("camvid")
    inference = DenseInference(scales=(0.5, 1.0), flip=True, window=(32, 32), overlap=4)
    picture = pictures / "a.jpg"
    (only,) = predict_checkpoint(
        weights,
        images=[picture],
        out=tmp_path / "out",
        size=(48, 64),
        inference=inference,
        frozen=False,
        overlays=False,
    )
    shown = torch.from_numpy(read_image(picture)).permute(2, 0, 1)
    model = load_checkpoint(weights)[0].eval()
    with torch.no_grad():
        out = inference.wrap(model)(normalised_picture(shown, (48, 64))[None])["out"]
        expected = F.interpolate(out, size=(32, 48), mode="bilinear")[0].argmax(0)
    assert np.array_equal(np.array(Image.open(only)), expected.numpy())


def test_detections_are_cocos_results(checkpoint_of, tmp_path):
    weights, root = checkpoint_of("coco")
    source = root / "val2017"
    written = predict_checkpoint(weights, images=source, out=tmp_path, frozen=False)
    names = sorted(path.stem for path in source.iterdir())
    assert [path.name for path in written] == [
        *(f"{name}_overlay.png" for name in names),
        "predictions.json",
        "images.json",
    ]
    found = json.loads((tmp_path / "predictions.json").read_text())
    listed = json.loads((tmp_path / "images.json").read_text())
    assert [image["id"] for image in listed] == [int(name) for name in names]
    assert (listed[0]["height"], listed[0]["width"]) == (64, 80)
    model = load_checkpoint(weights)[0].eval()
    pixels = read_image(source / listed[0]["file_name"])
    with torch.no_grad():
        (expected,) = model([torch.from_numpy(pixels).permute(2, 0, 1).float() / 255])
    own = [row for row in found if row["image_id"] == listed[0]["id"]]
    assert len(own) == len(expected["boxes"])
    for row, box, label in zip(own, expected["boxes"], expected["labels"], strict=True):
        x0, y0, x1, y1 = box.tolist()
        assert row["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=1e-3)
        assert row["category_id"] == int(label) and 0 <= row["score"] <= 1


def test_boxes_that_are_likely_are_drawn():
    from sparsight.train.predict_checkpoint import _with_boxes

    pixels = np.zeros((40, 40, 3), dtype=np.uint8)
    detections = {
        "boxes": torch.tensor([[5.0, 6, 30, 35], [0, 0, 3, 3]]),
        "labels": torch.tensor([2, 1]),
        "scores": torch.tensor([0.9, 0.4]),
    }
    drawn = _with_boxes(pixels, detections)
    assert tuple(drawn[20, 5]) == colour_of(2) and tuple(drawn[35, 20]) == colour_of(2)
    assert not drawn[:4, :4].any() and not pixels.any()


def test_categories_are_numbered_as_cocos_where_they_are_cocos():
    row = categories_of(81)
    assert len(row) == 80 and (row[1], row[11], row[12], row[80]) == (1, 11, 13, 90)
    assert categories_of(91) == {number: number for number in row.values()}
    assert categories_of(3) == {1: 1, 2: 2}


def test_pictures_that_are_not_numbered_are_counted(checkpoint_of, tmp_path):
    weights, root = checkpoint_of("coco")
    first = min((root / "val2017").iterdir())
    for name in ("street", "17"):
        shutil.copy(first, tmp_path / f"{name}{first.suffix}")
    predict_checkpoint(weights, images=tmp_path, out=tmp_path, frozen=False, overlays=False)
    listed = json.loads((tmp_path / "images.json").read_text())
    assert [(image["id"], image["file_name"][:2]) for image in listed] == [(1, "17"), (2, "st")]


def test_what_cannot_be_predicted_is_refused(checkpoint_of, pictures, tmp_path):
    weights, _ = checkpoint_of("camvid")
    with pytest.raises(FileNotFoundError, match=r"predict_checkpoint: 'gone.png' does not exist"):
        predict_checkpoint(weights, images="gone.png", out=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty' holds no picture; PNG or JPEG"):
        find_pictures([tmp_path / "empty"])
    with pytest.raises(ValueError, match=r"images is empty"):
        find_pictures([])
    shutil.copy(pictures / "a.jpg", tmp_path / "empty" / "a.jpg")
    with pytest.raises(ValueError, match=r"a\.jpg' and .*a\.jpg' have the same name"):
        find_pictures([pictures, tmp_path / "empty"])
    with pytest.raises(ValueError, match=r"predict_checkpoint: .*notes.txt' cannot be read"):
        predict_checkpoint(weights, images=pictures / "notes.txt", out=tmp_path)
    classifier, _ = checkpoint_of("cifar10")
    with pytest.raises(ValueError, match=r"is a resnet_cifar, which classifies whole images"):
        predict_checkpoint(classifier, images=pictures, out=tmp_path)
    detector, _ = checkpoint_of("coco")
    with pytest.raises(ValueError, match=r"predict_checkpoint: .* for detection; scales"):
        predict_checkpoint(
            detector, images=pictures, out=tmp_path, inference=DenseInference(flip=True)
        )


def test_mask_proposals_are_cocos_results_with_run_lengths(checkpoint_of, pictures, tmp_path):
    weights, _ = checkpoint_of("voc")
    written = predict_checkpoint(weights, images=pictures, out=tmp_path, frozen=False)
    assert [path.name for path in written] == [
        "a_overlay.png",
        "b_overlay.png",
        "predictions.json",
        "images.json",
    ]
    found = json.loads((tmp_path / "predictions.json").read_text())
    model = load_checkpoint(weights)[0].eval()
    pixels = read_image(pictures / "b.png")
    with torch.no_grad():
        (expected,) = model([torch.from_numpy(pixels).permute(2, 0, 1).float() / 255])
    own = [row for row in found if row["image_id"] == 2]
    assert len(own) == len(expected["scores"]) > 0
    masks = decode_masks([row["segmentation"] for row in own], size=(40, 50))
    assert torch.equal(masks, expected["masks"][:, 0])
    overlay = np.array(Image.open(tmp_path / "b_overlay.png"))
    best = expected["masks"][0, 0].numpy()
    assert (overlay[best] != pixels[best]).any(1).mean() > 0.9
