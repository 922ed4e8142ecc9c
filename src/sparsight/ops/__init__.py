"""Functions on tensors: the sampled computation itself.

Enters: dense channels-last maps, weights, masks. Leaves: dense maps of static shape.
May import torch, the compiled kernels and (lazily) triton; nothing else of sparsight.
`reference` states every operator in plain aten; the registered operators must agree with it.
"""

from sparsight.ops import reference
from sparsight.ops.assemble import assemble_windows, windows_inside
from sparsight.ops.conv import sampled_conv2d
from sparsight.ops.deform import sampled_deform_conv2d
from sparsight.ops.interpolate import interpolate
from sparsight.ops.merge import merge_maps
from sparsight.ops.pool import soft_pool1d, soft_pool2d, soft_pool3d
from sparsight.ops.sites import Sites, sites_from_mask

__all__ = [
    "Sites",
    "assemble_windows",
    "interpolate",
    "merge_maps",
    "reference",
    "sampled_conv2d",
    "sampled_deform_conv2d",
    "sites_from_mask",
    "soft_pool1d",
    "soft_pool2d",
    "soft_pool3d",
    "windows_inside",
]
