// SoftPool: the softmax-weighted mean of each window, channel by channel, forward and backward.
//
//   for each output o, channel c: over the taps i of its window inside the map
//     top = max x_i;  d_i = x_i - top;  e_i = exp(d_i);  s = sum e_i;  mean = sum e_i d_i / s
//     y = top + mean;  backward, for each tap: dx_i += g e_i / s * (1 + d_i - mean)
//
// One body for one to three dimensions (D H W, missing ones of extent 1) and two layouts: lanes are
// what lies side by side, as many as there are in a "line".
//   rows    channels-last: a line is the channels of a position, a tap is a position away
//   planes  contiguous: a line is a row of outputs. Rows of the input are first sorted by phase,
//           their column modulo the stride, so that a tap of all outputs is one run of numbers:
//             phase p, index j  holds  x[j * stride + p - pad],  -inf outside the map
// Windows of 4 and of 9 taps are read once, into registers: AVX-512 has 32, of which 9 taps and the
// 13 constants of the exponential take 22. Others are read twice, for the maximum and for the
// exponentials, the second time from L1; backward keeps up to kKeptTaps exponentials on the stack.
// Some 18 instructions a tap and vector, 9 of them on the two multipliers. Tuned on Zen 5.
//
// Backward scatters window by window into a block of the input that its caller alone owns; a window
// across the border of two blocks is computed for both. An input so gets what it gets in the order
// of the windows, whatever the blocks and threads are. Where windows lie side by side, each input
// is written once, without sums. Included in an ISA-named namespace.

constexpr int kPoolVectors = 2;
constexpr int kKeptTaps = 64;
// Windows of rows are fetched into the cache so many outputs before they are read: of maps larger
// than L2 the arithmetic then hides the memory, 1.93 -> 0.97 ms for 8x64x112x112, window 3.
constexpr int64_t kWindowsAhead = 4;

template <bool PART, class T>
static inline Vec line_at(const T* p, int n) {
  return PART ? Vec::load_part(p, n) : Vec::load(p);
}
template <bool PART, class T>
static inline void put_line(Vec x, T* p, int n) {
  if (PART)
    x.store_part(p, n);
  else
    x.store(p);
}

// body(i) for each tap; unrolled where their number, TAPS, is known.
template <int TAPS, class Body>
static inline __attribute__((always_inline)) void each_tap(int64_t count, Body body) {
  if constexpr (TAPS > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < TAPS; ++i) body(i);
  } else {
    for (int64_t i = 0; i < count; ++i) body(i);
  }
}

// Exponentials of several taps are computed step by step, so that their latencies overlap.
template <int SIZE>
struct TapGroup {
  static constexpr int size = SIZE;
};
// body(i, TapGroup) for taps i, i + 1 ... of each group.
template <int TAPS, class Body>
static inline __attribute__((always_inline)) void each_group(int64_t count, Body body) {
  if constexpr (TAPS > 0) {
    constexpr int G = TAPS % 3 == 0 ? 3 : 4;
#pragma GCC unroll 16
    for (int i = 0; i < TAPS; i += G) body(i, TapGroup<G>());
  } else {
    int64_t i = 0;
    for (; i + 2 <= count; i += 2) body(i, TapGroup<2>());
    if (i < count) body(i, TapGroup<1>());
  }
}

// V vectors of the taps of a window, of which the last may have n lanes only (PART).
template <int V, bool PART, int TAPS, class In>
struct PoolWindow {
  const In* base;
  const int64_t* taps;
  int64_t count;
  int n;
  Vec held[TAPS > 0 ? TAPS * V : 1];
  Vec top[V];

