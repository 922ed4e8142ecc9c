import torch
from torchvision import tv_tensors

from sparsight.train.data.augment import SeededView
from sparsight.train.data.boxes import collate_detection, detection_transform


class OneImage(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        pixels = torch.zeros(3, 8, 20, dtype=torch.uint8)
        pixels[:, 2:6, 1:4] = 255
        boxes = tv_tensors.BoundingBoxes(
            torch.tensor([[1.0, 2.0, 4.0, 6.0]]), format="XYXY", canvas_size=(8, 20)
        )
        return tv_tensors.Image(pixels), {
            "boxes": boxes,
            "labels": torch.tensor([3]),
            "image_id": 5,
        }


def test_boxes_stay_on_their_objects_when_an_image_is_flipped():
    view = SeededView(OneImage(), detection_transform(is_training=True))
    flipped = set()
    for epoch in range(12):
        image, target = view[epoch, 0]
        assert type(image) is type(target["boxes"]) is torch.Tensor
        assert image.dtype == torch.float32
        x0, y0, x1, y1 = target["boxes"][0].int().tolist()
        assert image[:, y0:y1, x0:x1].min() == 1.0
        assert image.sum() == 3 * 4 * 3
        assert target["labels"].tolist() == [3]
        assert target["image_id"] == 5
        flipped.add(x0 > 10)
    assert flipped == {True, False}


def test_evaluation_changes_nothing_but_the_range():
    transform = detection_transform(is_training=False)
    for _ in range(8):
        image, target = transform(*OneImage()[0])
        assert target["boxes"].tolist() == [[1.0, 2.0, 4.0, 6.0]]
        assert image.shape == (3, 8, 20)
        assert image.max() == 1.0


def test_images_of_any_size_make_a_batch():
    items = [(torch.zeros(3, h, 4), {"image_id": h}) for h in (2, 5)]
    images, targets = collate_detection(items)
    assert [image.shape[1] for image in images] == [2, 5]
    assert [target["image_id"] for target in targets] == [2, 5]
