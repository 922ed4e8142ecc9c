// Maps of any sizes joined into one: resized to its size, then side by side or summed.
//
//   for each row y, each position x of the output, each segment of its channels:
//     out[y][x][segment] = sum over the segment's sources of source at (y, x)
//   source at (y, x): its row there; resized, the row nearest to it, or bilinearly
//     h0 (w0 a + w1 b) + h1 (w0 c + w1 d), in this order, as torch has it
//
// Concatenation has a segment of each source, a sum one segment of all. What each row and column of
// the output reads is looked up in tables. One pass, bound by memory; 2 vectors of channels at a
// time. Included in an ISA-named namespace.

// Rows of one source around one output position.
struct MergePoint {
  const Element* rows[4];  // near and far column of the near row, then of the far row
  Vec weight[4];           // near and far column, near and far row
  bool is_mixed;
};

static inline MergePoint merge_point(const MergeSource& source, int64_t y, int64_t x) {
  const MergeTap row = source.rows[y], column = source.columns[x];
  MergePoint p;
  const auto at = [&](int64_t sy, int64_t sx) {
    return element_row(source.input, (sy * source.width + sx) * source.channels);
  };
  p.rows[0] = at(row.near, column.near);
  p.is_mixed = source.is_mixed;
  if (!p.is_mixed) return p;
  p.rows[1] = at(row.near, column.far);
  p.rows[2] = at(row.far, column.near);
  p.rows[3] = at(row.far, column.far);
  p.weight[0] = Vec::set(1.0f - column.far_weight);
  p.weight[1] = Vec::set(column.far_weight);
  p.weight[2] = Vec::set(1.0f - row.far_weight);
  p.weight[3] = Vec::set(row.far_weight);
  return p;
}

template <class Load>
static inline Vec merge_value(const MergePoint& p, Load load) {
  if (!p.is_mixed) return load(p.rows[0]);
  const Vec near = fma(p.weight[1], load(p.rows[1]), mul(p.weight[0], load(p.rows[0])));
  const Vec far = fma(p.weight[1], load(p.rows[3]), mul(p.weight[0], load(p.rows[2])));
  return fma(p.weight[3], far, mul(p.weight[2], near));
}

static void merge_maps(const MergeCall& call, int64_t row_begin, int64_t row_end) {
  for (int64_t y = row_begin; y < row_end; ++y) {
    int64_t first = 0;
    for (int64_t s = 0; s < call.num_sources; s += call.sources_per_segment) {
      const int count = (int)call.sources_per_segment;
      const int64_t channels = call.sources[s].channels;
      for (int64_t x = 0; x < call.width; ++x) {
        MergePoint points[kMaxMerged];
        for (int i = 0; i < count; ++i) points[i] = merge_point(call.sources[s + i], y, x);
        Element* out = (Element*)call.output + (y * call.width + x) * call.channels + first;
        int64_t c = 0;
        for (; c + 2 * Vec::lanes <= channels; c += 2 * Vec::lanes) {
          Vec sum[2];
          for (int v = 0; v < 2; ++v) {
            const auto load = [&](const Element* row) {
              return Vec::load(row + c + v * Vec::lanes);
            };
            sum[v] = merge_value(points[0], load);
            for (int i = 1; i < count; ++i) sum[v] = add(sum[v], merge_value(points[i], load));
          }
          if (call.stream)
            stream_vectors<2>(out + c, sum);
          else
            for (int v = 0; v < 2; ++v) sum[v].store(out + c + v * Vec::lanes);
        }
        for (; c < channels; c += Vec::lanes) {
          const int n = channels - c < Vec::lanes ? (int)(channels - c) : Vec::lanes;
          const auto load = [&](const Element* row) { return Vec::load_part(row + c, n); };
          Vec sum = merge_value(points[0], load);
          for (int i = 1; i < count; ++i) sum = add(sum, merge_value(points[i], load));
          sum.store_part(out + c, n);
        }
      }
      first += channels;
    }
  }
  if (call.stream) stream_fence();
}
