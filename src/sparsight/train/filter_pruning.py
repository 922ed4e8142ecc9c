"""Filters that are set to zero while a network trains: SFP and FPGM as a callback."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import lightning as L
import torch
from torch import Tensor, nn

from sparsight.compress import (
    find_channel_groups,
    fitting_ratio,
    norms_behind,
    remove_zero_filters,
    weakest_filters,
)
from sparsight.compress.filter_importance import filters_of
from sparsight.measure import count_macs
from sparsight.nn.evaluating import evaluating
from sparsight.train.architecture import AnyArchitecture, pruned_architecture
from sparsight.train.sampling_flags import SamplingFlags

Where = Callable[[str, nn.Module], bool]
FilterMethod = Literal["sfp", "fpgm"]
Kind = TypeVar("Kind", bound=AnyArchitecture)
_LARGEST_SIDE = 256  # pixels; tracing keeps what a backward pass would need


def is_not_shortcut(name: str, module: nn.Module) -> bool:
    """Whether a convolution takes part by default: all but those of residual shortcuts."""
    return "downsample" not in name.split(".")


class FilterPruning(L.Callback):
    """Sets the weakest filters of every convolution to zero, again and again, as training goes on.

    Before training, after every few epochs, and after the last one the filters are chosen anew from
    the weights as they are. What is zero at the end can be removed:
    `sparsight.compress.remove_zero_filters`.

    SFP is `FilterPruning(norm_ratio=0.3)`: in between all filters train, and one that was set to
    zero may come back. FPGM is `FilterPruning(distance_ratio=0.3, is_soft=False)`: in between the
    gradients of the chosen filters are zero. Its mix is `norm_ratio=0.1, distance_ratio=0.2`.

    Args:
        norm_ratio: share of a layer's filters, in [0, 1), taken by their small Euclidean norm.
        distance_ratio: share, of all filters, taken by their small sum of distances to the others
            that the norm has left.
        is_soft: chosen filters go on training.
        every_n_epochs: between two choices, at least 1.
        where: where(qualified name in the task's model, convolution) -> bool; default: every
            convolution but those of the shortcuts named `downsample`, the stem included. Leave out
            a convolution whose channels are the model's output.
        norms: norm behind each convolution, by name, see `sparsight.compress.norms_behind`. Its
            bias and running mean for a chosen filter are set to zero as well, so that the channel
            is silent: without `is_soft` at each choice, with it at the last one alone, for behind
            a ReLU nothing comes back from silence. Default None: they are left alone, as
            published, and the channel of a zero filter is a constant.

    Raises:
        ValueError: shares out of range, both 0, or less than one epoch.

    The choice follows from the weights alone, which are the same in all processes of a run; it is
    part of the training state, so that a resumed run goes on as the uninterrupted one.

    Source: He, Kang, Dong, Fu, Yang, "Soft Filter Pruning", IJCAI 2018, arXiv 1808.06866; He, Liu,
    Wang, Hu, Yang, "Filter Pruning via Geometric Median", CVPR 2019, arXiv 1811.00250. The text of
    the second calls its schedule soft; its code masks gradients, and so does ours. Momentum from
    before a choice still moves a filter within the epoch, as in that code. Silencing norms is ours.
    """

    def __init__(
        self,
        *,
        norm_ratio: float = 0.0,
        distance_ratio: float = 0.0,
        is_soft: bool = True,
        every_n_epochs: int = 1,
        where: Where = is_not_shortcut,
        norms: Mapping[str, str] | None = None,
    ) -> None:
        weakest_filters(torch.zeros(1, 1), norm_ratio=norm_ratio, distance_ratio=distance_ratio)
        if norm_ratio == distance_ratio == 0:
            raise ValueError(
                "FilterPruning: norm_ratio and distance_ratio are both 0; a share of filters to "
                "set to zero is required; pass norm_ratio=0.3 for SFP, distance_ratio=0.3 for FPGM."
            )
        if every_n_epochs < 1:
            raise ValueError(
                f"FilterPruning: every_n_epochs={every_n_epochs}; at least 1 is required; pass 1 "
                "to choose after every epoch, as published."
            )
        self.norm_ratio = norm_ratio
        self.distance_ratio = distance_ratio
        self.is_soft = is_soft
        self.every_n_epochs = every_n_epochs
        self.where = where
        self.norms = dict(norms or {})
        self.chosen: dict[str, Tensor] = {}  # convolution -> (O,) bool, True where it is zero
        self._epoch = -1  # of the last choice; -1 for that before training

    def state_dict(self) -> dict[str, Any]:
        """Return what was chosen, for the training state."""
        return {"epoch": self._epoch, "chosen": {n: c.cpu() for n, c in self.chosen.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was chosen."""
        self._epoch = state_dict["epoch"]
        self.chosen = dict(state_dict["chosen"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Choose before the first step; a resumed run has chosen already."""
        if not self.chosen:
            self.choose(_model(pl_module))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Without `is_soft`, let no gradient reach a chosen filter."""
        if self.is_soft:
            return
        for name, chosen in self.chosen.items():
            layer: Any = _model(pl_module).get_submodule(name)
            for parameter in (layer.weight, layer.bias):
                if parameter is not None and parameter.grad is not None:
                    parameter.grad[chosen.to(parameter.device)] = 0

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Choose before the epoch's validation: what is scored is what would be kept."""
        if trainer.state.fn == "fit":
            self._after_epoch(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Choose after an epoch without validation."""
        self._after_epoch(trainer, pl_module)

    def _after_epoch(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epoch = trainer.current_epoch
        if trainer.sanity_checking or self._epoch == epoch:
            return
        is_last = epoch + 1 == trainer.max_epochs
        if is_last or (epoch + 1) % self.every_n_epochs == 0:
            self._epoch = epoch
            self.choose(_model(pl_module), is_last=is_last)

    @torch.no_grad()
    def choose(self, model: nn.Module, *, is_last: bool = False) -> None:
        """Choose filters of `model` by its weights and set them to zero, in place.

        Args:
            model: the task's.
            is_last: nothing is trained afterwards.

        Raises:
            ValueError: it has no convolution that takes part.
        """
        layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Conv2d) and self.where(name, module)
        }
        if not layers:
            raise ValueError(
                f"FilterPruning: {type(model).__name__} has no convolution for which where is "
                "True; one at least is required; pass another where."
            )
        for name, module in layers.items():
            layer: Any = module
            chosen = weakest_filters(
                filters_of(layer), norm_ratio=self.norm_ratio, distance_ratio=self.distance_ratio
            )
            self.chosen[name] = chosen
            layer.weight[chosen] = 0
            if layer.bias is not None:
                layer.bias[chosen] = 0
            if name in self.norms and (is_last or not self.is_soft):
                norm: Any = model.get_submodule(self.norms[name])
                norm.running_mean[chosen] = 0
                if norm.bias is not None:
                    norm.bias[chosen] = 0


def _model(pl_module: Any) -> nn.Module:
    return pl_module.model


def plan_filter_pruning(
    method: FilterMethod,
    model: nn.Module,
    example: Tensor,
    *,
    ratio: float | None,
    norm_ratio: float = 0.0,
    budget: float | None = None,
    part: str = "",
) -> FilterPruning:
    """Return the callback that a recipe's flags ask for.

    Args:
        method: "sfp", soft filter pruning by norm, or "fpgm", by distances.
        model: that is going to be trained; not changed.
        example: (1, 3, H, W), of the shape that multiply-adds are counted at.
        ratio: share of each layer's filters to set to zero, in (0, 1).
        norm_ratio: of "fpgm", the part of `ratio` that is taken by norm.
        budget: instead of `ratio`, share of the model's multiply-adds that the network is to need
            once its zero filters are removed; those of the residual stream stay.
        part: name of the submodule of `model` whose filters are pruned, and whose multiply-adds the
            budget is of; it is called with the example. Default: all of the model.

    Returns:
        The callback, for all convolutions but those of shortcuts, those whose channels are outputs,
        and those that do not learn.

    Raises:
        ValueError: neither or both of `ratio` and `budget`, or one out of range; `norm_ratio` with
            "sfp", or above the ratio; a budget that the other layers alone exceed.
        ImportError: the extra `sparsight[compress]` is not installed.
    """
    if (ratio is None) == (budget is None):
        raise ValueError(
            f"plan: method={method!r} with filter_ratio={ratio} and budget={budget}; exactly one "
            "of them is required; pass --filter_ratio 0.3, or --budget 0.7 for the share of MACs."
        )
    if budget is not None:
        if not 0 < budget < 1:
            raise ValueError(
                f"plan: budget={budget} with method={method!r}; a share of the dense MACs in "
                "(0, 1) is required; pass 0.7 to save 30 %."
            )
        ratio = fitting_ratio(model.get_submodule(part), example, speedup=1 / budget)
    assert ratio is not None
    if norm_ratio and (method == "sfp" or not 0 < norm_ratio <= ratio):
        raise ValueError(
            f"plan: filter_norm_ratio={norm_ratio} with method={method!r} and a ratio of "
            f"{ratio:.3g}; it is the part of FPGM's filters that their norm decides; pass at most "
            "the ratio, with --method fpgm."
        )
    inside, prefix = model.get_submodule(part), f"{part}." if part else ""
    # What could not remove them is to fail before training.
    groups = find_channel_groups(inside, example)
    outputs = {name for group in groups if not group.consumers for name in group.producers}
    with evaluating(inside):
        norms = norms_behind(inside, example)

    def takes_part(name: str, module: nn.Module) -> bool:
        return (
            name.startswith(prefix)
            and name.removeprefix(prefix) not in outputs
            and is_not_shortcut(name, module)
            and any(parameter.requires_grad for parameter in module.parameters())
        )

    settings: dict[str, Any] = {
        "where": takes_part,
        "norms": {prefix + conv: prefix + norm for conv, norm in norms.items()},
    }
    if method == "sfp":
        return FilterPruning(norm_ratio=ratio, **settings)
    return FilterPruning(
        norm_ratio=norm_ratio, distance_ratio=ratio - norm_ratio, is_soft=False, **settings
    )


def pruning_of(
    flags: SamplingFlags, network: nn.Module, size: tuple[int, int], *, name: str, part: str = ""
) -> FilterPruning | None:
    """Return the callback that a run's flags ask for; None where its method prunes no filters.

    Args:
        flags: of the run.
        network: that is going to be trained; not changed.
        size: (height, width) of its input in pixels; shares are counted at 256 at most.
        name: of the run, for messages.
        part: see `plan_filter_pruning`.

    Raises:
        ValueError: flags that contradict each other, also as for `plan_filter_pruning`.
        ImportError: the extra `sparsight[compress]` is not installed.
    """
    prunes = flags.method in ("sfp", "fpgm")
    if (prunes and flags.sampling_weight is not None) or (
        not prunes and flags.filter_ratio is not None
    ):
        raise ValueError(
            f"{name}: method={flags.method!r} with sampling_weight={flags.sampling_weight} and "
            f"filter_ratio={flags.filter_ratio}; what is pruned has no price, and what is sampled "
            "no filters to choose; drop one of them."
        )
    if flags.method != "sfp" and flags.method != "fpgm":
        return None
    return plan_filter_pruning(
        flags.method,
        network,
        _example_at(size),
        ratio=flags.filter_ratio,
        norm_ratio=flags.filter_norm_ratio,
        budget=flags.budget,
        part=part,
    )


def remove_pruned_filters(
    network: nn.Module, architecture: Kind, *, part: str = ""
) -> tuple[nn.Module, Kind, float]:
    """Return a trained network without its zero filters, its architecture, and what is left.

    Args:
        network: in eval mode, on the CPU; where a part of it is pruned, it is changed.
        architecture: of the network.
        part: see `plan_filter_pruning`.

    Returns:
        Network, architecture, and share of the multiply-adds of the part.
    """
    example = _example_at(architecture.size)
    inside = network.get_submodule(part)
    before = count_macs(inside, example).total
    smaller = remove_zero_filters(inside, example)
    share = count_macs(smaller, example).total / before
    if part:
        parent, _, attribute = part.rpartition(".")
        setattr(network.get_submodule(parent), attribute, smaller)
    else:
        network = smaller
    narrow: Any = pruned_architecture(architecture, network)
    return network, narrow, share


def _example_at(size: tuple[int, int]) -> Tensor:
    height, width = (min(side, _LARGEST_SIDE) for side in size)
    return torch.zeros(1, 3, height, width)
