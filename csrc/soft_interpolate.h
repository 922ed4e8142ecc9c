// Fill a map with a float mask (training), forward and backward.
//
//   w_q = exp(log_kernel[q - p] + log M_q - max over the window of p)
//   I_p = sum_q w_q Y_q / sum_q w_q;  out_p = M_p Y_p + (1 - M_p) I_p
//
// The weights are products of two numbers wherever their sum is not tiny: the kernel is
// exponentiated once a call, relative to its largest value, as 49 exponentials a position cost more
// than the sums over channels. Only where all of the window nearly vanishes (hard masks beside a
// narrow kernel) is the maximum looked for.
//
// Backward gathers, so that no two threads write one row; the products g_p . Y_q of its first pass
// are kept for its second. Maps are rows of Element, sums and all else float32. Included in an
// ISA-named namespace, after interpolate.h.

// Bound of dI/dM: without it a narrow kernel beside a mask of 0 overflows, and inf * 0 is NaN.
constexpr float kSteepest = 1.2089258e24f;  // 2^80, as in ops/reference.py
// Least sum of products: a weight of 2^-26 of it is still a normal float32.
constexpr float kLeastTotal = 5.4210109e-20f;  // 2^-64

// The part of the window of (y, x) that lies in the map: rows dy0..dy1, columns dx0..dx1, both ends
// included, relative to its first row and column.
struct Clip {
  int64_t dy0, dy1, dx0, dx1;
};
static inline Clip clip_window(const SoftFillCall& call, int64_t y, int64_t x) {
  const int64_t radius = call.window / 2, last = call.window - 1;
  Clip clip = {radius - y, call.height - 1 - y + radius, radius - x, call.width - 1 - x + radius};
  if (clip.dy0 < 0) clip.dy0 = 0;
  if (clip.dx0 < 0) clip.dx0 = 0;
  if (clip.dy1 > last) clip.dy1 = last;
  if (clip.dx1 > last) clip.dx1 = last;
  return clip;
}

// Weights of the window of p over float masks; fills taps and weights, returns how many matter.
// inverse is 1 / denominator, 0 where nothing is seen. Where the sum is tiny, shift is the maximum
// of the exponents and inverse, relative to it, is given back negative.
static inline int soft_window(const SoftFillCall& call, int64_t y, int64_t x, int* taps,
                              float* weights, float* shift, float* inverse) {
  const int64_t radius = call.window / 2;
  const Clip clip = clip_window(call, y, x);
  const int64_t columns = clip.dx1 - clip.dx0 + 1;
  const float* masks = call.mask + (y - radius) * call.width + x - radius;
  float products[kMaxWindowTaps];
  Vec sum = Vec::zero();
  for (int64_t dy = clip.dy0; dy <= clip.dy1; ++dy) {
    const int64_t tap = dy * call.window + clip.dx0;
    const float* mask = masks + dy * call.width + clip.dx0;
    for (int64_t i = 0; i < columns; i += Vec::lanes) {
      const int n = columns - i < Vec::lanes ? (int)(columns - i) : Vec::lanes;
      const Vec product =
          mul(Vec::load_part(call.kernel + tap + i, n), Vec::load_part(mask + i, n));
      product.store_part(products + tap + i, n);
      sum = add(sum, product);
    }
  }
  const bool exact = call.eps < 0.0f;
  const float total = exact ? sum.sum() : sum.sum() + call.eps;
  int kept = 0;
  if (!exact || total >= kLeastTotal) {
    const float scale = total > 0.0f ? 1.0f / total : 0.0f;
    *shift = 0.0f;
    *inverse = scale;
    for (int64_t dy = clip.dy0; dy <= clip.dy1; ++dy) {
      const int64_t tap = dy * call.window + clip.dx0;
      for (int64_t i = 0; i < columns; i += Vec::lanes) {
        const int n = columns - i < Vec::lanes ? (int)(columns - i) : Vec::lanes;
        const Vec w = mul(Vec::load_part(products + tap + i, n), Vec::set(scale));
        float lanes[Vec::lanes];
        w.store(lanes);
        for (uint32_t left = above(w, Vec::set(kNegligible)); left; left &= left - 1) {
          const int lane = __builtin_ctz(left);
          taps[kept] = (int)(tap + i) + lane;
          weights[kept++] = lanes[lane];
        }
      }
    }
    return kept;
  }
  float best = -__builtin_inff();
  int count = 0;
  for (int64_t dy = clip.dy0; dy <= clip.dy1; ++dy)
    for (int64_t dx = clip.dx0; dx <= clip.dx1; ++dx) {
      const int tap = (int)(dy * call.window + dx);
      const float m = masks[dy * call.width + dx];
      if (!(m > 0.0f)) continue;
      const float smallest = 1.1754944e-38f;
      const float e = call.log_kernel[tap] + __builtin_logf(m < smallest ? smallest : m);
      if (!(e > -__builtin_inff())) continue;
      taps[count] = tap;
      weights[count++] = e;
      if (e > best) best = e;
    }
  *shift = best;
  *inverse = 0.0f;
  if (count == 0) return 0;
  float relative = 0.0f;
  for (int t = 0; t < count; ++t) {
    weights[t] = __builtin_expf(weights[t] - best);
    relative += weights[t];
  }
  *inverse = -1.0f / relative;
  for (int t = 0; t < count; ++t) {
    const float w = weights[t] * -*inverse;
    if (!(w > kNegligible)) continue;
    taps[kept] = taps[t];
    weights[kept++] = w;
  }
  return kept;
}

