"""Smaller and better taught networks: fewer channels, and a teacher beside the labels.

Enters: a trained network; for distillation its student too. Leaves: ordinary dense modules with
fewer channels, ready for `sparsight.sparsify` and `sparsight.freeze`; losses, modules and files
with which any training loop teaches a student. May import: nn and below. Torch-Pruning, which finds
the groups of channels, and safetensors, for a teacher's outputs kept on disk, are imported when
they are used: the extra `sparsight[compress]` brings the first, and scikit-learn for LASSO,
`sparsight[train]` the second.
"""

from sparsight.compress.cached_teacher import CachedTeacher
from sparsight.compress.channel_groups import (
    ChannelGroup,
    Member,
    find_channel_groups,
    keep_channels,
)
from sparsight.compress.constant_channels import norms_behind
from sparsight.compress.distillation import distillation_loss
from sparsight.compress.distiller import Distiller
from sparsight.compress.features import record_features
from sparsight.compress.filter_importance import weakest_filters
from sparsight.compress.hints import FeatureHints
from sparsight.compress.load_pruned import load_pruned
from sparsight.compress.narrow import narrow, shapes_of
from sparsight.compress.prune_channels import prune_channels
from sparsight.compress.prune_filters import fitting_ratio, prune_filters, remove_zero_filters
from sparsight.compress.pruning_run import PrunedLayer, PruningReport

__all__ = [
    "CachedTeacher",
    "ChannelGroup",
    "Distiller",
    "FeatureHints",
    "Member",
    "PrunedLayer",
    "PruningReport",
    "distillation_loss",
    "find_channel_groups",
    "fitting_ratio",
    "keep_channels",
    "load_pruned",
    "narrow",
    "norms_behind",
    "prune_channels",
    "prune_filters",
    "record_features",
    "remove_zero_filters",
    "shapes_of",
    "weakest_filters",
]
