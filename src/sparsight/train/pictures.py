"""Pictures of where a sampled model computes: image, annotation, predictions, masks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from sparsight.nn import record_sampling
from sparsight.train.data.augment import MEAN, STD


def to_pixels(normalised: Tensor) -> np.ndarray:
    """Return a normalised image (3, H, W) as uint8 (H, W, 3)."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    pixels = (normalised.cpu() * std + mean).clamp(0, 1) * 255
    return pixels.round().byte().permute(1, 2, 0).numpy()


def colour_classes(class_map: Tensor, *, num_classes: int, ignore_index: int) -> np.ndarray:
    """Return a class map (H, W) as uint8 (H, W, 3), one colour a class, ignored pixels black."""
    palette = (np.array(matplotlib.colormaps["tab20"].colors[:num_classes]) * 255).astype(np.uint8)
    labels = class_map.cpu().numpy()
    picture = palette[np.clip(labels, 0, num_classes - 1) % len(palette)]
    picture[labels == ignore_index] = 0
    return picture


def overlay_mask(pixels: np.ndarray, mask: Tensor) -> np.ndarray:
    """Return the image with the positions that are not computed darkened.

    Args:
        pixels: uint8 (H, W, 3).
        mask: bool (1, 1, h, w); each of its positions covers the pixels nearest to it.
    """
    large = (
        F.interpolate(mask.float(), size=pixels.shape[:2], mode="nearest")[0, 0]
        .bool()
        .cpu()
        .numpy()
    )
    return np.where(large[..., None], pixels, pixels // 5)


@torch.inference_mode()
def draw_masks(
    model: nn.Module,
    image: Tensor,
    labels: Tensor,
    *,
    path: str | Path,
    ignore_index: int,
    reference: nn.Module | None = None,
    shows_data: bool = True,
) -> None:
    """Write one PNG: image, annotation, prediction, then the mask of every sampler over the image.

    Args:
        model: sparsified or frozen, in eval mode.
        image: float (3, H, W), normalised.
        labels: int64 (h, w) class map.
        path: file to write; its folder is made.
        ignore_index: label drawn black.
        reference: a dense model whose prediction is drawn too.
        shows_data: draw image and annotation, and the masks over the image. False leaves them out
            and draws the masks over the prediction: for data that may not be published.

    Raises:
        ValueError: the model has no sampler (from `record_sampling`).
    """
    with record_sampling(model) as record:
        logits = model(image[None].contiguous(memory_format=torch.channels_last))["out"]
    colours: dict[str, Any] = {"num_classes": logits.shape[1], "ignore_index": ignore_index}
    prediction = colour_classes(logits[0].argmax(0), **colours)
    panels = [("sampled prediction", prediction)]
    pixels = prediction
    if shows_data:
        pixels = to_pixels(image)
        panels = [
            ("image", pixels),
            ("annotation", colour_classes(labels, **colours)),
            *panels,
        ]
    if reference is not None:
        dense_logits = reference(image[None].contiguous(memory_format=torch.channels_last))["out"]
        panels.append(("dense prediction", colour_classes(dense_logits[0].argmax(0), **colours)))
    for decision in record.decisions:
        density = float(decision.mask.float().mean())
        short = (
            decision.name.removeprefix("model.")
            .removeprefix("backbone.")
            .replace("samplers.", "mask ")
        )
        panels.append((f"{short}: {density:.0%} computed", overlay_mask(pixels, decision.mask)))
    num_columns = 3 if len(panels) <= 6 else 4
    num_rows = math.ceil(len(panels) / num_columns)
    figure = Figure(figsize=(3.2 * num_columns, 2.7 * num_rows), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for i, (title, picture) in enumerate(panels):
        axes = figure.add_subplot(num_rows, num_columns, i + 1)
        axes.imshow(picture)
        axes.set_title(title, fontsize=8)
        axes.set_axis_off()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    canvas.print_png(str(path))
