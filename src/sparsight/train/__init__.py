"""Training: data, tasks, budgets, checkpoints. The only room that imports lightning.

Enters: a dense model, a data set and a budget. Leaves: a sampled model that keeps to the budget, on
disk as safetensors with its architecture, and its score. May import: measure, compress, convert,
models, nn and below. Needs the extra `sparsight[train]`; `pictures`, and with it `draw_checkpoint`
and `predict_checkpoint`, needs `sparsight[report]` too.
"""

from sparsight.nn.budget import BudgetController, SamplingPrice, settle_on_budget
from sparsight.train.annealing import (
    TemperatureAnnealing,
    geometric_temperature,
    published_temperature,
)
from sparsight.train.architecture import (
    Architecture,
    DetectorArchitecture,
    ProposalArchitecture,
)
from sparsight.train.average_precision import AveragePrecision, average_precision
from sparsight.train.average_recall import AverageRecall, average_recall
from sparsight.train.checkpoint import load_checkpoint, save_checkpoint
from sparsight.train.dense_inference import DenseInference
from sparsight.train.detection_task import DetectionTask
from sparsight.train.distillation import Distillation, load_teacher, shared_flags
from sparsight.train.evaluate import Score, score
from sparsight.train.evaluate_checkpoint import evaluate_checkpoint
from sparsight.train.evaluate_classification import ClassificationScore, score_classification
from sparsight.train.evaluate_detection import DetectionScore, score_detector
from sparsight.train.evaluate_proposals import ProposalScore, score_proposals
from sparsight.train.filter_pruning import FilterPruning
from sparsight.train.hardware import Hardware
from sparsight.train.proposal_task import ProposalTask
from sparsight.train.recipe import Recipe
from sparsight.train.sampled_task import SampledTask
from sparsight.train.sampling import Plan, Sampling, apply_sampling, plan
from sparsight.train.sampling_flags import SamplingFlags, sampling_flags
from sparsight.train.tasks import SegmentationTask

__all__ = [
    "Architecture",
    "AveragePrecision",
    "AverageRecall",
    "BudgetController",
    "ClassificationScore",
    "DenseInference",
    "DetectionScore",
    "DetectionTask",
    "DetectorArchitecture",
    "Distillation",
    "FilterPruning",
    "Hardware",
    "Plan",
    "ProposalArchitecture",
    "ProposalScore",
    "ProposalTask",
    "Recipe",
    "SampledTask",
    "Sampling",
    "SamplingFlags",
    "SamplingPrice",
    "Score",
    "SegmentationTask",
    "TemperatureAnnealing",
    "apply_sampling",
    "average_precision",
    "average_recall",
    "evaluate_checkpoint",
    "geometric_temperature",
    "load_checkpoint",
    "load_teacher",
    "plan",
    "published_temperature",
    "sampling_flags",
    "save_checkpoint",
    "score",
    "score_classification",
    "score_detector",
    "score_proposals",
    "settle_on_budget",
    "shared_flags",
]