  inline __attribute__((always_inline)) Vec at(int64_t i, int v) const {
    return TAPS > 0 ? held[i * V + v] : line_at<PART>(base + taps[i] + v * Vec::lanes, n);
  }
  // Reads the window, finds its maximum, and fetches what lies `ahead` elements further. NaN are
  // passed over; they come back with the distances.
  inline __attribute__((always_inline)) void read(const In* base_, const int64_t* taps_,
                                                  int64_t count_, int n_, int64_t ahead) {
    base = base_;
    taps = taps_;
    count = count_;
    n = n_;
    for (int v = 0; v < V; ++v) top[v] = Vec::set(-__builtin_inff());
    each_tap<TAPS>(count, [&](int64_t i) {
      for (int v = 0; v < V; ++v) {
        __builtin_prefetch(base + taps[i] + v * Vec::lanes + ahead);
        if (TAPS > 0) held[i * V + v] = line_at<PART>(base + taps[i] + v * Vec::lanes, n);
        top[v] = greater_or(at(i, v), top[v]);
      }
    });
  }
  inline bool is_infinite() const {
    bool any = false;
    for (int v = 0; v < V; ++v) any |= any_infinite(top[v]);
    return any;
  }
  // x - top, from kLeastExponent to 0; NaN stays. FINITE: no maximum is infinite.
  template <bool FINITE>
  inline __attribute__((always_inline)) Vec below_top(int64_t i, int v) const {
    const Vec x = at(i, v);
    return greater_or(Vec::set(kLeastExponent), FINITE ? sub(x, top[v]) : distance(x, top[v]));
  }
};

// One chunk of V vectors of outputs. False, and nothing done, where an infinity is in the way of a
// FINITE one: what is rare stays out of the loop.
template <bool FINITE, int V, bool PART, int TAPS, class In, class Out>
static inline __attribute__((always_inline)) bool pool_chunk(const In* base, const int64_t* taps,
                                                             int64_t count, int n, Out* out,
                                                             int64_t ahead) {
  PoolWindow<V, PART, TAPS, In> window;
  window.read(base, taps, count, n, ahead);
  if (FINITE && __builtin_expect(window.is_infinite(), false)) return false;
  Vec sum[V], moment[V];
  for (int v = 0; v < V; ++v) sum[v] = moment[v] = Vec::zero();
  each_group<TAPS>(count, [&](int64_t i, auto group) __attribute__((always_inline)) {
    constexpr int G = decltype(group)::size;
    Vec d[G * V], e[G * V];
#pragma GCC unroll 16
    for (int at = 0; at < G * V; ++at)
      d[at] = window.template below_top<FINITE>(i + at / V, at % V);
    exp_of_negative<G * V>(d, e);
#pragma GCC unroll 16
    for (int at = 0; at < G * V; ++at) {
      sum[at % V] = add(sum[at % V], e[at]);
      moment[at % V] = fma(e[at], d[at], moment[at % V]);
    }
  });
  for (int v = 0; v < V; ++v)
    put_line<PART>(add(window.top[v], div(moment[v], sum[v])), out + v * Vec::lanes, n);
  return true;
}

// The rare chunk, out of line: one vector, infinities and all.
template <bool PART, class In, class Out>
static __attribute__((noinline)) void pool_infinite(const In* base, const int64_t* taps,
                                                    int64_t count, int n, Out* out) {
  pool_chunk<false, 1, PART, 0>(base, taps, count, n, out, 0);
}

