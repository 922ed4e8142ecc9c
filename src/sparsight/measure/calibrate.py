"""Fit a converted model to a budget without labels: its own dense form is the teacher."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsight.measure.macs import call_model, count_macs
from sparsight.measure.norms import (
    batch_statistics,
    measure_norms,
    norm_state,
    set_norm_state,
)
from sparsight.measure.sampled_layers import interpolation_modules, owns_samplers, samplers_of
from sparsight.nn import Sampler, SamplingDecision, record_sampling, sampling_loss
from sparsight.nn.budget import (
    BudgetController,
    check_budget,
    sampler_levels,
    settle_on_budget,
    share_pull,
)
from sparsight.nn.frozen_block import FrozenBlock

__all__ = ["CalibrationReport", "calibrate"]

# The temperature falls over the first part: the last steps see the masks that inference draws.
_ANNEALED_AT = 0.6
_FINAL_TEMPERATURE = 0.03
_NUM_MEASUREMENTS = 6  # of the share, during fitting
_NUM_MEASURED_IMAGES = 256
_SCALAR_LR_FACTOR = 5.0  # biases and widths are single numbers with far to go
_LARGEST_MISS = 0.02


@dataclass(frozen=True)
class CalibrationReport:
    """What `calibrate` reached; the attribute `calibration_report` of the model it returns.

    Attributes:
        budget: share of the dense MACs that was asked for.
        share: share that the model computes for the images, everything counted.
        feature_error: mean over the sampled layers of |sampled - dense|^2 / |dense|^2 of their
            outputs for the images.
        output_error: the same of the model's outputs; NaN where they cannot be compared.
        num_steps: optimiser steps.
        seconds: wall time.
    """

    budget: float
    share: float
    feature_error: float
    output_error: float
    num_steps: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.share:.3f} of the dense multiply-adds (budget {self.budget:.3f}); relative "
            f"squared error of features {self.feature_error:.4f}, of outputs "
            f"{self.output_error:.4f}; {self.num_steps} steps in {self.seconds:.0f} s"
        )


def calibrate(
    model: nn.Module,
    images: Tensor | Iterable[Any],
    *,
    budget: float,
    num_steps: int = 300,
    batch_size: int = 32,
    lr: float = 3e-3,
    remeasure_norms: bool = False,
    seed: int = 0,
    shows_progress: bool = False,
) -> nn.Module:
    """Fit a converted model to a budget of multiply-adds, without labels, in minutes.

    The samplers and the interpolations learn to reproduce the outputs of the sampled layers and of
    the model, as the same model gives them with full masks (self-distillation), at a share of the
    dense multiply-adds. Every other parameter stays as it is.

    Args:
        model: from :func:`sparsight.sparsify`, with trained weights; changed in place.
        images: (N, C, H, W) float, as the model takes them; or an iterable of batches, each of them
            what the model takes as its one argument (a tensor, or a list of images for a detector),
            read once and kept. A few hundred images suffice; labels are not needed.
        budget: share of the dense model's multiply-adds in (0, 1], everything counted; met within
            0.02, in general within 0.003.
        num_steps: optimiser steps, one batch each. Default 300.
        batch_size: images a step, where `images` is one tensor. Default 32.
        lr: peak learning rate of Adam for the samplers' weights; five times that for biases and
            interpolation widths. It rises never and falls as a half cosine.
        remeasure_norms: also measure the running statistics of the batch norms again, on the images
            and with the masks as they are in the end. Interpolated features vary less than computed
            ones, and statistics of the dense network amplify the loss from layer to layer: with
            new ones deep networks lose far less. Default False: the statistics are those of the
            source, so that with full masks the model still equals it.
        seed: of the order of the images and of the noise while fitting; the same seed gives the
            same result.
        shows_progress: write one line to standard error that counts the steps.

    Returns:
        The same model in eval mode, its attribute `calibration_report` a
        :class:`CalibrationReport`.

    Raises:
        TypeError: the model is no module.
        ValueError: the model is not converted, holds no sampler that learns, or is frozen; the
            budget is outside (0, 1] or not reached by any density; there are no images, or they
            hold NaN or infinite values; or the model returns such values for them.

    Cost: `num_steps` times one dense and one sampled forward and one backward pass.

    Example:
        >>> import sparsight
        >>> net = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 4, 1))
        >>> sampled = sparsight.sparsify(net, where=lambda name, module: name == "0")
        >>> images = torch.rand(8, 3, 16, 16)
        >>> fitted = sparsight.calibrate(sampled, images, budget=0.9, num_steps=5)
        >>> abs(fitted.calibration_report.share - 0.9) < 0.02
        True

    Source: ours. Self-distillation of features follows Romero et al., "FitNets", ICLR 2015, arXiv
    1412.6550; measuring norm statistics again, Yu, Huang, "Universally Slimmable Networks", ICCV
    2019, arXiv 1903.05134, section 3.2.
    """
    _check_model(model)
    check_budget(budget, name="calibrate")
    for name, value in (("num_steps", num_steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"calibrate: {name}={value}; at least 1 is required; leave it out.")
    batches = _batches(model, images, batch_size)
    started = time.perf_counter()
    modes = {module: module.training for module in model.modules()}
    wants_gradient = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            measured = _first_images(batches, _NUM_MEASURED_IMAGES)
            _check_floor(model, measured, budget)
            _fit(
                model,
                batches,
                measured,
                budget=budget,
                num_steps=num_steps,
                lr=lr,
                learns_with_batch_statistics=remeasure_norms,
                shows_progress=shows_progress,
            )
            # Statistics depend on the masks and, by way of the features, masks on the statistics.
            teacher = norm_state(model)
            for _ in range(2 if remeasure_norms else 1):
                if remeasure_norms:
                    measure_norms(model, batches)
                _, share = settle_on_budget(model, lambda: _share(model, measured), budget)
            if remeasure_norms:
                measure_norms(model, batches)
                share = _share(model, measured)
            features, outputs = _errors(model, measured, teacher)
    except BaseException:
        for module, mode in modes.items():
            module.training = mode
        raise
    finally:
        for parameter, wanted in wants_gradient.items():
            parameter.requires_grad_(wanted)
    if not abs(share - budget) <= _LARGEST_MISS:
        raise ValueError(
            f"calibrate: {share:.3f} of the multiply-adds were reached, but budget={budget} was "
            f"asked for, within {_LARGEST_MISS}; take more steps, or another budget."
        )
    result: Any = model
    result.calibration_report = CalibrationReport(
        budget=budget,
        share=share,
        feature_error=features,
        output_error=outputs,
        num_steps=num_steps,
        seconds=time.perf_counter() - started,
    )
    return model


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"calibrate: model is a {type(model).__name__}, but must be a torch.nn.Module; pass "
            "what sparsify returned."
        )
    if any(isinstance(module, FrozenBlock) for module in model.modules()):
        raise ValueError(
            "calibrate: the model is frozen, but samplers that can learn are needed; calibrate "
            "the converted model, then freeze it."
        )
    if not any(isinstance(module, Sampler) for module in model.modules()):
        raise ValueError(
            f"calibrate: {type(model).__name__} has no sparsight.nn.Sampler, but there must be "
            "something to fit; convert the model first, with sparsight.sparsify(model)."
        )


def _batches(model: nn.Module, images: Tensor | Iterable[Any], batch_size: int) -> list[Any]:
    if isinstance(images, Tensor):
        if images.ndim != 4 or len(images) == 0:
            raise ValueError(
                f"calibrate: images have shape {tuple(images.shape)}, but (N, C, H, W) with N >= 1 "
                "is needed; add the batch dimension with images[None]."
            )
        batches: list[Any] = list(images.split(batch_size))
    else:
        batches = list(images)
    if not batches:
        raise ValueError(
            "calibrate: the iterable of images is empty, but at least one batch is needed; pass "
            "some batches of what the model takes."
        )
    device = next(model.parameters()).device
    for i, batch in enumerate(batches):
        leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
        if not leaves:
            raise ValueError(
                f"calibrate: batch {i} is a {type(batch).__name__} without a tensor, but what the "
                "model takes is needed: a tensor or a list of images; leave the labels out."
            )
        for leaf in leaves:
            if leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
                raise ValueError(
                    f"calibrate: batch {i} of the images holds NaN or infinite values, but finite "
                    "ones are needed; look at how it was read and normalised."
                )
    return [_moved(batch, device) for batch in batches]


def _moved(batch: Any, device: torch.device) -> Any:
    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.to(device)
        return leaf.contiguous(memory_format=torch.channels_last) if leaf.ndim == 4 else leaf

    return pytree.tree_map(move, batch)


def _num_images(batch: Any) -> int:
    return len(batch) if isinstance(batch, Tensor | list) else 1


def _first_images(batches: list[Any], number: int) -> list[Any]:
    """Batches, spread over all, with about so many images."""
    wanted = max(1, math.ceil(number / max(1, _num_images(batches[0]))))
    step = max(1, len(batches) // wanted)
    return batches[::step][:wanted]


def _share(model: nn.Module, batches: list[Any]) -> float:
    counts = [count_macs(model, batch) for batch in batches]
    return sum(count.total for count in counts) / sum(count.dense for count in counts)


def _check_floor(model: nn.Module, batches: list[Any], budget: float) -> None:
    """Refuse a budget below what heads and ungated layers cost alone."""
    biases = [m.head.bias for m in model.modules() if isinstance(m, Sampler)]
    with torch.no_grad():
        kept = [bias.clone() for bias in biases if bias is not None]
        for bias in biases:
            assert bias is not None
            bias.fill_(-1e4)
        floor = _share(model, batches[:1])
        for bias, value in zip(biases, kept, strict=True):
            assert bias is not None
            bias.copy_(value)
    if budget < floor:
        raise ValueError(
            f"calibrate: budget={budget}, but {floor:.3f} of the multiply-adds remain where the "
            "samplers compute nothing: their heads, the grid and the layers that are not sampled; "
            "ask for more than that, or sample more layers."
        )


def _fit(
    model: nn.Module,
    batches: list[Any],
    measured: list[Any],
    *,
    budget: float,
    num_steps: int,
    lr: float,
    learns_with_batch_statistics: bool,
    shows_progress: bool,
) -> None:
    samplers = [module for module in model.modules() if isinstance(module, Sampler)]
    weights, scalars = _gate_parameters(model)
    model.requires_grad_(False)
    for parameter in weights + scalars:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(
        [{"params": weights}, {"params": scalars, "lr": lr * _SCALAR_LR_FACTOR}], lr=lr
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / num_steps))
    )
    controller = BudgetController(budget).to(next(model.parameters()).device)
    levels = sampler_levels(model)
    dense_macs: dict[int, int] = {}
    order: list[int] = []
    recent = _expected_share(model, measured[0])
    for step in range(num_steps):
        if not order:
            order = torch.randperm(len(batches)).tolist()
        index = order.pop()
        batch = batches[index]
        if index not in dense_macs:
            dense_macs[index] = count_macs(model, batch).dense
        progress = step / num_steps
        with torch.no_grad(), _full_masks(model), _watched(model) as taught:
            target = call_model(model, batch)
        for sampler in samplers:
            sampler.temperature = _FINAL_TEMPERATURE ** min(1.0, progress / _ANNEALED_AT)
        with (
            _sampling_for_training(samplers),
            batch_statistics(model, is_on=learns_with_batch_statistics),
            record_sampling(model) as record,
            _watched(model) as learnt,
            _head_inputs(samplers) as means,
        ):
            output = call_model(model, batch)
            share = sampling_loss(record, total_macs=dense_macs[index])
        loss = _mean_error(learnt, taught)
        compared = _output_error(output, target)
        if compared is not None:
            loss = loss + compared
        if not bool(torch.isfinite(loss)):
            raise ValueError(
                f"calibrate: the outputs of batch {index} differ by {float(loss.detach())}, but a "
                "finite number is needed; look for NaN or infinite values in the model's weights."
            )
        loss = loss + controller(share)
        optimizer.zero_grad()
        loss.backward()
        pull = share_pull(model, record, total_macs=dense_macs[index])
        controller.update(levels, pull, progress=progress)
        _step_centred(optimizer, samplers, means)
        schedule.step()
        recent = 0.9 * recent + 0.1 * pull.share
        if (step + 1) % max(1, num_steps // _NUM_MEASUREMENTS) == 0:
            with batch_statistics(model, is_on=learns_with_batch_statistics):
                controller.calibrate(_share(model, measured[:1]), recent)
        if shows_progress:
            end = "\n" if step + 1 == num_steps else ""
            line = f"\rcalibrate {step + 1}/{num_steps}: expected share {pull.share:.3f}, "
            sys.stderr.write(f"{line}error {float(_mean_error(learnt, taught).detach()):.4f}{end}")
            sys.stderr.flush()
    optimizer.zero_grad()  # nothing is left for the caller's next step


@contextmanager
def _head_inputs(samplers: list[Sampler]) -> Iterator[dict[Sampler, Tensor]]:
    """The mean of what each sampler's head reads, (1, C, 1, 1)."""
    means: dict[Sampler, Tensor] = {}

    def keep(module: Any, args: tuple[Tensor]) -> None:
        means[module] = args[0].detach().float().mean((0, 2, 3))[None, :, None, None]

    handles = [sampler.register_forward_pre_hook(keep) for sampler in samplers]
    try:
        yield means
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _step_centred(
    optimizer: torch.optim.Optimizer, samplers: list[Sampler], means: dict[Sampler, Tensor]
) -> None:
    """One step in the parameters of heads that read centred features.

    Features are positive. The price, which wants less of everything, would first of all push down
    every weight, and with it the places of large features, which are those that matter. With logit
    = w (x - mean) + b the price acts on b, and w learns where computing pays.
    """
    for sampler, mean in means.items():
        weight, bias = sampler.head.weight, sampler.head.bias
        assert weight.grad is not None and bias is not None and bias.grad is not None
        weight.grad -= bias.grad * mean.to(weight.dtype)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(parameters, 1.0)
    before = {sampler: sampler.head.weight.clone() for sampler in means}
    optimizer.step()
    for sampler, mean in means.items():
        assert sampler.head.bias is not None
        moved = (sampler.head.weight - before[sampler]) * mean.to(before[sampler].dtype)
        sampler.head.bias -= moved.sum()


