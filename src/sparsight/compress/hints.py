"""What a student's features lose against its teacher's, and the adapters between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsight.compress.features import check_recorded, record_features

__all__ = ["FeatureHints", "HintMode"]

HintMode = Literal["fitnets", "attention", "attention_mean"]


class FeatureHints(nn.Module):
    """Pulls layers of a student towards layers of its teacher; called, it returns the loss.

    Modes, u being the teacher's feature and v the student's:

    - "fitnets": mean over elements of (u - r(v))^2. The adapter r is a 1x1 convolution (a linear
      layer for features (B, C)) from v's channels to u's where these differ, otherwise nothing. It
      is trained together with the student and thrown away afterwards.
    - "attention": A is the mean over channels of the squared feature, flattened, over its own L2
      norm; the mean over images of the L2 norm of A_u - A_v. The paper's form. No adapter.
    - "attention_mean": the mean over elements of (A_u - A_v)^2, the form of the authors' code. It
      is the smaller one by far, and wants a weight of hundreds.

    Where two maps differ in size, the larger one is averaged down to the smaller's
    (`adaptive_avg_pool2d`, along each axis by itself); of attention, the map of squares is. The
    loss is the mean over the pairs, so that a weight keeps its meaning when a pair is added.

    Hint at layers *before* an activation, or on both sides behind the same one.

    Args:
        student: as it is trained, dense or sampled.
        teacher: as it teaches.
        features: names of layers, the student's to the teacher's; a sequence where both have the
            same names. A layer that returns several maps, such as a feature pyramid, is as many
            pairs.
        example: images to run once through both, from which channels are read; zeros will do.
        mode: see above.
        adapts_equal: an adapter also where channels are equal, as FitNets has it. Then a student
            that equals its teacher does have a loss.

    Attributes:
        adapters: by name of the student's feature, "." written "__".

    The weights of the adapters are those of this module, never of the student: hold it in the
    module that is trained, so that they are updated and saved with the training state, and save the
    student's own state_dict.

    Raises:
        ValueError: no pair, a layer that is not there or does not run, other numbers of maps on
            both sides, or features of other shapes than (B, C, H, W) and (B, C).

    Gradient: to the student's features and the adapters; none to the teacher.

    Example:
        >>> student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        >>> teacher = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU())
        >>> images = torch.randn(2, 3, 8, 8)
        >>> hints = FeatureHints(student, teacher, ["0"], example=images)
        >>> hints.adapters
        ModuleDict(
          (0): Conv2d(4, 16, kernel_size=(1, 1), stride=(1, 1))
        )

    Source: "fitnets" Romero et al., ICLR 2015, arXiv 1412.6550, equation 3, in one stage with the
    rest of the loss instead of two, and a mean instead of half a sum. "attention" Zagoruyko,
    Komodakis, ICLR 2017, arXiv 1612.03928, section 3.1, equation 2, p = 2; the paper sums over the
    pairs.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        features: Mapping[str, str] | Sequence[str],
        *,
        example: Tensor,
        mode: HintMode = "fitnets",
        adapts_equal: bool = False,
    ) -> None:
        super().__init__()
        if mode not in ("fitnets", "attention", "attention_mean"):
            raise ValueError(
                f"FeatureHints: mode={mode!r}; 'fitnets', 'attention' or 'attention_mean' is "
                "required; 'fitnets' compares features, the others where they are large."
            )
        if isinstance(features, str) or not features:
            raise ValueError(
                f"FeatureHints: features={features!r}; at least one pair of layers is required; "
                "pass {'student.layer': 'teacher.layer'} or a list of names that both have."
            )
        if not isinstance(features, Mapping):
            features = {name: name for name in features}
        self.student_names = list(features)
        self.teacher_names = list(dict.fromkeys(features.values()))
        self.pairs = dict(features)
        self.mode: HintMode = mode
        self.adapters = nn.ModuleDict()
        v = _run_once(student, self.student_names, example, of="student")
        u = _run_once(teacher, self.teacher_names, example, of="teacher")
        for name, (mine, theirs) in _paired(self.pairs, v, u).items():
            if mine.ndim != theirs.ndim or mine.ndim not in (2, 4):
                raise ValueError(
                    f"FeatureHints: {name!r} is {tuple(mine.shape)} in the student and "
                    f"{tuple(theirs.shape)} in the teacher; (B, C, H, W) or (B, C) on both sides "
                    "is required; name layers that return such maps."
                )
            if mode != "fitnets":
                if mine.ndim != 4:
                    raise ValueError(
                        f"FeatureHints: {name!r} is {tuple(mine.shape)}; attention is over the "
                        "positions of (B, C, H, W); name a layer with a map, or use "
                        "mode='fitnets'."
                    )
                continue
            inside, outside = mine.shape[1], theirs.shape[1]
            if inside != outside or adapts_equal:
                of_maps = mine.ndim == 4
                adapter = nn.Conv2d(inside, outside, 1) if of_maps else nn.Linear(inside, outside)
                self.adapters[_key(name)] = adapter.to(example.device)

    def forward(
        self, student_features: Mapping[str, Tensor], teacher_features: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the loss, a float32 scalar; 0 where all pairs agree.

        Args:
            student_features: as `record_features(student, hints.student_names)` recorded them.
            teacher_features: as `record_features(teacher, hints.teacher_names)` did.

        Raises:
            ValueError: a layer was not recorded.
        """
        check_recorded(self.student_names, student_features, of="student")
        check_recorded(self.teacher_names, teacher_features, of="teacher")
        paired = _paired(self.pairs, student_features, teacher_features)
        losses = [self._loss(name, v, u.detach()) for name, (v, u) in paired.items()]
        return torch.stack(losses).mean()

    def _loss(self, name: str, v: Tensor, u: Tensor) -> Tensor:
        if self.mode == "fitnets":
            if _key(name) in self.adapters:
                v = self.adapters[_key(name)](v)
            v, u = _common_size(v.float(), u.float())
            return F.mse_loss(v, u)
        v, u = _common_size(*(x.float().square().mean(1, keepdim=True) for x in (v, u)))
        difference = F.normalize(v.flatten(1)) - F.normalize(u.flatten(1))
        if self.mode == "attention":
            return torch.linalg.vector_norm(difference, dim=1).mean()
        return difference.square().mean()

    def extra_repr(self) -> str:
        """The pairs and the mode."""
        pairs = ", ".join(f"{mine} -> {theirs}" for mine, theirs in self.pairs.items())
        return f"{pairs}, mode={self.mode!r}"


def _key(name: str) -> str:
    return name.replace(".", "__")  # a name of a module may not contain a dot


def _paired(
    pairs: Mapping[str, str], mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The student's and the teacher's tensors of each pair, by name of the student's."""

    def of(name: str, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k: v for k, v in features.items() if k == name or k.startswith(f"{name}[")}

    found: dict[str, tuple[Tensor, Tensor]] = {}
    for student_name, teacher_name in pairs.items():
        v, u = of(student_name, mine), of(teacher_name, theirs)
        if [k.removeprefix(student_name) for k in v] != [k.removeprefix(teacher_name) for k in u]:
            raise ValueError(
                f"FeatureHints: {student_name!r} of the student returns {list(v)}, "
                f"{teacher_name!r} of the teacher {list(u)}; as many maps of the same names are "
                "required; name layers that return one map each."
            )
        found |= {key: (v[key], value) for key, value in zip(v, u.values(), strict=True)}
    return found


def _common_size(v: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps (B, C, H, W) averaged down to the smaller of their sizes along each axis."""
    if v.shape[2:] == u.shape[2:]:
        return v, u
    size = min(v.shape[2], u.shape[2]), min(v.shape[3], u.shape[3])
    return F.adaptive_avg_pool2d(v, size), F.adaptive_avg_pool2d(u, size)


@torch.no_grad()
def _run_once(
    model: nn.Module, names: Sequence[str], example: Any, *, of: str
) -> dict[str, Tensor]:
    """What the layers of `names` return for `example` in eval mode; modes are put back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with record_features(model, names) as features:
            model(example)
    finally:
        for module, mode in modes.items():
            module.training = mode
    check_recorded(names, features, of=of)
    return features
