"""Networks with fewer channels: which channels go together, which can go, and taking them out.

Enters: an ordinary dense `nn.Module` and example inputs. Leaves: an ordinary dense module with
fewer channels, ready for `sparsight.sparsify` and `sparsight.freeze`. May import: nn and below.
Torch-Pruning, which finds the groups of channels, is imported when it is used: the extra
`sparsight[compress]` brings it.
"""

from sparsight.compress.channel_groups import (
    ChannelGroup,
    Member,
    find_channel_groups,
    keep_channels,
)
from sparsight.compress.constant_channels import norms_behind
from sparsight.compress.filter_importance import weakest_filters
from sparsight.compress.narrow import narrow, shapes_of
from sparsight.compress.prune_filters import fitting_ratio, prune_filters, remove_zero_filters

__all__ = [
    "ChannelGroup",
    "Member",
    "find_channel_groups",
    "fitting_ratio",
    "keep_channels",
    "narrow",
    "norms_behind",
    "prune_filters",
    "remove_zero_filters",
    "shapes_of",
    "weakest_filters",
]
