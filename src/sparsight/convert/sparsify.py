"""A dense model in, the same model with sampled layers out."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from sparsight.convert.find import ConversionError, Where, find_targets
from sparsight.nn.evaluating import evaluating
from sparsight.nn.interpolation import RBFInterpolation
from sparsight.nn.sampled_block import Layout, SampledBlock
from sparsight.nn.sampled_conv import SampledConv2d
from sparsight.nn.sampler import Sampler, SamplingDecision

__all__ = ["SamplingReport", "sparsify"]


@dataclass(frozen=True)
class SamplingReport:
    """What `sparsify` did to a model; the attribute `sampling_report` of the model it returns.

    Attributes:
        sampled: qualified names of the converted layers.
        left_dense: (qualified name, reason) of what the default would take and left as it was.
    """

    sampled: tuple[str, ...]
    left_dense: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"sampled {len(self.sampled)} layers: {', '.join(self.sampled)}"]
        lines += [f"left dense {name}: {reason}" for name, reason in self.left_dense]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Repr:
    """Stands in for the extra_repr of one module object, so that no class is changed.

    A plain picklable object in the module's __dict__: it survives deepcopy and torch.save.
    """

    text: str

    def __call__(self) -> str:
        return self.text


def sparsify(
    model: nn.Module,
    *,
    where: Where | None = None,
    layout: Layout = "b",
    sampler: Callable[..., nn.Module] | None = None,
    interpolation: nn.Module | Callable[[], nn.Module] | None = None,
    example: Any = None,
) -> nn.Module:
    """A copy of the model that computes at sampled positions and interpolates the rest.

    The copy has the class, the call contract, the mode, the devices and the dtypes of the source,
    and the source's state_dict loads into it: only the samplers' and interpolations' own keys are
    missing. Fine-tune it with the task loss plus :func:`sparsight.sampling_loss`, then call
    :func:`sparsight.freeze` for the fast version.

    Args:
        model: a dense, eager model; not changed.
        where: where(qualified name, module) -> bool selects residual blocks of torchvision's ResNet
            family or any plain `Conv2d`; of nested selections the outermost wins. Default None:
            every residual block of torchvision's ResNet, ResNeXt and Wide ResNet, of
            `sparsight.models.resnet_cifar`, every :class:`sparsight.nn.DeformableBlock` and
            :class:`sparsight.nn.ConvPair`, wherever it sits, and the convolutions that a module of
            the model names in ``convs_to_sample()``, as RefineNet's do; those that cannot be
            converted are left dense, and the result's repr says so.
        layout: which convolutions of a block share a mask, "a", "b" (default, the paper's choice)
            or "c"; see :class:`sparsight.nn.SampledBlock`.
        sampler: called as ``sampler(in_channels, stride=stride)`` once per decision; it returns a
            new module. Default :class:`sparsight.nn.Sampler`, the paper's setting. Bind other
            settings with functools.partial. The attribute `layer` of the i-th is set to i.
        interpolation: a module, copied per decision, or a callable that returns a new one. Default
            :class:`sparsight.nn.RBFInterpolation`.
        example: what the model takes as its one argument (a tensor, a list of images). If given,
            source and result are both run on it in eval mode, with full masks, and must return the
            same structure, shapes and dtypes; and the result is run with its own masks.

    Returns:
        The converted model. Its attribute `sampling_report` and its repr say what was converted. A
        module shared under several names stays shared.

    Raises:
        ConversionError: listing every layer that `where` selected and that cannot be converted, and
            why; or if nothing can be converted, if the model is converted, scripted or compiled
            already, or if `example` shows that the call contract was not kept.
        ValueError: if `layout` is unknown.
        TypeError: if an argument has a wrong type.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> sampled = sparsify(net, where=lambda name, module: name == "2")
        >>> sampled(torch.randn(1, 3, 16, 16)).shape
        torch.Size([1, 4, 16, 16])

    Source: Xie et al., ECCV 2020, arXiv 2003.08866; single convolutions and basic blocks are ours.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"sparsify: model is a {type(model).__name__}, but must be a torch.nn.Module; pass the "
            "dense model itself."
        )
    if layout not in ("a", "b", "c"):
        raise ValueError(
            f"sparsify: layout is {layout!r}, but must be 'a', 'b' or 'c'; "
            "pass 'b' for the paper's choice."
        )
    for name, argument in (("sampler", sampler), ("interpolation", interpolation)):
        if argument is not None and not callable(argument):
            raise TypeError(
                f"sparsify: {name} is {argument!r}, but must be callable; "
                f"pass a function that returns a new {name}."
            )
    targets = find_targets(model, where)
    make_sampler = Sampler if sampler is None else sampler
    make_interpolation = _as_factory(RBFInterpolation if interpolation is None else interpolation)

    try:
        converted: Any = copy.deepcopy(model)
    except RuntimeError as error:
        raise ConversionError(
            f"sparsify: {type(model).__name__} cannot be copied ({error}), but the source is never "
            "changed in place; detach stored tensors, or remove weight_norm and its kin, first."
        ) from error
    # Found again by name: the copy has other objects. Names may repeat, objects do not.
    replacements: dict[nn.Module, Any] = {}
    layer = 0
    for name, _ in converted.named_modules():
        source = converted.get_submodule(name)
        if name in targets.blocks:
            new = SampledBlock(
                source, layout=layout, sampler=make_sampler, interpolation=make_interpolation
            )
            reference = new.conv1.weight
        elif name in targets.convs:
            assert isinstance(source, nn.Conv2d)
            stride: Any = source.stride
            stride = stride[0] if stride[0] == stride[1] else stride
            new = SampledConv2d.from_conv(
                source,
                sampler=make_sampler(source.in_channels, stride=stride),
                interpolation=make_interpolation(),
            )
            reference = new.weight
        else:
            continue
        for _, new_sampler in new.samplers_named():
            plain: Any = new_sampler
            plain.layer = layer
            layer += 1
        for part in _new_parts(new):
            part.to(device=reference.device, dtype=reference.dtype)
        replacements[source] = new
    for name, reason in targets.left_dense:
        _annotate(converted.get_submodule(name), f"left dense: {reason}")
    converted = replace_modules(converted, replacements)

    sampled = [n for n, _ in model.named_modules() if n in targets.blocks or n in targets.convs]
    report = SamplingReport(tuple(sampled), tuple(targets.left_dense))
    converted.sampling_report = report
    if sampled != [""]:
        _annotate(converted, str(report))
    if example is not None:
        _try(model, converted, example)
    return converted


