"""Smaller and better taught networks: what a student learns from a teacher.

Enters: a trained network, and its student. Leaves: losses, modules and files with which any training
loop teaches the student. May import: nn and below. Needs no more than torch, but for outputs kept
on disk (`CachedTeacher`), which are safetensors files.
"""

from sparsight.compress.distillation import distillation_loss
from sparsight.compress.distiller import Distiller

__all__ = ["Distiller", "distillation_loss"]
