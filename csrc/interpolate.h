// Fill the holes of a map from the sites in a window x window neighbourhood.
//
//   hard (inference):  for each hole p: over the sites q in its window
//     w_q = exp(log_kernel[q - p] - max over those sites)   (tables by level: no exp at run time)
//     out[p][:] = sum_q w_q values[q][:] / sum_q w_q, then + residual, activation; sites are copied
//   soft (training):   the same with w_q = exp(log_kernel[q - p] + log M_q - max), a row kept as
//     M_p Y_p + (1 - M_p) I_p; backward gathers, so that no two threads write one row.
//
// Rows are channels-last. A weight below 2^-30 of the total is below half an ULP of float32 and is
// not read, which leaves one to four rows a hole at the published width. Included in an ISA-named
// namespace.

constexpr int kMaxWindowTaps = kMaxWindow * kMaxWindow;
// Bound of dI/dM: without it a narrow kernel beside a mask of 0 overflows, and inf * 0 is NaN.
constexpr float kSteepest = 1.2089258e24f;  // 2^80, as in ops/reference.py

// out[0..channels) = relu?(sum_i weight[i] * rows[i] + residual)
template <bool STREAM>
static inline void combine_rows(const float* const* rows, const float* weights, int count,
                                const float* residual, bool clamp, float* out, int64_t channels) {
  constexpr int step = 4 * Vec::lanes;
  int64_t c = 0;
  for (; c + step <= channels; c += step) {
    Vec acc[4];
    for (int v = 0; v < 4; ++v)
      acc[v] = residual ? Vec::load(residual + c + v * Vec::lanes) : Vec::zero();
    for (int i = 0; i < count; ++i) {
      const Vec w = Vec::set(weights[i]);
      for (int v = 0; v < 4; ++v) acc[v] = fma(w, Vec::load(rows[i] + c + v * Vec::lanes), acc[v]);
    }
    for (int v = 0; v < 4; ++v) {
      const Vec y = clamp ? relu(acc[v]) : acc[v];
      if (STREAM)
        y.stream(out + c + v * Vec::lanes);
      else
        y.store(out + c + v * Vec::lanes);
    }
  }
  for (; c < channels; c += Vec::lanes) {
    const int n = channels - c < Vec::lanes ? (int)(channels - c) : Vec::lanes;
    Vec acc = residual ? Vec::load_part(residual + c, n) : Vec::zero();
    for (int i = 0; i < count; ++i)
      acc = fma(Vec::set(weights[i]), Vec::load_part(rows[i] + c, n), acc);
    (clamp ? relu(acc) : acc).store_part(out + c, n);
  }
}

// The sites in the window of (y, x): bit dy * window + dx of word 0, or of the words it spills
// into.
static inline void window_bits(const FillCall& call, int64_t y, int64_t x, uint64_t* words) {
  const int window = (int)call.window;
  for (int i = 0; i < kWindowWords; ++i) words[i] = 0;
  int at = 0;
  const uint8_t* row = call.bits + y * call.bits_stride + (x >> 3);
  for (int dy = 0; dy < window; ++dy, row += call.bits_stride, at += window) {
    uint64_t bits;
    __builtin_memcpy(&bits, row, 8);
    bits = (bits >> (x & 7)) & ((1ull << window) - 1);
    words[at >> 6] |= bits << (at & 63);
    if ((at & 63) + window > 64) words[(at >> 6) + 1] |= bits >> (64 - (at & 63));
  }
}

// Chooses the sites that count for a hole and their normalised weights; returns how many. The taps
// of one level share a kernel value, levels descend; `keep` of the first level that holds a site
// says which taps weigh at least kNegligible of it.
template <int WORDS>
static inline int choose_sites(const FillCall& call, const uint64_t* words, int* taps,
                               float* weights) {
  const FillTables& t = *call.tables;
  const float* row = t.kernel;  // with eps: the kernel itself
  const uint64_t* keep = t.keep_eps;
  float total = call.eps;
  if (call.eps < 0.0f) {
    int level = 0;
    for (; level < t.num_levels; ++level) {
      uint64_t any = 0;
      for (int w = 0; w < WORDS; ++w) any |= words[w] & t.level[level][w];
      if (any) break;
    }
    if (level == t.num_levels) return 0;
    keep = t.keep[level];
    row = t.ratio + level * call.window * call.window;
    total = 0.0f;
  }
  int kept = 0;
  for (int w = 0; w < WORDS; ++w)
    for (uint64_t left = words[w] & keep[w]; left; left &= left - 1) {
      const int tap = 64 * w + __builtin_ctzll(left);
      taps[kept] = tap;
      weights[kept] = row[tap];
      total += row[tap];
      ++kept;
    }
  if (kept == 0) return 0;
  const float inverse = 1.0f / total;
  for (int i = 0; i < kept; ++i) weights[i] *= inverse;
  return kept;
}

