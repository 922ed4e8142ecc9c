"""Clips of moving shapes: the class can be seen in the motion, and in nothing else."""

import math

import pytest
import torch

from sparsight.train.data import MovingShapes, SeededView, clip_transform
from sparsight.train.data.moving_shapes import DIRECTIONS, draw_clip

SIZE = (32, 32)


def clips_of(seed):
    """The same clip in all eight directions: (8, T, H, W)."""
    return torch.cat([draw_clip(k, size=SIZE, num_frames=8, seed=seed) for k in range(8)])


def test_an_item_is_a_function_of_split_and_index():
    some, more = MovingShapes("train", length=9), MovingShapes("train", length=12)
    for i in range(9):
        clip, label = some[i]
        assert clip.dtype == torch.uint8 and clip.shape == (1, 8, 32, 32)
        assert label == i % 8
        assert torch.equal(clip, more[i][0])
    other = MovingShapes("val", length=1)
    assert not torch.equal(some[0][0], other[0][0])
    assert not torch.equal(some[0][0], some[8][0])  # of the same class


def test_size_and_frames_are_as_asked():
    assert MovingShapes("val", length=1, size=(16, 24), num_frames=5)[0][0].shape == (1, 5, 16, 24)


def test_the_first_frame_does_not_depend_on_the_class():
    for seed in range(5):
        clips = clips_of(seed)
        assert (clips[:, 0] == clips[:1, 0]).all()
        assert not any(torch.equal(clips[0, -1], clip[-1]) for clip in clips[1:])


def test_a_single_later_frame_says_nothing_either():
    """A shape starts anywhere on a torus: over many clips, frames of all classes are alike."""
    clips = torch.stack([clips_of(seed)[:, -1].float() for seed in range(64)])  # (64, 8, H, W)
    means, noise = clips.mean(0), clips.std() / math.sqrt(64)
    assert (means - means.mean(0)).abs().max() < 6 * noise
    assert (clips.std((0, 2, 3)) / clips.std() - 1).abs().max() < 0.05


def moved(frame, rows, columns):
    """A frame on a torus, moved by a fraction of a pixel (in the frequency domain)."""
    height, width = frame.shape[-2:]
    phase = torch.fft.fftfreq(height)[:, None] * rows + torch.fft.rfftfreq(width) * columns
    return torch.fft.irfft2(torch.fft.rfft2(frame) * torch.exp(-2j * math.pi * phase), s=SIZE)


def seen_direction(clip):
    """The direction in which most pixels find again what was there two frames before."""
    clip = clip.float()
    found = []
    for k in range(len(DIRECTIONS)):
        angle = math.pi * k / 4
        shares = []
        for speed in (0.8, 1.1, 1.4):
            step = (2 * speed * math.sin(angle), 2 * speed * math.cos(angle))
            error = (clip[2:] - moved(clip[:-2], *step)).square()
            still = (clip[2:] - clip[:-2]).square()
            # Smoothed over neighbours, so that noise does not decide.
            gain = torch.nn.functional.avg_pool2d((still - error)[None], 5)[0]
            shares.append(gain.clamp(min=0).sum())
        found.append(max(shares))
    return int(torch.tensor(found).argmax())


def test_the_motion_shows_the_class():
    """Far above chance, 1 in 8, by looking for displacements, beside a background that moves."""
    data = MovingShapes("val", length=80)
    hits = sum(seen_direction(clip[0]) == label for clip, label in data)
    assert hits > 40
    # And not where time is taken away.
    frozen = sum(seen_direction(clip[0, :1].expand(8, -1, -1)) == label for clip, label in data)
    assert frozen <= 24


def test_models_take_them_normalised():
    view = SeededView(MovingShapes("train", length=64), clip_transform())
    clips = torch.stack([view[i][0] for i in range(64)])
    assert clips.dtype == torch.float32 and clips.shape == (64, 1, 8, 32, 32)
    assert abs(float(clips.mean())) < 0.05
    assert 0.8 < float(clips.std()) < 1.2
    assert view[3][1] == 3


@pytest.mark.parametrize(("label", "size"), [(8, (32, 32)), (-1, (32, 32)), (0, (15, 32))])
def test_what_cannot_be_drawn_is_refused(label, size):
    with pytest.raises(ValueError, match=r"draw_clip: label=.*at least 16x16 pixels are required"):
        draw_clip(label, size=size, num_frames=2, seed=0)
