// Weights -> blocked layout, once, at freeze (or per call for an unfrozen layer).
//
// panel layout:  [panel][tap][channel of the group][32 output channels]
//   A panel is up to 32 output channels of one group; a group of another width ends in a partial
//   panel. No panel spans groups: NaN in one group's input never meets another's zero weights.
// lanes layout:  [16 channels][tap][j in channels per group][16 output channels]
//   For C/groups == O/groups in {1, 2, 4, 8, 16}: output lane o reads input channel group(o)*Cg +
//   j.
// bias: [panel][32], or [channel] in the lanes layout; padded with zeros.
#pragma once
#include <cstring>

#include "kernels.h"

namespace sparsight {

struct Panel {
  int64_t first_out, width;  // output channels
  int64_t first_in;          // first input channel of its group
};

static inline int64_t panels_per_group(const ConvGeometry& g) {
  return (g.out_channels / g.groups + kPanel - 1) / kPanel;
}

static inline int64_t panel_count(const ConvGeometry& g, PackKind kind) {
  if (kind == PackKind::lanes) return (g.out_channels + kPanel - 1) / kPanel;
  return panels_per_group(g) * g.groups;
}

static inline Panel panel_at(const ConvGeometry& g, int64_t panel) {
  const int64_t per_group = panels_per_group(g), out_per_group = g.out_channels / g.groups;
  const int64_t group = panel / per_group, first = panel % per_group * kPanel;
  const int64_t left = out_per_group - first;
  return {group * out_per_group + first, left < kPanel ? left : kPanel,
          group * (g.in_channels / g.groups)};
}

static inline PackKind pack_kind(int64_t in_channels, int64_t out_channels, int64_t groups) {
  if (groups == 1) return PackKind::panel;
  const int64_t width = in_channels / groups;
  const bool square = in_channels == out_channels;
  const bool fits = width == 1 || width == 2 || width == 4 || width == 8 || width == 16;
  return square && fits ? PackKind::lanes : PackKind::panel;
}

// Number of floats of `panels` panels (in the lanes layout, of as many pairs of lane groups).
static inline int64_t packed_offset(const ConvGeometry& g, PackKind kind, int64_t panels) {
  const int64_t taps = g.kernel_h * g.kernel_w, in_per_group = g.in_channels / g.groups;
  return panels * taps * in_per_group * (kind == PackKind::lanes ? 2 * kLaneGroup : kPanel);
}

static inline int64_t packed_size(const ConvGeometry& g, PackKind kind) {
  return packed_offset(g, kind, panel_count(g, kind));
}

// weight: contiguous (O, C/groups, kh, kw). packed: packed_size floats, overwritten.
static inline void pack_weight(const ConvGeometry& g, PackKind kind, const float* weight,
                               float* packed) {
  const int64_t taps = g.kernel_h * g.kernel_w;
  const int64_t in_per_group = g.in_channels / g.groups;
  std::memset(packed, 0, sizeof(float) * packed_size(g, kind));
  if (kind == PackKind::lanes) {
    for (int64_t o = 0; o < g.out_channels; ++o)
      for (int64_t j = 0; j < in_per_group; ++j)
        for (int64_t t = 0; t < taps; ++t)
          packed[((o / kLaneGroup * taps + t) * in_per_group + j) * kLaneGroup + o % kLaneGroup] =
              weight[(o * in_per_group + j) * taps + t];
    return;
  }
  for (int64_t p = 0; p < panel_count(g, kind); ++p) {
    const Panel panel = panel_at(g, p);
    float* base = packed + packed_offset(g, kind, p);
    for (int64_t lane = 0; lane < panel.width; ++lane)
      for (int64_t c = 0; c < in_per_group; ++c)
        for (int64_t t = 0; t < taps; ++t)
          base[(t * in_per_group + c) * kPanel + lane] =
              weight[((panel.first_out + lane) * in_per_group + c) * taps + t];
  }
}

// Head columns computed in vectors of 16: the one or two that would start a new one are dot
// products.
static inline int64_t head_vector_columns(int64_t columns) {
  const int64_t rest = columns % kHeadColumns;
  return rest <= 2 ? columns - rest : columns - rest + kHeadColumns;
}

// Floats of packed heads.
static inline int64_t packed_heads_size(int64_t columns, int64_t channels) {
  const int64_t vector_columns = head_vector_columns(columns);
  return channels * (columns > vector_columns ? columns : vector_columns);
}

// weight: (columns, channels). packed: packed_heads_size floats, overwritten.
static inline void pack_heads(int64_t columns, int64_t channels, const float* weight,
                              float* packed) {
  const int64_t vector_columns = head_vector_columns(columns);
  std::memset(packed, 0, sizeof(float) * packed_heads_size(columns, channels));
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t c = 0; c < channels; ++c)
      packed[j < vector_columns ? c * vector_columns + j : j * channels + c] =
          weight[j * channels + c];
}

// packed: panel_count * 32 floats, overwritten; bias may be null.
static inline void pack_bias(const ConvGeometry& g, PackKind kind, const float* bias,
                             float* packed) {
  const int64_t panels = panel_count(g, kind);
  std::memset(packed, 0, sizeof(float) * panels * kPanel);
  if (!bias) return;
  if (kind == PackKind::lanes) {
    std::memcpy(packed, bias, sizeof(float) * g.out_channels);
    return;
  }
  for (int64_t p = 0; p < panels; ++p) {
    const Panel panel = panel_at(g, p);
    std::memcpy(packed + p * kPanel, bias + panel.first_out, sizeof(float) * panel.width);
  }
}

}  // namespace sparsight
