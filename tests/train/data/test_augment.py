import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from sparsight.train.data.augment import (
    EpochSampler,
    SeededView,
    evaluation_transform,
    items_of_process,
    mix_seed,
    normalise,
    normalised_picture,
    training_transform,
)

IGNORE = 11


class Coded(Dataset):
    """Images whose red channel is the class map, so that geometry can be compared."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        blocks = torch.randint(0, 11, (1, 1, 5, 7), generator=generator)
        labels = torch.nn.functional.interpolate(blocks.float(), size=(60, 84), mode="nearest")[
            0, 0
        ]
        image = torch.stack([labels * 20, torch.zeros(60, 84), torch.zeros(60, 84)]).byte()
        return tv_tensors.Image(image), tv_tensors.Mask(labels.long())


def views(seed=0):
    return SeededView(Coded(), training_transform((40, 56), ignore_index=IGNORE), seed=seed)


def test_an_item_is_a_function_of_seed_epoch_and_index():
    one, two = views(), views()
    torch.manual_seed(1)
    first = one[(3, 2)]
    torch.manual_seed(2)
    _ = two[(0, 1)]
    again = two[(3, 2)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], one[(4, 2)][0])
    assert not torch.equal(first[0], views(seed=1)[(3, 2)][0])


def test_reading_an_item_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    _ = views()[(0, 0)]
    assert torch.equal(torch.rand(3), expected)


def test_image_and_class_map_move_together():
    """Decode the red channel back to a class: it must agree with the class map but for edges."""
    for epoch in range(8):
        image, labels = views()[(epoch, 1)]
        assert image.shape == (3, 40, 56)
        assert labels.shape == (40, 56)
        assert labels.dtype == torch.int64
        red = (image[0] * 0.229 + 0.485) * 255 / 20
        counted = labels != IGNORE
        agree = ((red - labels).abs() < 0.5)[counted].float().mean()
        assert agree > 0.75
        assert counted.float().mean() > 0.25


def test_padding_does_not_count():
    transform = training_transform((90, 90), ignore_index=IGNORE, scale=(0.3, 0.3))
    image, labels = SeededView(Coded(), transform)[(0, 0)]
    padded = labels == IGNORE
    assert padded.float().mean() > 0.5
    assert image[:, padded].abs().max() < 0.02  # the mean colour


def test_evaluation_keeps_the_annotation_as_it_was_drawn():
    view = SeededView(Coded(), evaluation_transform((20, 28)))
    image, labels = view[0]
    assert image.shape == (3, 20, 28)
    assert torch.equal(labels, Coded()[0][1].as_subclass(torch.Tensor))
    assert type(image) is type(labels) is torch.Tensor


def test_normalising_takes_the_mean_colour_to_zero():
    pixels = torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None, None].expand(3, 8, 8)
    assert normalised_picture(pixels, (4, 4)).abs().max() < 0.02


def test_each_epoch_has_its_own_order_whatever_came_before():
    sampler = EpochSampler(20, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert {key[0] for key in keys} == {epoch}
        orders.append([key[1] for key in keys])
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[1]) == list(range(20)) == sorted(orders[0])
    assert len(sampler) == 20


@pytest.mark.parametrize(("num_processes", "batch_size"), [(2, 3), (3, 2), (2, 1), (1, 4)])
def test_processes_see_together_what_one_with_a_larger_batch_sees(num_processes, batch_size):
    step = num_processes * batch_size
    whole = EpochSampler(20, seed=3)
    whole.set_epoch(5)
    parts = []
    for rank in range(num_processes):
        sampler = EpochSampler(
            20, seed=3, batch_size=batch_size, rank=rank, num_processes=num_processes
        )
        sampler.set_epoch(5)
        parts.append(list(sampler))
        assert len(sampler) == len(parts[-1]) == 20 // step * batch_size
    steps = [
        [key for part in parts for key in part[start : start + batch_size]]
        for start in range(0, len(parts[0]), batch_size)
    ]
    expected = list(whole)
    assert steps == [expected[start : start + step] for start in range(0, 20 - step + 1, step)]


@pytest.mark.parametrize("length", [1, 4, 5, 6, 7, 8, 9])
def test_every_item_falls_to_one_process(length):
    shares = [items_of_process(range(length), 2, rank, 2) for rank in (0, 1)]
    assert sorted(shares[0] + shares[1]) == list(range(length))
    assert 0 <= len(shares[0]) - len(shares[1]) <= 2


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(num_workers):
    def batches(workers):
        sampler = EpochSampler(6, seed=1)
        sampler.set_epoch(2)
        loader = DataLoader(views(), batch_size=3, sampler=sampler, num_workers=workers)
        return torch.cat([images for images, _ in loader])

    assert torch.equal(batches(0), batches(num_workers))


def test_neighbouring_seeds_are_unrelated():
    seeds = {mix_seed(a, b, c) for a in range(10) for b in range(10) for c in range(-1, 10)}
    assert len(seeds) == 1100
    bits = [bin(mix_seed(0, 0, i) ^ mix_seed(0, 0, i + 1)).count("1") for i in range(100)]
    assert 25 < sum(bits) / len(bits) < 38
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_target_of_boxes_and_a_class_come_out_plain():
    boxes = tv_tensors.BoundingBoxes(
        torch.tensor([[0.0, 0.0, 2.0, 2.0]]), format="XYXY", canvas_size=(4, 4)
    )
    items = [(tv_tensors.Image(torch.zeros(3, 4, 4)), target) for target in ({"boxes": boxes}, 7)]
    view = SeededView(items, lambda image, target: (image, target))  # type: ignore[arg-type]
    image, target = view[0]
    assert type(image) is torch.Tensor
    assert type(target["boxes"]) is torch.Tensor
    assert view[1][1] == 7


def positions(height, width):
    """An image whose red and green are row and column, and classes that number its pixels."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([y, x, torch.zeros_like(y)]).byte()
    return tv_tensors.Image(image), tv_tensors.Mask(y * width + x)


