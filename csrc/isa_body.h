// The bodies of one instruction set and its table. Included once by each isa_*.cpp, after it has
// defined SPARSIGHT_ISA (the namespace) and, for the wide ones, SPARSIGHT_AVX2 or SPARSIGHT_AVX512,
// and for bfloat16 maps SPARSIGHT_BFLOAT16.
#include "kernels.h"
#include "pack.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sparsight {
namespace SPARSIGHT_ISA {

#include "simd.h"
#include "sampled_conv.h"
#include "bilinear_gather.h"
#include "interpolate.h"
#include "heads.h"
#include "max_pool.h"
#include "merge_maps.h"
#include "soft_interpolate.h"
#include "softpool.h"

#define SPARSIGHT_STRING_(x) #x
#define SPARSIGHT_STRING(x) SPARSIGHT_STRING_(x)

static const KernelTable table = {
    SPARSIGHT_STRING(SPARSIGHT_ISA),
    sizeof(Element),
    kUnit,
    conv,
    kRows,
    gather,
    heads,
    fill,
    max_rows,
    merge_maps,
    soft_fill,
    soft_fill_backward_rows,
    soft_fill_backward_sites,
    soft_pool_rows,
    soft_pool_rows_backward,
    soft_pool_plane,
    soft_pool_plane_backward,
};

}  // namespace SPARSIGHT_ISA
}  // namespace sparsight
