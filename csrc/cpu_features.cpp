// CPUID once; hands out the table of a given ISA, so that tests can force one.
#include <cstring>

#include "kernels.h"

namespace sparsight {
namespace {

bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

bool has_avx512() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
  return false;
#endif
}

#if defined(SPARSIGHT_HAS_AVX512BF16)
bool has_avx512bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
}
#endif

}  // namespace

#if !defined(__x86_64__)
const KernelTable* avx2_table() {
  return nullptr;
}
const KernelTable* avx512_table() {
  return nullptr;
}
#endif

const KernelTable* table_for(const char* isa) {
  static const KernelTable* const avx512 = has_avx512() ? avx512_table() : nullptr;
  static const KernelTable* const avx2 = has_avx2() ? avx2_table() : nullptr;
  if (std::strcmp(isa, "auto") == 0) return avx512 ? avx512 : avx2 ? avx2 : scalar_table();
  if (std::strcmp(isa, "avx512") == 0) return avx512;
  if (std::strcmp(isa, "avx2") == 0) return avx2;
  if (std::strcmp(isa, "scalar") == 0) return scalar_table();
  return nullptr;
}

const KernelTable* bfloat16_table() {
#if defined(SPARSIGHT_HAS_AVX512BF16)
  static const KernelTable* const table = has_avx512bf16() ? avx512bf16_table() : nullptr;
  return table;
#else
  return nullptr;
#endif
}

}  // namespace sparsight
