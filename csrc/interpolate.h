// Fill the holes of a map from the sites in a window x window neighbourhood (inference).
//
//   for each hole p: over the sites q in its window
//     w_q = exp(log_kernel[q - p] - max over those sites)   (tables by level: no exp at run time)
//     out[p][:] = sum_q w_q values[q][:] / sum_q w_q, then + residual, activation; sites are copied
//
// Rows are channels-last. Without eps, a weight that hardly counts beside that of the nearest site
// is not read: below 2^-26 of it, a quarter of float32's rounding (kNegligible); on bfloat16 rows
// below 2^-12 of it, an eighth of theirs (kNegligibleNarrow). That leaves one to four rows a hole
// at the published width. Included in an ISA-named namespace.

constexpr int kMaxWindowTaps = kMaxWindow * kMaxWindow;

constexpr int kAlways = 4;  // see choose_mixes

// out[0..VECS vectors) = relu?(sum_i weight[i] * rows[i][at..] + residual)
template <int VECS, bool STREAM, class Out>
static inline void combine_vectors(const Element* const* rows, const float* weights, int count,
                                   const Element* residual, bool clamp, Out* out, int64_t at) {
  Vec acc[VECS];
  for (int v = 0; v < VECS; ++v)
    acc[v] = residual ? Vec::load(residual + at + v * Vec::lanes) : Vec::zero();
  const auto add_row = [&](int i) {
    const Vec w = Vec::set(weights[i]);
    for (int v = 0; v < VECS; ++v)
      acc[v] = fma(w, Vec::load(rows[i] + at + v * Vec::lanes), acc[v]);
  };
  if (count == kAlways)
    for (int i = 0; i < kAlways; ++i) add_row(i);
  else
    for (int i = 0; i < count; ++i) add_row(i);
  if (clamp)
    for (int v = 0; v < VECS; ++v) acc[v] = relu(acc[v]);
  if (STREAM)
    stream_vectors<VECS>(out + at, acc);
  else
    for (int v = 0; v < VECS; ++v) acc[v].store(out + at + v * Vec::lanes);
}

// out[0..channels) = relu?(sum_i weight[i] * rows[i] + residual)
template <bool STREAM, class Out>
static inline void combine_rows(const Element* const* rows, const float* weights, int count,
                                const Element* residual, bool clamp, Out* out, int64_t channels) {
  int64_t c = 0;
  for (; c + 4 * Vec::lanes <= channels; c += 4 * Vec::lanes)
    combine_vectors<4, STREAM>(rows, weights, count, residual, clamp, out, c);
  if (c + 2 * Vec::lanes <= channels) {
    combine_vectors<2, STREAM>(rows, weights, count, residual, clamp, out, c);
    c += 2 * Vec::lanes;
  }
  if (c + Vec::lanes <= channels) {
    combine_vectors<1, STREAM>(rows, weights, count, residual, clamp, out, c);
    c += Vec::lanes;
  }
  if (c == channels) return;
  const int n = (int)(channels - c);
  Vec acc = residual ? Vec::load_part(residual + c, n) : Vec::zero();
  for (int i = 0; i < count; ++i)
    acc = fma(Vec::set(weights[i]), Vec::load_part(rows[i] + c, n), acc);
  (clamp ? relu(acc) : acc).store_part(out + c, n);
}

// From a position to its taps; 0 for numbers of none.
static inline void steps_of(const FillCall& call, int64_t* step) {
  const int64_t radius = call.window / 2, pitch = tap_pitch(call.window);
  __builtin_memset(step, 0, sizeof(int64_t) * kMaxTapNumbers);
  for (int64_t dx = 0; dx < call.window; ++dx)
    for (int64_t dy = 0; dy < call.window; ++dy)
      step[dx * pitch + dy] = (dy - radius) * call.width + dx - radius;
}

// The sites in the window of a position, and beside it what is in the same words.
template <int WORDS>
static inline void window_sites(const FillCall& call, int64_t p, uint64_t* words) {
  const int64_t y = (uint32_t)p / (uint32_t)call.width, x = p - y * call.width;
  const int64_t column_bytes = WORDS == 1 ? 1 : 2;
  __builtin_memcpy(words, call.columns + y * call.columns_stride + x * column_bytes, 8 * WORDS);
}

// Chooses the sites that count for a position and their normalised weights; returns how many. The
// taps of one level share a kernel value, levels descend; `keep` of the first level that holds a
// site says which taps are not negligible beside it.
static inline int choose_sites(const FillCall& call, const uint64_t* words, int* taps,
                               float* weights) {
  const FillTables& t = *call.tables;
  int64_t level = 0;
  for (; level < t.num_levels; ++level) {
    uint64_t any = 0;
    for (int w = 0; w < kWindowWords; ++w) any |= words[w] & t.level[level][w];
    if (any) break;
  }
  const float* row = t.ratio + level * tap_numbers(call.window);
  const uint64_t* keep = t.keep[level];
  float total = 0.0f;
  if (level > 0 && call.eps >= 0.0f) {  // the kernel itself
    row = t.kernel;
    keep = t.keep_eps;
    total = call.eps;
  } else if (level == t.num_levels) {
    return 0;
  }
  int kept = 0;
  for (int w = 0; w < kWindowWords; ++w)
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

static inline const Element* value_row(const FillCall& call, int64_t p) {
  return element_row(call.values, (call.row_of ? call.row_of[p] : p) * call.values_stride);
}

template <class Out>
static inline void put_row(const FillCall& call, const Element* const* rows, const float* weights,
                           int count, const Element* residual, Out* out) {
  if (call.stream)
    combine_rows<true>(rows, weights, count, residual, call.relu, out, call.channels);
  else
    combine_rows<false>(rows, weights, count, residual, call.relu, out, call.channels);
}

// The sources of one output row, chosen ahead of their use so that they are on their way meanwhile.
struct Mix {
  int64_t position;
  int count;
  const Element* rows[kMaxWindowTaps];
  float weights[kMaxWindowTaps];
};
constexpr int kMixesAhead = 8;
constexpr int64_t kPrefetchedBytes = 1024;  // of a row; what follows is a stream of its own

static inline void prefetch_row(const void* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes && at < kPrefetchedBytes; at += 64)
    __builtin_prefetch((const char*)row + at);
}

