"""Modules that decide where to compute, compute there, and fill in the rest; SoftPool.

Enters: dense maps, and convolutions or residual blocks to wrap. Leaves: modules with the same call
contract, and the decisions they make. May import `sparsight.ops`; no other room.
"""

from sparsight.nn.channel_select import ChannelSelect
from sparsight.nn.conv_pair import ConvPair
from sparsight.nn.deform_block import DeformableBlock
from sparsight.nn.deform_conv import DeformableConv2d
from sparsight.nn.interpolation import (
    AveragePoolInterpolation,
    ConvInterpolation,
    NearestInterpolation,
    RBFInterpolation,
    ZeroFill,
)
from sparsight.nn.merge_maps import MergeMaps
from sparsight.nn.noise import blue_noise_tile
from sparsight.nn.objective import sampling_loss
from sparsight.nn.perforation import PerforatedSampler
from sparsight.nn.pooling import AdaptiveSoftPool2d, SoftPool1d, SoftPool2d, SoftPool3d
from sparsight.nn.recompute import recompute_activations
from sparsight.nn.record import RecordedDecision, SamplingRecord, record_sampling
from sparsight.nn.relu_gate import ReLUGate
from sparsight.nn.sampled_block import SampledBlock
from sparsight.nn.sampled_conv import SampledConv2d
from sparsight.nn.sampler import Sampler, SamplingDecision
from sparsight.nn.seed import set_seed

__all__ = [
    "AdaptiveSoftPool2d",
    "AveragePoolInterpolation",
    "ChannelSelect",
    "ConvInterpolation",
    "ConvPair",
    "DeformableBlock",
    "DeformableConv2d",
    "MergeMaps",
    "NearestInterpolation",
    "PerforatedSampler",
    "RBFInterpolation",
    "ReLUGate",
    "RecordedDecision",
    "SampledBlock",
    "SampledConv2d",
    "Sampler",
    "SamplingDecision",
    "SamplingRecord",
    "SoftPool1d",
    "SoftPool2d",
    "SoftPool3d",
    "ZeroFill",
    "blue_noise_tile",
    "recompute_activations",
    "record_sampling",
    "sampling_loss",
    "set_seed",
]