static void fill(const FillCall& call, int64_t begin, int64_t end) {
  const int64_t radius = call.window / 2;
  const int center = (int)(radius * call.window + radius);
  int64_t step[kMaxWindowTaps];  // from a position to its taps
  for (int64_t dy = 0; dy < call.window; ++dy)
    for (int64_t dx = 0; dx < call.window; ++dx)
      step[dy * call.window + dx] = (dy - radius) * call.width + dx - radius;
  int taps[kMaxWindowTaps];
  const float* rows[kMaxWindowTaps];
  float weights[kMaxWindowTaps];
  uint64_t words[kWindowWords];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t p = call.positions ? call.positions[i] : i;
    const int64_t y = (uint32_t)p / (uint32_t)call.width;
    const int64_t x = p - y * call.width;
    float* out = call.output + p * call.output_stride;
    const float* residual = call.residual ? call.residual + p * call.residual_stride : nullptr;
    window_bits(call, y, x, words);
    int kept = 0;
    if (words[center >> 6] >> (center & 63) & 1) {
      rows[0] = call.values + (call.row_of ? call.row_of[p] : p) * call.values_stride;
      if (rows[0] == out && !residual && !call.relu) continue;
      weights[0] = 1.0f;
      kept = 1;
    } else if (call.tables) {
      kept = call.window <= 8 ? choose_sites<1>(call, words, taps, weights)
                              : choose_sites<kWindowWords>(call, words, taps, weights);
      for (int t = 0; t < kept; ++t) {
        const int64_t q = p + step[taps[t]];
        rows[t] = call.values + (call.row_of ? call.row_of[q] : q) * call.values_stride;
      }
    }
    if (call.stream)
      combine_rows<true>(rows, weights, kept, residual, call.relu, out, call.channels);
    else
      combine_rows<false>(rows, weights, kept, residual, call.relu, out, call.channels);
  }
  if (call.stream) stream_fence();
}

// Weights of the window of p over float masks; fills taps and weights, returns how many matter.
// shift is the maximum of the exponents (0 with eps), inverse 1 / denominator (0: nothing seen).
static inline int soft_window(const SoftFillCall& call, int64_t y, int64_t x, int* taps,
                              float* weights, float* shift, float* inverse) {
  const int64_t radius = call.window / 2;
  int count = 0;
  float best = -__builtin_inff();
  for (int64_t dy = -radius; dy <= radius; ++dy) {
    if ((uint64_t)(y + dy) >= (uint64_t)call.height) continue;
    for (int64_t dx = -radius; dx <= radius; ++dx) {
      if ((uint64_t)(x + dx) >= (uint64_t)call.width) continue;
      const int tap = (int)((dy + radius) * call.window + dx + radius);
      const float e = call.log_kernel[tap] + call.log_mask[(y + dy) * call.width + x + dx];
      if (!(e > -__builtin_inff())) continue;
      taps[count] = tap;
      weights[count++] = e;
      if (e > best) best = e;
    }
  }
  if (call.eps >= 0.0f || count == 0) best = 0.0f;
  float total = call.eps >= 0.0f ? call.eps : 0.0f;
  for (int t = 0; t < count; ++t) {
    weights[t] = __builtin_expf(weights[t] - best);
    total += weights[t];
  }
  *shift = best;
  *inverse = total > 0.0f ? 1.0f / total : 0.0f;
  int kept = 0;
  for (int t = 0; t < count; ++t) {
    const float w = weights[t] * *inverse;
    if (!(w > kNegligible)) continue;
    taps[kept] = taps[t];
    weights[kept++] = w;
  }
  return kept;
}

static inline const float* window_row(const SoftFillCall& call, int64_t y, int64_t x, int tap) {
  const int64_t radius = call.window / 2;
  const int64_t dy = tap / call.window, dx = tap - dy * call.window;
  return call.features + ((y + dy - radius) * call.width + x + dx - radius) * call.channels;
}

