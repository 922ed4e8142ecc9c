// AVX2 + FMA kernels, 8 lanes.
#define SPARSIGHT_ISA avx2
#define SPARSIGHT_AVX2 1
#include "isa_body.h"

namespace sparsight {
const KernelTable* avx2_table() {
  return &avx2::table;
}
}  // namespace sparsight
