"""Pruned networks, frozen: how much of the multiply-adds saved is time saved.

    python bench/compress.py --data CIFAR10 --weights cifar10_resnet56.pt --out runs/bench/today
    python bench/compress.py --data CIFAR10 --weights cifar10_resnet56.pt --only 2x
    python bench/compress.py --wide --out runs/bench/today
    python bench/compress.py --quick

A ResNet-56 of CIFAR-10, with its accuracy before fine-tuning; with --wide torchvision's ResNet-50
and VGG-16 at 224x224 instead, random weights, time alone.

One stage for each speed-up, 1.5x, 2x, 4x fewer multiply-adds, and with --wide for each network. The
rows of the first:

dense                the network as it is, the base of all ratios.
L1, L2, FPGM, norm   `prune_filters` by these importances, the same share from every inner layer.
torch-pruning        the library's MagnitudePruner with its group importance, as its users call it,
                     the residual stream ignored, for its padded shortcuts cannot be traced.
ours                 `prune_channels`: LASSO, least squares, widths by sensitivity; from training
                     images, without labels.

Those of --wide: `prune_filters` by L1, widths in multiples of 16 where layers are wide enough, all
of --round-to; what is random has no better widths. In a ResNet-50 the residual stream stays.

Multiply-adds are counted by sparsight.measure.count_macs. "top-1" is of all test images, without
any training after pruning. Dense and pruned are both frozen and timed in turns; "realised" is the
ratio of the times over that of the multiply-adds. --data and --weights are needed but for --quick,
whose network is random and shallow, and whose images and labels are drawn; and for --wide.
"""

import argparse
import copy
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import vgg16

import sparsight
import sparsight.compress
from harness.models import resnet
from harness.script import (
    Settings,
    argument_parser,
    cells,
    compare,
    run_script,
    settings_of,
)
from harness.stages import Row, Stage
from sparsight.compress import find_channel_groups, prune_filters
from sparsight.measure import Latency, count_macs
from sparsight.models import load_resnet_cifar, resnet_cifar

SPEEDUPS = (1.5, 2.0, 4.0)
WIDE = ("resnet50", "vgg16")
NUM_SAMPLED_IMAGES = 1024
IMPORTANCES = {"L1": "l1", "L2": "l2", "FPGM": "geometric_median", "norm": "batch_norm"}


@dataclass(frozen=True)
class Task:
    """What is pruned, and what with.

    Attributes:
        model: trained, in eval mode.
        sampled: training images (N, 3, H, W), normalised; for those who look at features.
        images: test images, normalised.
        labels: their classes.
        batch: images at once that are timed.
        round_to: counts of channels are multiples of it.
    """

    model: nn.Module
    sampled: Tensor
    images: Tensor
    labels: Tensor
    batch: int
    round_to: int


def load(settings: Settings, args: argparse.Namespace) -> Task:
    """The task of the flags."""
    torch.manual_seed(0)
    if settings.quick:
        images, labels = torch.randn(16, 3, 16, 16), torch.randint(10, (16,))
        return Task(resnet_cifar(8).eval(), images, images, labels, 1, args.round_to)
    from sparsight.train.data import CIFAR10, cifar10_evaluation_transform

    transform: Any = cifar10_evaluation_transform()

    def read(split: Any, limit: int | None) -> tuple[Tensor, Tensor]:
        items = CIFAR10(args.data, split)
        count = len(items) if limit is None else min(limit, len(items))
        chosen = torch.linspace(0, len(items) - 1, count).long().tolist()
        pairs = [items[i] for i in chosen]
        batch = [transform(image, label) for image, label in pairs]
        return torch.stack([image for image, _ in batch]), torch.tensor(
            [label for _, label in batch]
        )

    sampled, _ = read("train", NUM_SAMPLED_IMAGES)
    images, labels = read("test", None)
    return Task(load_resnet_cifar(args.weights), sampled, images, labels, args.batch, args.round_to)


