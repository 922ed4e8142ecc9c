"""The network that a run starts from: random, of a checkpoint, or of weights that others saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from sparsight.models import load_backbone_weights, read_state_dict
from sparsight.train.architecture import AnyArchitecture, Architecture, build_dense, convert
from sparsight.train.checkpoint import load_checkpoint, read_architecture

Kind = TypeVar("Kind", bound=AnyArchitecture)


def with_widths_of(architecture: Kind, init: str | Path | None) -> Kind:
    """Return `architecture` as narrow as the network that `init` holds: a pruned one stays so.

    Args:
        architecture: what a run's flags ask for, at full width.
        init: as for `initial_network`; a file that torch saved is of full width.

    Raises:
        FileNotFoundError: no such checkpoint.
    """
    if init is None or Path(init).suffix != ".safetensors":
        return architecture
    stored = read_architecture(init)
    return replace(architecture, widths=stored.widths, selected=stored.selected)


def initial_network(architecture: Architecture, init: str | Path | None) -> nn.Module:
    """Return the network of `architecture`, dense or sampled, with the weights asked for.

    Args:
        architecture: what to build.
        init: a *.safetensors checkpoint of sparsight, dense or sampled; or a state_dict of the
            dense network that was saved with torch (*.pt, *.pth), such as torchvision's; None for
            random weights.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the weights are of another architecture.
    """
    if init is None:
        return convert(build_dense(architecture), architecture)
    if Path(init).suffix == ".safetensors":
        return load_checkpoint(init, expected=architecture)[0]
    dense = build_dense(replace(architecture, sampling=None))
    advice = (
        "a *.safetensors checkpoint of sparsight, or a state_dict of the dense network saved with "
        "torch, is required; pass another file or change the flags of the architecture"
    )
    state = read_state_dict(init, name="initial_network", advice=advice)
    try:
        dense.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"initial_network: {str(init)!r} does not fit {architecture.model} "
            f"{architecture.backbone} with {architecture.num_classes} classes ({error}); {advice}."
        ) from error
    return convert(dense, architecture)


def dense_network(architecture: AnyArchitecture, backbone_weights: str | None) -> nn.Module:
    """Return the dense network of `architecture`, with random weights but for its backbone's.

    Args:
        architecture: what to build.
        backbone_weights: see `sparsight.models.load_backbone_weights`; None for random ones.

    Raises:
        FileNotFoundError: no such file.
        ConnectionError: torchvision could not fetch the weights.
        ValueError: there is no backbone, or the weights do not fit it.
    """
    dense = build_dense(architecture)
    if backbone_weights is not None:
        # torchvision's own models say at the end of their names what they stand on: fcn_resnet50
        name = architecture.backbone or architecture.model.rpartition("_")[2]
        kept = load_backbone_weights(dense, backbone_weights, name=name)
        random = f"; {len(kept)} parameters of it keep their values" if kept else ""
        say = rank_zero_only(print)  # not once a process
        say(f"{backbone_weights}: loaded into the backbone{random}")
    return dense


def check_one_start(caller: str, **starts: str | None) -> None:
    """Refuse more than one of the flags that say what weights a run starts from.

    Args:
        caller: of whom, for the message.
        starts: the flags, by name; None where one is not given.

    Raises:
        ValueError: two or more are given.
    """
    given = {name: value for name, value in starts.items() if value is not None}
    if len(given) > 1:
        listed = " and ".join(f"{name}={value!r}" for name, value in given.items())
        raise ValueError(
            f"{caller}: {listed} were both given; at most one is required; a checkpoint holds its "
            "backbone's weights: drop the other flag."
        )
