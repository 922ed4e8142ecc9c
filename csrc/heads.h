// The samplers' heads: 3x3 convolutions to one logit, read as a GEMM of x with 9 columns a head.
//
//   z[p][column] = x[p] . weight[column]        x is streamed once, for all the heads of a block
//   logit(y, x)  = bias + sum over taps of z[(y, x) moved by tap][9 * head + tap]   (by the caller)
//
// Two heads are 18 columns: 16 of them live in the lanes of one vector (a channel is broadcast),
// the two left over are dot products along the channels, so that a second vector is not paid for
// two lanes. Register budget, AVX-512: 12 rows x (1 or 2) vectors + weights + broadcast; then 4
// rows x 2. Packed: [channel][vector columns, padded to whole 16s] then [rest column][channel].
// Included in an ISA-named namespace.

constexpr int kHeadRows = kRows;

template <int MR, int VECS>
static inline void head_columns(const Element* const* rows, const float* packed, int64_t channels,
                                float* const* out) {
  Vec acc[MR][VECS];
  for (int m = 0; m < MR; ++m)
    for (int v = 0; v < VECS; ++v) acc[m][v] = Vec::zero();
  for (int64_t u = 0; u < channels / kUnit; ++u) {
    // The rows of the next tile: MR short streams are too many for the hardware to follow.
    if (u % 16 == 0)
      for (int m = 0; m < MR; ++m) __builtin_prefetch(rows[m] + kHeadRows * channels + u * kUnit);
    Vec w[VECS];
    for (int v = 0; v < VECS; ++v) w[v] = Vec::load(packed + v * Vec::lanes);
    packed += VECS * Vec::lanes;
    for (int m = 0; m < MR; ++m) {
      const Vec a = unit_at(rows[m] + u * kUnit);
      for (int v = 0; v < VECS; ++v) acc[m][v] = multiply_add(a, w[v], acc[m][v]);
    }
  }
  for (int m = 0; m < MR; ++m)
    for (int v = 0; v < VECS; ++v) acc[m][v].store(out[m] + v * Vec::lanes);
}

// row . weight, the weight packed in units
static inline float dot_units(const Element* row, const float* weight, int64_t channels) {
  Vec acc = Vec::zero();
  const int64_t units = channels / kUnit;
  int64_t u = 0;
  for (; u + Vec::lanes <= units; u += Vec::lanes)
    acc = multiply_add(units_at(row + u * kUnit), Vec::load(weight + u), acc);
  float total = acc.sum();
  for (; u < units; ++u)
    total += multiply_add(unit_at(row + u * kUnit), Vec::set(weight[u]), Vec::zero()).first();
  return total;
}

static void heads(const HeadCall& call, int64_t begin, int64_t end) {
  constexpr int kVectors = kHeadColumns / Vec::lanes;  // vectors in 16 columns
  const int64_t groups = call.vector_columns / kHeadColumns;
  const int64_t rest = call.columns - call.vector_columns;
  const int64_t units = call.channels / kUnit;
  const float* rest_weight = call.weight + call.vector_columns * units;
  for (int64_t tile = begin; tile < end; tile += kHeadRows) {
    const Element* rows[kHeadRows];
    float* out[kHeadRows];
    float spill[kHeadColumns * 2];
    const int live = end - tile < kHeadRows ? (int)(end - tile) : kHeadRows;
    for (int m = 0; m < kHeadRows; ++m) {
      const int64_t p = tile + (m < live ? m : live - 1);
      rows[m] = element_row(call.input, p * call.channels);
      out[m] = m < live ? call.output + p * call.output_stride : spill;
    }
#if defined(SPARSIGHT_AVX512)
    if (groups == 1) head_columns<kHeadRows, kVectors>(rows, call.weight, call.channels, out);
    if (groups == 2) head_columns<kHeadRows, 2 * kVectors>(rows, call.weight, call.channels, out);
#else
    if (groups == 1)
      for (int m = 0; m < kHeadRows; m += 2)
        head_columns<2, kVectors>(rows + m, call.weight, call.channels, out + m);
    if (groups == 2)
      for (int m = 0; m < kHeadRows; ++m)
        head_columns<1, 2 * kVectors>(rows + m, call.weight, call.channels, out + m);
#endif
    for (int64_t r = 0; r < rest; ++r)
      for (int m = 0; m < live; ++m)
        out[m][call.vector_columns + r] =
            dot_units(rows[m], rest_weight + r * units, call.channels);
  }
}