static void soft_fill(const SoftFillCall& call, int64_t row_begin, int64_t row_end) {
  int taps[kMaxWindowTaps];
  float weights[kMaxWindowTaps + 1];
  const float* rows[kMaxWindowTaps + 1];
  for (int64_t y = row_begin; y < row_end; ++y)
    for (int64_t x = 0; x < call.width; ++x) {
      const int64_t p = y * call.width + x;
      const float m = call.mask[p];
      int kept = 0;
      if (1.0f - m > kNegligible) {
        float shift, inverse;
        kept = soft_window(call, y, x, taps, weights, &shift, &inverse);
        for (int t = 0; t < kept; ++t) {
          weights[t] *= 1.0f - m;
          rows[t] = window_row(call, y, x, taps[t]);
        }
      }
      if (m != 0.0f) {
        weights[kept] = m;
        rows[kept++] = call.features + p * call.channels;
      }
      combine_rows<false>(rows, weights, kept, nullptr, false, call.output + p * call.channels,
                          call.channels);
    }
}

static inline float dot_rows(const float* a, const float* b, int64_t channels) {
  Vec acc = Vec::zero();
  int64_t c = 0;
  for (; c + Vec::lanes <= channels; c += Vec::lanes)
    acc = fma(Vec::load(a + c), Vec::load(b + c), acc);
  float total = acc.sum();
  for (; c < channels; ++c) total += a[c] * b[c];
  return total;
}

// Pass 1, by pixel p: shift, 1/denominator, (1 - M_p) g_p . I_p, and g_p . (Y_p - I_p) into
// grad_mask.
static void soft_fill_backward_rows(const SoftFillCall& call, int64_t row_begin, int64_t row_end) {
  int taps[kMaxWindowTaps];
  float weights[kMaxWindowTaps];
  for (int64_t y = row_begin; y < row_end; ++y)
    for (int64_t x = 0; x < call.width; ++x) {
      const int64_t p = y * call.width + x;
      const float m = call.mask[p];
      const float* g = call.grad + p * call.channels;
      const int kept = soft_window(call, y, x, taps, weights, &call.shift[p], &call.inverse[p]);
      float through = 0.0f;  // g_p . I_p
      for (int t = 0; t < kept; ++t)
        through += weights[t] * dot_rows(g, window_row(call, y, x, taps[t]), call.channels);
      call.projected[p] = (1.0f - m) * through;
      if (call.grad_mask)
        call.grad_mask[p] = dot_rows(g, call.features + p * call.channels, call.channels) - through;
    }
}

// Pass 2, by source q: what every p that sees q sends back to Y_q, M_q and the kernel.
static void soft_fill_backward_sites(const SoftFillCall& call, int64_t row_begin, int64_t row_end) {
  const int64_t radius = call.window / 2;
  const float* rows[kMaxWindowTaps + 1];
  float weights[kMaxWindowTaps + 1];
  for (int64_t y = row_begin; y < row_end; ++y) {
    float* kernel_sum = call.grad_log_kernel_rows + y * call.window * call.window;
    for (int64_t x = 0; x < call.width; ++x) {
      const int64_t q = y * call.width + x;
      const float m = call.mask[q];
      const float* features = call.features + q * call.channels;
      const bool reads = !(call.hard && m == 0.0f);
      int kept = 0;
      float mask_sum = 0.0f;
      for (int64_t dy = -radius; dy <= radius && reads; ++dy) {
        const int64_t py = y - dy;
        if ((uint64_t)py >= (uint64_t)call.height) continue;
        for (int64_t dx = -radius; dx <= radius; ++dx) {
          const int64_t px = x - dx;
          if ((uint64_t)px >= (uint64_t)call.width) continue;
          const int64_t p = py * call.width + px;
          const float hole = 1.0f - call.mask[p];
          if (!(hole > kNegligible) || call.inverse[p] == 0.0f) continue;
          const int tap = (int)((dy + radius) * call.window + dx + radius);
          // K / denominator, without M_q: dI/dM_q does not vanish with M_q.
          const float unit = __builtin_expf(call.log_kernel[tap] - call.shift[p]) * call.inverse[p];
          if (!(unit > kNegligible)) continue;
          const float* g = call.grad + p * call.channels;
          const float slope = hole * dot_rows(g, features, call.channels) - call.projected[p];
          mask_sum += (unit < kSteepest ? unit : kSteepest) * slope;
          if (m == 0.0f) continue;
          kernel_sum[tap] += unit * m * slope;
          if (unit * m > kNegligible) {
            weights[kept] = unit * m * hole;
            rows[kept++] = g;
          }
        }
      }
      if (call.grad_mask) call.grad_mask[q] += mask_sum;
      if (m != 0.0f) {
        weights[kept] = m;
        rows[kept++] = call.grad + q * call.channels;
      }
      combine_rows<false>(rows, weights, kept, nullptr, false,
                          call.grad_features + q * call.channels, call.channels);
    }
  }
}