// One line of outputs: tap i of them is the line at base + taps[i]; `ahead` elements further lies a
// window that is soon to be read.
template <int V, int TAPS, class In, class Out>
static __attribute__((noinline)) void pool_taps(const In* base, const int64_t* taps, int64_t count,
                                                int64_t length, Out* out, int64_t ahead) {
  constexpr int step = V * Vec::lanes;
  int64_t c = 0;
  for (;;) {
    while (c + step <= length &&
           pool_chunk<true, V, false, TAPS>(base + c, taps, count, 0, out + c, ahead))
      c += step;
    if (c + Vec::lanes > length) break;
    // Less than V vectors are left, or one of them holds an infinity.
    pool_infinite<false>(base + c, taps, count, 0, out + c);
    c += Vec::lanes;
  }
  const int n = (int)(length - c);
  if (n && !pool_chunk<true, 1, true, TAPS>(base + c, taps, count, n, out + c, ahead))
    pool_infinite<true>(base + c, taps, count, n, out + c);
}
template <class In, class Out>
static inline void pool_line(const In* base, const int64_t* taps, int64_t count, int64_t length,
                             Out* out, int64_t ahead) {
  if (count == 4)
    pool_taps<1, 4>(base, taps, count, length, out, ahead);
  else if (count == 9)
    pool_taps<1, 9>(base, taps, count, length, out, ahead);
  else if (count > 0)
    pool_taps<kPoolVectors, 0>(base, taps, count, length, out, ahead);
  else  // a window in the padding altogether, as max_pool
    for (int64_t c = 0; c < length; c += Vec::lanes)
      Vec::set(-__builtin_inff())
          .store_part(out + c, length - c < Vec::lanes ? (int)(length - c) : Vec::lanes);
}

// Where a window's gradient goes: for taps in [begin, end), to `into` + tap - begin.
template <class To>
struct PoolTarget {
  To* into;
  int64_t begin, end;
  bool detached;  // the weights are constants
};

// What V vectors of windows send back to their taps. FRESH: no other window does. FINITE as above.
template <bool FRESH, bool FINITE, int V, bool PART, int TAPS, class In, class To>
static inline __attribute__((always_inline)) bool unpool_chunk(const In* base, const int64_t* taps,
                                                               int64_t count, int n,
                                                               const Element* grad, int64_t c,
                                                               const PoolTarget<To>& target,
                                                               int64_t ahead) {
  PoolWindow<V, PART, TAPS, In> window;
  window.read(base + c, taps, count, n, ahead);
  if (FINITE && __builtin_expect(window.is_infinite(), false)) return false;
  Vec sum[V], moment[V], offset[V], scale[V];
  Vec kept[(TAPS > 0 ? TAPS : kKeptTaps) * V];
  const bool keeps = TAPS > 0 || count <= kKeptTaps;
  for (int v = 0; v < V; ++v) sum[v] = moment[v] = Vec::zero();
  each_group<TAPS>(count, [&](int64_t i, auto group) __attribute__((always_inline)) {
    constexpr int G = decltype(group)::size;
    Vec d[G * V], e[G * V];
#pragma GCC unroll 16
    for (int at = 0; at < G * V; ++at)
      d[at] = window.template below_top<FINITE>(i + at / V, at % V);
    exp_of_negative<G * V>(d, e);
#pragma GCC unroll 16
    for (int at = 0; at < G * V; ++at) {
      if (keeps) kept[i * V + at] = e[at];
      sum[at % V] = add(sum[at % V], e[at]);
      moment[at % V] = fma(e[at], d[at], moment[at % V]);
    }
  });
  for (int v = 0; v < V; ++v) {
    // Of the two only the moment is surely NaN where a tap is.
    sum[v] = fma(moment[v], Vec::zero(), sum[v]);
    scale[v] = div(line_at<PART>(grad + c + v * Vec::lanes, n), sum[v]);
    offset[v] = fma(div(moment[v], sum[v]), Vec::set(-1.0f), Vec::set(1.0f));
  }
  each_tap<TAPS>(count, [&](int64_t i) {
    if (taps[i] < target.begin || taps[i] >= target.end) return;
    To* at = target.into + (taps[i] - target.begin + c);
    for (int v = 0; v < V; ++v, at += Vec::lanes) {
      Vec slope = scale[v];
      const Vec e =
          keeps ? kept[i * V + v] : exp_of_negative(window.template below_top<FINITE>(i, v));
      if (!target.detached)
        slope = mul(slope, add(offset[v], window.template below_top<FINITE>(i, v)));
      put_line<PART>(FRESH ? mul(slope, e) : fma(slope, e, line_at<PART>(at, n)), at, n);
    }
  });
  return true;
}

