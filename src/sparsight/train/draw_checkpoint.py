"""Where a checkpoint computes on images of its data set, as pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsight.nn import RecordedDecision, record_sampling
from sparsight.train.architecture import AnyArchitecture, at_size
from sparsight.train.checkpoint import load_checkpoint
from sparsight.train.evaluation_data import (
    DatasetName,
    EvaluationData,
    Split,
    dataset_of,
    open_evaluation_data,
)
from sparsight.train.pictures import (
    Box,
    Frame,
    Panel,
    colour_classes,
    colour_of,
    draw_panels,
    mask_panels,
    share_panel,
    to_pixels,
)
from sparsight.train.proposal_pictures import blend_masks

_LEAST_CONFIDENCE = 0.5  # of the boxes that are drawn
_NUM_DRAWN = 10  # proposals
_CANVAS = 200  # grey that stands for a photograph which is not to be shown


def draw_checkpoint(
    checkpoint: str | Path,
    *,
    data: str | Path,
    dense: str | Path | None = None,
    dataset: DatasetName | None = None,
    images: Sequence[int] = (0, 33, 66),
    split: Split = "val",
    size: tuple[int, int] | None = None,
    out: str | Path = "masks",
    shows_data: bool = False,
    per_sampler: bool = True,
) -> list[Path]:
    """Draw an overview of several images, and of each image the mask of every sampler.

    The overview, overview.png, has a row for each image: prediction, beside that of a dense
    checkpoint if one is given, and the share of the samplers that compute each pixel. Masks are
    those of sampling seed 0.

    Args:
        checkpoint: a file that `save_checkpoint` wrote, of a sampled model.
        data: folder of the data set.
        dense: a dense checkpoint for the same classes, whose prediction is drawn too; of
            segmentation or detection, at the size of `checkpoint`'s input.
        dataset: which; default: what the checkpoint says, see `dataset_of`.
        images: positions in the split.
        split: which images.
        size: of the input, see `at_size`; default: that of training.
        out: folder for the pictures.
        shows_data: draw photographs and annotations too, and masks and boxes over the photographs.
            False draws masks over the predicted classes, or over a blank canvas, for data that may
            not be published.
        per_sampler: also draw one picture an image with the mask of every sampler.

    Returns:
        The files written, the overview first.

    Raises:
        FileNotFoundError: a checkpoint or data missing.
        ValueError: no images, one that is not there, a model without samplers, or checkpoint, dense
            checkpoint and data set do not fit together.
    """
    if not images:
        raise ValueError(
            "draw_checkpoint: images is empty; at least one is required; leave it out."
        )
    name = dataset_of(checkpoint, dataset)
    model, stored = load_checkpoint(checkpoint)
    architecture = at_size(model.eval(), stored, size)
    source = open_evaluation_data(
        name,
        data,
        split=split,
        num_classes=architecture.num_classes,
        size=architecture.size,
        task=architecture.task,
    )
    reference = None if dense is None else _dense_model(dense, architecture)
    classes = None
    if source.task == "segmentation":
        classes = {str(each): colour_of(k) for k, each in enumerate(source.classes)}
    looks = [_look(model, source, index, shows_data, reference) for index in images]
    rows = [
        [*look.panels, share_panel(look.decisions, look.frame, caption=look.caption)]
        for look in looks
    ]
    written = [Path(out) / "overview.png"]
    panels = [panel for row in rows for panel in row]
    draw_panels(panels, written[0], num_columns=len(rows[0]), classes=classes)
    for index, look, row in zip(images, looks, rows, strict=True):
        if not per_sampler:
            break
        written.append(Path(out) / f"{source.title(index)}.png")
        masks = mask_panels(look.decisions, look.background, look.frame)
        draw_panels(row + masks, written[-1], classes=classes)
    return written


@dataclass(frozen=True)
class _Look:
    """What a model made of one image.

    Attributes:
        panels: photograph and annotation, if they are shown, and the prediction, if it is a
            picture.
        caption: what there is to say where there is no such panel.
        background: uint8 (H, W, 3) that the masks are drawn over.
        frame: of the background.
        decisions: of the samplers.
    """

    panels: list[Panel]
    background: np.ndarray
    frame: Frame
    decisions: Sequence[RecordedDecision] = ()
    caption: str = ""


@torch.inference_mode()
def _look(
    model: nn.Module,
    source: EvaluationData,
    index: int,
    shows_data: bool,
    reference: nn.Module | None,
) -> _Look:
    example = source.example(index)
    with record_sampling(model) as record:
        output = model(example)
    if reference is None:
        look = _SHOWN[source.task](source, index, output, shows_data, "")
    else:
        look = _SHOWN[source.task](source, index, output, shows_data, "sampled ")
        other = _SHOWN[source.task](source, index, reference(example), shows_data, "dense ")
        look = replace(look, panels=[*look.panels[:-1], other.panels[-1], look.panels[-1]])
    if source.task == "detection":
        # As the backbone sees it: resized, and padded to the right and below.
        detector: Any = model
        batch, _ = detector.transform(example)
        frame = Frame(look.frame.size, batch.image_sizes[0], tuple(batch.tensors.shape[2:]))
        return replace(look, frame=frame, decisions=record.decisions)
    if source.task == "proposals":
        # It looks at each image at all of its scales; shown is the last, which is the largest.
        proposer: Any = model
        tensors, (resized,) = proposer.prepare(example, [proposer.scales[-1]])
        frame = Frame(look.frame.size, resized, tuple(tensors.shape[2:]))
        num_samplers = len(record.decisions) // len(proposer.scales)
        return replace(look, frame=frame, decisions=record.decisions[-num_samplers:])
    return replace(look, decisions=record.decisions)


def _dense_model(checkpoint: str | Path, sampled: AnyArchitecture) -> nn.Module:
    """The model of a dense checkpoint that predicts what a sampled one does."""
    model, stored = load_checkpoint(checkpoint)
    wrong = []
    if stored.sampling is not None:
        wrong.append("it is sampled")
    if (stored.task, stored.num_classes) != (sampled.task, sampled.num_classes):
        wrong.append(f"it is for {stored.task} with {stored.num_classes} classes")
    if sampled.task == "classification":
        wrong.append("a prediction for whole images is no picture")
    if wrong:
        raise ValueError(
            f"draw_checkpoint: dense={str(checkpoint)!r}, but {' and '.join(wrong)}; a dense "
            f"checkpoint for {sampled.task} with {sampled.num_classes} classes is required; pass "
            "another, or leave it out."
        )
    at_size(model.eval(), stored, sampled.size)
    return model


def _segmentation(
    source: EvaluationData, index: int, output: dict[str, Tensor], shows_data: bool, whose: str
) -> _Look:
    image, labels = source.view[index]
    logits = output["out"][0]
    colours = {"num_classes": len(source.classes), "ignore_index": source.source.ignore_index}
    prediction = colour_classes(logits.argmax(0), **colours)
    title = source.title(index)
    caption = f"{whose}prediction"
    panels = [Panel(caption if shows_data else f"{title}: {caption}", prediction)]
    background = prediction
    if shows_data:
        background = to_pixels(image)
        annotation = colour_classes(labels, **colours)
        panels = [Panel(title, background), Panel("annotation", annotation), *panels]
    return _Look(panels, background, Frame.plain((image.shape[1], image.shape[2])))


def _classification(
    source: EvaluationData, index: int, output: Tensor, shows_data: bool, whose: str
) -> _Look:
    image, label = source.view[index]
    probability, predicted = output[0].softmax(0).max(0)
    text = f"{source.title(index)}: {source.classes[int(predicted)]} {float(probability):.0%}"
    size = image.shape[1], image.shape[2]
    if not shows_data:
        return _Look([], _canvas(size), Frame.plain(size), caption=f"{text}\n")
    text += f" (is {source.classes[label]})"
    pixels = to_pixels(image)
    return _Look([Panel(text, pixels)], pixels, Frame.plain(size))


def _detection(
    source: EvaluationData,
    index: int,
    output: list[dict[str, Tensor]],
    shows_data: bool,
    whose: str,
) -> _Look:
    (found,) = output
    image, target = source.view[index]
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    size = pixels.shape[0], pixels.shape[1]
    background = pixels if shows_data else _canvas(size)
    title = source.title(index)
    texts = [f"{float(score):.2f}" for score in found["scores"]]
    kept = [i for i, score in enumerate(found["scores"]) if score >= _LEAST_CONFIDENCE]
    boxes = [_box(source, found["boxes"][i], found["labels"][i], texts[i]) for i in kept]
    caption = f"{whose}{len(boxes)} found at {_LEAST_CONFIDENCE} or more"
    panels = [Panel(caption if shows_data else f"{title}: {caption}", background, boxes)]
    if shows_data:
        truth = [
            _box(source, box, label)
            for box, label in zip(target["boxes"], target["labels"], strict=True)
        ]
        panels = [Panel(f"{title}: annotation", background, truth), *panels]
    return _Look(panels, background, Frame.plain(size))


def _proposals(
    source: EvaluationData,
    index: int,
    output: list[dict[str, Tensor]],
    shows_data: bool,
    whose: str,
) -> _Look:
    (found,) = output
    image, target = source.view[index]
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    size = pixels.shape[0], pixels.shape[1]
    background = pixels if shows_data else _canvas(size)
    title = source.title(index)
    drawn = found["masks"][:_NUM_DRAWN, 0]
    caption = f"{whose}best {len(drawn)} of {len(found['masks'])} proposals"
    prediction = blend_masks(background, drawn)
    panels = [Panel(caption if shows_data else f"{title}: {caption}", prediction)]
    if shows_data:
        truth = blend_masks(background, target["masks"][~target["iscrowd"]])
        panels = [Panel(f"{title}: annotation", truth), *panels]
    return _Look(panels, background, Frame.plain(size))


_SHOWN: dict[str, Callable[..., _Look]] = {
    "segmentation": _segmentation,
    "classification": _classification,
    "detection": _detection,
    "proposals": _proposals,
}


def _box(source: EvaluationData, corners: Tensor, label: Tensor, text: str = "") -> Box:
    x0, y0, x1, y1 = corners.tolist()
    name = source.classes[int(label)] or f"class {int(label)}"
    return Box((x0, y0, x1, y1), f"{name} {text}".strip(), int(label))


def _canvas(size: tuple[int, int]) -> np.ndarray:
    return np.full((*size, 3), _CANVAS, dtype=np.uint8)
