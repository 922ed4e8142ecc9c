"""The `sparsight` command: train, evaluate, profile, draw masks, predict, run the demo."""

from __future__ import annotations

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
  evaluate CHECKPOINT ...       mIoU, AP, AR or top-1, MACs and frozen milliseconds, over seeds
  profile CHECKPOINT ...        density, MACs and milliseconds of each layer
  masks CHECKPOINT ...          pictures: prediction, where it computes, sampling masks
  predict CHECKPOINT ...        label maps, or COCO's results, of pictures without annotations
  demo                          everything at once, small, on scenes drawn on the spot

`sparsight COMMAND --help` lists the flags of a command, `sparsight train RECIPE --help` those of a
recipe. Flags may be written with - or _; a flag that is true or false may stand alone; sizes are
written 240x320. --traceback anywhere shows where an error came from.
"""


def evaluate(
    checkpoint: str,
    *,
    data: str | None = None,
    dataset: Literal["camvid", "cityscapes", "cifar10", "imagenet", "coco", "voc", "moving_shapes"]
    | None = None,
    split: Literal["train", "val"] = "val",
    size: tuple[int, int] | None = None,
    frozen: bool = True,
    latency: bool = True,
    seeds: int = 1,
    batch_size: int = 8,
    scales: tuple[float, ...] | list[float] = (1.0,),
    flip: bool = False,
    window: tuple[int, int] | None = None,
    overlap: int = 64,
    out: str | None = None,
) -> dict[str, Any]:
    """Score a checkpoint: metric, MACs, and milliseconds frozen against its dense form.

    The metric is mIoU on CamVid and Cityscapes, top-1 on CIFAR-10, ImageNet and the moving shapes,
    AP on COCO, of models that propose masks average recall on COCO and VOC.

    Args:
        checkpoint: weights.safetensors of a training run.
        data: folder of the data set, in the layout that its recipe expects; left out for
            moving_shapes, which are drawn.
        dataset: which one it is; default: what the checkpoint says.
        split: which images; "val" is CIFAR-10's test set.
        size: height and width in pixels, as 240x320; default: those of training. A smaller one is
            the "resized" baseline: scores are always counted at the annotations' own size. For a
            detector, or for proposals: shorter side, and the bound on the longer.
        frozen: freeze the model first; scores then come from the kernels that will be deployed.
        latency: also measure milliseconds for one image, interleaved with the dense form.
        seeds: number of sampling seeds, from 0; more than one gives mean, standard deviation, least
            and greatest of the metric and of the share of the MACs.
        batch_size: images scored at once.
        scales: of a segmentation model: factors on the size of the input, as 0.75,1,1.25, over
            which it is averaged. Costs and milliseconds are those of all of them.
        flip: of a segmentation model: each also mirrored, left to right.
        window: of a segmentation model: height and width, as 512x1024, of the windows that an image
            is cut into that would not fit into memory; default: the whole image at once.
        overlap: pixels that neighbouring windows share.
        out: JSON file to write the result to; bench/curves.py draws them.
    """
    from sparsight.train.checkpoint import write_atomically
    from sparsight.train.dense_inference import DenseInference
    from sparsight.train.evaluate_checkpoint import evaluate_checkpoint

    if out is not None and Path(out).is_dir():  # said before the images are scored, not after
        raise ValueError(
            f"sparsight evaluate: out={out!r} is a folder; a file is required; pass --out "
            f"{Path(out) / 'evaluation.json'}."
        )
    inference = DenseInference(scales=tuple(scales), flip=flip, window=window, overlap=overlap)
    result = evaluate_checkpoint(
        checkpoint,
        data=data,
        dataset=dataset,
        split=split,
        size=size,
        frozen=frozen,
        latency=latency,
        seeds=seeds,
        batch_size=batch_size,
        inference=inference,
    )
    if out is not None:
        write_atomically(out, json.dumps(result, indent=2).encode())
    return result


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
        size: height and width in pixels, as 240x320; default: those of training. For a detector,
            or for proposals: shorter side, and the bound on the longer.
        image: picture to run on; default: a drawn street scene, or clip. Densities depend on it.
        choose: "measured" runs the layers dense that are faster so on this picture, which changes
            what they return; below the table stands what both forms of each took. Default: none.
    """
    from sparsight import measure
    from sparsight.convert import freeze
    from sparsight.train.architecture import at_size
    from sparsight.train.checkpoint import load_checkpoint

    model, stored = load_checkpoint(checkpoint)
    architecture = at_size(model, stored, size)
    x: Any
    if architecture.task in ("detection", "proposals"):  # they resize and normalise by themselves
        shorter, bound = architecture.size
        x = [_pixels(image, (shorter, min(bound, shorter * 4 // 3))).float() / 255]
    elif architecture.task == "video":
        x = _clip(image, architecture.size)
    else:
        x = _picture(image, architecture.size)
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
    dense: str | None = None,
    dataset: Literal["camvid", "cityscapes", "cifar10", "imagenet", "coco", "voc"] | None = None,
    images: tuple[int, ...] | list[int] = (0, 33, 66),
    split: Literal["train", "val"] = "val",
    size: tuple[int, int] | None = None,
    out: str = "masks",
    shows_data: bool = False,
    per_sampler: bool = True,
) -> list[str]:
    """Draw where a sampled checkpoint computes: an overview, and the masks of every sampler.

    Args:
        checkpoint: weights.safetensors of a sampled training run.
        data: folder of the data set, in the layout that its recipe expects.
        dense: weights.safetensors of a dense run for the same classes, of segmentation or
            detection, whose prediction is drawn beside the sampled one.
        dataset: which one it is; default: what the checkpoint says.
        images: positions in the split, as [0,33,66].
        split: which images; "val" is CIFAR-10's test set.
        size: height and width in pixels, as 240x320; default: those of training. For a detector,
            or for proposals: shorter side, and the bound on the longer.
        out: folder for the pictures: overview.png, and one PNG an image.
        shows_data: draw photographs and annotations too; false draws masks over the predicted
            classes, or over a blank canvas, for data that may not be published.
        per_sampler: also draw the PNG of each image, with the mask of every sampler.
    """
    from sparsight.train.draw_checkpoint import draw_checkpoint

    written = draw_checkpoint(
        checkpoint,
        data=data,
        dense=dense,
        dataset=dataset,
        images=images,
        split=split,
        size=size,
        out=out,
        shows_data=shows_data,
        per_sampler=per_sampler,
    )
    print("\n".join(map(str, written)))
    return [str(path) for path in written]


def predict(
    checkpoint: str,
    *,
    images: str,
    out: str = "predictions",
    size: tuple[int, int] | None = None,
    scales: tuple[float, ...] | list[float] = (1.0,),
    flip: bool = False,
    window: tuple[int, int] | None = None,
    overlap: int = 64,
    frozen: bool = True,
    overlays: bool = True,
) -> list[str]:
    """Write what a checkpoint says of pictures: label maps, or detections as COCO's results.

    Segmentation writes NAME_labels.png, one byte a pixel, at the picture's own size. Detection and
    mask proposals write predictions.json and images.json. All write NAME_overlay.png.

    Args:
        checkpoint: weights.safetensors of a training run for segmentation, detection or proposals.
        images: a PNG or JPEG file, or a folder of them.
        out: folder for the files.
        size: height and width in pixels, as 240x320; default: those of training. For a detector,
            or for proposals: shorter side, and the bound on the longer.
        scales: of a segmentation model: factors on the size, as 0.75,1,1.25, that are averaged.
        flip: of a segmentation model: each also mirrored, left to right.
        window: of a segmentation model: height and width of the windows that a large image is cut
            into; default: the whole image at once.
        overlap: pixels that neighbouring windows share.
        frozen: freeze the model first.
        overlays: also write the pictures.
    """
    from sparsight.train.dense_inference import DenseInference
    from sparsight.train.predict_checkpoint import predict_checkpoint

    written = predict_checkpoint(
        checkpoint,
        images=images,
        out=out,
        size=size,
        inference=DenseInference(scales=tuple(scales), flip=flip, window=window, overlap=overlap),
        frozen=frozen,
        overlays=overlays,
    )
    print("\n".join(map(str, written)))
    return [str(path) for path in written]


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
    except (ValueError, OSError, ModuleNotFoundError) as error:
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
        "predict": predict,
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
    `[240,320]`, and numbers with commas between them, as `0.75,1`, become a list.
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
    if match:
        return f"[{match[1]},{match[2]}]"
    number = r"\d+(?:\.\d*)?"
    return f"[{value}]" if re.fullmatch(rf"{number}(?:,{number})+", value) else value


def _picture(path: str | None, size: tuple[int, int]) -> torch.Tensor:
    """A picture as models for segmentation and classification take it."""
    from sparsight.train.data.augment import normalised_picture

    picture = normalised_picture(_pixels(path, size), size)[None]
    return picture.contiguous(memory_format=torch.channels_last)


def _clip(path: str | None, size: tuple[int, int]) -> torch.Tensor:
    """A drawn clip as models for clips take it."""
    from sparsight.nn.channels_last import channels_last
    from sparsight.train.data.moving_shapes import clip_transform, draw_clip

    if path is not None:
        raise ValueError(
            f"profile: image={path!r} was given for a model of clips; a drawn clip is used, and no "
            "picture is read; leave --image out."
        )
    clip, _ = clip_transform()(draw_clip(0, size=size, num_frames=8, seed=0), 0)
    return channels_last(clip[None])


def _pixels(path: str | None, size: tuple[int, int]) -> torch.Tensor:
    """A picture as uint8 (3, h, w): a file's, or a drawn scene of the size."""
    from sparsight.train.data.camvid import read_image
    from sparsight.train.data.synthetic import draw_scene

    if path is None:
        return draw_scene(size, seed=0).image
    return torch.from_numpy(read_image(path, owner="sparsight profile")).permute(2, 0, 1)


if __name__ == "__main__":
    sys.exit(main())
