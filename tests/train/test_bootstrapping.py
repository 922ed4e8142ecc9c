import pytest
import torch
import torch.nn.functional as F

from sparsight.train.bootstrapping import bootstrapped_cross_entropy

VOID = 7


def drawn(batch: int = 3):
    torch.manual_seed(0)
    logits = torch.randn(batch, 4, 16, 12, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 4, (batch, 16, 12))
    labels[torch.rand(batch, 16, 12) < 0.3] = VOID
    return logits, labels


def by_hand(logits, labels, k):
    """Sort what counts of each image, take the worst, average: as the authors describe it."""
    means = []
    for scores, truth in zip(logits, labels, strict=True):
        at = truth != VOID
        losses = -scores.log_softmax(0)[:, at].gather(0, truth[at][None])[0]
        worst = losses.sort(descending=True).values[:k]
        means.append(worst.mean() if len(worst) else worst.sum())
    return torch.stack(means).mean()


@pytest.mark.parametrize(
    ("options", "k"),
    [({}, 12), ({"share": 0.5}, 96), ({"num_pixels": 5}, 5), ({"num_pixels": 10_000}, 10_000)],
)
def test_it_is_the_mean_of_the_worst_pixels_of_each_image(options, k):
    logits, labels = drawn()
    found = bootstrapped_cross_entropy(logits, labels, ignore_index=VOID, **options)
    expected = by_hand(logits, labels, k)
    torch.testing.assert_close(found, expected)
    a, b = (torch.autograd.grad(loss, logits)[0] for loss in (found, expected))
    torch.testing.assert_close(a, b)


def test_the_published_numbers_of_pixels_are_a_sixteenth():
    assert 256 * 512 / 16 == 8_192 and 512 * 1024 / 16 == 512 * 64


def test_everything_of_one_image_is_the_cross_entropy():
    logits, labels = drawn(1)
    found = bootstrapped_cross_entropy(logits, labels, ignore_index=VOID, share=1.0)
    torch.testing.assert_close(found, F.cross_entropy(logits, labels, ignore_index=VOID))


def test_an_image_without_anything_that_counts_gives_nothing():
    logits, labels = drawn(1)
    labels[:] = VOID
    loss = bootstrapped_cross_entropy(logits, labels, ignore_index=VOID)
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, logits)[0].any()


def test_narrow_logits_are_summed_in_float32():
    logits, labels = drawn()
    loss = bootstrapped_cross_entropy(logits.bfloat16(), labels, ignore_index=VOID)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.0}, r"share=0.0; a share of the pixels in \(0, 1\]"),
        ({"num_pixels": 0}, "num_pixels=0; at least 1"),
        ({"labels": torch.zeros(3, 8, 6, dtype=torch.long)}, "resize the logits to the class maps"),
    ],
)
def test_bad_arguments_are_named(options, message):
    logits, labels = drawn()
    with pytest.raises(ValueError, match=message):
        bootstrapped_cross_entropy(
            logits, options.pop("labels", labels), ignore_index=VOID, **options
        )
