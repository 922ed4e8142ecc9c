// The masks of a block: its heads, what they decide, and which holes the next convolution reads.
#pragma once
#include <cstdint>

#include "operators.h"
#include "sampled_block.h"

namespace sparsight {

constexpr int kMaxMasks = 3;

// Of the memory that a block uses again, see Scratch.
enum Slot {
  kZeroRow = 8,
  kHeads,
  kZeroHeads,
  kSites,
  kHoles,
  kRowOf,
  kNeeded,
  kColumns,
  kStageA,
  kStageB,
  kMerged,
  kOffsets,
  kEveryPosition,
  kPooled,
  kMixed
};

inline const int64_t* mask_fields(const int64_t* spec, int64_t m) {
  return spec + kHeaderFields + m * kMaskFields;
}
inline const int64_t* stage_fields(const int64_t* spec, int64_t s) {
  return spec + kHeaderFields + spec[kNumMasks] * kMaskFields + s * kStageFields;
}

inline int64_t out_size(int64_t size, int64_t kernel, int64_t stride, int64_t pad,
                        int64_t dilation) {
  return (size + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1;
}

inline ConvGeometry stage_geometry(const int64_t* stage, int64_t height, int64_t width) {
  ConvGeometry g{};
  g.height = height;
  g.width = width;
  g.in_channels = stage[kStageIn];
  g.out_channels = stage[kStageOut];
  g.groups = stage[kStageGroups];
  g.kernel_h = stage[kKernelH];
  g.kernel_w = stage[kKernelW];
  g.stride_h = stage[kStrideH];
  g.stride_w = stage[kStrideW];
  g.pad_h = stage[kPadH];
  g.pad_w = stage[kPadW];
  g.dilation_h = stage[kDilationH];
  g.dilation_w = stage[kDilationW];
  g.out_height = out_size(height, g.kernel_h, g.stride_h, g.pad_h, g.dilation_h);
  g.out_width = out_size(width, g.kernel_w, g.stride_w, g.pad_w, g.dilation_w);
  return g;
}

inline bool is_pointwise(const int64_t* stage) {
  return stage[kKernelH] == 1 && stage[kKernelW] == 1 && stage[kStrideH] == 1 &&
         stage[kStrideW] == 1 && stage[kPadH] == 0 && stage[kPadW] == 0;
}

inline bool is_deformable(const int64_t* stage) {
  return stage[kOffsetGroups] > 0;
}

struct Mask {
  int64_t height = 0, width = 0, count = 0;
  uint8_t* bytes = nullptr;
  int32_t* sites = nullptr;
  bool full() const { return count == height * width; }
};

// Shared by the stages of one call.
struct BlockMasks {
  BlockMasks(const KernelTable& kernels, const BlockArrays& arrays, int num_threads)
      : table(kernels), a(arrays), threads(num_threads) {}

  const KernelTable& table;
  const BlockArrays& a;
  const int threads;
  Scratch& scratch = thread_scratch();
  Mask masks[kMaxMasks];
  int64_t mask_positions = 0;

  const int64_t* mask_spec(int64_t m) const { return mask_fields(a.spec, m); }
  const int64_t* stage_spec(int64_t s) const { return stage_fields(a.spec, s); }

  // Fills `masks` for one image. Returns false when a logit is NaN.
  bool decide(int64_t image, const void* x);

  // Positions of mask m that `next`, on its own sites, reads and that are holes; how many.
  int64_t needed_holes(int64_t m, const ConvGeometry& next, const Mask& readers, int32_t* holes);
  // Where a deformable reader looks is known only once its offsets are: every hole of mask m.
  int64_t all_holes(int64_t m, int32_t* holes);

 private:
  // Makes the masks that have heads. Returns false when a logit is NaN.
  bool run_heads(int64_t image, const void* x, float* logits);
  int64_t head_stride() const;
  float logit_at(const float* const* rows, int64_t x, int64_t stride) const;
  bool threshold_row(int64_t m, int64_t image, int64_t y, const float* const* head_rows,
                     float* row) const;
};

}  // namespace sparsight
