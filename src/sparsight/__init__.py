"""CNNs that compute their features only where the image needs them.

Convert a model with `sparsify`, fit it to a budget with `calibrate` or fine-tune it with the task
loss plus `sampling_loss`, look at what it samples with `record_sampling`, and run it fast with
`freeze`. The rooms hold the rest:
`sparsight.measure`, `sparsight.convert`, `sparsight.compress`, `sparsight.models`, `sparsight.nn`,
`sparsight.ops`.
`sparsight.train` is imported by those who train: it needs the extra `sparsight[train]`.
"""

from sparsight import compress, convert, measure, models, nn, ops
from sparsight.convert import freeze, sparsify
from sparsight.measure import calibrate
from sparsight.nn import record_sampling, sampling_loss

__version__ = "0.1.0"  # read by the build; the only place where it stands

__all__ = [
    "calibrate",
    "compress",
    "convert",
    "freeze",
    "measure",
    "models",
    "nn",
    "ops",
    "record_sampling",
    "sampling_loss",
    "sparsify",
]
