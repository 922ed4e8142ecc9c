"""Pictures of where a sampled model computes: images, predictions, masks, shares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor, nn

from sparsight.nn import RecordedDecision, record_sampling
from sparsight.train.data.augment import MEAN, STD

_SHARE_COLOURS = "viridis"  # dark is interpolated, bright is computed, as in the masks
_FEWEST_PIXELS = 128  # a smaller side is enlarged pixel by pixel


@dataclass(frozen=True)
class Box:
    """A box to draw over a picture.

    Attributes:
        corners: x0, y0, x1, y1 in pixels of the picture.
        text: written at its upper left corner.
        number: decides the colour.
    """

    corners: tuple[float, float, float, float]
    text: str
    number: int


@dataclass(frozen=True)
class Panel:
    """One picture of a figure.

    Attributes:
        title: above it.
        pixels: uint8 (H, W, 3); or float (H, W) in [0, 1], the computed share of each pixel, drawn
            in the colours that the figure's legend explains.
        boxes: over it.
    """

    title: str
    pixels: np.ndarray
    boxes: Sequence[Box] = ()

    @property
    def is_share(self) -> bool:
        """Whether it shows a computed share."""
        return self.pixels.ndim == 2


@dataclass(frozen=True)
class Frame:
    """Where the input of the sampled layers lies in the picture that is shown.

    Attributes:
        size: (height, width) of the picture in pixels.
        resized: (height, width) of the same image as the layers are given it.
        padded: (height, width) of their whole input; what is right and below of `resized` is
            padding.
    """

    size: tuple[int, int]
    resized: tuple[int, int]
    padded: tuple[int, int]

    @classmethod
    def plain(cls, size: tuple[int, int]) -> Frame:
        """The frame of a picture that is the input."""
        return cls(size, size, size)

    def fit(self, mask: Tensor) -> np.ndarray:
        """Return a mask as a picture: each of its positions covers the pixels nearest to it.

        Args:
            mask: bool (1, 1, h, w), any size.

        Returns:
            bool `size`.
        """
        whole = F.interpolate(mask.float(), size=self.padded, mode="nearest")
        shown = whole[..., : self.resized[0], : self.resized[1]]
        return F.interpolate(shown, size=self.size, mode="nearest")[0, 0].bool().cpu().numpy()


def to_pixels(normalised: Tensor) -> np.ndarray:
    """Return a normalised image (3, H, W) as uint8 (H, W, 3)."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    pixels = (normalised.cpu() * std + mean).clamp(0, 1) * 255
    return pixels.round().byte().permute(1, 2, 0).numpy()


def colour_of(number: int) -> tuple[int, int, int]:
    """Return the colour of a class as red, green, blue of 0 to 255; they repeat after twenty."""
    palette: Any = matplotlib.colormaps["tab20"]
    red, green, blue = (int(255 * value) for value in palette.colors[number % 20])
    return red, green, blue


def colour_classes(class_map: Tensor, *, num_classes: int, ignore_index: int) -> np.ndarray:
    """Return a class map (H, W) as uint8 (H, W, 3), one colour a class, ignored pixels black."""
    palette = np.array([colour_of(k) for k in range(num_classes)], dtype=np.uint8)
    labels = class_map.cpu().numpy()
    picture = palette[np.clip(labels, 0, num_classes - 1)]
    picture[labels == ignore_index] = 0
    return picture