template <bool FRESH, bool PART, class In, class To>
static __attribute__((noinline)) void unpool_infinite(const In* base, const int64_t* taps,
                                                      int64_t count, int n, const Element* grad,
                                                      int64_t c, const PoolTarget<To>& target) {
  unpool_chunk<FRESH, false, 1, PART, 0>(base, taps, count, n, grad, c, target, 0);
}

template <bool FRESH, int V, int TAPS, class In, class To>
static __attribute__((noinline)) void unpool_taps(const In* base, const int64_t* taps,
                                                  int64_t count, int64_t length,
                                                  const Element* grad, const PoolTarget<To>& target,
                                                  int64_t ahead) {
  constexpr int step = V * Vec::lanes;
  int64_t c = 0;
  for (;;) {
    while (c + step <= length &&
           unpool_chunk<FRESH, true, V, false, TAPS>(base, taps, count, 0, grad, c, target, ahead))
      c += step;
    if (c + Vec::lanes > length) break;
    unpool_infinite<FRESH, false>(base, taps, count, 0, grad, c, target);
    c += Vec::lanes;
  }
  const int n = (int)(length - c);
  if (n && !unpool_chunk<FRESH, true, 1, true, TAPS>(base, taps, count, n, grad, c, target, ahead))
    unpool_infinite<FRESH, true>(base, taps, count, n, grad, c, target);
}
template <bool FRESH, class In, class To>
static inline void unpool_line(const In* base, const int64_t* taps, int64_t count, int64_t length,
                               const Element* grad, const PoolTarget<To>& target, int64_t ahead) {
  if (count == 4)
    unpool_taps<FRESH, 2, 4>(base, taps, count, length, grad, target, ahead);
  else if (count == 9)
    unpool_taps<FRESH, 1, 9>(base, taps, count, length, grad, target, ahead);
  else if (count > 0)
    unpool_taps<FRESH, kPoolVectors, 0>(base, taps, count, length, grad, target, ahead);
}

// The taps of output o along an axis that lie inside the map.
struct PoolSpan {
  int64_t first, count;  // the input index of the first, and how many
};
static inline PoolSpan pool_span(const PoolGeometry& g, int axis, int64_t o) {
  const int64_t dilation = g.dilation[axis];
  const int64_t start = o * g.stride[axis] - g.pad[axis];
  const int64_t skipped = start < 0 ? (dilation - 1 - start) / dilation : 0;
  const int64_t room = g.in[axis] - 1 - start;
  int64_t end = room < 0 ? 0 : room / dilation + 1;
  if (end > g.kernel[axis]) end = g.kernel[axis];
  return {start + skipped * dilation, end > skipped ? end - skipped : 0};
}

// ---- channels-last ----

// Offsets of the taps of a window of rows, ascending; returns how many.
static inline int64_t row_taps(const PoolGeometry& g, PoolSpan z, PoolSpan y, PoolSpan x,
                               int64_t pitch, int64_t* taps) {
  int64_t count = 0;
  for (int64_t i = 0; i < z.count; ++i)
    for (int64_t j = 0; j < y.count; ++j) {
      const int64_t line = (z.first + i * g.dilation[0]) * g.in[1] + y.first + j * g.dilation[1];
      for (int64_t k = 0; k < x.count; ++k)
        taps[count++] = (line * g.in[2] + x.first + k * g.dilation[2]) * pitch;
    }
  return count;
}

