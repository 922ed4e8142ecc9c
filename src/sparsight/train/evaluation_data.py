"""The images that a checkpoint is scored on: of which data set, and in the form its model takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from sparsight.nn.channels_last import channels_last
from sparsight.train.architecture import AnyArchitecture, Task
from sparsight.train.checkpoint import read_architecture, read_dataset
from sparsight.train.data import (
    CIFAR10,
    CamVid,
    Cityscapes,
    Coco,
    ImageFolders,
    MovingShapes,
    SeededView,
    Voc,
    cifar10_evaluation_transform,
    clip_transform,
    collate_detection,
    detection_transform,
    evaluation_transform,
    imagenet_evaluation_transform,
    proposal_transform,
)
from sparsight.train.evaluate import Score, score
from sparsight.train.evaluate_classification import ClassificationScore, score_classification
from sparsight.train.evaluate_detection import DetectionScore, score_detector
from sparsight.train.evaluate_proposals import ProposalScore, score_proposals

DatasetName = Literal["camvid", "cityscapes", "cifar10", "imagenet", "coco", "voc", "moving_shapes"]
Split = Literal["train", "val"]

# What models of a data set are for; the first where nothing else says it.
_TASKS_OF: dict[DatasetName, tuple[Task, ...]] = {
    "camvid": ("segmentation",),
    "cityscapes": ("segmentation",),
    "cifar10": ("classification",),
    "imagenet": ("classification",),
    "coco": ("detection", "proposals"),
    "voc": ("proposals",),
    "moving_shapes": ("video",),
}


def dataset_of(checkpoint: str | Path, asked: DatasetName | None = None) -> DatasetName:
    """Return which data set a checkpoint is scored on.

    What is asked for counts; without it what the checkpoint says of its training; and for
    checkpoints that say nothing, what follows from the architecture: a detector, or a model that
    proposes masks, is of COCO, a ResNet for 32x32 images of CIFAR-10, torchvision's ResNet of
    ImageNet, a segmentation model with 11 classes of CamVid and with 19 of Cityscapes, one for
    clips of the moving shapes.

    Args:
        checkpoint: a file that `save_checkpoint` wrote.
        asked: name of the data set.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no checkpoint; one whose data set is not known and was not asked for; or one
            that is for another task than the data set.
    """
    architecture, told = read_architecture(checkpoint), read_dataset(checkpoint)
    name = asked or told or _usual(architecture)
    fitting = [known for known, tasks in _TASKS_OF.items() if architecture.task in tasks]
    if name in fitting:
        return name  # type: ignore[return-value]  # one of the names, by the line before
    found = f"was trained on {told!r}" if told else "does not say what data set it was trained on"
    arrived = "no data set was asked for" if asked is None else f"{asked!r} was asked for"
    raise ValueError(
        f"dataset_of: {str(checkpoint)!r} is a {architecture.model} for {architecture.task} with "
        f"{architecture.num_classes} classes and {found}; {arrived}; one of {', '.join(fitting)} "
        "is required; pass it as --dataset."
    )


def _usual(architecture: AnyArchitecture) -> DatasetName | None:
    if architecture.task in ("detection", "proposals"):
        return "coco"
    if architecture.task == "video":
        return "moving_shapes"
    if architecture.task == "classification":
        return "cifar10" if architecture.model == "resnet_cifar" else "imagenet"
    by_classes: dict[int, DatasetName] = {11: "camvid", 19: "cityscapes"}
    return by_classes.get(architecture.num_classes)


@dataclass(frozen=True)
class EvaluationData:
    """A split of a data set, unaugmented, as the models of its task take it; a clip is an image.

    Attributes:
        name: of the data set.
        source: its reader.
        view: (image, annotation) by index, transformed.
        asked: what the models are for, where the data set is of several tasks.
    """

    name: DatasetName
    source: Any
    view: SeededView
    asked: Task | None = None

    def __len__(self) -> int:
        return len(self.view)

    @property
    def task(self) -> Task:
        """What models of this data set are for."""
        return self.asked or _TASKS_OF[self.name][0]

    @property
    def classes(self) -> Sequence[str | None]:
        """Name of each class, by its number."""
        return self.source.classes

    def batches(self, batch_size: int) -> DataLoader[Any]:
        """Return all images in batches, in order."""
        collate_fn = _COLLATING.get(self.task)
        return DataLoader(self.view, batch_size=batch_size, collate_fn=collate_fn)

    def example(self, index: int = 0) -> Tensor | list[Tensor]:
        """Return one image as the model takes it: a batch, channels-last; or in a list.

        Raises:
            ValueError: there is no such image.
        """
        if not 0 <= index < len(self):
            raise ValueError(
                f"{self.name}: image {index} of {len(self)}; 0 to {len(self) - 1} is required; "
                "choose another image, or another split."
            )
        image = self.view[index][0]
        if self.task in ("detection", "proposals"):
            return [image]
        return channels_last(image[None])

    def title(self, index: int) -> str:
        """Return a name of an image that can be a file's."""
        if self.name == "cifar10":
            return f"image{index}"
        if self.name == "moving_shapes":
            return f"clip{index}"
        if self.name == "coco":
            return Path(self.source.file_names[index]).stem
        path: Path = self.source.items[index][0]
        # Names of ImageNet's files may repeat from class to class.
        return f"{path.parent.name}_{path.stem}" if self.name == "imagenet" else path.stem

    def score(
        self, model: nn.Module, *, batch_size: int
    ) -> Score | ClassificationScore | DetectionScore | ProposalScore:
        """Return what a model, in eval mode, scores on all images and what it computes for that."""
        batches = self.batches(batch_size)
        if self.task == "detection":
            return score_detector(model, batches, data=self.source)
        if self.task == "proposals":
            return score_proposals(model, batches, data=self.source)
        if self.task in ("classification", "video"):
            return score_classification(model, batches, num_classes=len(self.classes))
        return score(
            model, batches, classes=self.source.classes, ignore_index=self.source.ignore_index
        )