static inline void prefetch_ahead(const FillCall& call, int64_t p) {
  const char* row = (const char*)call.values + p * call.values_stride * (int64_t)sizeof(Element);
  const int64_t bytes = call.channels * (int64_t)sizeof(Element);
  for (int64_t at = 0; at < bytes && at < kPrefetchedBytes; at += 64)
    __builtin_prefetch(row + at, 1);
}

static inline void choose_mix(const FillCall& call, const int64_t* step, int64_t p, Mix* mix) {
  const int64_t center = call.window / 2 * (tap_pitch(call.window) + 1);
  const int64_t row_bytes = call.channels * (int64_t)sizeof(Element);
  uint64_t words[kWindowWords] = {};
  if (tap_pitch(call.window) == 8)
    window_sites<1>(call, p, words);
  else
    window_sites<kWindowWords>(call, p, words);
  mix->position = p;
  mix->count = 0;
  if (call.residual) prefetch_row(element_row(call.residual, p * call.residual_stride), row_bytes);
  int taps[kMaxWindowTaps];
  if (call.tables) {
    mix->count = choose_sites(call, words, taps, mix->weights);
  } else if (words[center >> 6] >> (center & 63) & 1) {
    taps[0] = (int)center;
    mix->weights[0] = 1.0f;
    mix->count = 1;
  }
  for (int t = 0; t < mix->count; ++t) {
    mix->rows[t] = value_row(call, p + step[taps[t]]);
    prefetch_row(mix->rows[t], row_bytes);
  }
}

// The same for some positions of a small window, exact. How many sites count for one differs from
// position to position, and a jump that nobody can foresee costs more than a row: kAlways sources
// are always taken, those that are none are rows of zeros.
static inline void choose_mixes(const FillCall& call, const int64_t* step, const int64_t* positions,
                                int count, Mix* mixes) {
  const FillTables& t = *call.tables;
  const int64_t row_bytes = call.channels * (int64_t)sizeof(Element);
  const Element* zero_row = element_row(call.zero_row, 0);
  uint64_t words[kMixesAhead] = {}, kept[kMixesAhead];
  int64_t level[kMixesAhead];
  for (int m = 0; m < count; ++m) window_sites<1>(call, positions[m], words + m);
  first_levels(words, t.level[0], t.keep[0], t.num_levels, kWindowWords, level, kept);
  for (int m = 0; m < count; ++m) {
    Mix& mix = mixes[m];
    const int64_t p = mix.position = positions[m];
    const float* ratio = t.ratio + level[m] * 64;  // without a level: the kernel, and nothing kept
    uint64_t left = kept[m];
    float total = 0.0f;
    for (int i = 0; i < kAlways; ++i) {
      const int tap = __builtin_ctzll(left | 1ull << kNoTap);
      const Element* row = value_row(call, p + step[tap]);
      mix.rows[i] = left ? row : zero_row;
      mix.weights[i] = ratio[tap];
      total += ratio[tap];
      left &= left - 1;
    }
    mix.count = kAlways;
    for (; left; left &= left - 1) {
      const int tap = __builtin_ctzll(left);
      mix.rows[mix.count] = value_row(call, p + step[tap]);
      mix.weights[mix.count++] = ratio[tap];
      total += ratio[tap];
    }
    const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
    for (int i = 0; i < mix.count; ++i) mix.weights[i] *= inverse;
    // What the sites' rows are read for first lies at the lower end of the window, and is by then
    // on its way; of compact rows the hardware follows the order.
    if (call.residual)
      prefetch_row(element_row(call.residual, p * call.residual_stride), row_bytes);
    if (!call.row_of) prefetch_ahead(call, p + call.window / 2 * call.width);
  }
}

static void fill(const FillCall& call, int64_t begin, int64_t end) {
  int64_t step[kMaxTapNumbers];
  steps_of(call, step);
  const bool is_small = call.tables && call.eps < 0.0f && tap_pitch(call.window) == 8;
  Mix mixes[kMixesAhead];
  for (int64_t i = begin; i < end; i += kMixesAhead) {
    const int count = end - i < kMixesAhead ? (int)(end - i) : kMixesAhead;
    int64_t positions[kMixesAhead];
    for (int m = 0; m < count; ++m) positions[m] = call.positions ? call.positions[i + m] : i + m;
    if (is_small)
      choose_mixes(call, step, positions, count, mixes);
    else
      for (int m = 0; m < count; ++m) choose_mix(call, step, positions[m], &mixes[m]);
    for (int m = 0; m < count; ++m) {
      const Mix& mix = mixes[m];
      const Element* residual =
          call.residual ? element_row(call.residual, mix.position * call.residual_stride) : nullptr;
      const int64_t at = mix.position * call.output_stride;
      if (kUnit == 1 || !call.float_output)
        put_row(call, mix.rows, mix.weights, mix.count, residual, (Element*)call.output + at);
      else
        put_row(call, mix.rows, mix.weights, mix.count, residual, (float*)call.output + at);
    }
  }
  if (call.stream) stream_fence();
}
