// AVX-512 (F, BW, VL, DQ) kernels, 16 lanes.
#define SPARSIGHT_ISA avx512
#define SPARSIGHT_AVX512 1
#include "isa_body.h"

namespace sparsight {
const KernelTable* avx512_table() {
  return &avx512::table;
}
}  // namespace sparsight
