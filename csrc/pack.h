// Weights -> blocked layout, once, at freeze (or per call for an unfrozen layer).
//
// panel layout:  [panel][tap][channel of the group][32 output channels]
//   A panel is up to 32 output channels of one group; a group of another width ends in a partial
//   panel. No panel spans groups: NaN in one group's input never meets another's zero weights.
// lanes layout:  [16 channels][tap][j in channels per group][16 output channels]
//   For C/groups == O/groups in {1, 2, 4, 8, 16}: output lane o reads input channel group(o)*Cg +
//   j.
// For bfloat16 maps a float of the panel layout is a unit of two channels, the even one in its
// lower half; of an odd number the last unit ends in a zero, which the kernels multiply by nothing.
// The lanes layout stays float32. bias: [panel][32], or [channel] in the lanes layout; padded with
// zeros.
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
static inline int64_t packed_offset(const ConvGeometry& g, PackKind kind, int64_t panels,
                                    int64_t unit) {
  const int64_t taps = g.kernel_h * g.kernel_w, in_per_group = g.in_channels / g.groups;
  if (kind == PackKind::lanes) return panels * taps * in_per_group * 2 * kLaneGroup;
  return panels * taps * ((in_per_group + unit - 1) / unit) * kPanel;
}

static inline int64_t packed_size(const ConvGeometry& g, PackKind kind, int64_t unit) {
  return packed_offset(g, kind, panel_count(g, kind), unit);
}

// The nearest bfloat16, ties to even, as its bits.
static inline uint16_t nearest_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Puts the value of channel c where the float (or half of one) of its unit is: units of one column
// lie `stride` floats apart.
static inline void put_channel(float* column, int64_t c, int64_t stride, int64_t unit,
                               float value) {
  if (unit == 1) {
    column[c * stride] = value;
    return;
  }
  const uint16_t bits = nearest_bfloat16(value);
  std::memcpy(reinterpret_cast<char*>(column + c / 2 * stride) + c % 2 * sizeof bits, &bits,
              sizeof bits);
}

// weight: contiguous (O, C/groups, kh, kw). packed: packed_size floats, overwritten.
static inline void pack_weight(const ConvGeometry& g, PackKind kind, const float* weight,
                               float* packed, int64_t unit) {
  const int64_t taps = g.kernel_h * g.kernel_w;
  const int64_t in_per_group = g.in_channels / g.groups;
  const int64_t units = (in_per_group + unit - 1) / unit;
  std::memset(packed, 0, sizeof(float) * packed_size(g, kind, unit));
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
    float* base = packed + packed_offset(g, kind, p, unit);
    for (int64_t lane = 0; lane < panel.width; ++lane)
      for (int64_t c = 0; c < in_per_group; ++c)
        for (int64_t t = 0; t < taps; ++t)
          put_channel(base + t * units * kPanel + lane, c, kPanel, unit,
                      weight[((panel.first_out + lane) * in_per_group + c) * taps + t]);
  }
}

// Head columns computed in vectors of 16: the one or two that would start a new one are dot
// products.
static inline int64_t head_vector_columns(int64_t columns) {
  const int64_t rest = columns % kHeadColumns;
  return rest <= 2 ? columns - rest : columns - rest + kHeadColumns;
}

// Floats of packed heads; channels is a multiple of the unit.
static inline int64_t packed_heads_size(int64_t columns, int64_t channels, int64_t unit) {
  const int64_t vector_columns = head_vector_columns(columns);
  return channels / unit * (columns > vector_columns ? columns : vector_columns);
}

// weight: (columns, channels). packed: packed_heads_size floats, overwritten.
static inline void pack_heads(int64_t columns, int64_t channels, const float* weight, float* packed,
                              int64_t unit) {
  const int64_t vector_columns = head_vector_columns(columns);
  std::memset(packed, 0, sizeof(float) * packed_heads_size(columns, channels, unit));
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t c = 0; c < channels; ++c) {
      const float value = weight[j * channels + c];
      if (j < vector_columns)
        put_channel(packed + j, c, vector_columns, unit, value);
      else
        put_channel(packed + j * (channels / unit), c, 1, unit, value);
    }
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
