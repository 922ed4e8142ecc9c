// The seam between the instruction sets and everything else: one table of function pointers per
// ISA and element type.
//
// Plain pointers, sizes and strides (in elements) only. Maps are rows of a table's elements, float
// or bfloat16, behind `void*`; weights, offsets and logits are float32 unless they are packed in
// units. A kernel works on a half-open range and never allocates, locks or throws; whoever calls
// it splits the range over threads.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sparsight {

// Columns (output channels) of one packed panel. Every ISA reads the same packed layout.
constexpr int kPanel = 32;
// Channels of one packed lane group, for grouped convolutions whose groups fit in a vector.
constexpr int kLaneGroup = 16;
// Largest number of taps of a sampled convolution, and largest interpolation window side.
constexpr int kMaxTaps = 128;
constexpr int kMaxWindow = 15;

enum class PackKind : int64_t { panel = 0, lanes = 1 };

struct ConvGeometry {
  int64_t height, width;          // input map
  int64_t out_height, out_width;  // output map
  int64_t in_channels, out_channels, groups;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

// One convolution over a list of sites of one image.
struct ConvCall {
  ConvGeometry geometry;
  PackKind kind;
  const void* input;  // row of pixel i at input + i * input_stride
  int64_t input_stride;
  bool compact_input;    // the row of tap t of the i-th site is row i * taps + t of the input
  const void* zero_row;  // in_channels zeros, read where a tap falls outside the map
  const int32_t* sites;  // flat output positions; null means all positions in order
  const float* weight;   // packed, see pack.h
  const float* bias;     // padded to whole panels, or null
  const void* residual;  // row of a position, or null
  int64_t residual_stride;
  void* output;
  int64_t output_stride;
  bool compact_output;  // write the i-th row, not the row of its position
  bool float_output;    // write float32 rows, whatever the elements are
  bool stream;          // write past the caches: each group of a row is whole lines of 64 bytes
  bool relu;
};

// Rows of a deformable convolution at a list of sites of one image, mixed for `conv` to read as
// compact input; see bilinear_gather.h.
struct GatherCall {
  ConvGeometry geometry;
  int64_t offset_groups;
  const void* input;  // row of pixel i at input + i * input_stride
  int64_t input_stride;
  const void* zero_row;  // in_channels zeros
  const int32_t* sites;
  const float* offset;  // row of a position: [offset group][tap][y, x]
  int64_t offset_stride;
  const float* modulation;  // row of a position: [offset group][tap], or null
  int64_t modulation_stride;
  bool compact_offset;  // offset and modulation: the row of the i-th site, not of its position
  void* output;         // [site][tap][in_channels]
};

// The heads of a block over the rows of one image; see heads.h.
constexpr int kHeadColumns = 16;
struct HeadCall {
  const void* input;       // rows, stride = channels
  int64_t channels;        // a multiple of the unit
  const float* weight;     // packed
  int64_t columns;         // 9 a head
  int64_t vector_columns;  // the first of them, in whole vectors of 16
  float* output;
  int64_t output_stride;  // >= columns, and >= vector_columns
};
// What a hard fill knows of its kernel, made once. Taps are numbered column by column, dx * pitch +
// dy, where a column takes a byte, or two of a large window: the sites of a window are then read in
// one load from a map of columns. A set of taps is kWindowWords words of bits.
static inline int64_t tap_pitch(int64_t window) {
  return window <= 8 ? 8 : 16;
}
// Numbers of taps, in whole words. The last one of a small window is never a tap.
static inline int64_t tap_numbers(int64_t window) {
  return (window * tap_pitch(window) + 63) / 64 * 64;
}
constexpr int kWindowWords = (kMaxWindow * 16 + 63) / 64;
constexpr int kMaxTapNumbers = kWindowWords * 64;
constexpr int kNoTap = 63;
constexpr float kNegligible = 1.4901161e-8f;  // 2^-26
// Of bfloat16 rows, whose own rounding is 2^-9.
constexpr float kNegligibleNarrow = 2.44140625e-4f;  // 2^-12
struct FillTables {
  // The middle of the window, a site that stays as it is; then the distinct kernel values, the
  // largest first, zeros left out.
  int64_t num_levels;
  const uint64_t (*level)[kWindowWords];  // taps of a level
  const uint64_t (*keep)[kWindowWords];   // taps that matter when the level is the best one seen
  const uint64_t* keep_eps;               // taps that matter at all, with eps
  const float* ratio;                     // num_levels x numbers: kernel[tap] / value of the level
  const float* kernel;                    // numbers, right behind the last level's ratios
};

// Fill the holes of one image from the sites in their windows.
struct FillCall {
  int64_t height, width, channels, window;
  const uint8_t* columns;    // map of columns, see make_column_map
  int64_t columns_stride;    // bytes
  const FillTables* tables;  // null: holes are zero
  const void* zero_row;      // channels zeros
  float eps;                 // < 0: exact; otherwise added to the denominator
  const int32_t* positions;  // positions to write; null means all in order
  const void* values;        // rows of the sites
  int64_t values_stride;
  const int32_t* row_of;  // position -> row of `values`, or null when they are the same
  const void* residual;
  int64_t residual_stride;
  void* output;
  int64_t output_stride;
  bool relu;
  bool float_output;  // as in ConvCall
  bool stream;        // write past the caches: rows are whole lines of 64 bytes
};

// Fill with a float mask (training), forward and backward; all maps are dense rows of one image.
struct SoftFillCall {
  int64_t height, width, channels, window;
  const float* log_kernel;      // exact: relative to its largest value
  const float* kernel;          // its exponential
  const float* kernel_flipped;  // the same, last tap first
  float eps;                    // < 0: exact softmax
  const float* mask;            // height*width
  bool hard;                    // mask is 0 or 1 and holes' features must not be read
  const void* features;         // rows, stride = channels
  void* output;                 // forward only
  // backward only
  const void* grad;
  float* products;              // height*width x window^2 scratch: g_p . Y_q
  float* shift;                 // height*width scratch
  float* inverse;               // height*width scratch: 1 / denominator
  float* projected;             // height*width scratch: (1 - M_p) g_p . I_p
  void* grad_features;          // rows
  float* grad_mask;             // height*width or null
  float* grad_log_kernel_rows;  // height x window^2 partial sums
};

// A pooling over up to three axes, D H W; missing ones come first and have extent and window 1.
struct PoolGeometry {
  int64_t in[3], out[3], kernel[3], stride[3], pad[3], dilation[3];
};
// Static, so that no copy that was compiled for a newer CPU is taken for all.
// The axis along which the work on one image is split: depth, or rows where there is none.
static inline int pool_split_axis(const PoolGeometry& g) {
  return g.in[0] > 1 ? 0 : 1;
}
// Columns of the input sorted by phase, see softpool.h: how many phases, and how long each is.
static inline int64_t pool_phases(const PoolGeometry& g) {
  const int64_t reach = g.dilation[2] * (g.kernel[2] - 1) + 1;
  return g.stride[2] < reach ? g.stride[2] : reach;
}
static inline int64_t pool_phase_length(const PoolGeometry& g) {
  return g.out[2] + g.dilation[2] * (g.kernel[2] - 1) / g.stride[2];
}

// Whether windows lie side by side: each input is in one, but for what lies behind the last.
static inline bool pool_tiles(const PoolGeometry& g) {
  bool tiles = true;
  for (int axis = 0; axis < 3; ++axis)
    tiles &= g.stride[axis] == g.kernel[axis] && (g.dilation[axis] == 1 || g.kernel[axis] == 1);
  return tiles;
}

// SoftPool of some channels of one image of rows, or of one plane; see softpool.h.
struct SoftPoolCall {
  PoolGeometry geometry;
  int64_t channels;  // to pool, of rows; 1 for planes
  int64_t pitch;     // elements from one position to the next
  const void* input;
  void* output;      // forward only
  const void* grad;  // backward only, as grad_input
  void* grad_input;
  bool detached;   // take the weights for constants
  int64_t* taps;   // as many as a window has
  float* scratch;  // rows backward: sums, where elements are narrow; planes: see pool_operators.cpp
};

// Maps joined into one, of one image; see merge_maps.h.
constexpr int kMaxMerged = 16;
struct MergeTap {
  int32_t near, far;  // rows, or columns, of a source
  float far_weight;
};
struct MergeSource {
  const void* input;  // dense rows
  int64_t channels, height, width;
  const MergeTap* rows;     // of each row of the output
  const MergeTap* columns;  // of each column of the output
  bool is_mixed;            // four positions are mixed; else the near one is copied
};
struct MergeCall {
  const MergeSource* sources;
  int64_t num_sources;
  int64_t sources_per_segment;  // 1: side by side; all: summed, at most kMaxMerged
  int64_t width, channels;      // of the output
  void* output;
  bool stream;  // write past the caches: segments are whole lines of 64 bytes
};

struct KernelTable {
  const char* name;
  int64_t element_size;  // bytes of an element of a map
  int64_t unit;          // channels that one packed float holds, see pack.h
  void (*conv)(const ConvCall&, int64_t panel_begin, int64_t panel_end, int64_t site_begin,
               int64_t site_end);
  int64_t conv_tile;  // sites per register tile
  void (*gather)(const GatherCall&, int64_t begin, int64_t end);
  void (*heads)(const HeadCall&, int64_t begin, int64_t end);
  void (*fill)(const FillCall&, int64_t begin, int64_t end);
  // Largest of `count` rows, channel by channel; float_output as in ConvCall.
  void (*max_rows)(const void* const* rows, int count, int64_t channels, void* out,
                   bool float_output);
  void (*merge)(const MergeCall&, int64_t row_begin, int64_t row_end);
  void (*soft_fill)(const SoftFillCall&, int64_t row_begin, int64_t row_end);
  void (*soft_fill_backward_rows)(const SoftFillCall&, int64_t row_begin, int64_t row_end);
  void (*soft_fill_backward_sites)(const SoftFillCall&, int64_t row_begin, int64_t row_end);
  // Rows: outputs; planes: outputs along the split axis. Backward, both: inputs along it.
  void (*soft_pool_rows)(const SoftPoolCall&, int64_t begin, int64_t end);
  void (*soft_pool_rows_backward)(const SoftPoolCall&, int64_t begin, int64_t end);
  void (*soft_pool_plane)(const SoftPoolCall&, int64_t begin, int64_t end);
  void (*soft_pool_plane_backward)(const SoftPoolCall&, int64_t begin, int64_t end);
};

const KernelTable* scalar_table();
const KernelTable* avx2_table();  // null when not compiled in
const KernelTable* avx512_table();
const KernelTable* avx512bf16_table();

// The table of a given ISA ("scalar", "avx2", "avx512"), or of the best one ("auto"); null when
// this machine cannot run it.
const KernelTable* table_for(const char* isa);
// The table for bfloat16 maps; null when this machine has no instructions for them.
const KernelTable* bfloat16_table();

}  // namespace sparsight
