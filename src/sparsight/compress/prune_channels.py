"""Channel pruning by LASSO and least squares: fewer channels, nearly the same features.

Letters in shapes: B images, C channels, H W height and width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from sparsight.compress.image_batches import read_batches
from sparsight.compress.layer_widths import candidate_widths, count_cost
from sparsight.compress.prune_targets import PruneTarget, layer_costs
from sparsight.compress.pruning_run import PruningReport, PruningRun
from sparsight.nn.evaluating import evaluating

__all__ = ["prune_channels"]


def prune_channels(
    model: nn.Module,
    images: Tensor | Iterable[Any],
    *,
    speedup: float | None = None,
    ratio: float | Mapping[str, float] | None = None,
    round_to: int = 16,
    where: Callable[[str, nn.Module], bool] | None = None,
    num_positions: int | None = None,
    seed: int = 0,
    reconstruct: bool = True,
    multi_branch: bool = True,
    branch_inputs: bool = False,
    batch_size: int | None = None,
    shows_progress: bool = False,
) -> nn.Module:
    """A physically smaller copy of a trained model, whose features are nearly those of the source.

    Layer by layer, from the front: LASSO on sampled feature patches chooses the channels that the
    next layers need least; they are removed from all layers that hold them; and the filters of
    the next layers are fitted again, by least squares, from what the pruned network computes to
    what the *original* one did, so that errors do not add up. No labels, no gradients, minutes.

    The copy is an ordinary model with the class and call contract of the source: fine-tune it,
    `sparsify`, `freeze` and export it. Its state_dict records the widths:
    :func:`sparsight.compress.load_pruned` loads it into a fresh model of full width.

    In a residual network the stream keeps its width, for all blocks add to it. The layers inside
    a branch are pruned, and the branch's last layer also makes up for what the shortcut has lost
    so far. Depthwise and grouped convolutions lose whole groups. Where several layers read the
    same channels, one choice is made for all of them, by the sum of their errors.

    Args:
        model: a trained, dense model in any mode; not changed.
        images: (N, C, H, W) as the model takes them, or an iterable of batches, each what the model
            takes as its one argument (a tensor, a list of images for a detector; of a pair with
            labels the first is taken), read once and kept. The published runs take 5,000; 500 to
            1,000 come close.
        speedup: how many times fewer multiply-adds, at least 1: 2.0 halves them. All convolutions
            and linear layers are counted, pruned or not. Every group then gets a width of its own:
            its error alone is measured at up to eight widths, and the widths are chosen such that
            the last multiply-add saved costs the same error everywhere.
        ratio: instead of `speedup`, the share of channels to remove, in [0, 1), from all groups; or
            one for each layer that is named, and none from the others. A group of channels is named
            as any layer that produces it.
        round_to: widths become multiples of it, since the kernels compute in vectors (16 floats in
            AVX-512). Groups of fewer than eight times as many channels get the largest power of two
            that leaves them eight steps: 2 for 16 channels, 4 for 32, 8 for 64. 1 allows any width.
        where: where(qualified name, module) -> bool for the layers that produce channels; those for
            which it is False keep theirs. Default: all that can be pruned.
        num_positions: sampled positions of an image in each layer, drawn once for the run,
            independently for every image. Default None: what makes 50,000 samples, as many as
            published (10 positions of 5,000 images), but 10 to 100. More of fewer images do nearly
            as well.
        seed: of the positions; the same seed gives the same model, bit for bit, on the same machine
            and number of threads.
        reconstruct: fit the filters again by least squares. Default True; False only removes.
        multi_branch: the last layer of a residual branch makes up for the error of the shortcut.
            Default True.
        branch_inputs: also let the first layer of a residual branch read a part of the stream only,
            by a :class:`sparsight.nn.ChannelSelect` before it. The paper does; default False, for
            the selection copies a map where the multiply-adds saved are few, and a block that holds
            it is left dense by `sparsify`'s default.
        batch_size: images in a batch, where `images` is one tensor. Default None: as many as
            together have 2**18 pixels, at most 128.
        shows_progress: draw a bar on standard error.

    Returns:
        The pruned model in the mode of the source, its attribute `pruning_report` a
        :class:`PruningReport`. With nothing to remove it is a copy, bit for bit.

    Raises:
        TypeError: the model is no module.
        ValueError: neither or both of `speedup` and `ratio`; one out of range; a name that is no
            layer, or one that cannot be pruned alone, with the group it belongs to; nothing that
            can be pruned; a speed-up out of reach, with the largest that is not; no images, or of a
            wrong shape; fewer samples than channels; NaN in the activations.
        ImportError: the extra `sparsight[compress]` is not installed.

    Cost: about three passes over the images, for a network of blocks; normal equations of a layer
    with D = in_channels * kernel size columns take 8 * D * D bytes, and rows of the original
    up to 1 GiB.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()
        >>> pruned = prune_channels(net, torch.rand(8, 3, 16, 16), speedup=2.0)
        >>> pruned[0].weight.shape, pruned[2].weight.shape
        (torch.Size([8, 3, 3, 3]), torch.Size([8, 8, 3, 3]))

    Source: He, Zhang, Sun, "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017,
    arXiv 1707.06168. Widths by sensitivity and second moments instead of stored patches are ours.
    """
    _check_arguments(model, speedup, ratio, round_to, num_positions)
    batches = read_batches(images, batch_size)
    if num_positions is None:
        num_positions = min(100, max(10, -(-50_000 // sum(len(batch) for batch in batches))))
    with evaluating(model):
        pruned: Any = copy.deepcopy(model)
        run = PruningRun(
            model,
            batches,
            num_positions=num_positions,
            seed=seed,
            refits=reconstruct,
            corrects_shortcut=multi_branch,
            shows_progress=shows_progress,
        )
        targets = run.find_targets(branch_inputs)
        targets = _selected(model, targets, run.reasons, ratio, where)
        if speedup is not None:
            widths = run.widths_for(targets, speedup, round_to)
        else:
            assert ratio is not None
            widths = _widths_at(targets, ratio, round_to)
        layers = run.prune(pruned, targets, widths)
        costs = layer_costs(model, run.uses, targets)
        full = {target.name: target.units for target in targets}
        report = PruningReport(
            round(count_cost(costs, full)),
            round(count_cost(costs, {**full, **widths})),
            tuple(layers),
            tuple(run.reasons.items()),
        )
    for name, module in pruned.named_modules():
        module.training = _training_of(model, name)
    pruned.pruning_report = report
    return pruned


def _training_of(model: nn.Module, name: str) -> bool:
    """The mode of the module of this name, or of the closest one around it in the source."""
    while name:
        try:
            return model.get_submodule(name).training
        except AttributeError:
            name = name.rpartition(".")[0]
    return model.training


def _widths_at(
    targets: list[PruneTarget], ratio: float | Mapping[str, float], round_to: int
) -> dict[str, int]:
    widths = {}
    for target in targets:
        share = ratio if isinstance(ratio, int | float) else _ratio_of(target, ratio)
        wanted = (1 - share) * target.units
        candidates = candidate_widths(target.units, target.channels, round_to)
        widths[target.name] = min(candidates, key=lambda width: (abs(width - wanted), -width))
        if share == 0:
            widths[target.name] = target.units
    return widths


def _names_of(target: PruneTarget) -> set[str]:
    group = target.group
    return {target.name, *((*group.producers, *group.grouped) if group is not None else ())}


def _ratio_of(target: PruneTarget, ratio: Mapping[str, float]) -> float:
    named = [share for name, share in ratio.items() if name in _names_of(target)]
    return max(named, default=0.0)


def _selected(
    model: nn.Module,
    targets: list[PruneTarget],
    reasons: Mapping[str, str],
    ratio: float | Mapping[str, float] | None,
    where: Callable[[str, nn.Module], bool] | None,
) -> list[PruneTarget]:
    """The targets that the caller means; ValueError for names that are none."""
    if isinstance(ratio, Mapping):
        for name, share in ratio.items():
            if any(name in _names_of(target) for target in targets) or share == 0:
                continue
            why = reasons.get(name)
            if why is None:
                why = (
                    "it has no channels that anything reads"
                    if name in dict(model.named_modules())
                    else "the model has no such layer"
                )
            raise ValueError(
                f"prune_channels: ratio names {name!r}, which cannot be pruned alone: {why}; name "
                f"layers that can: {', '.join(target.name for target in targets[:5])}, ..."
            )
        named = [target for target in targets if _names_of(target) & set(ratio)]
    else:
        named = [target for target in targets if target.refusal is None]
        for target in targets:
            if (
                target.refusal is not None
                and target.group is not None
                and isinstance(reasons, dict)
            ):
                reasons[target.name] = target.refusal
    if where is not None:
        named = [
            target
            for target in named
            if any(
                where(name, model.get_submodule(name))
                for name in _names_of(target)
                if not name.endswith(":in")
            )
        ]
    if not named and not (isinstance(ratio, Mapping) and not ratio):
        listed = "; ".join(f"{name}: {why}" for name, why in list(reasons.items())[:5])
        raise ValueError(
            f"prune_channels: no channels of {type(model).__name__} can be pruned"
            f"{' where `where` is True' if where is not None else ''}; a layer whose channels are "
            f"read by other convolutions or linear layers is required ({listed})."
        )
    return named


def _check_arguments(
    model: Any, speedup: Any, ratio: Any, round_to: Any, num_positions: Any
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"prune_channels: model is a {type(model).__name__}; a torch.nn.Module is required; "
            "pass the trained model itself."
        )
    if (speedup is None) == (ratio is None):
        raise ValueError(
            f"prune_channels: speedup is {speedup} and ratio is {ratio}; exactly one of them is "
            "required; pass speedup=2.0 to halve the multiply-adds, or ratio=0.5 to halve widths."
        )
    if speedup is not None and not (math.isfinite(speedup) and speedup >= 1):
        raise ValueError(
            f"prune_channels: speedup is {speedup}; 1 or more is required, how many times fewer "
            "multiply-adds; pass 2.0 to halve them."
        )
    shares = ratio.items() if isinstance(ratio, Mapping) else [("", ratio)]
    for name, share in shares if ratio is not None else ():
        if not isinstance(share, int | float) or not 0 <= share < 1:
            at = f" for {name!r}" if name else ""
            raise ValueError(
                f"prune_channels: ratio{at} is {share}; a share in [0, 1) is required, that of the "
                "channels to remove; pass 0.5 for half of them."
            )
    for name, value in (("round_to", round_to), ("num_positions", num_positions)):
        if name == "num_positions" and value is None:
            continue
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"prune_channels: {name} is {value}; an integer from 1 is required; leave it out "
                "for the default."
            )
