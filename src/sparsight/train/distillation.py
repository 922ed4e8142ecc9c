"""Whom a run's student learns from, and how: the flags, and the `Distiller` that they make."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsight.compress import CachedTeacher, Distiller, FeatureHints
from sparsight.compress.distiller import logits_in
from sparsight.compress.hints import HintMode
from sparsight.models import load_resnet_cifar
from sparsight.nn.channels_last import put_channels_last
from sparsight.train.architecture import (
    AnyArchitecture,
    DetectorArchitecture,
    ProposalArchitecture,
)
from sparsight.train.checkpoint import load_checkpoint
from sparsight.train.hardware import Hardware
from sparsight.train.initial_weights import initial_network
from sparsight.train.sampling_flags import SamplingFlags, sampling_flags

_PYRAMID = "fpn"
_EXAMPLE_PX = 128  # sides of the image on which channels are read: enough for a stride of 32


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Whom a run's student learns from, and how; `shared_flags` makes it of a recipe's flags.

    Attributes:
        teacher: file of a trained network's weights, see `load_teacher`; None for the annotations
            alone.
        temperature: of the soft term, see `distillation_loss`.
        alpha: weight of the soft term, see `distillation_loss`.
        features: names of layers to compare, the student's to the teacher's; empty for none. Of a
            detector those of its `.backbone`, of which the pyramid, "fpn", is compared if nothing
            is named.
        feature_weight: of that comparison, beside the other terms.
        feature_mode: what is compared, see `FeatureHints`.
        cache: folder for the teacher's outputs, see `CachedTeacher`; None computes them each time.
        cache_in_half: store them in float16.

    Raises:
        ValueError: features or a cache, but no teacher.
    """

    teacher: str | None = None
    temperature: float = 4.0
    alpha: float = 0.9
    features: tuple[tuple[str, str], ...] = ()
    feature_weight: float = 1.0
    feature_mode: HintMode = "fitnets"
    cache: str | None = None
    cache_in_half: bool = False

    def __post_init__(self) -> None:
        if self.teacher is None and (self.features or self.cache is not None):
            given = "features" if self.features else "cache"
            raise ValueError(
                f"Distillation: {given}={getattr(self, given)!r}, but there is no teacher; the "
                "weights of a trained network are required; pass --teacher FILE."
            )

    def distiller(self, student: nn.Module, like: AnyArchitecture) -> Distiller | None:
        """Return what teaches `student`; None without a teacher.

        Draws the adapters of features, if any, from torch's generator.

        Args:
            student: the network that is trained, dense or sampled.
            like: architecture of the dense student.

        Raises:
            FileNotFoundError: the teacher's file is missing.
            ValueError: a teacher of another task or other classes, a layer that is not there, a
                cache of another teacher, or a number out of range.
        """
        if self.teacher is None:
            return None
        teacher = load_teacher(self.teacher, like=like)
        put_channels_last(teacher)
        pairs = dict(self.features)
        finds_logits: Any = logits_in
        if isinstance(like, DetectorArchitecture):
            teacher, student = teacher.get_submodule("backbone"), student.get_submodule("backbone")
            pairs = pairs or {_PYRAMID: _PYRAMID}
            finds_logits = None
        hints = None
        if pairs:
            height, width = (min(side, _EXAMPLE_PX) for side in like.size)
            example = torch.zeros(1, 3, height, width)
            hints = FeatureHints(student, teacher, pairs, example=example, mode=self.feature_mode)
        taught_by: nn.Module | CachedTeacher = teacher
        if self.cache is not None:
            dtype = torch.float16 if self.cache_in_half else None
            taught_by = CachedTeacher(teacher, self.cache, dtype=dtype)
        return Distiller(
            taught_by,
            student,
            features=hints,
            feature_weight=self.feature_weight,
            temperature=self.temperature,
            alpha=self.alpha,
            logits_of=finds_logits,
        )


