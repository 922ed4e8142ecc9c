"""CNNs that compute their features only where the image needs them.

Convert a model with `sparsify`, fine-tune it with the task loss plus `sampling_loss`, look at what it
samples with `record_sampling`, and run it fast with `freeze`. The rooms below hold the rest: `sparsight.ops`,
`sparsight.nn`, `sparsight.convert`.
"""

from sparsight.convert import freeze, sparsify
from sparsight.nn import record_sampling, sampling_loss

__all__ = ["freeze", "record_sampling", "sampling_loss", "sparsify"]
