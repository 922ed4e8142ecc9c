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
// A window is read twice, for its maximum and for the exponentials, from L1; backward keeps up to
// kKeptTaps exponentials on the stack. 2 vectors at a time: some 18 instructions a tap and vector,
// of which 13 are the exponential.
//
// Backward scatters window by window into a block of the input that its caller alone owns; a window
// across the border of two blocks is computed for both. An input so gets what it gets in the order
// of the windows, whatever the blocks and threads are. Included in an ISA-named namespace.

constexpr int kPoolVectors = 2;
constexpr int kKeptTaps = 64;

template <bool PART, class T>
static inline Vec line_at(const T* p, int n) {
  return PART ? Vec::load_part(p, n) : Vec::load(p);
}

// d = x - top, from kLeastExponent to 0; NaN stays.
static inline Vec distance_from_top(Vec x, Vec top) {
  return greater_or(Vec::set(kLeastExponent), distance(x, top));
}

// NaN are passed over here; they come back with the distances.
template <int V, bool PART, class In>
static inline void top_of_window(const In* base, const int64_t* taps, int64_t count, int n,
                                 Vec* top) {
  for (int v = 0; v < V; ++v) top[v] = Vec::set(-__builtin_inff());
  for (int64_t i = 0; i < count; ++i)
    for (int v = 0; v < V; ++v)
      top[v] = greater_or(line_at<PART>(base + taps[i] + v * Vec::lanes, n), top[v]);
}

template <int V, bool PART, class In, class Out>
static inline void pool_chunk(const In* base, const int64_t* taps, int64_t count, int n, Out* out) {
  Vec top[V], sum[V], moment[V];
  top_of_window<V, PART>(base, taps, count, n, top);
  for (int v = 0; v < V; ++v) sum[v] = moment[v] = Vec::zero();
  for (int64_t i = 0; i < count; ++i)
    for (int v = 0; v < V; ++v) {
      const Vec d = distance_from_top(line_at<PART>(base + taps[i] + v * Vec::lanes, n), top[v]);
      const Vec e = exp_of_negative(d);
      sum[v] = add(sum[v], e);
      moment[v] = fma(e, d, moment[v]);
    }
  for (int v = 0; v < V; ++v) {
    const Vec y = add(top[v], div(moment[v], sum[v]));
    if (PART)
      y.store_part(out + v * Vec::lanes, n);
    else
      y.store(out + v * Vec::lanes);
  }
}

// One line of outputs: tap i of them is the line at base + taps[i].
template <class In, class Out>
static inline void pool_line(const In* base, const int64_t* taps, int64_t count, int64_t length,
                             Out* out) {
  int64_t c = 0;
  if (count == 0) {  // a window in the padding altogether, as max_pool
    for (; c < length; c += Vec::lanes)
      Vec::set(-__builtin_inff())
          .store_part(out + c, length - c < Vec::lanes ? (int)(length - c) : Vec::lanes);
    return;
  }
  constexpr int step = kPoolVectors * Vec::lanes;
  for (; c + step <= length; c += step)
    pool_chunk<kPoolVectors, false>(base + c, taps, count, 0, out + c);
  for (; c + Vec::lanes <= length; c += Vec::lanes)
    pool_chunk<1, false>(base + c, taps, count, 0, out + c);
  if (c < length) pool_chunk<1, true>(base + c, taps, count, (int)(length - c), out + c);
}

// What a window sends back to those of its taps that lie in [begin, end), to `into` + tap - begin.
template <int V, bool PART, class In>
static inline void unpool_chunk(const In* base, const int64_t* taps, int64_t count, int n,
                                const Element* grad, bool detached, float* into, int64_t begin,
                                int64_t end) {
  Vec top[V], sum[V], moment[V], offset[V], scale[V];
  Vec kept[kKeptTaps * V];
  const bool keeps = count <= kKeptTaps;
  top_of_window<V, PART>(base, taps, count, n, top);
  for (int v = 0; v < V; ++v) sum[v] = moment[v] = Vec::zero();
  for (int64_t i = 0; i < count; ++i)
    for (int v = 0; v < V; ++v) {
      const Vec d = distance_from_top(line_at<PART>(base + taps[i] + v * Vec::lanes, n), top[v]);
      const Vec e = exp_of_negative(d);
      if (keeps) kept[i * V + v] = e;
      sum[v] = add(sum[v], e);
      moment[v] = fma(e, d, moment[v]);
    }
  for (int v = 0; v < V; ++v) {
    scale[v] = div(line_at<PART>(grad + v * Vec::lanes, n), sum[v]);
    offset[v] = fma(div(moment[v], sum[v]), Vec::set(-1.0f), Vec::set(1.0f));
  }
  for (int64_t i = 0; i < count; ++i) {
    if (taps[i] < begin || taps[i] >= end) continue;
    float* at = into + taps[i] - begin;
    for (int v = 0; v < V; ++v, at += Vec::lanes) {
      Vec slope = scale[v], e;
      if (!keeps || !detached) {
        const Vec d = distance_from_top(line_at<PART>(base + taps[i] + v * Vec::lanes, n), top[v]);
        e = keeps ? kept[i * V + v] : exp_of_negative(d);
        if (!detached) slope = mul(slope, add(offset[v], d));
      } else {
        e = kept[i * V + v];
      }
      const Vec total = fma(slope, e, line_at<PART>(at, n));
      if (PART)
        total.store_part(at, n);
      else
        total.store(at);
    }
  }
}

