// Rows of a deformable convolution: for each site and tap, one row mixed from the four around a
// point between the pixels.
//
//   for each site i, tap t, offset group:
//     (y, x) = top-left corner of i + t * dilation + offset[i][group][t]
//     for c in channels of the group:
//       out[i][t][c] = sum over the 4 corners k of  weight_k * modulation[i][group][t] * row_k[c]
//
// A corner outside the map, or of weight zero, reads the zero row: infinity and NaN there stay
// there. A NaN offset makes the row NaN. What is written is the compact input of `conv`, tap by
// tap, so that the multiply-adds are those of an ordinary convolution at the sites.
// Registers: 4 broadcast weights and 4 accumulators of whole vectors; 4 loads and 1 store a vector
// of channels, against out_channels / lanes multiply-adds a channel in the GEMM that follows.
// Included in an ISA-named namespace.

struct Corners {
  const float* row[4];
  float weight[4];
};

// The integer below, for coordinates that fit in 32 bits; NaN is far outside.
static inline int64_t floor_of(float x) {
  if (x != x) return -2;
  const int32_t truncated = (int32_t)x;
  return (float)truncated > x ? truncated - 1 : truncated;
}

// Whatever is further out reads the same: nothing. NaN stays.
static inline float clamp_outside(float x, int64_t size) {
  const float low = -2.0f, high = (float)(size + 1);
  return x < low ? low : x > high ? high : x;
}

static inline Corners corners_at(const GatherCall& call, float y, float x, float modulation) {
  const ConvGeometry& g = call.geometry;
  y = clamp_outside(y, g.height);
  x = clamp_outside(x, g.width);
  const int64_t top = floor_of(y), left = floor_of(x);
  const float below = y - (float)top, right = x - (float)left;
  const float vertical[2] = {1.0f - below, below}, horizontal[2] = {1.0f - right, right};
  Corners corners;
  for (int k = 0; k < 4; ++k) {
    const int64_t row = top + k / 2, column = left + k % 2;
    const bool inside = (uint64_t)row < (uint64_t)g.height && (uint64_t)column < (uint64_t)g.width;
    const float weight = vertical[k / 2] * horizontal[k % 2] * modulation;
    corners.weight[k] = weight;
    corners.row[k] = inside && weight != 0.0f
                         ? call.input + (row * g.width + column) * call.input_stride
                         : call.zero_row;
  }
  return corners;
}

static inline void mix_rows(const Corners& corners, int64_t first, int64_t channels, float* out) {
  const float* r0 = corners.row[0] + first;
  const float* r1 = corners.row[1] + first;
  const float* r2 = corners.row[2] + first;
  const float* r3 = corners.row[3] + first;
  const Vec w0 = Vec::set(corners.weight[0]), w1 = Vec::set(corners.weight[1]);
  const Vec w2 = Vec::set(corners.weight[2]), w3 = Vec::set(corners.weight[3]);
  int64_t c = 0;
  for (; c + Vec::lanes <= channels; c += Vec::lanes) {
    Vec sum = mul(w0, Vec::load(r0 + c));
    sum = fma(w1, Vec::load(r1 + c), sum);
    sum = fma(w2, Vec::load(r2 + c), sum);
    fma(w3, Vec::load(r3 + c), sum).store(out + c);
  }
  if (c < channels) {
    const int n = (int)(channels - c);
    Vec sum = mul(w0, Vec::load_part(r0 + c, n));
    sum = fma(w1, Vec::load_part(r1 + c, n), sum);
    sum = fma(w2, Vec::load_part(r2 + c, n), sum);
    fma(w3, Vec::load_part(r3 + c, n), sum).store_part(out + c, n);
  }
}

static void gather(const GatherCall& call, int64_t begin, int64_t end) {
  const ConvGeometry& g = call.geometry;
  const int64_t taps = g.kernel_h * g.kernel_w;
  const int64_t channels = g.in_channels / call.offset_groups;
  float* out = call.output + begin * taps * g.in_channels;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t position = call.sites[i];
    const SiteOrigin origin = origin_of(g, position);
    const int64_t at = call.compact_offset ? i : position;
    const float* offset = call.offset + at * call.offset_stride;
    const float* modulation =
        call.modulation ? call.modulation + at * call.modulation_stride : nullptr;
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t tap_y = origin.y + t / g.kernel_w * g.dilation_h;
      const int64_t tap_x = origin.x + t % g.kernel_w * g.dilation_w;
      for (int64_t group = 0; group < call.offset_groups; ++group) {
        const int64_t of = group * taps + t;
        const Corners corners =
            corners_at(call, (float)tap_y + offset[2 * of], (float)tap_x + offset[2 * of + 1],
                       modulation ? modulation[of] : 1.0f);
        mix_rows(corners, group * channels, channels, out);
        out += channels;
      }
    }
  }
}
