// Fill a map with a float mask (training), forward and backward.
//
//   w_q = exp(log_kernel[q - p] + log M_q - max over the window of p)
//   I_p = sum_q w_q Y_q / sum_q w_q;  out_p = M_p Y_p + (1 - M_p) I_p
//
// Backward gathers, so that no two threads write one row. Float32 only. Included in an ISA-named
// namespace, after interpolate.h.

// Bound of dI/dM: without it a narrow kernel beside a mask of 0 overflows, and inf * 0 is NaN.
constexpr float kSteepest = 1.2089258e24f;  // 2^80, as in ops/reference.py

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
