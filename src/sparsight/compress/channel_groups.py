"""Which channels of a network can only be removed together, found by running it once.

A channel of a convolution is read by a norm, by the next convolutions, and is added to channels of
other convolutions: whoever removes one removes it everywhere. The graph is read off autograd's by
the Torch-Pruning library (MIT; Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023,
arXiv 2301.12900). torch.fx, the alternative, follows Python symbolically and gives up at the loops
and conditions on data that every detection model has; autograd sees what was executed, whatever
Python did in between.

What autograd does not show is checked by experiment, for a wrong group would only be noticed by a
network that is quietly worse: marks are put on channels, and must arrive at the layers of the
group, at the places that were computed, and nowhere else; and the model has to run without some
channels of each group. A group that fails is kept, with the reason.

This is the only module that imports Torch-Pruning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from sparsight.compress.channel_group import (
    ChannelGroup,
    Member,
    Side,
    keep_all_channels,
    keep_channels,
    width_of,
)
from sparsight.compress.check_groups import refuse_stray_marks, refuse_what_fails
from sparsight.compress.narrow import is_channelwise, is_convolution, is_grouped
from sparsight.compress.run_model import (
    call_with,
    has_channels,
    hooked,
    tensors_in,
    traceable_copy,
)
from sparsight.nn.deform_conv import DeformableConv2d

__all__ = [
    "ChannelGroup",
    "Member",
    "find_channel_groups",
    "keep_all_channels",
    "keep_channels",
]

_Element = tuple[Side, str, int]


def find_channel_groups(model: nn.Module, example: Any) -> list[ChannelGroup]:
    """Return all groups of channels of a model, removable or not, in the order of execution.

    Args:
        model: any dense module in any mode, on any device; neither it nor its parameters, their
            gradients and its buffers are changed: a copy is traced, in eval mode.
        example: what the model is called with: a tuple holds positional arguments, a dict keyword
            arguments, anything else is the only argument; a detector takes a list of images.
            Small images will do; they have to be large enough for the model.

    Returns:
        Groups whose producers are disjoint: every convolution and linear layer that is called is in
        one, except grouped ones behind others. Indices describe the model as it is now.

    Raises:
        ImportError: Torch-Pruning is not installed.
        TypeError: the model is no module.
        ValueError: nothing in it is called that has channels; it is sampled or compiled; Torch-
            Pruning cannot follow it, as ShuffleNet.

    Cost: three passes, one of them with autograd's graph, and two copies of the model; one or two
    more passes for each group where autograd's graph misleads.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> [(group.name, group.channels, group.removable)
        ...  for group in find_channel_groups(net, torch.zeros(1, 3, 8, 8))]
        [('0', 8, True), ('2', 4, False)]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"find_channel_groups: model is a {type(model).__name__}; a torch.nn.Module is "
            "required; pass the model itself."
        )
    _refuse(model)
    traced = traceable_copy(model).eval()
    with torch.enable_grad(), torch.inference_mode(False):
        graph = _trace(traced, example)
    groups = _assemble(traced, graph)
    with torch.no_grad():
        groups = refuse_stray_marks(traced, example, groups)
        return refuse_what_fails(model, example, groups)


def _refuse(model: nn.Module) -> None:
    for name, module in model.named_modules():
        at = f"its submodule {name!r}" if name else "it"
        if hasattr(module, "samplers_named"):
            raise ValueError(
                f"find_channel_groups: {at} is a {type(module).__name__}: the model is sampled, "
                "but a dense one is required; prune it first, then sparsify the result."
            )
        if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod"):
            raise ValueError(
                f"find_channel_groups: {at} is scripted or compiled, but Python modules are "
                "required; prune the model first, then compile the result."
            )


@dataclass
class _Graph:
    called: list[str]  # layers with channels, in the order of their first calls
    joined: _Joined
    troubles: dict[str, str]  # layer -> why its output channels cannot be removed


class _Joined:
    """Sets of elements that are removed together (union-find)."""

    def __init__(self) -> None:
        self.parents: dict[_Element, _Element] = {}

    def find(self, element: _Element) -> _Element:
        root = element
        while (parent := self.parents.setdefault(root, root)) != root:
            root = parent
        while element != root:
            self.parents[element], element = root, self.parents[element]
        return root

    def join(self, a: _Element, b: _Element) -> None:
        self.parents[self.find(b)] = self.find(a)


