"""Surgery on models: a dense model in, a sampled one out, with the same call contract.

Enters: any eager torch model, above all torchvision's. Leaves: a converted copy. May import
`sparsight.nn` and `sparsight.ops`; neither `models` nor `compress`.
"""

from sparsight.convert.find import ConversionError
from sparsight.convert.freeze import freeze
from sparsight.convert.replace_pooling import replace_pooling
from sparsight.convert.sparsify import SamplingReport, sparsify

__all__ = ["ConversionError", "SamplingReport", "freeze", "replace_pooling", "sparsify"]
