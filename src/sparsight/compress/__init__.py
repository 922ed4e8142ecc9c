"""Smaller and better taught networks: what a student learns from a teacher.

Enters: a trained network, and its student. Leaves: losses, modules and files with which any
training loop teaches the student. May import: nn and below. Needs no more than torch, but for
outputs kept on disk (`CachedTeacher`), which are safetensors files.
"""

from sparsight.compress.cached_teacher import CachedTeacher
from sparsight.compress.distillation import distillation_loss
from sparsight.compress.distiller import Distiller
from sparsight.compress.features import record_features
from sparsight.compress.hints import FeatureHints

__all__ = [
    "CachedTeacher",
    "Distiller",
    "FeatureHints",
    "distillation_loss",
    "record_features",
]
