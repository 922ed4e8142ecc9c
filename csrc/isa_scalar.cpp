// Portable kernels, one lane: the fall-back on any CPU and the honest baseline of the tests.
#define SPARSIGHT_ISA scalar
#include "isa_body.h"

namespace sparsight {
const KernelTable* scalar_table() {
  return &scalar::table;
}
}  // namespace sparsight