def _collate_segmentation(items: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    sizes = {tuple(labels.shape) for _, labels in items}
    if len(sizes) > 1:
        found = " and ".join(f"{height}x{width}" for height, width in sorted(sizes)[:2])
        raise ValueError(
            f"EvaluationData.batches: annotations of {found} pixels in one batch of {len(items)}; "
            "scores are counted at the annotations' own size, one for a whole batch is required; "
            "pass --batch-size 1."
        )
    return default_collate(items)


_COLLATING: dict[Task, Callable[[list[Any]], Any]] = {
    "detection": collate_detection,
    "proposals": collate_detection,
    "segmentation": _collate_segmentation,
}


def open_evaluation_data(
    name: DatasetName,
    root: str | Path | None,
    *,
    split: Split,
    num_classes: int,
    size: tuple[int, int],
    task: Task | None = None,
) -> EvaluationData:
    """Return a split of a data set for models of `num_classes` classes and of an input size.

    Args:
        name: of the data set.
        root: its folder, in the layout that its reader in `sparsight.train.data` describes; None
            for moving_shapes, which are drawn.
        split: "train", or "val", which is CIFAR-10's test set.
        num_classes: of the model; a detector's with the background.
        size: height and width in pixels that images are brought to; of models that resize
            themselves, not used.
        task: of the model, where the data set is of several; default: its first.

    Raises:
        FileNotFoundError: a folder or file is missing; says which layout is expected and where to
            obtain the data.
        ValueError: an unknown name, no folder, another number of classes, or a size that the data
            set does not come in.
    """
    if name == "moving_shapes":
        source, transform = MovingShapes(split, size=size), clip_transform()
    elif root is None:
        raise ValueError(
            f"open_evaluation_data: no folder was given for {name}; the one that holds its images "
            "is required; pass --data DIR."
        )
    elif task == "proposals" and name in ("coco", "voc"):
        source = Coco(root, f"{split}2017", with_masks=True) if name == "coco" else Voc(root, split)
        view = SeededView(source, proposal_transform())
        return EvaluationData(name, source, view, task)
    elif name == "coco":
        source = Coco(root, f"{split}2017", num_classes=num_classes)
        return EvaluationData(
            name, source, SeededView(source, detection_transform(is_training=False))
        )
    elif name == "cifar10":
        if tuple(size) != (32, 32):
            raise ValueError(
                f"open_evaluation_data: size={size[0]}x{size[1]} for CIFAR-10; 32x32 is required: "
                "its images are taken as they are; leave --size out."
            )
        source = CIFAR10(root, "test" if split == "val" else "train")
        transform = cifar10_evaluation_transform()
    elif name == "imagenet":
        source, transform = ImageFolders(root, split), imagenet_evaluation_transform(size)
    elif name == "camvid":
        source, transform = CamVid(root, split), evaluation_transform(size)
    elif name == "cityscapes":
        source, transform = Cityscapes(root, split), evaluation_transform(size)
    else:
        raise ValueError(
            f"open_evaluation_data: dataset={name!r}; one of {', '.join(get_args(DatasetName))} "
            "is required."
        )
    if len(source.classes) != num_classes:
        of = "" if root is None else f" in {str(root)!r}"
        raise ValueError(
            f"open_evaluation_data: {name}{of} has {len(source.classes)} classes, the "
            f"checkpoint {num_classes}; equal numbers are required; pass --data with the images "
            "that it was trained on, and --dataset if they are of another data set."
        )
    return EvaluationData(name, source, SeededView(source, transform))
