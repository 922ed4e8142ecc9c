"""The `sparsight` command: train, evaluate, profile, draw masks, run the demo."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

_EXTRA = "pip install 'sparsight[train]'"

_USAGE = """usage: sparsight COMMAND [arguments]

  train RECIPE --data DIR ...   train; RECIPE is a file such as recipes/segmentation/camvid.py
  evaluate CHECKPOINT ...       mIoU or AP, MACs and frozen milliseconds of a trained model
  profile CHECKPOINT ...        density, MACs and milliseconds of each layer
  masks CHECKPOINT ...          pictures: image, sampling masks, prediction
  demo                          everything at once, small, on scenes drawn on the spot

`sparsight COMMAND --help` lists the flags of a command, `sparsight train RECIPE --help` those of a
recipe. Flags may be written with - or _; a flag that is true or false may stand alone; sizes are
written 240x320. --traceback anywhere shows where an error came from.
"""


def evaluate(
    checkpoint: str,
    *,
    data: str,
    split: Literal["train", "val"] = "val",
    size: tuple[int, int] | None = None,
    frozen: bool = True,
    latency: bool = True,
    seeds: int = 1,
    batch_size: int = 8,
    out: str | None = None,
) -> dict[str, Any]:
    """Score a checkpoint: metric, MACs, and milliseconds frozen against its dense source.

    A segmentation model is scored on CamVid (mIoU), a detector on COCO (AP).

    Args:
        checkpoint: weights.safetensors of a training run.
        data: folder with train/, trainannot/, val/, valannot/; for a detector with annotations/,
            train2017/, val2017/.
        split: which images.
        size: height and width in pixels, as 240x320; default: those of training. A smaller one is
            the "resized" baseline: scores are always counted at the annotations' own size. For a
            detector: shorter side, and the bound on the longer.
        frozen: freeze the model first; scores then come from the kernels that will be deployed.
        latency: also measure milliseconds for one image, interleaved with the dense source.
        seeds: number of sampling seeds, from 0; more than one gives mean and spread of the metric.
        batch_size: images scored at once.
        out: JSON file to write the result to.
    """
    from torch.utils.data import DataLoader

    from sparsight.convert import freeze
    from sparsight.measure import environment
    from sparsight.train.architecture import DetectorArchitecture
    from sparsight.train.checkpoint import load_checkpoint, write_atomically
    from sparsight.train.data import CamVid, SeededView, evaluation_transform
    from sparsight.train.evaluate import score

    if seeds < 1:
        raise ValueError(
            f"evaluate: seeds={seeds}; at least 1 is required; leave --seeds out for one."
        )
    model, architecture = load_checkpoint(checkpoint)
    model.eval()
    size = size or architecture.size
    if isinstance(architecture, DetectorArchitecture):
        result = _evaluate_detector(
            model,
            dataclasses.replace(architecture, size=size),
            data=data,
            split=split,
            frozen=frozen,
            latency=latency,
            seeds=seeds,
            batch_size=batch_size,
        )
        result = {"checkpoint": Path(checkpoint).name} | result
        if out is not None:
            write_atomically(out, json.dumps(result, indent=2, default=str).encode())
        return result
    dataset = CamVid(data, split)
    view = SeededView(dataset, evaluation_transform(size))
    image = view[0][0][None].contiguous(memory_format=torch.channels_last)
    scores = []
    for seed in range(seeds):
        _seed_samplers(model, seed)
        deployed = freeze(model, example=image) if frozen else model
        batches = DataLoader(view, batch_size=batch_size)
        scores.append(
            score(deployed, batches, classes=dataset.classes, ignore_index=dataset.ignore_index)
        )
        print(f"seed {seed}: {scores[-1]}")
    mious = torch.tensor([s.miou for s in scores], dtype=torch.float64)
    result: dict[str, Any] = {
        "checkpoint": Path(checkpoint).name,
        "architecture": architecture.to_json(),
        "size": size,
        "frozen": frozen,
        "miou_mean": float(mious.mean()),
        "miou_std": float(mious.std()) if seeds > 1 else None,
        "scores": [dataclasses.asdict(s) for s in scores],
        "environment": _plain(environment()),
    }
    if latency:
        result["latency"] = _latency(model, architecture, image)
    if out is not None:
        write_atomically(out, json.dumps(result, indent=2, default=str).encode())
    return result


def _evaluate_detector(
    model: torch.nn.Module,
    architecture: Any,
    *,
    data: str,
    split: str,
    frozen: bool,
    latency: bool,
    seeds: int,
    batch_size: int,
) -> dict[str, Any]:
    """As `evaluate`, at the size of `architecture`."""
    from torch.utils.data import DataLoader

    from sparsight.convert import freeze
    from sparsight.measure import count_published_macs, environment
    from sparsight.train.data import Coco, SeededView, collate_detection, detection_transform
    from sparsight.train.evaluate_detection import score_detector

    detector: Any = model
    detector.transform.min_size = (architecture.size[0],)
    detector.transform.max_size = architecture.size[1]
    dataset = Coco(data, f"{split}2017", num_classes=architecture.num_classes)
    view = SeededView(dataset, detection_transform(is_training=False))
    images = [view[0][0]]
    scores = []
    for seed in range(seeds):
        _seed_samplers(model, seed)
        deployed = freeze(model, example=images) if frozen else model
        batches = DataLoader(view, batch_size=batch_size, collate_fn=collate_detection)
        scores.append(score_detector(deployed, batches, data=dataset))
        print(f"seed {seed}: {scores[-1]}")
    aps = torch.tensor([s.metrics.ap or 0.0 for s in scores], dtype=torch.float64)
    result: dict[str, Any] = {
        "architecture": architecture.to_json(),
        "size": architecture.size,
        "frozen": frozen,
        "ap_mean": float(aps.mean()),
        "ap_std": float(aps.std()) if seeds > 1 else None,
        "scores": [dataclasses.asdict(s) for s in scores],
        # The paper's "GFLOPs": the backbone at one nominal size, with these mean densities.
        "published_gmacs": [
            count_published_macs(
                model, shorter_side=architecture.size[0], density=s.density or 1.0
            ).total
            / 1e9
            for s in scores
        ],
        "environment": _plain(environment()),
    }
    if latency:
        result["latency"] = _latency(model, architecture, images)
    return result


def _seed_samplers(model: torch.nn.Module, seed: int) -> None:
    from sparsight.nn import Sampler

    for module in model.modules():
        if isinstance(module, Sampler):
            module.seed = seed


def profile(
    checkpoint: str,
    *,
    size: tuple[int, int] | None = None,
    image: str | None = None,
    choose: Literal["measured"] | None = None,
) -> None:
    """Print density, MACs and milliseconds of each layer of a frozen checkpoint.

    Args:
        checkpoint: weights.safetensors of a training run.
        size: height and width in pixels, as 240x320; default: those of training. For a detector:
            shorter side, and the bound on the longer.
        image: picture to run on; default: a drawn street scene. Densities depend on it.
        choose: "measured" runs the layers dense that are faster so on this picture, which changes
            what they return; below the table stands what both forms of each took. Default: none.
    """
    from sparsight import measure
    from sparsight.convert import freeze
    from sparsight.train.architecture import DetectorArchitecture
    from sparsight.train.checkpoint import load_checkpoint

    model, architecture = load_checkpoint(checkpoint)
    x: Any = _picture(image, size or architecture.size)
    if isinstance(architecture, DetectorArchitecture):
        # A detector resizes and normalises by itself.
        detector: Any = model
        shorter, bound = size or architecture.size
        detector.transform.min_size, detector.transform.max_size = (shorter,), bound
        x = [_pixels(image, (shorter, min(bound, shorter * 4 // 3))).float() / 255]
    frozen = freeze(model.eval(), example=x, choose=choose)
    print(measure.profile(frozen, x))
    for name, module in frozen.named_modules():
        measured = getattr(module, "measured", None)
        if measured is not None:
            print(f"{name}: computed={module.computed} ({measured})")


def masks(
    checkpoint: str,
    *,
    data: str,
    images: tuple[int, ...] | list[int] = (0, 33, 66),
    split: Literal["train", "val"] = "val",
    out: str = "masks",
    shows_data: bool = True,
) -> list[str]:
    """Draw image, annotation, prediction and the sampling mask of each block.

    Args:
        checkpoint: weights.safetensors of a sampled training run.
        data: folder with train/, trainannot/, val/, valannot/.
        images: positions in the split, as [0,33,66].
        split: which images.
        out: folder for the pictures, one PNG an image.
        shows_data: draw image and annotation, and masks over the image; false draws masks over the
            prediction, for data that may not be published.
    """
    from sparsight.train.architecture import DetectorArchitecture
    from sparsight.train.checkpoint import load_checkpoint
    from sparsight.train.data import CamVid, SeededView, evaluation_transform
    from sparsight.train.pictures import draw_masks

    model, architecture = load_checkpoint(checkpoint)
    if isinstance(architecture, DetectorArchitecture):
        raise ValueError(
            f"masks: {checkpoint!r} is a detector; a segmentation model is required; use "
            "sparsight.record_sampling to see the masks of any other."
        )
    dataset = CamVid(data, split)
    view = SeededView(dataset, evaluation_transform(architecture.size))
    written = []
    for index in images:
        if not 0 <= index < len(dataset):
            raise ValueError(
                f"masks: image {index} of {len(dataset)} in {split!r}; 0 to {len(dataset) - 1} is "
                "required; change --images."
            )
        normalised, labels = view[index]
        path = Path(out) / f"{dataset.items[index][0].stem}.png"
        draw_masks(
            model.eval(),
            normalised,
            labels,
            path=path,
            ignore_index=dataset.ignore_index,
            shows_data=shows_data,
        )
        print(path)
        written.append(str(path))
    return written


def find_recipe(name: str) -> Path:
    """Return the file of a recipe.

    Args:
        name: a path to a Python file; or one of the recipes that come with the package, with or
            without "recipes/" in front and ".py" behind: "segmentation/camvid".

    Raises:
        FileNotFoundError: neither; lists the recipes of the package.
    """
    if Path(name).is_file():
        return Path(name)
    here = Path(__file__).parent
    # In a wheel the folder recipes/ of the repository is packed as sparsight/recipes; in a checkout
    # it lies at the root.
    shipped = [
        folder for folder in (here / "recipes", here.parents[1] / "recipes") if folder.is_dir()
    ]
    relative = name.removeprefix("recipes/").removesuffix(".py") + ".py"
    for folder in shipped:
        if (folder / relative).is_file():
            return folder / relative
    known = sorted(
        {p.relative_to(f).with_suffix("").as_posix() for f in shipped for p in f.glob("*/*.py")}
    )
    raise FileNotFoundError(
        f"sparsight train: recipe {name!r} was not found; a Python file or one of "
        f"{', '.join(known) or '(none)'} is required; check the path."
    )


def load_recipe(path: Path) -> Callable[..., Any]:
    """Return the function of a recipe file: the one that has the file's name."""
    spec = importlib.util.spec_from_file_location(f"sparsight_recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and annotations inside look themselves up here
    spec.loader.exec_module(module)
    function = getattr(module, path.stem, None)
    if not callable(function):
        raise ValueError(
            f"sparsight train: {str(path)!r} defines no function {path.stem!r}; a recipe is one "
            "function named as its file; rename the function or the file."
        )
    return function


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    Args:
        argv: arguments after the program's name; None takes those of the process.

    Returns:
        0, or 1 after an error whose message was printed. Wrong flags leave through SystemExit(2).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    shows_traceback = "--traceback" in arguments
    arguments = [a for a in arguments if a != "--traceback"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_USAGE)
        return 0
    try:
        return _dispatch(arguments[0], arguments[1:])
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        if shows_traceback:
            raise
        print(f"sparsight: error: {error}", file=sys.stderr)
        if isinstance(error, ModuleNotFoundError):
            print(f"sparsight: the commands need the training extra: {_EXTRA}", file=sys.stderr)
        return 1


def _dispatch(command: str, rest: list[str]) -> int:
    functions: dict[str, Callable[..., Any]] = {
        "evaluate": evaluate,
        "profile": profile,
        "masks": masks,
    }
    program = f"sparsight {command}"
    if command == "train":
        if not rest or rest[0] in ("-h", "--help"):
            print(
                "usage: sparsight train RECIPE [flags]; sparsight train RECIPE --help lists the "
                "recipe's flags"
            )
            return 0 if rest else 2
        path = find_recipe(rest[0])
        function, rest, program = load_recipe(path), rest[1:], f"{program} {rest[0]}"
    elif command == "demo":
        from sparsight.demo import demo

        function = demo
    elif command in functions:
        function = functions[command]
    else:
        print(_USAGE, file=sys.stderr)
        print(f"sparsight: error: unknown command {command!r}", file=sys.stderr)
        return 2
    from jsonargparse import auto_cli

    auto_cli(function, args=normalise_flags(rest), prog=program, as_positional=True)
    return 0


def normalise_flags(arguments: Sequence[str]) -> list[str]:
    """Return the arguments in the spelling jsonargparse expects.

    `--batch-size 8` becomes `--batch_size 8`, a flag without a value gets `true`, `240x320` becomes
    `[240,320]`.
    """
    result: list[str] = []
    for i, argument in enumerate(arguments):
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            result.append("--" + name[2:].replace("-", "_") + equals + _size(value))
            has_value = bool(equals) or (
                i + 1 < len(arguments) and not arguments[i + 1].startswith("--")
            )
            if not has_value and name not in ("--help", "--print_config", "--print-config"):
                result.append("true")
        else:
            result.append(_size(argument))
    return result


def _size(value: str) -> str:
    match = re.fullmatch(r"(\d+)x(\d+)", value)
    return f"[{match[1]},{match[2]}]" if match else value


def _picture(path: str | None, size: tuple[int, int]) -> torch.Tensor:
    """A picture as segmentation models take it."""
    from sparsight.train.data.augment import normalised_picture

    picture = normalised_picture(_pixels(path, size), size)[None]
    return picture.contiguous(memory_format=torch.channels_last)


def _pixels(path: str | None, size: tuple[int, int]) -> torch.Tensor:
    """A picture as uint8 (3, h, w): a file's, or a drawn scene of the size."""
    from sparsight.train.data.camvid import read_image
    from sparsight.train.data.synthetic import draw_scene

    if path is None:
        return draw_scene(size, seed=0).image
    return torch.from_numpy(read_image(path)).permute(2, 0, 1)


def _latency(model: torch.nn.Module, architecture: Any, example: Any) -> Any:
    from sparsight.convert import freeze
    from sparsight.measure import measure_latency
    from sparsight.train.architecture import DetectorArchitecture, build_dense

    dense = build_dense(dataclasses.replace(architecture, sampling=None))
    if isinstance(architecture, DetectorArchitecture):
        # What the heads cost depends on what is found: the source has the same weights.
        own = dense.state_dict()
        dense.load_state_dict({k: v for k, v in model.state_dict().items() if k in own})
    dense = dense.eval().to(memory_format=torch.channels_last)
    name = "dense" if architecture.sampling is None else "sampled"
    rows = {"dense, eager channels-last": dense, f"{name}, frozen": freeze(model, example=example)}
    measured = measure_latency({key: (lambda m=m: m(example)) for key, m in rows.items()})
    print(measured)
    return _plain(measured)


def _plain(value: Any) -> Any:
    """`value` with dataclasses turned into dictionaries, for JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


if __name__ == "__main__":
    sys.exit(main())
