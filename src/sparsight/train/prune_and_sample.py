"""Fewer channels at fewer places: prune a trained network, sample the rest, learn from the whole.

What the recipes that do all three have in common: the steps, each a checkpoint, and their table.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from sparsight.compress import prune_channels
from sparsight.measure import calibrate, environment
from sparsight.train.architecture import (
    Architecture,
    build_dense,
    convert,
    pruned_architecture,
)
from sparsight.train.chain_table import ChainStep, chain_table, measure_frozen
from sparsight.train.checkpoint import load_checkpoint, save_checkpoint, write_atomically
from sparsight.train.initial_weights import initial_network
from sparsight.train.recipe import Recipe
from sparsight.train.sampling_flags import SamplingFlags
from sparsight.train.settling import settle

DENSE_FILE = "dense.safetensors"
_PRUNED_FILE = "pruned.safetensors"
_CONVERTED_FILE = "converted.safetensors"
_WEIGHTS_FILE = "weights.safetensors"
_TUNED_FOLDER = "tuned"
_RECORD_FILE = "chain.json"
_NUM_SETTLING_IMAGES = 64
_CALIBRATION_LR = 1e-3


@dataclass(frozen=True, kw_only=True)
class ChainSettings:
    """How a network is pruned, and what is done before the sampled one is trained.

    Attributes:
        speedup: how many times fewer multiply-adds the pruned network has, at least 1.
        round_to: widths are multiples of it, see `prune_channels`.
        num_images: about so many training images that pruning and calibration look at, without
            their labels.
        tune_epochs: passes over the training images that train the pruned network before it is
            sampled; 0 for none.
        tune_lr: peak learning rate of these.
        calibration_steps: of `sparsight.calibrate` on the converted network, from which training
            then starts; 0: training starts from the dense pruned one, and the row of the converted
            one is that of samplers that have learnt nothing, settled on the budget.

    Raises:
        ValueError: fewer than 0 epochs or steps, or no image.
    """

    speedup: float = 2.0
    round_to: int = 16
    num_images: int = 1024
    tune_epochs: int = 0
    tune_lr: float = 2e-5
    calibration_steps: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_images", 1), ("tune_epochs", 0), ("calibration_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"ChainSettings: {name}={getattr(self, name)}; at least {least} is required; "
                    "leave it out for the default."
                )


def prune_and_sample(
    recipe: Recipe,
    *,
    name: str,
    dense: Architecture,
    init: str | None,
    settings: ChainSettings,
    flags: SamplingFlags,
    train: Callable[..., dict[str, Any]],
    score: Callable[[nn.Module, Iterable[Any]], Any],
    lr: float,
    latency: bool = True,
    resume: bool = False,
) -> dict[str, Any]:
    """Prune, tune if asked for, convert, train, and say what each step scores and costs.

    Each step is a checkpoint in `recipe.out`: dense.safetensors, the network that everything starts
    from; pruned.safetensors; tuned/weights.safetensors; converted.safetensors, sampled before
    training; weights.safetensors, the end.

    Args:
        recipe: data, transforms and length of the last training; its folder takes everything.
        name: of the run, for the result.
        dense: architecture of the dense network at full width.
        init: its weights, see `initial_network`; None for random ones.
        settings: of the steps before the last.
        flags: what the last network is to compute; the budget is a share of the *pruned* network's
            multiply-adds.
        train: train(recipe, flags=, init=, lr=, resume=) -> result: one run with the task's labels,
            and a teacher if there is one, that leaves weights.safetensors in the recipe's folder.
            It may read the teacher from `recipe.out` / DENSE_FILE.
        score: score(model in eval mode, batches) -> `ClassificationScore` or `Score`.
        lr: peak learning rate of the last training.
        latency: also measure milliseconds of all steps, frozen, on the first validation image.
        resume: do not repeat the steps whose checkpoint is in the folder, and go on with trainings
            from their last.ckpt.

    Returns:
        What is also written to `recipe.out`/result.json: "steps", the fields of each `ChainStep`;
        "share_of_dense" and "share_of_pruned" of the end; "details" of single steps; "training",
        the result of the last run; "latency", the fields of a `LatencyComparison`, or None;
        "settings", "environment", "architecture".

    Raises:
        ValueError: another method than "sampled", no budget, more than one process, a folder of
            other settings to resume, a speed-up out of reach, or weights of another architecture.
        FileNotFoundError: weights are missing, or there is nothing to resume.
    """
    _check(recipe, name, flags)
    budget = flags.budget
    assert budget is not None
    planned = flags.plan(size=dense.size, dense=lambda: build_dense(dense))
    out = recipe.out
    dataset = getattr(recipe.val_data, "name", None)
    record = _Record.open(
        out / _RECORD_FILE,
        {
            "architecture": dense.to_json(),
            "settings": asdict(settings),
            "sampling": asdict(flags.sampling),
            "budget": budget,
            "seed": recipe.seed,
        },
        name=name,
        resume=resume,
    )
    steps: list[tuple[str, Path, Any]] = []

    def add(step: str, path: Path, make: Callable[[], dict[str, Any]], *, repeats: bool) -> None:
        if repeats or step not in record.details or not path.is_file():
            record.note(step, make())
        model, _ = load_checkpoint(path)
        steps.append((step, path, score(model.eval(), recipe.validation_batches())))
        print(f"{step}: {steps[-1][2]}", flush=True)

    def images() -> Tensor:
        return torch.cat([batch[0] for batch in recipe.measured_batches(settings.num_images)])

    def copy_dense() -> dict[str, Any]:
        L.seed_everything(recipe.seed, verbose=False)
        save_checkpoint(out / DENSE_FILE, initial_network(dense, init), dense, dataset=dataset)
        return {}

    def prune() -> dict[str, Any]:
        network, _ = load_checkpoint(out / DENSE_FILE)
        pruned: Any = prune_channels(
            network.eval(),
            images(),
            speedup=settings.speedup,
            round_to=settings.round_to,
            seed=recipe.seed,
            shows_progress=recipe.shows_progress,
        )
        architecture = pruned_architecture(dense, pruned)
        save_checkpoint(out / _PRUNED_FILE, pruned, architecture, dataset=dataset)
        return asdict(pruned.pruning_report)

    def trained(at: Recipe, flags: SamplingFlags, init: Path, lr: float) -> dict[str, Any]:
        goes_on = resume and (at.out / "last.ckpt").is_file()
        return train(at, flags=flags, init=str(init), lr=lr, resume=goes_on)

    def convert_pruned(source: Path) -> dict[str, Any]:
        network, stored = load_checkpoint(source)
        architecture = replace(stored, sampling=planned.sampling)
        L.seed_everything(recipe.seed, verbose=False)
        model: Any = convert(network, architecture).eval()
        details: dict[str, Any]
        if settings.calibration_steps > 0:
            calibrate(
                model,
                # As training shows them: a network that has trained on plain ones knows them by
                # heart, and norms measured on them are not those of new images.
                torch.cat([batch[0] for batch in recipe.augmented_batches(settings.num_images)]),
                budget=budget,
                num_steps=settings.calibration_steps,
                batch_size=recipe.batch_size,
                lr=_CALIBRATION_LR,
                remeasure_norms=True,
                seed=recipe.seed,
                shows_progress=recipe.shows_progress,
            )
            details = asdict(model.calibration_report)
        else:
            details = dict(settle(model, recipe, budget, num_images=_NUM_SETTLING_IMAGES))
        save_checkpoint(out / _CONVERTED_FILE, model, architecture, dataset=dataset)
        return details

    add("dense", out / DENSE_FILE, copy_dense, repeats=False)
    before = out / _PRUNED_FILE
    add("pruned", before, prune, repeats=False)
    if settings.tune_epochs > 0:
        tuning = replace(recipe, out=out / _TUNED_FOLDER, epochs=settings.tune_epochs)
        unpriced = replace(flags, budget=None)
        pruned, before = before, tuning.out / _WEIGHTS_FILE
        add(
            "pruned, tuned",
            before,
            lambda: trained(tuning, unpriced, pruned, settings.tune_lr),
            repeats=True,
        )
    is_calibrated = settings.calibration_steps > 0
    add(
        "sampled, calibrated" if is_calibrated else "sampled, untrained",
        out / _CONVERTED_FILE,
        lambda: convert_pruned(before),
        repeats=False,
    )
    start = out / _CONVERTED_FILE if is_calibrated else before
    add(
        "sampled, distilled",
        out / _WEIGHTS_FILE,
        lambda: trained(recipe, flags, start, lr),
        repeats=True,
    )

    example = next(iter(recipe.validation_batches()))[0][:1]
    measured = measure_frozen({step: path for step, path, _ in steps}, example) if latency else None
    table = [
        ChainStep.of(step, path.relative_to(out), scored, first=steps[0][2], measured=measured)
        for step, path, scored in steps
    ]
    print(chain_table(table))
    last = steps[-1][2]
    result: dict[str, Any] = {
        "task": name,
        "seed": recipe.seed,
        "epochs": recipe.epochs,
        "budget": budget,
        "settings": asdict(settings),
        "share_of_dense": table[-1].share,
        "share_of_pruned": last.share,
        "steps": [asdict(step) for step in table],
        "details": {step: details for step, details in record.details.items() if details},
        "training": record.details[table[-1].name],
        "latency": None if measured is None else asdict(measured),
        "environment": environment(),
        "architecture": load_checkpoint(out / _WEIGHTS_FILE)[1].to_json(),
    }
    del result["details"][table[-1].name]
    write_atomically(out / "result.json", json.dumps(result, indent=2).encode())
    return result


def _check(recipe: Recipe, name: str, flags: SamplingFlags) -> None:
    if flags.method != "sampled" or flags.budget is None:
        raise ValueError(
            f"{name}: method={flags.method!r} with budget={flags.budget}; what was pruned is "
            'sampled to a budget here: method="sampled" and a share of the pruned network\'s MACs '
            "in (0, 1] are required; give the checkpoint of a pruned network to another recipe as "
            "--init for other methods."
        )
    if recipe.hardware.num_processes > 1:
        raise ValueError(
            f"{name}: devices and num_nodes make {recipe.hardware.num_processes} processes; one is "
            f"required, for pruning is one process's work; leave them out, or give {_PRUNED_FILE} "
            "of such a run as --init to the recipe that only trains, with its --devices."
        )


@dataclass
class _Record:
    """What a folder holds, and what was said of its steps when they were made.

    Attributes:
        path: of the file.
        made_with: what decides the steps that are not repeated.
        details: by name of a step that was made, in plain values.
    """

    path: Path
    made_with: dict[str, Any]
    details: dict[str, dict[str, Any]]

    @staticmethod
    def open(path: Path, made_with: dict[str, Any], *, name: str, resume: bool) -> _Record:
        """Start a record, or go on with the one in the file."""
        made_with = json.loads(json.dumps(made_with))  # tuples are lists in the file
        if not resume:
            record = _Record(path, made_with, {})
            record._write()
            return record
        if not path.is_file():
            raise FileNotFoundError(
                f"{name}: {str(path)!r} does not exist; that of an interrupted run is required to "
                "resume; pass the --out folder of that run, or leave --resume out."
            )
        stored = json.loads(path.read_text(encoding="utf-8"))
        found = [key for key in made_with if stored["made_with"].get(key) != made_with[key]]
        if found:
            told = "; ".join(
                f"{key} {stored['made_with'].get(key)}, not {made_with[key]}" for key in found
            )
            raise ValueError(
                f"{name}: the steps in {str(path.parent)!r} were made with {told}; the same "
                "settings are required to resume; repeat the flags of that run, or pass another "
                "--out."
            )
        return _Record(path, made_with, stored["details"])

    def note(self, step: str, details: dict[str, Any]) -> None:
        """Keep what is to be said of a step that was made."""
        self.details[step] = details
        self._write()

    def _write(self) -> None:
        values = {"made_with": self.made_with, "details": self.details}
        write_atomically(self.path, json.dumps(values, indent=2).encode())
