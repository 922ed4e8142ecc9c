import math

import pytest
import torch
from torchvision import tv_tensors

from sparsight.train.data import SyntheticScenes
from sparsight.train.data.augment import MEAN, STD
from sparsight.train.data.augment_frrn import frrn_transform, gamma_of, translate

VOID = 255


def test_translation_uncovers_a_reflection_of_the_image_and_void_of_the_labels():
    row = torch.tensor([[0, 1, 2, 3]])
    assert translate(row, 0, 2, void=None).tolist() == [[2, 1, 0, 1]]
    assert translate(row, 0, -1, void=None).tolist() == [[1, 2, 3, 2]]
    assert translate(row, 0, 2, void=VOID).tolist() == [[VOID, VOID, 0, 1]]
    assert translate(row.T, -3, 0, void=VOID).T.tolist() == [[3, VOID, VOID, VOID]]
    assert translate(row, 5, 0, void=None).tolist() == row.tolist()  # a single row reflects itself
    picture = torch.randn(3, 4, 6)
    assert torch.equal(translate(picture, 1, 2, void=None)[:, 1:, 2:], picture[:, :-1, :-2])
    assert translate(picture, 30, -30, void=None).shape == picture.shape


def test_gamma_is_one_for_nothing_and_inverse_for_the_opposite():
    assert gamma_of(0.0) == 1.0
    assert gamma_of(0.05) * gamma_of(-0.05) == pytest.approx(1.0)
    z = 0.05
    expected = math.log(0.5 + z * 2**-0.5) / math.log(0.5 - z * 2**-0.5)
    assert gamma_of(z) == expected < 1


def test_image_and_labels_move_together_and_come_out_normalised():
    labels = tv_tensors.Mask(torch.arange(24 * 32).reshape(24, 32) % 11)
    # The class is the brightness.
    image = tv_tensors.Image((labels.as_subclass(torch.Tensor) * 20).byte().expand(3, -1, -1))
    transform = frrn_transform((24, 32), ignore_index=VOID, max_offset=5, max_gamma=0.0)
    offsets = set()
    for seed in range(6):
        torch.manual_seed(seed)
        shown, truth = transform(image, labels)
        assert shown.shape == (3, 24, 32) and truth.shape == (24, 32)
        pixels = (shown[0] * STD[0] + MEAN[0]) * 255
        counted = truth != VOID
        assert torch.equal((pixels / 20).round().long()[counted], truth[counted])
        offsets.add(int((~counted).sum()))
    assert len(offsets) > 2


def test_without_draws_it_is_resizing():
    image, labels = SyntheticScenes(1, size=(48, 64))[0]
    transform = frrn_transform((24, 32), ignore_index=VOID, max_offset=0, max_gamma=0.0)
    shown, truth = transform(image, labels)
    assert shown.shape == (3, 24, 32) and shown.dtype == torch.float32
    assert truth.shape == (24, 32) and set(truth.unique().tolist()) <= set(labels.unique().tolist())
    torch.manual_seed(0)
    brighter = frrn_transform((24, 32), ignore_index=VOID, max_offset=0, max_gamma=0.4)
    assert (brighter(image, labels)[0] - shown).abs().max() > 0.01


def test_a_crop_is_cut_from_both():
    image, labels = SyntheticScenes(1, size=(48, 64))[0]
    shown, truth = frrn_transform((48, 64), ignore_index=VOID, crop=(16, 24))(image, labels)
    assert shown.shape == (3, 16, 24) and truth.shape == (16, 24)


@pytest.mark.parametrize("options", [{"max_offset": -1}, {"max_gamma": 0.6}])
def test_bad_arguments_are_named(options):
    with pytest.raises(ValueError, match=r"frrn_transform: max_offset=.* are required"):
        frrn_transform((24, 32), ignore_index=VOID, **options)