def _as_factory(interpolation: nn.Module | Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    if isinstance(interpolation, nn.Module):
        return lambda: copy.deepcopy(interpolation)
    return interpolation


def _new_parts(sampled: nn.Module) -> list[nn.Module]:
    """The modules that the source did not have."""
    if isinstance(sampled, SampledBlock):
        return [sampled.samplers, sampled.interpolations]
    assert isinstance(sampled, SampledConv2d)
    assert sampled.sampler is not None
    return [sampled.sampler, sampled.interpolation]


def replace_modules(model: nn.Module, replacements: dict[nn.Module, Any]) -> nn.Module:
    """Put the new modules in the place of the old ones, under every name."""
    if model in replacements:
        return replacements[model]
    for parent in list(model.modules()):
        if parent in replacements:
            continue
        for name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, name, replacements[child])
    return model


def _annotate(module: Any, text: str) -> None:
    lines = [line for line in (module.extra_repr(), text) if line]
    module.extra_repr = _Repr("\n".join(lines))


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """All of a model in eval mode and without gradients, until it is put back as it was."""
    with evaluating(model), torch.no_grad():
        yield


def _fill_mask(module: nn.Module, args: Any, decision: SamplingDecision) -> SamplingDecision:
    """Forward hook: sample everything, so that a converted model computes what its source does."""
    return SamplingDecision(torch.ones_like(decision.mask), decision.probability, decision.relaxed)


def describe_output(output: Any) -> tuple[Any, list[Any]]:
    """Structure, shapes and dtypes of what a model returned."""
    leaves, structure = pytree.tree_flatten(output)
    return structure, [
        (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else type(leaf)
        for leaf in leaves
    ]


def _try(source: nn.Module, converted: nn.Module, example: Any) -> None:
    """Run both models on the example and compare what they return."""
    samplers = [
        sampler
        for owner in converted.modules()
        if isinstance(owner, SampledBlock | SampledConv2d)
        for _, sampler in owner.samplers_named()
    ]
    with eval_mode(source):
        expected = describe_output(source(example))
    with eval_mode(converted):
        handles = [sampler.register_forward_hook(_fill_mask) for sampler in samplers]
        try:
            arrived = describe_output(converted(example))
        except (RuntimeError, TypeError, ValueError) as error:
            raise ConversionError(
                f"sparsify: the source runs on the example but the converted model does not "
                f"({error}); leave the layer that fails out with `where`."
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        if arrived != expected:
            raise ConversionError(
                f"sparsify: the converted model returns {arrived} for the example, but the source "
                f"returns {expected}; leave layers out with `where` until they agree."
            )
        converted(example)
