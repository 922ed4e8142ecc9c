// Maps of any sizes joined into one, over a batch; see merge_maps.h.
#pragma once
#include <vector>

#include "kernels.h"

namespace sparsight {

enum class Resizing : int64_t { nearest = 0, bilinear = 1, bilinear_corners = 2 };

struct MergeArrays {
  int64_t batch, height, width;  // of the output
  // channels, height, width of each source: rows of elements of the table
  std::vector<const void*> inputs;
  std::vector<int64_t> channels, heights, widths;
  bool sums;  // else side by side; a sum takes kMaxMerged sources and maps of the same channels
  Resizing resizing;
};
void merge_all(const KernelTable& table, const MergeArrays& a, void* output, int num_threads);

}  // namespace sparsight