// body(ox, shift, count) for outputs [begin, end) of a row, whose windows' `count` taps lie at
// shift + taps. Those of windows inside the map are the same but for their shift.
template <class Body>
static inline __attribute__((always_inline)) void each_window(const SoftPoolCall& call, PoolSpan z,
                                                              PoolSpan y, int64_t begin,
                                                              int64_t end, Body body) {
  const PoolGeometry& g = call.geometry;
  const int64_t stride = g.stride[2], pad = g.pad[2];
  const int64_t room = g.in[2] + pad - 1 - g.dilation[2] * (g.kernel[2] - 1);
  const int64_t first = (pad + stride - 1) / stride, last = room < 0 ? 0 : room / stride + 1;
  bool shared = false;
  int64_t count = 0;
  for (int64_t ox = begin; ox < end; ++ox) {
    const bool is_inside = first <= ox && ox < last;
    if (!is_inside)
      count = row_taps(g, z, y, pool_span(g, 2, ox), call.pitch, call.taps);
    else if (!shared)
      count = row_taps(g, z, y, {0, g.kernel[2]}, call.pitch, call.taps);
    shared = is_inside;
    body(ox, is_inside ? (ox * stride - pad) * call.pitch : 0, count);
  }
}

// Outputs [begin, end) of one image, numbered (od * OH + oh) * OW + ow.
static void soft_pool_rows(const SoftPoolCall& call, int64_t begin, int64_t end) {
  const PoolGeometry& g = call.geometry;
  const int64_t ahead = kWindowsAhead * g.stride[2] * call.pitch;
  for (int64_t at = begin; at < end;) {
    const int64_t row = at / g.out[2], from = at % g.out[2];
    const int64_t to = g.out[2] - from < end - at ? g.out[2] : from + end - at;
    const PoolSpan z = pool_span(g, 0, row / g.out[1]), y = pool_span(g, 1, row % g.out[1]);
    Element* out = (Element*)call.output + at * call.pitch;
    each_window(call, z, y, from, to, [&](int64_t, int64_t shift, int64_t count) {
      pool_line((const Element*)call.input + shift, call.taps, count, call.channels, out, ahead);
      out += call.pitch;
    });
    at += to - from;
  }
}

// The outputs along the split axis whose windows reach into inputs [begin, end).
static inline PoolSpan reaching(const PoolGeometry& g, int axis, int64_t begin, int64_t end) {
  const int64_t stride = g.stride[axis];
  const int64_t low = begin + g.pad[axis] - g.dilation[axis] * (g.kernel[axis] - 1);
  const int64_t first = low > 0 ? (low + stride - 1) / stride : 0;
  int64_t last = (end - 1 + g.pad[axis]) / stride + 1;
  if (last > g.out[axis]) last = g.out[axis];
  return {first, last > first ? last - first : 0};
}

// float32 sums to elements.
static inline void narrow_line(const float* sums, int64_t length, Element* out) {
  for (int64_t i = 0; i < length; i += Vec::lanes) {
    const int n = length - i < Vec::lanes ? (int)(length - i) : Vec::lanes;
    Vec::load_part(sums + i, n).store_part(out + i, n);
  }
}

// Zeros at `count` positions.
template <class T>
static inline void clear_rows(const SoftPoolCall& call, T* at, int64_t count) {
  if (count <= 0) return;
  const int64_t runs = call.channels == call.pitch ? 1 : count;
  const int64_t length = call.channels == call.pitch ? count * call.pitch : call.channels;
  for (int64_t i = 0; i < runs; ++i)
    __builtin_memset(at + i * call.pitch, 0, sizeof(T) * (size_t)length);
}

// The windows of outputs `o` along the split axis, of inputs [begin, end) of it.
template <bool FRESH, class To>
static inline void unpool_windows(const SoftPoolCall& call, int axis, int64_t o, int64_t begin,
                                  int64_t end, To* into) {
  const PoolGeometry& g = call.geometry;
  const int other = 1 - axis;
  const int64_t ahead = kWindowsAhead * g.stride[2] * call.pitch;
  const PoolSpan along = pool_span(g, axis, o);
  for (int64_t q = 0; q < g.out[other]; ++q) {
    const PoolSpan across = pool_span(g, other, q);
    const PoolSpan z = axis == 0 ? along : across, y = axis == 0 ? across : along;
    const int64_t row = axis == 0 ? o * g.out[1] + q : q * g.out[1] + o;
    const Element* grad = element_row(call.grad, row * g.out[2] * call.pitch);
    each_window(call, z, y, 0, g.out[2], [&](int64_t, int64_t shift, int64_t count) {
      unpool_line<FRESH>((const Element*)call.input + shift, call.taps, count, call.channels, grad,
                         PoolTarget<To>{into, begin - shift, end - shift, call.detached}, ahead);
      grad += call.pitch;
    });
  }
}

