// Weights -> blocked layout, once, at freeze (or per call for an unfrozen layer).
//
// panel layout:  [panel][tap][c in the panel's input range][32 output channels]
//   The input range of a panel is the union of the channel ranges of the groups that its 32 outputs
//   belong to: all channels for groups = 1, and a block-diagonal expansion where a panel spans
//   groups.
// lanes layout:  [16 channels][tap][j in channels per group][16 output channels]
//   For C/groups == O/groups in {1, 2, 4, 8, 16}: output lane o reads input channel group(o)*Cg +
//   j.
#pragma once
#include <cstring>

#include "kernels.h"

namespace sparsight {

static inline int64_t panel_count(int64_t channels) {
  return (channels + kPanel - 1) / kPanel;
}

static inline PackKind pack_kind(int64_t in_channels, int64_t out_channels, int64_t groups) {
  if (groups == 1) return PackKind::panel;
  const int64_t width = in_channels / groups;
  const bool square = in_channels == out_channels;
  const bool fits = width == 1 || width == 2 || width == 4 || width == 8 || width == 16;
  return square && fits ? PackKind::lanes : PackKind::panel;
}

// First and one-past-last input channel that a panel reads.
static inline void panel_input_range(const ConvGeometry& g, int64_t panel, int64_t* begin,
                                     int64_t* end) {
  const int64_t out_per_group = g.out_channels / g.groups;
  const int64_t in_per_group = g.in_channels / g.groups;
  const int64_t first = panel * kPanel;
  int64_t last = first + kPanel - 1;
  if (last >= g.out_channels) last = g.out_channels - 1;
  *begin = first / out_per_group * in_per_group;
  *end = (last / out_per_group + 1) * in_per_group;
}

// Number of floats before panel `panel` (or lane group of 16), panel = count gives the total.
static inline int64_t packed_offset(const ConvGeometry& g, PackKind kind, int64_t panel) {
  const int64_t taps = g.kernel_h * g.kernel_w;
  if (kind == PackKind::lanes) return panel * 2 * taps * (g.in_channels / g.groups) * kLaneGroup;
  if (g.groups == 1) return panel * taps * g.in_channels * kPanel;
  int64_t total = 0;
  for (int64_t p = 0; p < panel; ++p) {
    int64_t begin, end;
    panel_input_range(g, p, &begin, &end);
    total += (end - begin) * taps * kPanel;
  }
  return total;
}

static inline int64_t packed_size(const ConvGeometry& g, PackKind kind) {
  return packed_offset(g, kind, panel_count(g.out_channels));
}

// weight: contiguous (O, C/groups, kh, kw). packed: packed_size floats, overwritten.
static inline void pack_weight(const ConvGeometry& g, PackKind kind, const float* weight,
                               float* packed) {
  const int64_t taps = g.kernel_h * g.kernel_w;
  const int64_t in_per_group = g.in_channels / g.groups;
  const int64_t out_per_group = g.out_channels / g.groups;
  std::memset(packed, 0, sizeof(float) * packed_size(g, kind));
  if (kind == PackKind::lanes) {
    for (int64_t o = 0; o < g.out_channels; ++o)
      for (int64_t j = 0; j < in_per_group; ++j)
        for (int64_t t = 0; t < taps; ++t)
          packed[((o / kLaneGroup * taps + t) * in_per_group + j) * kLaneGroup + o % kLaneGroup] =
              weight[(o * in_per_group + j) * taps + t];
    return;
  }
  const int64_t panels = panel_count(g.out_channels);
  for (int64_t p = 0; p < panels; ++p) {
    int64_t begin, end;
    panel_input_range(g, p, &begin, &end);
    float* base = packed + packed_offset(g, kind, p);
    const int64_t range = end - begin;
    for (int64_t lane = 0; lane < kPanel && p * kPanel + lane < g.out_channels; ++lane) {
      const int64_t o = p * kPanel + lane;
      const int64_t first = o / out_per_group * in_per_group - begin;
      for (int64_t c = 0; c < in_per_group; ++c)
        for (int64_t t = 0; t < taps; ++t)
          base[(t * range + first + c) * kPanel + lane] = weight[(o * in_per_group + c) * taps + t];
    }
  }
}

}  // namespace sparsight
