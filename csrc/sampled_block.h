// A whole residual block (or a single convolution) in one call: heads, masks, site lists, the
// convolutions on the sites, interpolation, residual and activation.
//
// `spec` (int64) says what the block is, `params` (float32) holds its packed weights; both are
// written once by convert/freeze.py with the field order below. Offsets count floats in `params`;
// -1 is "none". Maps are float32, or bfloat16 where a unit of the weights is two channels.
//   header      : kHeaderFields
//   then masks  : num_masks  x kMaskFields
//   then stages : num_stages x kStageFields
//   then the sets of taps of the interpolation kernels, as 64-bit words
#pragma once
#include <cstdint>

#include "kernels.h"

namespace sparsight {

enum HeaderField {
  kVersion,
  kInChannels,
  kNumMasks,
  kNumStages,
  kReluOut,
  kHeadWeight,  // offset of the packed heads
  kRowMerge,    // 1: the only stage reads a kernel row as one run of channels, see merge_rows
  kHeadCount,   // their columns: 9 for each mask with a head
  kPoolH,       // window of the max pooling after the only stage, which has no mask; 0: none
  kPoolW,
  kPoolStrideH,
  kPoolStrideW,
  kPoolPadH,
  kPoolPadW,
  kUnitChannels,  // channels of a unit of the packed weights: 1 of float32, 2 of bfloat16
  kHeaderFields
};
enum MaskField {
  kParent,  // -1: has its own head or is given; otherwise: every (stride)-th position of that mask
  kHeadColumn,  // first of its 9 columns in the packed heads
  kHeadBias,    // offset of one float
  kMaskStrideH,
  kMaskStrideW,
  kGridStride,  // 0: no grid prior
  kWindow,
  kLevels,  // number of levels of FillTables; 0: holes are zero
  kWords,   // index in `spec` of its sets: levels, keep, keep_eps
  kRatios,  // offset of its numbers: ratios, kernel
  kEps,     // offset of one float, or -1: exact
  kMaskFields
};
// kStageMask is -1 for a stage that is computed everywhere; a deformable one has a mask.
enum StageField {
  kStageIn,
  kStageOut,
  kStageGroups,
  kKernelH,
  kKernelW,
  kStrideH,
  kStrideW,
  kPadH,
  kPadW,
  kDilationH,
  kDilationW,
  kStageMask,
  kStageRelu,
  kStageWeight,
  kStageBias,
  kOffsetGroups,  // 0: the taps stay where they are; otherwise a deformable convolution
  kModulated,     // 1: each tap has a factor, the sigmoid of one more column
  kGuided,        // 1: its offsets are made of the block's input; 0: of its own
  kOffsetWeight,  // of the convolution that makes them, of this one's geometry; its columns are
  kOffsetBias,    // [offset group][tap][y, x], then [offset group][tap] of the modulation
  kStageFields
};
constexpr int64_t kSpecVersion = 3;

struct BlockArrays {
  const void* x;         // (batch, height, width, in_channels)
  bool planar;           // only with kRowMerge: x is (batch, in_channels, height, width)
  const void* shortcut;  // (batch, out_height, out_width, out_channels), or null: none
  const float* const*
      noise;  // per mask (batch, mask size) added to the logits, or null where given
  const uint8_t* const* given;  // per mask (batch, mask size), or null where its head decides
  const float* params;
  const int64_t* spec;
  int64_t batch, height, width;
  void* output;       // (batch, out_height, out_width, out_channels)
  bool float_output;  // the output is float32, whatever the input is
  uint8_t* masks;     // per image: all masks, one after another
  float* logits;      // the same layout; untouched for masks without a head
};

// Sizes of mask m and of the output, from the input size.
void mask_size(const int64_t* spec, int64_t m, int64_t height, int64_t width, int64_t* out_height,
               int64_t* out_width);
int64_t block_out_channels(const int64_t* spec);

// Returns the index of the first image whose logits hold NaN, or -1.
int64_t run_block(const KernelTable& table, const BlockArrays& arrays, int num_threads);

}  // namespace sparsight