def _trace(model: nn.Module, example: Any) -> _Graph:
    """Join what Torch-Pruning says belongs together; `model` is a copy that may be changed."""
    pruning = _import_torch_pruning()
    names = {module: name for name, module in model.named_modules()}
    offsets = {
        f"{name}.offset".removeprefix(".")
        for name, module in model.named_modules()
        if isinstance(module, DeformableConv2d)
    }
    called: dict[str, None] = {}
    ends: list[Tensor] = []
    sources: dict[Any, str] = {}  # node of autograd's graph -> layer
    outputs: set[str] = set()
    has_run: list[bool] = []

    def observe(name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            called.setdefault(name)
            if output.grad_fn is None:  # the model switches gradients off for this layer
                return None
            sources[output.grad_fn] = name
            # An end of its own for every layer: what a detector detaches is in the graph as well.
            if output.ndim == 2 or is_convolution(module):
                ends.append(output * 1)
            # Offsets are no channels of the deformable convolution that takes them.
            return output.detach() if name in offsets else None

        return hook

    def forward(model: nn.Module, example: Any) -> list[Tensor]:
        with hooked(model, has_channels, observe):
            results = tensors_in(call_with(model, example))
        outputs.update(_reached(results, sources))
        has_run.append(True)
        # Not what a detector makes of its layers' outputs: Torch-Pruning follows joining paths
        # again and again, which takes forever there.
        return ends

    norms = {type(module) for module in model.modules() if is_channelwise(module)}
    known = {kind: _channelwise_pruner(pruning) for kind in norms}
    graph = pruning.DependencyGraph()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            graph.build_dependency(
                model, example, forward_fn=forward, customized_pruners=known, verbose=False
            )
        except Exception as error:
            if not has_run:
                raise  # the model's own, or a wrong example's
            raise ValueError(
                f"find_channel_groups: Torch-Pruning cannot follow {type(model).__name__} "
                f"({type(error).__name__}: {error}); a model whose channels are not rearranged by "
                "views, as in a shuffle, is required; prune a part of it."
            ) from error
    if not called:
        raise ValueError(
            f"find_channel_groups: {type(model).__name__} calls no convolution and no linear layer "
            "for this example; a network of such modules is required; layers called as functions "
            "(torch.nn.functional) are not seen."
        )
    result = _Graph(list(called), _Joined(), {})
    result.troubles.update(dict.fromkeys(outputs, "they are an output of the model"))
    _join_own_blocks(model, result)
    covered: set[str] = set()
    for name in called:
        module: Any = model.get_submodule(name)
        if name in covered or module not in graph.module2node:
            continue
        pruner = graph.get_pruner_of_module(module)
        every = list(range(width_of(module, "out")))
        group = graph.get_pruning_group(module, pruner.prune_out_channels, every)
        for item in group:
            node, handler = item.dep.target, item.dep.handler
            if node.module in names:
                side = _side(node.module, graph.is_out_channel_pruning_fn(handler))
                target = names[node.module]
                if isinstance(node.module, nn.PReLU) and side is None:
                    continue  # one value for all channels
                if side is None:
                    kind = type(node.module).__name__
                    what = f"{target!r} ({kind}) reads them, which is not known to be narrowed"
                    result.troubles.setdefault(name, what)
                    continue
                complete = _join_item(result, name, target, side, item, width_of(node.module, side))
                if complete and side == "out":
                    covered.add(target)
            elif isinstance(node.module, nn.Parameter):
                result.troubles.setdefault(name, "they meet a parameter of no known layer")
    return result


def _reached(results: Iterable[Tensor], sources: dict[Any, str]) -> set[str]:
    """Return the layers that results come from without another layer in between."""
    waiting = [result.grad_fn for result in results if result.grad_fn is not None]
    seen, found = set(waiting), set()
    while waiting:
        node = waiting.pop()
        if node in sources:
            found.add(sources[node])
            continue
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return found


def _import_torch_pruning() -> Any:
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError(
            "find_channel_groups: torch_pruning is not installed; it finds which channels go "
            'together; pip install "sparsight[compress]".'
        ) from error
    return torch_pruning


def _channelwise_pruner(pruning: Any) -> Any:
    class Pruner(pruning.BasePruningFunc):  # tells the graph that channels go straight through
        def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
            return layer

        prune_in_channels = prune_out_channels

        def get_out_channels(self, layer: Any) -> int:
            return width_of(layer, "norm")

        get_in_channels = get_out_channels

    return Pruner()


def _side(module: nn.Module, is_out: bool) -> Side | None:
    if is_channelwise(module):
        return "norm"
    if isinstance(module, DeformableConv2d) and module.offset_groups > 1 and not is_out:
        return None
    if not has_channels(module):
        return None
    # Torch-Pruning has one function for both sides of a depthwise convolution: its output's.
    return "out" if is_out else "in"


def _join_own_blocks(model: nn.Module, graph: _Graph) -> None:
    """A grouped convolution can only lose whole groups, on both sides; GroupNorm too."""
    for name, module in model.named_modules():
        if is_grouped(module):
            layer: Any = module
            deep, wide = layer.in_channels // layer.groups, layer.out_channels // layer.groups
            for i in range(layer.in_channels):
                graph.joined.join(("in", name, i // deep * deep), ("in", name, i))
            for i in range(layer.out_channels):
                graph.joined.join(("in", name, i // wide * deep), ("out", name, i))
        elif isinstance(module, nn.GroupNorm):
            block = module.num_channels // module.num_groups
            for i in range(module.num_channels):
                graph.joined.join(("norm", name, i // block * block), ("norm", name, i))


def _join_item(graph: _Graph, root: str, target: str, side: Side, item: Any, width: int) -> bool:
    """Join the channels of one layer to those of the root; True if all of it is covered."""
    for index, origin in zip(item.idxs, item.root_idxs, strict=True):
        if index >= width:
            graph.troubles.setdefault(
                root,
                f"they are combined with the {width} channels of {target!r}, so that padding, "
                "slicing or broadcasting decides which belong together",
            )
            index = width - 1  # still one group: the trouble is shared
        graph.joined.join(("out", root, origin), (side, target, index))
    return len(set(item.idxs)) >= width


def _assemble(model: nn.Module, graph: _Graph) -> list[ChannelGroup]:
    """Return the groups, in the order of execution, from the sets of joined elements."""
    ordinary = [name for name in graph.called if not is_grouped(model.get_submodule(name))]
    for name in graph.called:
        for i in range(width_of(model.get_submodule(name), "out")):
            graph.joined.find(("out", name, i))
    called = set(graph.called)
    units: dict[_Element, dict[tuple[str, Side], list[int]]] = {}
    for element in graph.joined.parents:
        side, name, index = element
        if side == "norm" or name in called:
            places = units.setdefault(graph.joined.find(element), {})
            places.setdefault((name, side), []).append(index)

    tied = _Joined()  # of producers: elements ("out", name, 0)
    sets: dict[str, list[dict[tuple[str, Side], list[int]]]] = {}
    owners = []
    for unit in units.values():
        names = {name for name, side in unit if side == "out"}
        sources = sorted(names & set(ordinary), key=graph.called.index)
        # A grouped convolution that reads the image has no producer but itself.
        sources = sources or sorted(names, key=graph.called.index)[:1]
        owners.append(sources)
        for other in sources:
            tied.join(("out", sources[0], 0), ("out", other, 0))
    for unit, sources in zip(units.values(), owners, strict=True):
        if sources:
            sets.setdefault(tied.find(("out", sources[0], 0))[1], []).append(unit)
    groups = [_group(model, graph, members) for members in sets.values()]
    return sorted(groups, key=lambda group: graph.called.index(group.name))


def _group(
    model: nn.Module, graph: _Graph, units: list[dict[tuple[str, Side], list[int]]]
) -> ChannelGroup:
    places = list(dict.fromkeys(chain.from_iterable(units)))
    layers = sorted({name for name, side in places if side != "norm"}, key=graph.called.index)
    between = tuple(name for name in layers if is_grouped(model.get_submodule(name)))
    producers = tuple(n for n in layers if (n, "out") in places and n not in between)
    consumers = tuple(n for n in layers if (n, "in") in places and n not in between)
    norms = tuple(sorted(name for name, side in places if side == "norm"))
    first = (producers or between)[0]
    reason = next(
        (graph.troubles[name] for name in (*producers, *between) if name in graph.troubles), None
    )
    widths: dict[tuple[str, Side], int] = {
        (n, side): width_of(model.get_submodule(n), side) for n, side in places
    }
    alike = all(
        set(unit) == set(places) and all(len(unit[p]) == len(units[0][p]) for p in places)
        for unit in units
    )
    if not alike and reason is None:
        reason = "they are not treated alike: a split, a slice or padding tells them apart"
    if not producers and reason is None:
        reason = f"{first!r} is grouped and reads the input of the model"
    if not consumers and reason is None:
        reason = "no convolution and no linear layer reads them: they are an output of the model"
    reason = reason or _fixed(model, {name for name, _ in places})
    if len(units) == 1 and reason is None:
        reason = "they are a single unit, of which one has to stay"
    members: tuple[Member, ...] = ()
    if alike:
        lead: tuple[str, Side] = (first, "out")
        units = sorted(units, key=lambda unit: min(unit[lead]))
        members = tuple(
            Member(name, side, tuple(tuple(sorted(u[name, side])) for u in units), width)
            for (name, side), width in widths.items()
        )
    return ChannelGroup(
        name=first,
        channels=len(units) if alike else widths[first, "out"],
        producers=producers or (first,),
        consumers=consumers,
        norms=norms,
        removable=reason is None,
        reason=reason,
        grouped=between if producers else between[1:],
        members=members,
    )


def _fixed(model: nn.Module, names: set[str]) -> str | None:
    """Why one of these layers cannot be narrowed, if so: weights that are shared or computed."""
    homes: dict[int, str] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            other = homes.setdefault(id(parameter), name)
            if other != name and names & {other, name}:
                return f"{other!r} and {name!r} share a parameter"
    for name in sorted(names):
        module = model.get_submodule(name)
        stored = {key for key, _ in module.named_parameters(recurse=False)}
        if has_channels(module) and "weight" not in stored:
            return f"the weight of {name!r} is computed from others (a parametrisation)"
    return None
