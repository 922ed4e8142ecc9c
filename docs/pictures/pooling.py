"""One picture pooled four times, each time by 2, by maximum, SoftPool and average.

    python docs/pictures/pooling.py --out docs/pictures/pooling.png

The picture is the sample that comes with matplotlib: Commodore Grace M. Hopper, official portrait
of 1984 by James S. Davis, US Navy (public domain). Its values are normalised to mean 0 and
deviation 1 before they are pooled, as those of a map behind a norm are: SoftPool depends on their
scale.
"""

import argparse
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.cbook import get_sample_data
from torch import Tensor

from sparsight.ops import soft_pool2d

KINDS = {
    "maximum": lambda x: F.max_pool2d(x, 2),
    "SoftPool": lambda x: soft_pool2d(x, 2),
    "average": lambda x: F.avg_pool2d(x, 2),
}
NUM_TIMES = 4


def photograph() -> Tensor:
    """The upper square of the sample, (1, 3, 512, 512), normalised as a whole."""
    with get_sample_data("grace_hopper.jpg") as file:
        pixels = torch.tensor(plt.imread(file, format="jpg"))
    x = pixels[:512, :512].permute(2, 0, 1)[None].float()
    return (x - x.mean()) / x.std()


def pooled(x: Tensor) -> dict[str, list[Tensor]]:
    """By kind, the picture after none, one, two, three and four poolings."""
    found = {}
    for kind, pool in KINDS.items():
        steps = [x]
        for _ in range(NUM_TIMES):
            steps.append(pool(steps[-1]))
        found[kind] = steps
    return found


def draw(out: Path) -> None:
    """Write the picture: a row for each kind, all in the same range of values."""
    x = photograph()
    low, high = float(x.min()), float(x.max())
    matplotlib.use("agg")
    rows = pooled(x)
    figure, axes = plt.subplots(
        len(rows), NUM_TIMES + 1, figsize=(10, 6.4), dpi=80, layout="constrained"
    )
    for row, (kind, steps) in zip(axes, rows.items(), strict=True):
        for axis, step in zip(row, steps, strict=True):
            shown = (step[0].permute(1, 2, 0) - low) / (high - low)
            axis.imshow(shown.numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(kind)
    for axis, step in zip(axes[0], rows["average"], strict=True):
        axis.set_title(f"{step.shape[-2]}x{step.shape[-1]}", fontsize=10)
    figure.savefig(out, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    draw(parser.parse_args().out)


if __name__ == "__main__":
    main()
