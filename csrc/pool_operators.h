// SoftPool over a batch: split over threads, scratch memory.
#pragma once
#include "kernels.h"

namespace sparsight {

struct SoftPoolArrays {
  PoolGeometry geometry;
  int64_t batch, channels;
  bool rows;          // channels-last; else contiguous planes
  const void* input;  // elements of the table, as all maps
};
void soft_pool(const KernelTable& table, const SoftPoolArrays& a, void* output, int num_threads);
// detached: the gradient takes the weights for constants.
void soft_pool_backward(const KernelTable& table, const SoftPoolArrays& a, const void* grad,
                        bool detached, void* grad_input, int num_threads);

}  // namespace sparsight