def top1(model: nn.Module, task: Task) -> float:
    """Share of the test images, in percent, whose likeliest class is theirs."""
    right = 0
    with torch.inference_mode():
        for images, labels in zip(task.images.split(128), task.labels.split(128), strict=True):
            right += int((model(images).argmax(1) == labels).sum())
    return 100 * right / len(task.labels)


def by_importance(task: Task, importance: Any, speedup: float) -> nn.Module:
    """Our filter pruning."""
    return prune_filters(
        task.model,
        task.images[:1],
        importance=importance,
        speedup=speedup,
        round_to=task.round_to,
    )


def by_torch_pruning(task: Task, speedup: float) -> nn.Module | str:
    """The library's own pruner, at the smallest ratio that is fast enough."""
    if importlib.util.find_spec("torch_pruning") is None:
        return "torch-pruning is not installed"
    import torch_pruning

    example = task.images[:1]
    groups = find_channel_groups(task.model, example)
    left = [name for group in groups if group.is_stream for name in group.producers]
    left += [group.name for group in groups if not group.removable]
    dense = count_macs(task.model, example).total

    def pruned_at(ratio: float) -> nn.Module:
        model = copy.deepcopy(task.model)
        pruner = torch_pruning.pruner.MagnitudePruner(
            model,
            example,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=[model.get_submodule(name) for name in dict.fromkeys(left)],
            round_to=task.round_to,
        )
        pruner.step()
        return model.eval()

    low, high = 0.0, 0.98
    found: nn.Module | str = f"cannot reach {speedup}x"
    for _ in range(7):
        middle = (low + high) / 2
        model = pruned_at(middle)
        if dense / count_macs(model, example).total >= speedup:
            high, found = middle, model
        else:
            low = middle
    return found


def by_lasso(task: Task, speedup: float) -> nn.Module | str:
    """Channel pruning with reconstruction."""
    prune: Callable[..., nn.Module] | None = getattr(sparsight.compress, "prune_channels", None)
    if prune is None:
        return "prune_channels is not part of this version"
    return prune(task.model, task.sampled, speedup=speedup, round_to=task.round_to)


def pruned_models(task: Task, speedup: float) -> Iterator[tuple[str, nn.Module | str]]:
    """Every method's model, or why there is none."""
    for name, importance in IMPORTANCES.items():
        yield name, by_importance(task, importance, speedup)
    yield "torch-pruning", by_torch_pruning(task, speedup)
    yield "ours", by_lasso(task, speedup)


def rows(settings: Settings, args: argparse.Namespace, speedup: float) -> Iterator[Row]:
    """The dense network and all pruned ones at one speed-up."""
    task = load(settings, args)
    image = task.images[: task.batch].contiguous(memory_format=torch.channels_last)
    dense_macs = count_macs(task.model, task.images[:1]).total
    dense = sparsight.freeze(copy.deepcopy(task.model), example=image)
    yield {
        "method": "dense",
        "asked": speedup,
        "top-1": top1(task.model, task),
        "MMACs": dense_macs / 1e6,
        "MAC ratio": 1.0,
    }
    for name, model in pruned_models(task, speedup):
        if isinstance(model, str):
            yield {"method": name, "asked": speedup, "top-1": model}
            continue
        yield {
            "method": name,
            "asked": speedup,
            "top-1": top1(model, task),
            **saved(settings, model, dense, image, dense_macs),
        }


def saved(
    settings: Settings, model: nn.Module, dense: nn.Module, image: Tensor, dense_macs: int
) -> Row:
    """What a pruned network computes and takes, beside the dense one.

    Args:
        settings: of the script.
        model: pruned, in eval mode.
        dense: the dense network, frozen.
        image: (B, 3, H, W), channels-last.
        dense_macs: of the dense network for one image.
    """
    macs = count_macs(model, image[:1]).total
    row: Row = {"MMACs": macs / 1e6, "MAC ratio": dense_macs / macs, "batch": len(image)}
    times = compare(
        settings, {"dense": dense, "pruned": sparsight.freeze(model, example=image)}, image
    )
    for candidate, latency in times.items():
        row.update(cells(candidate, latency))
    ms = {key: t.latency_ms for key, t in times.items() if isinstance(t, Latency)}
    row["time ratio"] = ms["dense"] / ms["pruned"]
    row["realised"] = row["time ratio"] / row["MAC ratio"]
    return row