static inline const Element* window_row(const SoftFillCall& call, int64_t y, int64_t x, int tap) {
  const int64_t radius = call.window / 2;
  const int64_t dy = tap / call.window, dx = tap - dy * call.window;
  return element_row(call.features,
                     ((y + dy - radius) * call.width + x + dx - radius) * call.channels);
}

static void soft_fill(const SoftFillCall& call, int64_t row_begin, int64_t row_end) {
  int taps[kMaxWindowTaps];
  float weights[kMaxWindowTaps + 1];
  const Element* rows[kMaxWindowTaps + 1];
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
        rows[kept++] = element_row(call.features, p * call.channels);
      }
      combine_rows<false>(rows, weights, kept, nullptr, false,
                          (Element*)call.output + p * call.channels, call.channels);
    }
}

static inline float dot_rows(const Element* a, const Element* b, int64_t channels) {
  Vec acc = Vec::zero();
  int64_t c = 0;
  for (; c + Vec::lanes <= channels; c += Vec::lanes)
    acc = fma(Vec::load(a + c), Vec::load(b + c), acc);
  if (c < channels) {
    const int n = (int)(channels - c);
    acc = fma(Vec::load_part(a + c, n), Vec::load_part(b + c, n), acc);
  }
  return acc.sum();
}

// Pass 1, by pixel p: the products g_p . Y_q (NaN where q does not matter), shift, 1/denominator (0
// where p is no hole), (1 - M_p) g_p . I_p, and g_p . (Y_p - I_p) into grad_mask.
static void soft_fill_backward_rows(const SoftFillCall& call, int64_t row_begin, int64_t row_end) {
  const int64_t num_taps = call.window * call.window;
  int taps[kMaxWindowTaps];
  float weights[kMaxWindowTaps];
  for (int64_t y = row_begin; y < row_end; ++y)
    for (int64_t x = 0; x < call.width; ++x) {
      const int64_t p = y * call.width + x;
      const float m = call.mask[p];
      const bool is_hole = 1.0f - m > kNegligible;
      call.projected[p] = 0.0f;
      call.inverse[p] = 0.0f;
      // A position that is kept whole says nothing about its window but how it compares with it.
      if (!is_hole && !call.grad_mask) continue;
      const Element* g = element_row(call.grad, p * call.channels);
      float* products = call.products + p * num_taps;
      for (int64_t t = 0; t < num_taps; ++t) products[t] = __builtin_nanf("");
      float inverse;
      const int kept = soft_window(call, y, x, taps, weights, &call.shift[p], &inverse);
      float through = 0.0f;  // g_p . I_p
      for (int t = 0; t < kept; ++t) {
        const float product = dot_rows(g, window_row(call, y, x, taps[t]), call.channels);
        products[taps[t]] = product;
        through += weights[t] * product;
      }
      call.projected[p] = (1.0f - m) * through;
      if (is_hole) call.inverse[p] = inverse;
      if (call.grad_mask)
        call.grad_mask[p] =
            dot_rows(g, element_row(call.features, p * call.channels), call.channels) - through;
    }
}

// Pass 2, by source q: what every p that sees q sends back to Y_q, M_q and the kernel.
static void soft_fill_backward_sites(const SoftFillCall& call, int64_t row_begin, int64_t row_end) {
  const int64_t radius = call.window / 2, num_taps = call.window * call.window;
  const Element* rows[kMaxWindowTaps + 1];
  float weights[kMaxWindowTaps + 1];
  for (int64_t y = row_begin; y < row_end; ++y) {
    float* kernel_sum = call.grad_log_kernel_rows + y * num_taps;
    for (int64_t x = 0; x < call.width; ++x) {
      const int64_t q = y * call.width + x;
      const float m = call.mask[q];
      const Element* features = element_row(call.features, q * call.channels);
      const bool reads = !(call.hard && m == 0.0f);
      int kept = 0;
      float mask_sum = 0.0f;
      // p in the window of q sees q through the opposite tap: kernel_flipped, read forwards.
      const Clip clip = clip_window(call, y, x);
      for (int64_t dy = clip.dy0; dy <= clip.dy1 && reads; ++dy)
        for (int64_t i = clip.dx0; i <= clip.dx1; i += Vec::lanes) {
          const int n = clip.dx1 + 1 - i < Vec::lanes ? (int)(clip.dx1 + 1 - i) : Vec::lanes;
          const int64_t first = (y + dy - radius) * call.width + x + i - radius;
          const Vec inverses = Vec::load_part(call.inverse + first, n);
          // K / denominator, without M_q: dI/dM_q does not vanish with M_q.
          const Vec quotients =
              mul(Vec::load_part(call.kernel_flipped + dy * call.window + i, n), inverses);
          float units[Vec::lanes];
          quotients.store(units);
          uint32_t left = above(quotients, Vec::set(kNegligible));
          left |= above(Vec::zero(), inverses);
          for (; left; left &= left - 1) {
            const int lane = __builtin_ctz(left);
            const int64_t p = first + lane;
            const int tap = (int)(num_taps - 1 - (dy * call.window + i + lane));
            float unit = units[lane];
            if (call.inverse[p] < 0.0f) {
              unit = -call.inverse[p] * __builtin_expf(call.log_kernel[tap] - call.shift[p]);
              if (!(unit > kNegligible)) continue;
            }
            const float hole = 1.0f - call.mask[p];
            const Element* g = element_row(call.grad, p * call.channels);
            float product = call.products[p * num_taps + tap];
            if (product != product) product = dot_rows(g, features, call.channels);
            const float slope = hole * product - call.projected[p];
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
        rows[kept++] = element_row(call.grad, q * call.channels);
      }
      combine_rows<false>(rows, weights, kept, nullptr, false,
                          (Element*)call.grad_features + q * call.channels, call.channels);
    }
  }
}
