"""A student's loss against its teacher, for any training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsight.compress.cached_teacher import CachedTeacher
from sparsight.compress.distillation import distillation_loss
from sparsight.compress.features import record_features, tensors_in
from sparsight.compress.hints import FeatureHints

__all__ = ["Distiller", "logits_in"]

_OUTPUT = "output"


def logits_in(output: Any) -> Tensor:
    """Return the logits in what a network returned: itself, or its "out".

    Raises:
        TypeError: neither a tensor nor a mapping with a tensor under "out", as torchvision's
            segmentation models return.
    """
    found = output.get("out") if isinstance(output, Mapping) else output
    if not isinstance(found, Tensor):
        raise TypeError(
            f"Distiller: the network returned a {type(output).__name__}; logits, or a mapping with "
            "logits under 'out', are required; pass logits_of, which finds them in it, or None to "
            "distil features alone."
        )
    return found


class Distiller(nn.Module):
    """Holds a teacher and gives its student's loss; what is trained beside it are the hints.

    Make it a child of the module that is trained, a LightningModule for example: the adapters of
    `features` are then trained and saved with the training state, and the teacher moves to the
    device of the rest. Neither teacher nor student are children of it: their weights appear in no
    state_dict, optimiser or DistributedDataParallel on its account. Each call puts the teacher in
    eval mode and runs it without gradient.

    Args:
        teacher: a trained network that takes the student's images, or one whose outputs are kept on
            disk. Frozen in place: eval mode, `requires_grad` off.
        student: what is trained; shares no parameter with the teacher.
        features: pairs of layers to compare as well; None for the logits alone.
        feature_weight: of that loss, beside the other terms' alpha and 1 - alpha; at least 0.
        temperature: see `distillation_loss`.
        alpha: see `distillation_loss`.
        ignore_index: see `distillation_loss`.
        distills_ignored: see `distillation_loss`.
        logits_of: finds the logits in what student and teacher return; None where there is nothing
            to compare but features, as in a detector, whose losses then count whole.

    Raises:
        ValueError: teacher and student share parameters, no features and no logits to compare, or a
            number out of range.

    Example:
        >>> student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> distiller = Distiller(teacher, student)
        >>> images, labels = torch.randn(2, 4), torch.tensor([0, 2])
        >>> with distiller.recording() as features:
        ...     output = student(images)
        >>> distiller.loss(images, output, labels, features=features).backward()
        >>> len(list(distiller.parameters()))
        0
    """

    def __init__(
        self,
        teacher: nn.Module | CachedTeacher,
        student: nn.Module,
        *,
        features: FeatureHints | None = None,
        feature_weight: float = 1.0,
        temperature: float = 4.0,
        alpha: float = 0.9,
        ignore_index: int = -100,
        distills_ignored: bool = True,
        logits_of: Callable[[Any], Tensor] | None = logits_in,
    ) -> None:
        super().__init__()
        cache = teacher if isinstance(teacher, CachedTeacher) else None
        model = teacher.model if isinstance(teacher, CachedTeacher) else teacher
        own = {id(parameter) for parameter in student.parameters()}
        shared = [name for name, parameter in model.named_parameters() if id(parameter) in own]
        if shared:
            raise ValueError(
                f"Distiller: teacher and student share {len(shared)} parameters, such as "
                f"{shared[0]!r}; none may be shared, as the teacher's are frozen; pass "
                "copy.deepcopy(student) as the teacher."
            )
        if features is None and logits_of is None:
            raise ValueError(
                "Distiller: features=None and logits_of=None; something to compare is required; "
                "pass FeatureHints, or leave logits_of out."
            )
        if not (feature_weight >= 0 and math.isfinite(feature_weight)):
            raise ValueError(
                f"Distiller: feature_weight={feature_weight}; a number of at least 0 is required; "
                "1 is the default."
            )
        # In a tuple: children would be trained, saved, and set to training mode.
        self._networks = model.eval().requires_grad_(False), student
        self._cache = cache
        self.features = features
        self.feature_weight = feature_weight
        self.temperature = temperature
        self.alpha = alpha
        self.ignore_index = ignore_index
        self.distills_ignored = distills_ignored
        self.logits_of = logits_of
        # Numbers out of range are refused now, not after the first forward passes.
        nothing = torch.zeros(0, 1)
        distillation_loss(
            nothing, nothing, nothing[:, 0].long(), temperature=temperature, alpha=alpha
        )

    @property
    def teacher(self) -> nn.Module:
        """The frozen network."""
        return self._networks[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        """Take the teacher along to another device or dtype."""
        self.teacher._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    @contextmanager
    def recording(self) -> Iterator[dict[str, Tensor]]:
        """Record the student's features of the one call inside a `with` block.

        Yields:
            What `loss` takes as `features`; stays empty without hints.
        """
        names = [] if self.features is None else self.features.student_names
        with record_features(self._networks[1], names) as features:
            yield features

    def loss(
        self,
        images: Tensor,
        output: Any,
        labels: Tensor | None = None,
        *,
        features: Mapping[str, Tensor] | None = None,
        hard_loss: Tensor | None = None,
    ) -> Tensor:
        """Return the student's loss on a batch.

        Args:
            images: what the student was given, (B, ...).
            output: what it returned.
            labels: see `distillation_loss`; None for the teacher alone, or with `hard_loss`.
            features: what was recorded while it ran; required with hints.
            hard_loss: the task's own loss in the place of the cross-entropy with `labels`: weighed
                by 1 - alpha, or by 1 where no logits are compared.

        Returns:
            Scalar: `alpha * soft + (1 - alpha) * hard + feature_weight * hints`. Where the
            teacher's map of logits differs in size from the student's, it is resized (bilinear)
            first.

        Raises:
            ValueError: labels and a hard loss at once, features missing, or tensors that do not
                fit; see `distillation_loss`.
        """
        if labels is not None and hard_loss is not None:
            raise ValueError(
                "Distiller.loss: labels and hard_loss were both given; at most one is required; "
                "leave the labels out where the task has a loss of its own."
            )
        if self.features is not None and not features:
            raise ValueError(
                "Distiller.loss: no features arrived, but hints compare "
                f"{', '.join(self.features.student_names)}; run the student inside `with "
                "distiller.recording() as features:` and pass them."
            )
        taught = self._outputs(images)
        loss = hard_loss
        if self.logits_of is not None:
            loss = self._logit_loss(output, taught, labels, hard_loss)
        if self.features is None:
            assert loss is not None  # there are logits then
            return loss
        hints = self.feature_weight * self.features(features or {}, taught)
        return hints if loss is None else loss + hints

    def _logit_loss(
        self,
        output: Any,
        taught: Mapping[str, Tensor],
        labels: Tensor | None,
        hard_loss: Tensor | None,
    ) -> Tensor:
        assert self.logits_of is not None
        student, teacher = self.logits_of(output), self.logits_of(_whole_output(taught))
        is_map = student.ndim == teacher.ndim == 4
        if is_map and student.shape[2:] != teacher.shape[2:]:
            size = student.shape[2:]
            teacher = F.interpolate(teacher, size=size, mode="bilinear", align_corners=False)
        if hard_loss is None:
            return distillation_loss(
                student,
                teacher,
                labels,
                temperature=self.temperature,
                alpha=self.alpha,
                ignore_index=self.ignore_index,
                distills_ignored=self.distills_ignored,
            )
        soft = distillation_loss(student, teacher, temperature=self.temperature)
        return self.alpha * soft + (1 - self.alpha) * hard_loss

    def _outputs(self, images: Tensor) -> dict[str, Tensor]:
        """What the teacher returns and what is compared of its layers, by name."""
        if self._cache is not None:
            return self._cache.outputs(images, self._run_teacher, names=self._names())
        return self._run_teacher(images)

    def _names(self) -> list[str]:
        hints = [] if self.features is None else self.features.teacher_names
        return hints if self.logits_of is None else [_OUTPUT, *hints]

    @torch.no_grad()
    def _run_teacher(self, images: Tensor) -> dict[str, Tensor]:
        names = [] if self.features is None else self.features.teacher_names
        teacher = self.teacher.eval()  # also if it was set to training mode since
        with record_features(teacher, names) as features:
            output = teacher(images)
        return features if self.logits_of is None else tensors_in(output, _OUTPUT) | features


def _whole_output(taught: Mapping[str, Tensor]) -> Any:
    """What a network returned, put together again from what `tensors_in` took it apart to."""
    if _OUTPUT in taught:
        return taught[_OUTPUT]
    inside = {k[len(_OUTPUT) + 1 : -1]: v for k, v in taught.items() if k.startswith(f"{_OUTPUT}[")}
    if all(key.isdigit() for key in inside):
        return list(inside.values())
    return {key[1:-1]: value for key, value in inside.items()}  # without the quotes