def _gate_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters of samplers and interpolations: those with several dimensions, and the others."""
    found: dict[int, nn.Parameter] = {}
    for owner in model.modules():
        if owns_samplers(owner):
            parts = [sampler for _, sampler in samplers_of(owner)] + interpolation_modules(owner)
            for part in parts:
                found |= {id(parameter): parameter for parameter in part.parameters()}
    gates = list(found.values())
    return [p for p in gates if p.ndim > 1], [p for p in gates if p.ndim <= 1]


@torch.no_grad()
def _expected_share(model: nn.Module, batch: Any) -> float:
    with record_sampling(model) as record:
        call_model(model, batch)
    return float(sampling_loss(record, total_macs=count_macs(model, batch).dense))


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[Tensor]]:
    """The outputs of the sampled layers, in the order in which they run."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.append(output)

    owners = [module for module in model.modules() if owns_samplers(module)]
    handles = [owner.register_forward_hook(keep) for owner in owners]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _full_masks(model: nn.Module) -> Iterator[None]:
    """The dense network: every sampler says that everything is computed."""

    def fill(module: nn.Module, args: Any, decision: SamplingDecision) -> SamplingDecision:
        full = torch.ones_like(decision.mask)
        return SamplingDecision(full, decision.probability, None)

    handles = []
    for owner in model.modules():
        if owns_samplers(owner):
            handles += [sampler.register_forward_hook(fill) for _, sampler in samplers_of(owner)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _sampling_for_training(samplers: list[Sampler]) -> Iterator[None]:
    """Relaxed masks, while everything else of the model stays in eval mode."""
    for sampler in samplers:
        sampler.train()
    try:
        yield
    finally:
        for sampler in samplers:
            sampler.eval()


def _mean_error(learnt: list[Tensor], taught: list[Tensor]) -> Tensor:
    """Mean over the layers of the relative squared error."""
    return torch.stack([_relative(a, b) for a, b in zip(learnt, taught, strict=True)]).mean()


def _relative(learnt: Tensor, taught: Tensor) -> Tensor:
    taught = taught.float()
    scale = taught.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
    return (learnt.float() - taught).square().sum() / scale


def _output_error(learnt: Any, taught: Any) -> Tensor | None:
    """Mean relative squared error of the output's tensors.

    None where they differ in number or size, as a detector's boxes do, or hold no float.
    """
    pairs = list(zip(_float_leaves(learnt), _float_leaves(taught), strict=False))
    has_equal_number = len(_float_leaves(learnt)) == len(_float_leaves(taught))
    if not pairs or not has_equal_number or any(a.shape != b.shape for a, b in pairs):
        return None
    if not any(a.requires_grad for a, _ in pairs) and torch.is_grad_enabled():
        return None
    return torch.stack([_relative(a, b) for a, b in pairs]).mean()


def _float_leaves(output: Any) -> list[Tensor]:
    return [
        leaf
        for leaf in pytree.tree_leaves(output)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]


@torch.no_grad()
def _errors(
    model: nn.Module, batches: list[Any], dense_norms: list[dict[str, Tensor]]
) -> tuple[float, float]:
    """Errors of features and outputs at inference, mean over batches."""
    own_norms = norm_state(model)
    features, outputs = [], []
    for batch in batches:
        set_norm_state(model, dense_norms)
        with _full_masks(model), _watched(model) as taught:
            target = call_model(model, batch)
        set_norm_state(model, own_norms)
        with _watched(model) as learnt:
            output = call_model(model, batch)
        features.append(float(_mean_error(learnt, taught)))
        compared = _output_error(output, target)
        outputs.append(math.nan if compared is None else float(compared))
    return sum(features) / len(features), sum(outputs) / len(outputs)
