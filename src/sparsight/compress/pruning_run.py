"""One pass of channel pruning through a network, from the front."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsight.compress.channel_groups import find_channel_groups, keep_channels
from sparsight.compress.fit_layers import TargetFit, make_reader
from sparsight.compress.layer_widths import candidate_widths, count_cost, spread_widths
from sparsight.compress.load_pruned import insert_select
from sparsight.compress.narrow import keep_indices
from sparsight.compress.observe_layers import LayerUse, Rows, read_rows, survey_layers
from sparsight.compress.prune_targets import (
    PruneTarget,
    find_targets,
    layer_costs,
    without_channels,
)
from sparsight.compress.replay import Replay
from sparsight.compress.sample_patches import draw_positions

__all__ = ["PrunedLayer", "PruningReport", "PruningRun"]

_MAX_BYTES = 1 << 30
_NUM_CURVE_POINTS = 8


@dataclass(frozen=True)
class PrunedLayer:
    """What became of one group of channels.

    Attributes:
        name: the layer that produces them; with ":in", a layer that now reads some of its input.
        channels: how many there were.
        kept: how many are left.
        error: squared error of the layers that read them when the channels are taken out, behind
            their norm, relative to the variance of what they are added to; summed over readers.
        refitted_error: the same after least squares.
    """

    name: str
    channels: int
    kept: int
    error: float
    refitted_error: float


@dataclass(frozen=True)
class PruningReport:
    """What `prune_channels` did; the attribute `pruning_report` of the model it returns.

    Attributes:
        macs_before: multiply-adds of convolutions and linear layers for the first two images.
        macs_after: the same of the pruned model.
        layers: one entry for every group of channels that was considered, from the front.
        left: (name, reason) of every layer whose output channels could not be pruned.
    """

    macs_before: int
    macs_after: int
    layers: tuple[PrunedLayer, ...]
    left: tuple[tuple[str, str], ...] = field(repr=False)

    @property
    def speedup(self) -> float:
        """Multiply-adds before, divided by those after."""
        return self.macs_before / self.macs_after

    def __str__(self) -> str:
        lines = [
            f"{self.speedup:.2f}x fewer multiply-adds ({self.macs_before:,} -> {self.macs_after:,})"
        ]
        lines += [
            f"{layer.name}: {layer.kept} of {layer.channels} channels, relative error "
            f"{layer.error:.4f}, {layer.refitted_error:.4f} after least squares"
            for layer in self.layers
            if layer.kept < layer.channels
        ]
        return "\n".join(lines)


class PruningRun:
    """The images and positions of one run, the original network, and what was read from it.

    Args:
        model: the original, in eval mode; not changed.
        batches: what it takes, one after the other.
        num_positions: sampled positions of an image in each layer.
        seed: of the positions.
        refits: fit the filters of the readers again.
        corrects_shortcut: the last layer of a branch makes up for what the shortcut has lost.
        shows_progress: draw a bar on standard error.

    Attributes:
        uses: how the model uses its layers, by name.
        reasons: why the output channels of a layer are left alone, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: list[Any],
        *,
        num_positions: int,
        seed: int,
        refits: bool,
        corrects_shortcut: bool,
        shows_progress: bool,
    ) -> None:
        self.model = model
        self.batches = batches
        self.refits = refits
        self.corrects_shortcut = corrects_shortcut
        self.shows_progress = shows_progress
        self.num_positions = num_positions
        self.counts = [len(batch) for batch in batches]
        self.shares = draw_positions(self.counts, num_positions, seed=seed)
        self.example = batches[0][:2]  # two: what counts objects shows by their number
        self.uses = _survey(model, self.example)
        self.reasons: dict[str, str] = {}
        self.originals: dict[str, list[dict[str, list[Rows]]]] = {}

    def find_targets(self, selects_inputs: bool) -> list[PruneTarget]:
        """Return what can be pruned, from the front; `reasons` says why the rest cannot."""
        groups = find_channel_groups(self.model, self.example[:1])
        targets, self.reasons = find_targets(
            self.model,
            groups,
            self.uses,
            num_images=len(self.example),
            num_rows=self._num_rows,
            selects_inputs=selects_inputs,
        )
        return targets

    def _layer(self, name: str) -> Any:
        return self.model.get_submodule(name)

    def _num_rows(self, use: LayerUse) -> int:
        is_linear = isinstance(self._layer(use.name), nn.Linear)
        per_map = 1 if is_linear else self.num_positions
        return sum(self.counts) * per_map * use.num_calls

    def _fit(self, target: PruneTarget, model: nn.Module) -> TargetFit:
        readers = [
            make_reader(model, self.uses[name], units)
            for name, units in target.unit_of_channel.items()
        ]
        return TargetFit(target, readers, corrects_shortcut=self.corrects_shortcut)

    def _row_bytes(self, target: PruneTarget) -> int:
        """What keeping the original's rows for a target takes."""
        total = 0
        for name in target.unit_of_channel:
            use, layer = self.uses[name], self._layer(name)
            total += self._num_rows(use) * len(layer.weight) * 4 * (2 if use.num_sums else 1)
        return total

    def _moment_bytes(self, target: PruneTarget) -> int:
        weights = [self._layer(name).weight for name in target.unit_of_channel]
        return sum(8 * w[0].numel() * (w[0].numel() + len(w)) for w in weights)

    def widths_for(
        self, targets: list[PruneTarget], speedup: float, round_to: int
    ) -> dict[str, int]:
        """Return the widths of least damage, by each target's error alone."""
        costs = layer_costs(self.model, self.uses, targets)
        candidates = {
            target.name: candidate_widths(target.units, target.channels, round_to)
            for target in targets
        }
        full = {target.name: target.units for target in targets}
        narrowest = {name: widths[0] for name, widths in candidates.items()}
        total, least = count_cost(costs, full), count_cost(costs, narrowest)
        if total < speedup * least * (1 - 1e-9):
            raise ValueError(
                f"prune_channels: speedup is {speedup:g}, but with every one of {len(targets)} "
                f"groups at its smallest width it is {total / least:.3g}; a speed-up up to that is "
                "required; lower it, or round_to, or let `where` select more layers."
            )
        if speedup == 1:
            return full
        damage: dict[str, dict[int, float]] = {}
        rest = list(targets)
        while rest:
            part = [rest.pop(0)]
            taken = self._moment_bytes(part[0])
            while rest and taken + self._moment_bytes(rest[0]) <= _MAX_BYTES:
                part.append(rest.pop(0))
                taken += self._moment_bytes(part[-1])
            fits = self._observe_original(part)
            for target, fit in zip(part, fits, strict=True):
                fit.check_rows()
                damage[target.name] = _damage_curve(
                    fit, candidates[target.name], refits=self.refits
                )
                self._show(len(damage), 2 * len(targets), f"{target.name}: measured")
        widths = spread_widths(costs, damage, max_cost=total / speedup)
        assert widths is not None
        return widths

    def _observe_original(self, targets: list[PruneTarget]) -> list[TargetFit]:
        """Fit targets to the original network's own inputs; keep its outputs if there is room."""
        fits = [self._fit(target, self.model) for target in targets]
        uses = {name: self.uses[name] for target in targets for name in target.unit_of_channel}
        keeps = self._room() >= sum(self._row_bytes(target) for target in targets)
        for batch, shares in zip(self.batches, self.shares, strict=True):
            rows = read_rows(self.model, batch, shares, uses.values(), reads_inputs=True)
            for fit in fits:
                fit.add(rows, rows)
            if keeps:
                self._remember(targets, rows)
        return fits

    def _room(self) -> int:
        used = sum(
            tensor.nbytes
            for kept in self.originals.values()
            for rows in kept
            for calls in rows.values()
            for call in calls
            for tensor in (call.outputs, call.shortcut)
            if tensor is not None
        )
        return _MAX_BYTES - used

    def _remember(self, targets: list[PruneTarget], rows: Mapping[str, list[Rows]]) -> None:
        for target in targets:
            kept = {
                name: [Rows(None, call.outputs, call.shortcut) for call in rows[name]]
                for name in target.unit_of_channel
            }
            self.originals.setdefault(target.name, []).append(kept)

    def _original_rows(self, targets: list[PruneTarget]) -> list[dict[str, list[Rows]]]:
        """Return what the original showed for the first target; read for the next ones too."""
        name = targets[0].name
        if name not in self.originals:
            part, room = [targets[0]], self._room() - self._row_bytes(targets[0])
            for target in targets[1:]:
                room -= self._row_bytes(target)
                if room < 0 or target.name in self.originals:
                    break
                part.append(target)
            uses = {n: self.uses[n] for target in part for n in target.unit_of_channel}
            for batch, shares in zip(self.batches, self.shares, strict=True):
                rows = read_rows(self.model, batch, shares, uses.values(), reads_inputs=False)
                self._remember(part, rows)
        return self.originals.pop(name)

    def prune(
        self, pruned: nn.Module, targets: list[PruneTarget], widths: Mapping[str, int]
    ) -> list[PrunedLayer]:
        """Prune a copy of the original in place, from the front."""
        todo = [target for target in targets if widths[target.name] < target.units]
        done: dict[str, PrunedLayer] = {}
        replay = Replay(pruned, self.example, max_bytes=_MAX_BYTES)
        selected: dict[str, Tensor] = {}
        hooks = []
        while todo:
            target = todo[0]
            fit = self._fit(target, pruned)
            self._collect(replay, pruned, fit, todo)
            fit.check_rows()
            kept = fit.choose(widths[target.name])
            before = after = 0.0
            solved = {}
            for reader in fit.readers:
                plain, _ = fit.solve(reader, kept, refits=False)
                solved[reader.name] = fit.solve(reader, kept, refits=self.refits)
                before += fit.error(reader, kept, plain)
                after += fit.error(reader, kept, solved[reader.name][0])
            if target.group is not None:
                keep_channels(pruned, target.group, kept)
            else:
                (name,) = target.unit_of_channel
                conv = pruned.get_submodule(name)
                keep_indices(conv, "in", kept.tolist())
                selected[name] = kept
                hooks.append(conv.register_forward_pre_hook(_select_hook(kept)))
            for name, (weight, bias) in solved.items():
                if bias is not None:
                    _write(pruned, self.uses[name], weight, bias)
            size = _size(target)
            done[target.name] = PrunedLayer(
                target.name, target.units * size, len(kept) * size, before, after
            )
            todo = [without_channels(other, target, kept) for other in todo[1:]]
            self._show(len(done), len(done) + len(todo), f"{target.name}: {len(kept)} channels")
        for hook in hooks:
            hook.remove()
        for name, kept in selected.items():
            insert_select(pruned, name, kept)
        layers = []
        for target in targets:
            width = _size(target) * target.units
            layers.append(done.get(target.name, PrunedLayer(target.name, width, width, 0, 0)))
        return layers

    def _collect(
        self, replay: Replay, pruned: nn.Module, fit: TargetFit, todo: list[PruneTarget]
    ) -> None:
        originals = self._original_rows(todo)
        uses = [self.uses[name] for name in fit.target.unit_of_channel]
        touched = {name for target in todo for name in target.touched}
        changed = min(touched, key=lambda name: self.uses[name].order)

        def read(i: int, batch: Any) -> None:
            rows = read_rows(pruned, batch, self.shares[i], uses, reads_inputs=True)
            fit.add(originals[i], rows)

        replay.run(self.batches, changed=changed, run=read)

    def _show(self, done: int, total: int, text: str) -> None:
        if self.shows_progress:
            filled = 24 * done // max(1, total)
            bar = "#" * filled + "." * (24 - filled)
            end = "\n" if done == total else ""
            print(f"\rprune_channels [{bar}] {text:<60}", end=end, file=sys.stderr, flush=True)


