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
from sparsight.compress.load_pruned import load_pruned
from sparsight.compress.prune_channels import prune_channels
from sparsight.compress.pruning_run import PrunedLayer, PruningReport

__all__ = [
    "ChannelGroup",
    "Member",
    "PrunedLayer",
    "PruningReport",
    "find_channel_groups",
    "keep_channels",
    "load_pruned",
    "prune_channels",
]
