// Rows of a deformable convolution: for each site and tap, one row mixed from the four around a
// point between the pixels.
//
//   for each site i, offset group, tap t:
//     (y, x) = top-left corner of i + t * dilation + offset[i][group][t]
//     for c in channels of the group:
//       out[i][t][c] = sum over the 4 corners k of  weight_k * modulation[i][group][t] * row_k[c]
//
// A corner outside the map, or of weight zero, reads the zero row: infinity and NaN there stay
// there. A NaN offset makes the row NaN. What is written is the compact input of `conv`, tap by
// tap, so that the multiply-adds are those of an ordinary convolution at the sites.
// Registers: 4 broadcast weights, 1 sum; 4 loads and 1 store a vector of channels, bound by L2, as
// the rows of an image line do not fit in L1. Included in an ISA-named namespace.

// The corners of all taps of one site and offset group, made in plain loops over whole groups of
// lanes that compilers turn into vectors.
constexpr int kTapLanes = 16;
struct Corners {
  float y[kMaxTaps], x[kMaxTaps], factor[kMaxTaps];
  float weight[4][kMaxTaps];
  int32_t pixel[4][kMaxTaps];  // negative: the zero row
};

// Points further out read nothing either. NaN stays.
static inline float clamp_outside(float x, float most) {
  const float raised = x < -2.0f ? -2.0f : x;
  return raised > most ? most : raised;
}

static inline void find_corner(int lanes, int32_t down, int32_t right, int32_t height,
                               int32_t width, const Corners& c, float* __restrict weight,
                               int32_t* __restrict pixel) {
  for (int t = 0; t < lanes; ++t) {
    const float y = clamp_outside(c.y[t], (float)height);
    const float x = clamp_outside(c.x[t], (float)width);
    const float top = __builtin_floorf(y), left = __builtin_floorf(x);
    const float dy = y - top, dx = x - left;
    const float mixed = (down ? dy : 1.0f - dy) * (right ? dx : 1.0f - dx) * c.factor[t];
    const int32_t row = (int32_t)(top == top ? top : -2.0f) + down;
    const int32_t column = (int32_t)(left == left ? left : -2.0f) + right;
    const int32_t is_read =
        ((uint32_t)row < (uint32_t)height) & ((uint32_t)column < (uint32_t)width) & (mixed != 0.0f);
    weight[t] = mixed;
    pixel[t] = is_read ? row * width + column : -1;
  }
}

static inline const Element* corner_row(const GatherCall& call, int32_t pixel, int64_t first) {
  return pixel < 0 ? element_row(call.zero_row, 0)
                   : element_row(call.input, pixel * call.input_stride + first);
}

static inline void mix_rows(const GatherCall& call, const Corners& corners, int64_t t,
                            int64_t first, int64_t channels, Element* out) {
  const Element* r0 = corner_row(call, corners.pixel[0][t], first);
  const Element* r1 = corner_row(call, corners.pixel[1][t], first);
  const Element* r2 = corner_row(call, corners.pixel[2][t], first);
  const Element* r3 = corner_row(call, corners.pixel[3][t], first);
  const Vec w0 = Vec::set(corners.weight[0][t]), w1 = Vec::set(corners.weight[1][t]);
  const Vec w2 = Vec::set(corners.weight[2][t]), w3 = Vec::set(corners.weight[3][t]);
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
  const int taps = (int)(g.kernel_h * g.kernel_w);
  const int lanes = (taps + kTapLanes - 1) / kTapLanes * kTapLanes;
  const int64_t channels = g.in_channels / call.offset_groups;
  int32_t tap_y[kMaxTaps] = {}, tap_x[kMaxTaps] = {};
  Corners corners;
  for (int t = 0; t < lanes; ++t) {
    tap_y[t] = (int32_t)(t / g.kernel_w * g.dilation_h);
    tap_x[t] = (int32_t)(t % g.kernel_w * g.dilation_w);
    corners.y[t] = corners.x[t] = 0.0f;
    corners.factor[t] = 1.0f;
  }
  for (int64_t i = begin; i < end; ++i) {
    const int64_t position = call.sites[i];
    const int64_t at = call.compact_offset ? i : position;
    const SiteOrigin origin = origin_of(g, position);
    for (int64_t group = 0; group < call.offset_groups; ++group) {
      const float* offset = call.offset + at * call.offset_stride + group * 2 * taps;
      for (int t = 0; t < taps; ++t) {
        corners.y[t] = (float)((int32_t)origin.y + tap_y[t]) + offset[2 * t];
        corners.x[t] = (float)((int32_t)origin.x + tap_x[t]) + offset[2 * t + 1];
      }
      if (call.modulation)
        for (int t = 0; t < taps; ++t)
          corners.factor[t] = call.modulation[at * call.modulation_stride + group * taps + t];
      for (int k = 0; k < 4; ++k)
        find_corner(lanes, k / 2, k % 2, (int32_t)g.height, (int32_t)g.width, corners,
                    corners.weight[k], corners.pixel[k]);
      Element* out = (Element*)call.output + i * taps * g.in_channels + group * channels;
      for (int t = 0; t < taps; ++t)
        mix_rows(call, corners, t, group * channels, channels, out + t * g.in_channels);
    }
  }
}
