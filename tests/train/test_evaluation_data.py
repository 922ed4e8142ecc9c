"""Which data set a checkpoint is scored on, and its images as models take them."""

import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Subset

from sparsight.train.architecture import (
    Architecture,
    DetectorArchitecture,
    ProposalArchitecture,
    build_dense,
)
from sparsight.train.checkpoint import load_checkpoint, save_checkpoint
from sparsight.train.evaluation_data import dataset_of, open_evaluation_data

SEGMENTATION = Architecture(num_classes=11)
USUAL = {
    "camvid": SEGMENTATION,
    "cityscapes": replace(SEGMENTATION, num_classes=19),
    "cifar10": replace(SEGMENTATION, model="resnet_cifar", num_classes=100),
    "imagenet": replace(SEGMENTATION, model="resnet"),
    "coco": DetectorArchitecture(num_classes=7),
}
CLIPS = replace(SEGMENTATION, model="small_c3d", num_classes=8, size=(16, 16))


def save(folder, architecture, dataset=None):
    """A checkpoint whose weights nobody reads."""
    path = folder / "weights.safetensors"
    save_checkpoint(path, nn.Conv2d(1, 1, 1), architecture, dataset=dataset)
    return path


@pytest.mark.parametrize("name", USUAL)
def test_without_a_word_the_data_set_follows_from_the_architecture(name, tmp_path):
    assert dataset_of(save(tmp_path, USUAL[name])) == name


def test_what_is_asked_for_counts_before_what_the_checkpoint_says(tmp_path):
    assert dataset_of(save(tmp_path, SEGMENTATION, "cityscapes")) == "cityscapes"
    assert dataset_of(save(tmp_path, SEGMENTATION, "cityscapes"), "camvid") == "camvid"
    assert dataset_of(save(tmp_path, replace(SEGMENTATION, num_classes=3)), "camvid") == "camvid"


@pytest.mark.parametrize(
    ("num_classes", "told", "asked", "message"),
    [
        (
            3,
            None,
            None,
            r"3 classes and does not say what .* on; no data set was asked for; one of",
        ),
        (
            3,
            "mine",
            None,
            r"for segmentation with 3 classes and was trained on 'mine'; no data set",
        ),
        (
            11,
            None,
            "coco",
            r"'coco' was asked for; one of camvid, cityscapes is required; .*--data",
        ),
    ],
)
def test_an_error_says_what_was_found_and_needed(tmp_path, num_classes, told, asked, message):
    path = save(tmp_path, replace(SEGMENTATION, num_classes=num_classes), told)
    with pytest.raises(ValueError, match=message):
        dataset_of(path, asked)


def test_clips_are_of_the_moving_shapes_and_need_no_folder(tmp_path):
    assert dataset_of(save(tmp_path, CLIPS)) == "moving_shapes"
    with pytest.raises(ValueError, match=r"for video .* 'camvid' was asked for; one of moving_sh"):
        dataset_of(save(tmp_path, CLIPS), "camvid")
    data = open_evaluation_data("moving_shapes", None, split="val", num_classes=8, size=CLIPS.size)
    assert (len(data), data.task, data.title(3)) == (1024, "video", "clip3")
    assert data.classes[0] == "E"
    assert data.example().shape == (1, 1, 8, 16, 16)
    model = build_dense(replace(CLIPS, pooling="soft")).eval()
    data = replace(data, view=Subset(data.view, range(4)))
    score = data.score(model, batch_size=3)
    assert score.num_images == 4 and score.share == 1 and "top1" in score.figures
    with pytest.raises(ValueError, match=r"moving_shapes has 8 classes, the checkpoint 3; equal"):
        open_evaluation_data("moving_shapes", None, split="val", num_classes=3, size=(16, 16))


def test_what_is_read_needs_a_folder():
    with pytest.raises(ValueError, match=r"no folder was given for camvid; .*--data DIR"):
        open_evaluation_data("camvid", None, split="val", num_classes=11, size=(32, 48))