// Inputs [begin, end) of one image along the split axis.
static void soft_pool_rows_backward(const SoftPoolCall& call, int64_t begin, int64_t end) {
  const PoolGeometry& g = call.geometry;
  const int axis = pool_split_axis(g), other = 1 - axis;
  // Where the split axis is the second, the first has one input.
  const int64_t rows = axis == 0 ? g.in[1] : 1, positions = rows * g.in[2];
  const int64_t slice = positions * call.pitch;
  Element* out = (Element*)call.grad_input + begin * slice;
  const PoolSpan outputs = reaching(g, axis, begin, end);
  if (pool_tiles(g)) {
    // What lies behind the last window of an axis is in none.
    const int64_t width = g.out[2] * g.stride[2] - g.pad[2];
    const int64_t height = g.out[other] * g.stride[other] - g.pad[other];
    const int64_t length = g.out[axis] * g.stride[axis] - g.pad[axis];
    for (int64_t i = begin; i < end; ++i) {
      Element* at = out + (i - begin) * slice;
      const int64_t kept = i >= length ? 0 : rows < height ? rows : height;
      for (int64_t j = 0; j < kept; ++j)
        clear_rows(call, at + (j * g.in[2] + width) * call.pitch, g.in[2] - width);
      clear_rows(call, at + kept * g.in[2] * call.pitch, (rows - kept) * g.in[2]);
    }
    for (int64_t o = outputs.first; o < outputs.first + outputs.count; ++o)
      unpool_windows<true>(call, axis, o, begin * slice, end * slice, out);
    return;
  }
  float* sums = kUnit == 1 ? (float*)out : call.scratch;
  // Zeros are written just before the first sum that needs them, while they stay in the cache.
  int64_t zeroed = begin;
  for (int64_t o = outputs.first; o < outputs.first + outputs.count; ++o) {
    int64_t reach = o * g.stride[axis] - g.pad[axis] + g.dilation[axis] * (g.kernel[axis] - 1) + 1;
    if (reach > end) reach = end;
    if (reach > zeroed) {
      clear_rows(call, sums + (zeroed - begin) * slice, (reach - zeroed) * positions);
      zeroed = reach;
    }
    unpool_windows<false>(call, axis, o, begin * slice, end * slice, sums);
  }
  clear_rows(call, sums + (zeroed - begin) * slice, (end - zeroed) * positions);
  if (kUnit != 1)
    for (int64_t i = 0; i < (end - begin) * positions; ++i)
      narrow_line(sums + i * call.pitch, call.channels, out + i * call.pitch);
}

// ---- contiguous ----

// The positions of one phase that come from the map: indices [first, last) of its run.
static inline void phase_bounds(const PoolGeometry& g, int64_t phase, int64_t length,
                                int64_t* first, int64_t* last) {
  const int64_t stride = g.stride[2], start = g.pad[2] - phase;  // x = j * stride - start
  *first = start > 0 ? (start + stride - 1) / stride : 0;
  *last = g.in[2] + start > 0 ? (g.in[2] + start + stride - 1) / stride : 0;
  if (*last > length) *last = length;
  if (*first > *last) *first = *last;
}