def _size(target: PruneTarget) -> int:
    """Channels of the producer in each unit."""
    group = target.group
    return 1 if group is None else len(group.of(group.name, "out").units[0])


def _select_hook(kept: Tensor) -> Callable[..., tuple[Tensor]]:
    return lambda module, args: (args[0].index_select(1, kept.to(args[0].device)),)


def _write(model: nn.Module, use: LayerUse, weight: Tensor, bias: Tensor) -> None:
    """Set a layer's filters, and add to its output: by its bias, else by its norm's mean."""
    layer: Any = model.get_submodule(use.name)
    with torch.no_grad():
        layer.weight.copy_(weight.view_as(layer.weight))
        if layer.bias is not None:
            layer.bias.copy_(bias)
        elif use.norm is not None:
            norm: Any = model.get_submodule(use.norm)
            norm.running_mean.sub_(bias.to(norm.running_mean))


def _damage_curve(fit: TargetFit, widths: list[int], *, refits: bool) -> dict[int, float]:
    """Damage at every width; between up to eight measured ones it is interpolated in its root."""
    step = max(1, -(-(len(widths) - 1) // _NUM_CURVE_POINTS))
    measured = {width: fit.damage(width, refits=refits) for width in widths[:-1][::step]}
    measured[widths[-1]] = 0.0
    points = sorted(measured)
    # LASSO need not be monotone: a narrower layer is never the better one.
    for lower, upper in zip(points[-2::-1], points[:0:-1], strict=True):
        measured[lower] = max(measured[lower], measured[upper])
    curve = {}
    for width in widths:
        upper = min(point for point in points if point >= width)
        lower = max(point for point in points if point <= width)
        share = 0.0 if upper == lower else (width - lower) / (upper - lower)
        root = (1 - share) * math.sqrt(measured[lower]) + share * math.sqrt(measured[upper])
        curve[width] = root**2
    return curve


def _survey(model: nn.Module, batch: Any) -> dict[str, LayerUse]:
    try:
        return survey_layers(model, batch)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        kind = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
        raise ValueError(
            f"prune_channels: images: the model does not run on a batch {kind} of them ({error}); "
            "pass what the model takes: (N, C, H, W), or an iterable of its batches."
        ) from error
