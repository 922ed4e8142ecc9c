"""What every reader of a data set has in common."""

import pytest

from sparsight.train.data import CIFAR10, CamVid, Cityscapes, Coco, ImageFolders, Voc

READERS = {
    # reader, a split, what of the layout a message must show, and where to obtain it
    CamVid: ("val", "train/, trainannot/, val/ and valannot/", "https://github.com/"),
    Cityscapes: ("val", "leftImg8bit/ and gtFine/", "https://www.cityscapes-dataset.com"),
    CIFAR10: ("test", "cifar-10-batches-bin/", "https://www.cs.toronto.edu/~kriz/cifar.html"),
    ImageFolders: (
        "val",
        "train/<class>/*.JPEG and val/<class>/*.JPEG",
        "https://www.image-net.org/download",
    ),
    Coco: (
        "val2017",
        "annotations/instances_<split>.json and the images in <split>/",
        "https://cocodataset.org/#download",
    ),
    Voc: (
        "val",
        "SegmentationObject/, SegmentationClass/ and ImageSets/Segmentation/<split>.txt, or SBD's",
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
    ),
}


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
@pytest.mark.parametrize("folder", ["not there", "empty"])
def test_missing_data_say_the_folder_the_layout_and_the_source(reader, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    split, layout, source = READERS[reader]
    with pytest.raises(FileNotFoundError) as raised:
        reader(tmp_path / folder, split)
    message = str(raised.value)
    assert message.startswith(f"{reader.__name__}: root=")
    for part in (str(tmp_path / folder), "expected", layout, source):
        assert part in message


def test_names_are_those_of_the_command_line():
    names = [reader.name for reader in READERS]
    assert names == ["camvid", "cityscapes", "cifar10", "imagenet", "coco", "voc"]