template <class In>
static inline void unpool_line(const In* base, const int64_t* taps, int64_t count, int64_t length,
                               const Element* grad, bool detached, float* into, int64_t begin,
                               int64_t end) {
  constexpr int step = kPoolVectors * Vec::lanes;
  int64_t c = 0;
  for (; c + step <= length; c += step)
    unpool_chunk<kPoolVectors, false>(base + c, taps, count, 0, grad + c, detached, into + c, begin,
                                      end);
  for (; c + Vec::lanes <= length; c += Vec::lanes)
    unpool_chunk<1, false>(base + c, taps, count, 0, grad + c, detached, into + c, begin, end);
  if (c < length)
    unpool_chunk<1, true>(base + c, taps, count, (int)(length - c), grad + c, detached, into + c,
                          begin, end);
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
                               int64_t channels, int64_t* taps) {
  int64_t count = 0;
  for (int64_t i = 0; i < z.count; ++i)
    for (int64_t j = 0; j < y.count; ++j) {
      const int64_t line = (z.first + i * g.dilation[0]) * g.in[1] + y.first + j * g.dilation[1];
      for (int64_t k = 0; k < x.count; ++k)
        taps[count++] = (line * g.in[2] + x.first + k * g.dilation[2]) * channels;
    }
  return count;
}

// Output rows [begin, end) of one image, numbered od * OH + oh.
static void soft_pool_rows(const SoftPoolCall& call, int64_t begin, int64_t end) {
  const PoolGeometry& g = call.geometry;
  const int64_t channels = call.channels;
  for (int64_t row = begin; row < end; ++row) {
    const PoolSpan z = pool_span(g, 0, row / g.out[1]), y = pool_span(g, 1, row % g.out[1]);
    Element* out = (Element*)call.output + row * g.out[2] * channels;
    for (int64_t ox = 0; ox < g.out[2]; ++ox, out += channels) {
      const int64_t count = row_taps(g, z, y, pool_span(g, 2, ox), channels, call.taps);
      pool_line((const Element*)call.input, call.taps, count, channels, out);
    }
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

// Inputs [begin, end) of one image along the split axis.
static void soft_pool_rows_backward(const SoftPoolCall& call, int64_t begin, int64_t end) {
  const PoolGeometry& g = call.geometry;
  const int axis = pool_split_axis(g), other = 1 - axis;
  const int64_t channels = call.channels;
  // Where the split axis is the second, the first has one input.
  const int64_t slice = (axis == 0 ? g.in[1] : 1) * g.in[2] * channels;
  Element* out = (Element*)call.grad_input + begin * slice;
  float* sums = kUnit == 1 ? (float*)out : call.scratch;
  const PoolSpan outputs = reaching(g, axis, begin, end);
  // Zeros are written just before the first sum that needs them, while they stay in the cache.
  int64_t zeroed = begin;
  for (int64_t o = outputs.first; o < outputs.first + outputs.count; ++o) {
    int64_t reach = o * g.stride[axis] - g.pad[axis] + g.dilation[axis] * (g.kernel[axis] - 1) + 1;
    if (reach > end) reach = end;
    if (reach > zeroed) {
      __builtin_memset(sums + (zeroed - begin) * slice, 0,
                       sizeof(float) * (size_t)((reach - zeroed) * slice));
      zeroed = reach;
    }
    const PoolSpan along = pool_span(g, axis, o);
    for (int64_t q = 0; q < g.out[other]; ++q) {
      const PoolSpan across = pool_span(g, other, q);
      const PoolSpan z = axis == 0 ? along : across, y = axis == 0 ? across : along;
      const int64_t row = axis == 0 ? o * g.out[1] + q : q * g.out[1] + o;
      const Element* grad = element_row(call.grad, row * g.out[2] * channels);
      for (int64_t ox = 0; ox < g.out[2]; ++ox, grad += channels) {
        const int64_t count = row_taps(g, z, y, pool_span(g, 2, ox), channels, call.taps);
        if (count)
          unpool_line((const Element*)call.input, call.taps, count, channels, grad, call.detached,
                      sums, begin * slice, end * slice);
      }
    }
  }
  if (zeroed < end)
    __builtin_memset(sums + (zeroed - begin) * slice, 0,
                     sizeof(float) * (size_t)((end - zeroed) * slice));
  if (kUnit != 1) narrow_line(sums, (end - begin) * slice, out);
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
      pool_line(call.scratch, call.taps, count, g.out[2], (Element*)call.output + row * g.out[2]);
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
        unpool_line((const float*)call.scratch, call.taps, count, g.out[2],
                    element_row(call.grad, row * g.out[2]), call.detached, sums, from, from + size);
    }
  Element* out = (Element*)call.grad_input + begin * (axis == 0 ? g.in[1] : 1) * g.in[2];
  for (int64_t i = 0; i < size / rows.line; ++i, out += g.in[2]) {
    float* plain = kUnit == 1 ? (float*)out : line;
    unsort_phases(g, sums + i * rows.line, plain);
    if (kUnit != 1) narrow_line(line, g.in[2], out);
  }
}
