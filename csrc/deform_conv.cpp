#include "deform_conv.h"

#include <algorithm>
#include <cstring>

#include "operators.h"
#include "pack.h"
#include "threads.h"

namespace sparsight {
namespace {

enum Slot { kWeight, kGathered };

// A block is as large as the weights that are read once for it, within these bounds: 1 to 8 MB.
constexpr int64_t kLeastFloats = 1 << 18, kMostFloats = 1 << 21;
constexpr int64_t kBlockStep = 24;  // a multiple of the tiles of 12, 4 and 2 sites

}  // namespace

int64_t gather_block(const ConvGeometry& g) {
  const int64_t site = g.kernel_h * g.kernel_w * g.in_channels;
  const int64_t floats = std::clamp(site * g.out_channels / g.groups, kLeastFloats, kMostFloats);
  const int64_t sites = std::min(floats / site, g.out_height * g.out_width + kBlockStep);
  return std::max<int64_t>(1, sites / kBlockStep) * kBlockStep;
}

void run_deform_conv(const KernelTable& table, GatherCall gather, ConvCall conv, int64_t num_sites,
                     int num_threads) {
  const int64_t block = gather_block(conv.geometry);
  conv.input = gather.output;
  conv.input_stride = conv.geometry.in_channels;
  conv.compact_input = true;
  for (int64_t left = num_sites; left > 0; left -= block) {
    const int64_t sites = std::min(left, block);
    conv.sites = gather.sites;
    parallel_ranges(num_threads, sites,
                    [&](int64_t begin, int64_t end) { table.gather(gather, begin, end); });
    run_conv(table, conv, sites, num_threads);
    gather.sites += sites;
    if (gather.compact_offset) {
      gather.offset += sites * gather.offset_stride;
      if (gather.modulation) gather.modulation += sites * gather.modulation_stride;
    }
    const int64_t written = conv.float_output ? sizeof(float) : table.element_size;
    if (conv.compact_output)
      conv.output = static_cast<char*>(conv.output) + sites * conv.output_stride * written;
  }
}

void deform_conv(const KernelTable& table, const DeformArrays& a, int num_threads) {
  const ConvGeometry& g = a.geometry;
  const int64_t taps = g.kernel_h * g.kernel_w;
  const int64_t positions = g.height * g.width, out_positions = g.out_height * g.out_width;
  Scratch& scratch = thread_scratch();
  ConvCall conv{};
  conv.geometry = g;
  conv.kind = pack_kind(g.in_channels, g.out_channels, g.groups);
  const int64_t size = packed_size(g, conv.kind, table.unit);
  const int64_t columns = panel_count(g, conv.kind) * kPanel;
  float* packed = scratch.get<float>(kWeight, size + columns + g.in_channels);
  float* padded_bias = packed + size;
  float* zero_row = padded_bias + columns;
  pack_weight(g, conv.kind, a.weight, packed, table.unit);
  pack_bias(g, conv.kind, a.bias, padded_bias);
  std::memset(zero_row, 0, sizeof(float) * g.in_channels);
  conv.weight = packed;
  conv.bias = padded_bias;
  conv.zero_row = zero_row;
  conv.output_stride = conv.residual_stride = g.out_channels;
  conv.relu = a.relu;

  GatherCall gather{};
  gather.geometry = g;
  gather.offset_groups = a.offset_groups;
  gather.input_stride = g.in_channels;
  gather.zero_row = zero_row;
  gather.offset_stride = 2 * a.offset_groups * taps;
  gather.modulation_stride = a.offset_groups * taps;
  gather.output = scratch.get<float>(kGathered, gather_block(g) * taps * g.in_channels);
  for (int64_t image = 0; image < a.batch; ++image) {
    gather.input = a.input + image * positions * g.in_channels;
    gather.offset = a.offset + image * out_positions * gather.offset_stride;
    gather.modulation =
        a.modulation ? a.modulation + image * out_positions * gather.modulation_stride : nullptr;
    gather.sites = a.index + image * out_positions;
    conv.output = a.output + image * out_positions * g.out_channels;
    conv.residual = a.residual ? a.residual + image * out_positions * g.out_channels : nullptr;
    run_deform_conv(table, gather, conv, a.count[image], num_threads);
  }
}

}  // namespace sparsight