// One row of the map, sorted by phase. Backward, `least` tells -inf of the map from padding.
static inline void sort_by_phase(const PoolGeometry& g, const Element* row, Vec least,
                                 float* sorted) {
  const int64_t stride = g.stride[2], phases = pool_phases(g), length = pool_phase_length(g);
  for (int64_t phase = 0; phase < phases; ++phase, sorted += length) {
    int64_t first, last;
    phase_bounds(g, phase, length, &first, &last);
    for (int64_t j = 0; j < first; ++j) sorted[j] = -__builtin_inff();
    for (int64_t j = last; j < length; ++j) sorted[j] = -__builtin_inff();
    const Element* from = row + first * stride + phase - g.pad[2];
    const Element* end = row + g.in[2];
    int64_t j = first;
    if (stride == 1)
      for (; j + Vec::lanes <= last; j += Vec::lanes, from += Vec::lanes)
        greater_or(least, Vec::load(from)).store(sorted + j);
    if (stride == 2)
      for (; j + Vec::lanes <= last && from + 2 * Vec::lanes <= end;
           j += Vec::lanes, from += 2 * Vec::lanes)
        greater_or(least, even_lanes(Vec::load(from), Vec::load(from + Vec::lanes)))
            .store(sorted + j);
    const float bound = least.first();
    for (; j < last; ++j, from += stride) {
      const float value = to_float(*from);
      sorted[j] = value < bound ? bound : value;
    }
  }
}

// The reverse, for sums: what is in no window is 0.
static inline void unsort_phases(const PoolGeometry& g, const float* sorted, float* row) {
  const int64_t stride = g.stride[2], phases = pool_phases(g), length = pool_phase_length(g);
  int64_t start = 0;  // of the columns that are not yet written
  if (stride == 2 && phases == 2) {
    // Both phases in turns, from the first pair on that lies in the map as a whole.
    const int64_t skipped = (g.pad[2] + 1) / 2;
    if (2 * skipped > g.pad[2]) row[0] = sorted[length + skipped - 1];
    start = 2 * skipped - g.pad[2];
    const float *even = sorted + skipped, *odd = sorted + length + skipped;
    const float* end = sorted + length;
    for (; start + 2 * Vec::lanes <= g.in[2] && even + Vec::lanes <= end;
         start += 2 * Vec::lanes, even += Vec::lanes, odd += Vec::lanes) {
      const Vec a = Vec::load(even), b = Vec::load(odd);
      zip_first(a, b).store(row + start);
      zip_last(a, b).store(row + start + Vec::lanes);
    }
  }
  for (int64_t x = start; x < g.in[2]; ++x) {
    const int64_t u = x + g.pad[2], phase = u % stride, j = u / stride;
    row[x] = phase < phases && j < length ? sorted[phase * length + j] : 0.0f;
  }
}

// Sorted input rows: those along the split axis that outputs `span` read, all of the other axis.
struct SortedRows {
  int64_t first, count;  // along the split axis
  int64_t slice;         // floats of one index of it
  int64_t line;          // floats of one row
};
static inline SortedRows sort_rows(const SoftPoolCall& call, PoolSpan outputs, Vec least,
                                   float* sorted) {
  const PoolGeometry& g = call.geometry;
  const int axis = pool_split_axis(g);
  const int64_t line = pool_phases(g) * pool_phase_length(g);
  const int64_t lines = axis == 0 ? g.in[1] : 1;
  int64_t first = outputs.first * g.stride[axis] - g.pad[axis];
  int64_t end = (outputs.first + outputs.count - 1) * g.stride[axis] - g.pad[axis] +
                g.dilation[axis] * (g.kernel[axis] - 1) + 1;
  if (first < 0) first = 0;
  if (end > g.in[axis]) end = g.in[axis];
  const int64_t count = outputs.count > 0 && end > first ? end - first : 0;
  for (int64_t i = 0; i < count * lines; ++i)
    sort_by_phase(g, element_row(call.input, (first * lines + i) * g.in[2]), least,
                  sorted + i * line);
  return {first, count, lines * line, line};
}