@pytest.mark.parametrize(
    ("scene", "factor"), [((64, 96), 1.0), ((32, 48), 2.0), ((96, 144), 2 / 3)]
)
def test_a_crop_is_one_window_of_the_scaled_scene(scene, factor):
    """Image and class map are scaled once, then cut at one place, and flipped together or not."""
    image, labels = positions(*scene)
    size = [round(factor * length) for length in scene]
    assert size == [64, 96]
    whole = v2.Compose(normalise())(v2.functional.resize(image, size))
    classes = v2.functional.resize(labels, size)
    transform = training_transform((64, 96), ignore_index=-1, crop=(32, 40), scale=(1.0, 1.0))
    places, flips = set(), set()
    for seed in range(16):
        torch.manual_seed(seed)
        cut_image, cut_labels = transform(image, labels)
        assert cut_image.shape == (3, 32, 40) and cut_labels.shape == (32, 40)
        is_flipped = bool(cut_labels[0, 0] > cut_labels[0, -1])
        if is_flipped:
            cut_image, cut_labels = cut_image.flip(-1), cut_labels.flip(-1)
        windows = classes.unfold(0, 32, 1).unfold(1, 40, 1)
        equal = (windows == cut_labels).flatten(2).all(-1)
        of_image = whole.unfold(1, 32, 1).unfold(2, 40, 1).permute(1, 2, 0, 3, 4)
        equal &= (of_image == cut_image).flatten(2).all(-1)
        assert equal.sum() == 1
        places.add(tuple(equal.nonzero()[0].tolist()))
        flips.add(is_flipped)
    assert len(places) > 8
    assert flips == {False, True}


@pytest.mark.parametrize("scale", [0.5, 0.9, 1.0])
@pytest.mark.parametrize(
    ("scene", "fitted"), [((60, 84), (40, 56)), ((84, 60), (40, 28.6)), ((20, 84), (13.3, 56))]
)
def test_scale_one_fits_the_image_into_the_size(scene, fitted, scale):
    """What is not padding is the whole image, at its aspect ratio."""
    transform = training_transform((40, 56), ignore_index=-1, scale=(scale, scale))
    _, labels = transform(*positions(*scene))
    counted = labels >= 0
    seen = counted.any(1).sum().item(), counted.any(0).sum().item()
    assert seen == tuple(round(scale * length) for length in fitted)


def test_scales_fill_their_range():
    transform = training_transform((40, 56), ignore_index=-1, scale=(0.25, 0.75))
    torch.manual_seed(0)
    heights = [(transform(*positions(40, 56))[1] >= 0).any(1).sum().item() for _ in range(60)]
    assert min(heights) in (10, 11, 12)
    assert max(heights) in (28, 29, 30)