def overlay_mask(pixels: np.ndarray, computed: np.ndarray) -> np.ndarray:
    """Return a picture with the pixels that are not computed darkened.

    Args:
        pixels: uint8 (H, W, 3).
        computed: bool (H, W).
    """
    return np.where(computed[..., None], pixels, pixels // 5)


def mask_panels(
    decisions: Sequence[RecordedDecision], pixels: np.ndarray, frame: Frame
) -> list[Panel]:
    """Return a panel for each sampler: its mask over a picture.

    Args:
        decisions: of one call on one image.
        pixels: uint8 (H, W, 3) of the frame's size.
        frame: of the picture.
    """
    panels = []
    for decision in decisions:
        density = float(decision.mask.float().mean())
        short = (
            decision.name.removeprefix("model.")
            .removeprefix("backbone.")
            .removeprefix("body.")
            .replace("samplers.", "mask ")
        )
        panels.append(
            Panel(
                f"{short}: {density:.0%} computed", overlay_mask(pixels, frame.fit(decision.mask))
            )
        )
    return panels


def share_panel(decisions: Sequence[RecordedDecision], frame: Frame, *, caption: str = "") -> Panel:
    """Return the share of the samplers that compute each pixel, of one call on one image.

    Every sampler counts the same, whatever its convolutions cost.

    Args:
        decisions: of the call.
        frame: of the picture.
        caption: written before the mean.
    """
    share = np.mean([frame.fit(decision.mask) for decision in decisions], axis=0)
    return Panel(f"{caption}computed share: {share.mean():.0%} in the mean", share)


def draw_panels(
    panels: Sequence[Panel],
    path: str | Path,
    *,
    num_columns: int | None = None,
    classes: Mapping[str, tuple[int, int, int]] | None = None,
) -> None:
    """Write panels to one PNG, row by row.

    Args:
        panels: what is drawn.
        path: file to write; its folder is made.
        num_columns: panels of a row. Default: 3 for up to six panels, 4 for up to twenty, else 8.
        classes: colours by name, for a legend below.
    """
    if num_columns is None:
        num_columns = 3 if len(panels) <= 6 else 4 if len(panels) <= 20 else 8
    num_rows = math.ceil(len(panels) / num_columns)
    figure = Figure(figsize=(3.2 * num_columns + 0.6, 2.7 * num_rows), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    of_share = []
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(num_rows, num_columns, i + 1)
        is_small = min(panel.pixels.shape[:2]) < _FEWEST_PIXELS
        options: dict[str, Any] = {"interpolation": "nearest"} if is_small else {}
        if panel.is_share:
            options |= {"cmap": _SHARE_COLOURS, "vmin": 0.0, "vmax": 1.0}
            of_share.append(axes)
        axes.imshow(panel.pixels, **options)
        for box in panel.boxes:
            _draw_box(axes, box)
        axes.set_title(panel.title, fontsize=8)
        axes.set_axis_off()
    if of_share:
        scale = ScalarMappable(Normalize(0.0, 1.0), _SHARE_COLOURS)
        bar = figure.colorbar(scale, ax=figure.axes, shrink=min(1.0, 1.5 / num_rows), pad=0.01)
        bar.set_label("share of the samplers that compute a pixel", fontsize=8)
    if classes:
        handles = [
            Patch(color=_hexadecimal(colour), label=name) for name, colour in classes.items()
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=7, fontsize=7)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    canvas.print_png(str(path))


def _draw_box(axes: Any, box: Box) -> None:
    x0, y0, x1, y1 = box.corners
    colour = _hexadecimal(colour_of(box.number))
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour))
    label = {"facecolor": colour, "edgecolor": "none", "pad": 1.0}
    axes.text(x0, y0, box.text, fontsize=6, color="white", va="top", bbox=label)


def _hexadecimal(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


@torch.inference_mode()
def draw_masks(
    model: nn.Module,
    image: Tensor,
    labels: Tensor,
    *,
    path: str | Path,
    ignore_index: int,
    reference: nn.Module | None = None,
) -> None:
    """Write one PNG: image, annotation, prediction, then the mask of every sampler over the image.

    Args:
        model: sparsified or frozen, in eval mode; (1, 3, H, W) -> {"out": (1, K, H, W)}.
        image: float (3, H, W), normalised.
        labels: int64 (h, w) class map.
        path: file to write; its folder is made.
        ignore_index: label drawn black.
        reference: a dense model whose prediction is drawn too.

    Raises:
        ValueError: the model has no sampler (from `record_sampling`).
    """
    batch = image[None].contiguous(memory_format=torch.channels_last)
    with record_sampling(model) as record:
        logits = model(batch)["out"]
    colours: dict[str, Any] = {"num_classes": logits.shape[1], "ignore_index": ignore_index}
    pixels = to_pixels(image)
    panels = [
        Panel("image", pixels),
        Panel("annotation", colour_classes(labels, **colours)),
        Panel("sampled prediction", colour_classes(logits[0].argmax(0), **colours)),
    ]
    if reference is not None:
        prediction = colour_classes(reference(batch)["out"][0].argmax(0), **colours)
        panels.append(Panel("dense prediction", prediction))
    frame = Frame.plain((image.shape[1], image.shape[2]))
    draw_panels(panels + mask_panels(record.decisions, pixels, frame), path)