def wide_network(name: str, *, is_small: bool) -> nn.Module:
    """A network of torchvision's with random weights, in eval mode.

    Args:
        name: "resnet50" or "vgg16".
        is_small: a block a stage, or a small classifier, to see that the script works.
    """
    if name == "resnet50":
        return resnet((1, 1, 1, 1) if is_small else (3, 4, 6, 3))
    torch.manual_seed(0)
    made = vgg16(weights=None)
    if is_small:
        made.classifier = nn.Sequential(nn.Linear(512 * 7 * 7, 10))
    return made.eval().to(memory_format=torch.channels_last)


def wide_rows(
    settings: Settings, args: argparse.Namespace, name: str, speedup: float
) -> Iterator[Row]:
    """One wide network at one speed-up."""
    side = 64 if settings.quick else 224
    torch.manual_seed(1)
    image = torch.randn(args.batch, 3, side, side).contiguous(memory_format=torch.channels_last)
    model = wide_network(name, is_small=settings.quick)
    dense_macs = count_macs(model, image[:1]).total
    dense = sparsight.freeze(model, example=image)
    yield {
        "network": name,
        "method": "dense",
        "asked": speedup,
        "MMACs": dense_macs / 1e6,
        "MAC ratio": 1.0,
    }
    smaller = prune_filters(model, image[:1], speedup=speedup, round_to=args.round_to)
    del model
    yield {
        "network": name,
        "method": "L1",
        "asked": speedup,
        **saved(settings, smaller, dense, image, dense_macs),
    }


def parser() -> argparse.ArgumentParser:
    """The shared flags and this script's own."""
    made = argument_parser(__doc__)
    made.add_argument("--data", type=Path, help="folder of CIFAR-10")
    made.add_argument("--weights", type=Path, help="of a CIFAR ResNet")
    made.add_argument("--batch", type=int, default=1, help="images at once that are timed")
    made.add_argument(
        "--round-to", type=int, help="multiples of channels; default 8, with --wide 16"
    )
    made.add_argument("--wide", action="store_true", help="ResNet-50 and VGG-16: time alone")
    return made


def main() -> None:
    """Measure every speed-up."""
    made = parser()
    args = made.parse_args()
    settings = settings_of(args)
    if args.round_to is None:
        args.round_to = 16 if args.wide else 8
    if not (settings.quick or args.wide) and (args.data is None or args.weights is None):
        made.error("--data and --weights are required; --quick and --wide run without them")
    speedups = SPEEDUPS[:1] if settings.quick else SPEEDUPS
    suffix = "" if args.batch == 1 else f"-batch{args.batch}"
    realised = (
        "MACs are those of one image. Realised: ratio of the times over the ratio of the MACs."
    )
    if args.wide:
        run_script(
            settings,
            f"compress-wide{suffix}",
            [
                Stage(f"{name}-{s:g}x", lambda name=name, s=s: wide_rows(settings, args, name, s))
                for name in WIDE
                for s in speedups
            ],
            title="Pruned ResNet-50 and VGG-16, frozen",
            notes=f"Random weights, 224x224, widths in multiples of {args.round_to}. {realised}",
        )
        return
    run_script(
        settings,
        f"compress{suffix}",
        [Stage(f"{s:g}x", lambda s=s: rows(settings, args, s)) for s in speedups],
        title="Pruned ResNet-56 on CIFAR-10, before fine-tuning, frozen",
        notes=f"Top-1 in percent of the test images, without training after pruning. {realised}",
    )


if __name__ == "__main__":
    main()
