// AVX-512 with BF16: bfloat16 maps and weights, float32 sums, 16 lanes.
#define SPARSIGHT_ISA avx512bf16
#define SPARSIGHT_AVX512 1
#define SPARSIGHT_BFLOAT16 1
#include "isa_body.h"

namespace sparsight {
const KernelTable* avx512bf16_table() {
  return &avx512bf16::table;
}
}  // namespace sparsight