@pytest.mark.parametrize("name", USUAL)
def test_images_come_as_the_model_takes_them(name, checkpoint_of):
    weights, root = checkpoint_of(name)
    model, architecture = load_checkpoint(weights)
    data = open_evaluation_data(
        name,
        root,
        split="val",
        num_classes=architecture.num_classes,
        size=architecture.size,
    )
    assert len(data) == 4 and data.task == architecture.task
    assert len(data.classes) == architecture.num_classes
    assert len({data.title(i) for i in range(4)}) == 4
    with torch.no_grad():
        model.eval()(data.example(3))
    images, _ = next(iter(data.batches(3)))
    assert len(images) == 3
    score = data.score(model, batch_size=3)
    assert score.num_images == 4 and 0.4 < score.share < 0.9
    assert next(iter(score.figures)) == {"coco": "ap", "cifar10": "top1", "imagenet": "top1"}.get(
        name, "miou"
    )
    with pytest.raises(ValueError, match=f"{name}: image 4 of 4; 0 to 3 is required"):
        data.example(4)


def open_with(name, checkpoint_of, **changes):
    options = {"split": "val", "num_classes": 10, "size": (32, 32)} | changes
    return open_evaluation_data(name, checkpoint_of(name)[1], **options)


def test_another_number_of_classes_is_refused(checkpoint_of):
    with pytest.raises(
        ValueError, match=r"imagenet in '.*' has 2 classes, the checkpoint 10; equal"
    ):
        open_with("imagenet", checkpoint_of)
    with pytest.raises(ValueError, match=r"Coco: num_classes=10, but the annotations have 2"):
        open_with("coco", checkpoint_of)


def test_annotations_of_several_sizes_are_scored_one_by_one(checkpoint_of, tmp_path):
    _, root = checkpoint_of("camvid")
    shutil.copytree(root, tmp_path / "data")
    for folder, mode in (("val", "RGB"), ("valannot", "L")):
        Image.new(mode, (60, 20)).save(tmp_path / "data" / folder / "scene1.png")
    images = open_evaluation_data(
        "camvid", tmp_path / "data", split="val", num_classes=11, size=(32, 48)
    )
    with pytest.raises(
        ValueError, match=r"20x60 and 32x48 pixels in one batch of 4.*--batch-size 1"
    ):
        next(iter(images.batches(8)))
    sizes = [tuple(labels.shape) for _, labels in images.batches(1)]
    assert sizes == [(1, 32, 48), (1, 20, 60), (1, 32, 48), (1, 32, 48)]


def test_cifar10_comes_in_one_size(checkpoint_of):
    with pytest.raises(ValueError, match=r"size=64x64 for CIFAR-10; 32x32 is required"):
        open_with("cifar10", checkpoint_of, size=(64, 64))


def test_an_unknown_name_and_a_missing_split_are_refused(checkpoint_of):
    with pytest.raises(ValueError, match=r"dataset='mnist'; one of camvid, cityscapes"):
        open_evaluation_data("mnist", ".", split="val", num_classes=10, size=(32, 32))
    with pytest.raises(FileNotFoundError, match=r"has no folder 'train'"):
        open_with("camvid", checkpoint_of, split="train", num_classes=11)


def test_proposals_are_of_coco_unless_the_checkpoint_says_voc(tmp_path):
    proposals = ProposalArchitecture(backbone="resnet18")
    assert dataset_of(save(tmp_path, proposals)) == "coco"
    assert dataset_of(save(tmp_path, proposals, "voc")) == "voc"
    with pytest.raises(ValueError, match=r"for proposals .* 'camvid' .*; one of coco, voc is"):
        dataset_of(save(tmp_path, proposals), "camvid")


@pytest.mark.parametrize("name", ["coco", "voc"])
def test_images_with_masks_come_as_the_model_takes_them(name, checkpoint_of):
    model, architecture = load_checkpoint(checkpoint_of("voc")[0])
    data = open_evaluation_data(
        name,
        checkpoint_of(name)[1],
        split="val",
        num_classes=architecture.num_classes,
        size=architecture.size,
        task=architecture.task,
    )
    assert (len(data), data.task) == (4, "proposals") and len(
        {data.title(i) for i in range(4)}
    ) == 4
    images, targets = next(iter(data.batches(3)))
    assert len(images) == 3 and targets[0]["masks"].shape[1:] == images[0].shape[1:]
    model.max_proposals = 5
    score = data.score(model.eval(), batch_size=3)
    assert score.num_images == 4 and next(iter(score.figures)) == "ar100"
    with torch.no_grad():
        assert "masks" in model(data.example(3))[0]