// Offsets of the taps of a line of outputs; returns how many.
static inline int64_t plane_taps(const PoolGeometry& g, const SortedRows& rows, PoolSpan z,
                                 PoolSpan y, int64_t* taps) {
  const int axis = pool_split_axis(g);
  const int64_t length = pool_phase_length(g);
  int64_t count = 0;
  for (int64_t i = 0; i < z.count; ++i)
    for (int64_t j = 0; j < y.count; ++j) {
      const int64_t iz = z.first + i * g.dilation[0], iy = y.first + j * g.dilation[1];
      const int64_t line = axis == 0 ? (iz - rows.first) * rows.slice + iy * rows.line
                                     : (iy - rows.first) * rows.slice;
      for (int64_t k = 0; k < g.kernel[2]; ++k) {
        const int64_t u = k * g.dilation[2];
        taps[count++] = line + u % g.stride[2] * length + u / g.stride[2];
      }
    }
  return count;
}

// Outputs [begin, end) of one plane along the split axis; scratch holds the sorted rows.
static void soft_pool_plane(const SoftPoolCall& call, int64_t begin, int64_t end) {
  const PoolGeometry& g = call.geometry;
  const int axis = pool_split_axis(g), other = 1 - axis;
  const SortedRows rows =
      sort_rows(call, {begin, end - begin}, Vec::set(-__builtin_inff()), call.scratch);
  for (int64_t o = begin; o < end; ++o)
    for (int64_t q = 0; q < g.out[other]; ++q) {
      const PoolSpan along = pool_span(g, axis, o), across = pool_span(g, other, q);
      const int64_t count = axis == 0 ? plane_taps(g, rows, along, across, call.taps)
                                      : plane_taps(g, rows, across, along, call.taps);
      const int64_t row = axis == 0 ? o * g.out[1] + q : q * g.out[1] + o;
      pool_line(call.scratch, call.taps, count, g.out[2], (Element*)call.output + row * g.out[2],
                0);
    }
}

// Inputs [begin, end) of one plane along the split axis; scratch holds the sorted rows, their sums,
// and one row.
static void soft_pool_plane_backward(const SoftPoolCall& call, int64_t begin, int64_t end) {
  const PoolGeometry& g = call.geometry;
  const int axis = pool_split_axis(g), other = 1 - axis;
  const PoolSpan outputs = reaching(g, axis, begin, end);
  // The largest finite number: a window of -inf only weighs its taps alike, and padding not at all.
  const SortedRows rows = sort_rows(call, outputs, Vec::set(-3.40282347e+38f), call.scratch);
  float* sums = call.scratch + rows.count * rows.slice;
  const int64_t size = (end - begin) * rows.slice;
  float* line = sums + size;
  __builtin_memset(sums, 0, sizeof(float) * (size_t)size);
  const int64_t from = (begin - rows.first) * rows.slice;
  for (int64_t o = outputs.first; o < outputs.first + outputs.count; ++o)
    for (int64_t q = 0; q < g.out[other]; ++q) {
      const PoolSpan along = pool_span(g, axis, o), across = pool_span(g, other, q);
      const int64_t count = axis == 0 ? plane_taps(g, rows, along, across, call.taps)
                                      : plane_taps(g, rows, across, along, call.taps);
      const int64_t row = axis == 0 ? o * g.out[1] + q : q * g.out[1] + o;
      if (count)
        unpool_line<false>((const float*)call.scratch, call.taps, count, g.out[2],
                           element_row(call.grad, row * g.out[2]),
                           PoolTarget<float>{sums, from, from + size, call.detached}, 0);
    }
  Element* out = (Element*)call.grad_input + begin * (axis == 0 ? g.in[1] : 1) * g.in[2];
  for (int64_t i = 0; i < size / rows.line; ++i, out += g.in[2]) {
    float* plain = kUnit == 1 ? (float*)out : line;
    unsort_phases(g, sums + i * rows.line, plain);
    if (kUnit != 1) narrow_line(line, g.in[2], out);
  }
}
