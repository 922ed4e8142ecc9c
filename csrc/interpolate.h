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

// out[0..VECS vectors) = relu?(sum_i weight[i] * rows[i][at..] + residual)
template <int VECS, bool STREAM, class Out>
static inline void combine_vectors(const Element* const* rows, const float* weights, int count,
                                   const Element* residual, bool clamp, Out* out, int64_t at) {
  Vec acc[VECS];
  for (int v = 0; v < VECS; ++v)
    acc[v] = residual ? Vec::load(residual + at + v * Vec::lanes) : Vec::zero();
  for (int i = 0; i < count; ++i) {
    const Vec w = Vec::set(weights[i]);
    for (int v = 0; v < VECS; ++v)
      acc[v] = fma(w, Vec::load(rows[i] + at + v * Vec::lanes), acc[v]);
  }
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
// says which taps are not negligible beside it.
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

// Returns false when there is nothing to write: a site in its place.
static inline bool choose_mix(const FillCall& call, const int64_t* step, int64_t p, Mix* mix) {
  const int64_t radius = call.window / 2;
  const int center = (int)(radius * call.window + radius);
  const int64_t y = (uint32_t)p / (uint32_t)call.width;
  const int64_t x = p - y * call.width;
  uint64_t words[kWindowWords];
  window_bits(call, y, x, words);
  mix->position = p;
  mix->count = 0;
  if (call.residual)
    prefetch_row(element_row(call.residual, p * call.residual_stride),
                 call.channels * (int64_t)sizeof(Element));
  if (words[center >> 6] >> (center & 63) & 1) {
    mix->rows[0] = value_row(call, p);
    mix->weights[0] = 1.0f;
    mix->count = 1;
    return mix->rows[0] != element_row(call.output, p * call.output_stride) || call.residual ||
           call.relu;
  }
  if (!call.tables) return true;
  int taps[kMaxWindowTaps];
  mix->count = call.window <= 8 ? choose_sites<1>(call, words, taps, mix->weights)
                                : choose_sites<kWindowWords>(call, words, taps, mix->weights);
  for (int t = 0; t < mix->count; ++t) {
    mix->rows[t] = value_row(call, p + step[taps[t]]);
    prefetch_row(mix->rows[t], call.channels * (int64_t)sizeof(Element));
  }
  return true;
}

static void fill(const FillCall& call, int64_t begin, int64_t end) {
  const int64_t radius = call.window / 2;
  int64_t step[kMaxWindowTaps];  // from a position to its taps
  for (int64_t dy = 0; dy < call.window; ++dy)
    for (int64_t dx = 0; dx < call.window; ++dx)
      step[dy * call.window + dx] = (dy - radius) * call.width + dx - radius;
  Mix mixes[kMixesAhead];
  for (int64_t i = begin; i < end;) {
    int chosen = 0;
    for (; chosen < kMixesAhead && i < end; ++i)
      chosen += choose_mix(call, step, call.positions ? call.positions[i] : i, &mixes[chosen]);
    for (int m = 0; m < chosen; ++m) {
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
