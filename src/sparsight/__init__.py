"""CNNs that compute their features only where the image needs them.

Convert a model with `sparsify`, fine-tune it with the task loss plus `sampling_loss`, and look at
what it samples with `record_sampling`. The rooms below hold the rest: `sparsight.ops`,
`sparsight.nn`, `sparsight.convert`.
"""

from sparsight.convert import sparsify
from sparsight.nn import record_sampling, sampling_loss

__all__ = ["record_sampling", "sampling_loss", "sparsify"]
