// The largest of a few rows, channel by channel: one position of a max pooling.
//
//   out[c] = max over i of rows[i][c], NaN where one of them is, as torch.nn.functional.max_pool2d
//
// 4 vectors of running maxima; 1 load a row and vector, bound by L2. Included in an ISA-named
// namespace.

template <class Out>
static inline void largest_of_rows(const Element* const* rows, int count, int64_t channels,
                                   Out* out) {
  constexpr int step = 4 * Vec::lanes;
  int64_t c = 0;
  for (; c + step <= channels; c += step) {
    Vec best[4];
    for (int v = 0; v < 4; ++v) best[v] = Vec::load(rows[0] + c + v * Vec::lanes);
    for (int i = 1; i < count; ++i)
      for (int v = 0; v < 4; ++v)
        best[v] = larger(Vec::load(rows[i] + c + v * Vec::lanes), best[v]);
    for (int v = 0; v < 4; ++v) best[v].store(out + c + v * Vec::lanes);
  }
  for (; c < channels; c += Vec::lanes) {
    const int n = channels - c < Vec::lanes ? (int)(channels - c) : Vec::lanes;
    Vec best = Vec::load_part(rows[0] + c, n);
    for (int i = 1; i < count; ++i) best = larger(Vec::load_part(rows[i] + c, n), best);
    best.store_part(out + c, n);
  }
}

static void max_rows(const void* const* rows, int count, int64_t channels, void* out,
                     bool float_output) {
  if (kUnit == 1 || !float_output)
    largest_of_rows((const Element* const*)rows, count, channels, (Element*)out);
  else
    largest_of_rows((const Element* const*)rows, count, channels, (float*)out);
}