def load_teacher(path: str | Path, *, like: AnyArchitecture) -> nn.Module:
    """Return a trained network that can teach one of another architecture.

    Args:
        path: a *.safetensors checkpoint of sparsight, of any architecture for the same task, dense
            or sampled; or a state_dict saved with torch (*.pt, *.pth), of a CIFAR ResNet of any
            depth where the student is one, otherwise of the student's own dense architecture, at
            full width. For a detector a checkpoint of sparsight is required.
        like: architecture of the student.

    Raises:
        FileNotFoundError: no such file.
        ValueError: weights for another task or, where logits are compared, other classes; or a
            student that proposes masks.
    """
    if isinstance(like, ProposalArchitecture):
        raise ValueError(
            f"load_teacher: {str(path)!r} is to teach {like.model}; a student for segmentation, "
            "classification or detection is required, as its outputs are not compared; leave the "
            "teacher out."
        )
    if isinstance(like, DetectorArchitecture) or Path(path).suffix == ".safetensors":
        teacher, stored = load_checkpoint(path)
        task, num_classes = stored.task, stored.num_classes
    elif like.model == "resnet_cifar":
        network = load_resnet_cifar(path)
        teacher, task, num_classes = network, like.task, network.linear.out_features
    else:
        full = replace(like, sampling=None, widths=None, selected=None)
        return initial_network(full, path)
    fits = task == like.task and (task == "detection" or num_classes == like.num_classes)
    if not fits:
        raise ValueError(
            f"load_teacher: {str(path)!r} is for {task} in {num_classes} classes, the student for "
            f"{like.task} in {like.num_classes}; the same task and classes are required; pass the "
            "weights of a teacher of this data set."
        )
    return teacher


def shared_flags(
    *,
    teacher: str | None = None,
    distill_temperature: float = 4.0,
    distill_alpha: float = 0.9,
    distill_features: str | None = None,
    distill_feature_weight: float = 1.0,
    distill_feature_mode: HintMode = "fitnets",
    cache_teacher: str | None = None,
    cache_teacher_half: bool = False,
    **sampling: Any,
) -> tuple[SamplingFlags, Distillation, Hardware]:
    """Return what the flags say that all recipes share.

    Args:
        teacher: weights of a trained network to learn from beside the annotations: a checkpoint
            (*.safetensors) of any architecture for the same task and classes; or, for
            classification, a state_dict saved with torch, of a CIFAR ResNet of any depth or of
            the student's own architecture. None: the annotations alone.
        distill_temperature: softens the classes of both in the loss; 1 leaves them as they are. Not
            for detection, whose logits are not compared.
        distill_alpha: weight of the teacher's classes in [0, 1]; 1 minus it is that of the
            annotations. Not for detection either.
        distill_features: layers to compare as well, by name, with commas between them: "layer2", or
            "layer2=layer3" where the teacher's has another name. For detection those of the
            backbone; default there: "fpn", its pyramid.
        distill_feature_weight: of that comparison.
        distill_feature_mode: "fitnets" compares features, through 1x1 convolutions where channels
            differ; "attention" and "attention_mean" compare where they are large.
        cache_teacher: folder for the teacher's outputs; each is found by the pixels that the
            teacher was shown. With random augmentation it pays in the next run with the same seed.
        cache_teacher_half: store them in float16.
        **sampling: flags of `sparsight.train.sampling_flags`: sampling, processes, machines,
            memory.

    Raises:
        ValueError: flags that contradict each other, see `Distillation` and `Hardware`; or pairs of
            layers that cannot be read.
    """
    distillation = Distillation(
        teacher=teacher,
        temperature=distill_temperature,
        alpha=distill_alpha,
        features=_pairs(distill_features),
        feature_weight=distill_feature_weight,
        feature_mode=distill_feature_mode,
        cache=cache_teacher,
        cache_in_half=cache_teacher_half,
    )
    flags, hardware = sampling_flags(**sampling)
    return flags, distillation, hardware


def _pairs(written: str | None) -> tuple[tuple[str, str], ...]:
    pairs = []
    for pair in [] if written is None else written.split(","):
        names = [name.strip() for name in pair.split("=")]
        if len(names) > 2 or not all(names):
            raise ValueError(
                f"shared_flags: distill_features={written!r}; names of layers with commas between "
                "them are required; write layer2,layer3 or student.layer=teacher.layer."
            )
        pairs.append((names[0], names[-1]))
    return tuple(pairs)
