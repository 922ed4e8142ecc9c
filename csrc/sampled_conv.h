// Indirect GEMM: convolution rows computed at a list of sites.
//
//   for each panel of 32 output channels, for each tile of MR sites:
//     acc[MR][32] = bias
//     for each tap: rows[m] = input row of (site m moved by tap), or the zero row outside the map
//       for c in channels:  acc[m][:] += rows[m][c] * packed[tap][c][:]
//     out row of site m = activation(acc[m] + residual)
//
// Input, residual and output are channels-last rows; nothing is gathered, rows are read by pointer.
// Register budget: AVX-512 12 x 2 accumulators of 16 lanes + 2 weights + 1 broadcast = 27 of 32;
// AVX2 4 x 2 of 8 lanes + 2 + 1 = 11 of 16 (a panel is walked as two halves); scalar 2 x 4.
// A panel that ends within the first vector (48 channels are 32 and 16) is 12 x 1: one load more in
// 12, half the multiply-adds.
// With bfloat16 maps a step of the inner loop takes a pair of channels (csrc/pack.h).
// Every element is summed tap by tap, channel by channel, in one order whatever the tile, so that
// results do not depend on the split over threads. Included in an ISA-named namespace.

#if defined(SPARSIGHT_AVX512)
constexpr int kRows = 12;
constexpr int kVecs = 2;
#elif defined(SPARSIGHT_AVX2)
constexpr int kRows = 4;
constexpr int kVecs = 2;
#else
constexpr int kRows = 2;
constexpr int kVecs = 4;
#endif
constexpr int kColumns = kVecs * Vec::lanes;

struct SiteOrigin {
  int64_t y, x;  // input coordinates of the top-left tap
};

static inline int64_t site_at(const ConvCall& call, int64_t i) {
  return call.sites ? call.sites[i] : i;
}

static inline SiteOrigin origin_of(const ConvGeometry& g, int64_t position) {
  const uint32_t y = (uint32_t)position / (uint32_t)g.out_width;
  const uint32_t x = (uint32_t)position - y * (uint32_t)g.out_width;
  return {(int64_t)y * g.stride_h - g.pad_h, (int64_t)x * g.stride_w - g.pad_w};
}

static inline const Element* tap_row(const ConvCall& call, SiteOrigin o, int64_t ky, int64_t kx) {
  const ConvGeometry& g = call.geometry;
  const int64_t y = o.y + ky * g.dilation_h;
  const int64_t x = o.x + kx * g.dilation_w;
  if ((uint64_t)y >= (uint64_t)g.height || (uint64_t)x >= (uint64_t)g.width)
    return element_row(call.zero_row, 0);
  return element_row(call.input, (y * g.width + x) * call.input_stride);
}

// The tiles that share the drawing of the next weights: those of one panel may be half of L2, and
// come from L3 at a third of the rate that they are used at.
constexpr int64_t kDrawingTiles = 3;

// One register tile: up to kRows sites, one half or whole panel.
struct Tile {
  const Element* const* rows;  // [tap][kRows]
  int live;                    // sites that are stored; the others repeat the last one
  const int64_t* in_row;       // of each site, its index in the list
  int64_t taps, range, first_channel;
  const float* packed;
  const float* bias;  // or null
  int64_t column, left;
  // Rows of the tile after this one: sites are scattered, the hardware cannot guess. Or null.
  const Element* const* next_rows;
  // The weights that come after these, which would otherwise arrive from afar in the middle of the
  // first tile that needs them, or null. Of the taps, numbered on through the panels, this tile
  // draws every turns-th one, beginning at `turn`.
  const float* next_packed;
  int64_t turn, turns;
};

// acc += rows[0..MR) (channels) x packed (channels x 32, this half)
template <int MR, int VECS, bool ROWS, bool WEIGHTS>
static inline void accumulate(Vec (&acc)[MR][VECS], const Element* const* rows,
                              const Element* const* next_rows, const float* packed,
                              const float* next_packed, int64_t channels) {
  const Element* r[MR];
  for (int m = 0; m < MR; ++m) r[m] = rows[m];
  const int64_t units = channels / kUnit;
  for (int64_t u = 0; u < units; ++u) {
    if (ROWS && u % 16 == 0)
      for (int m = 0; m < MR; ++m) __builtin_prefetch(next_rows[m] + u * kUnit);
    if (WEIGHTS)
      for (int line = 0; line < VECS * Vec::lanes; line += 16)
        __builtin_prefetch(next_packed + u * kPanel + line, 0, 2);
    Vec w[VECS];
    for (int v = 0; v < VECS; ++v) w[v] = Vec::load(packed + v * Vec::lanes);
    packed += kPanel;
    for (int m = 0; m < MR; ++m) {
      const Vec a = unit_at(r[m] + u * kUnit);
      for (int v = 0; v < VECS; ++v) acc[m][v] = multiply_add(a, w[v], acc[m][v]);
    }
  }
  if (kUnit > 1 && channels % kUnit) {
    for (int m = 0; m < MR; ++m) {
      const Vec a = half_unit_at(r[m] + channels - 1);
      for (int v = 0; v < VECS; ++v)
        acc[m][v] = multiply_add(a, Vec::load(packed + v * Vec::lanes), acc[m][v]);
    }
  }
}

// out[0..left) of one row = relu?(acc + residual)
template <int VECS, class Out>
static inline void store_row(Vec* acc, const Element* residual, bool clamp, bool past_caches,
                             Out* out, int64_t left) {
  if (left >= VECS * Vec::lanes) {
    if (residual)
      for (int v = 0; v < VECS; ++v) acc[v] = add(acc[v], Vec::load(residual + v * Vec::lanes));
    if (clamp)
      for (int v = 0; v < VECS; ++v) acc[v] = relu(acc[v]);
    if (past_caches)
      stream_vectors<VECS>(out, acc);
    else
      for (int v = 0; v < VECS; ++v) acc[v].store(out + v * Vec::lanes);
    return;
  }
  for (int v = 0; v * Vec::lanes < left; ++v) {
    const int64_t rest = left - v * Vec::lanes;
    const int n = rest < Vec::lanes ? (int)rest : Vec::lanes;
    Vec y = acc[v];
    if (residual) y = add(y, Vec::load_part(residual + v * Vec::lanes, n));
    if (clamp) y = relu(y);
    y.store_part(out + v * Vec::lanes, n);
  }
}

template <int MR, int VECS>
static inline void conv_tile(const ConvCall& call, const Tile& tile) {
  Vec acc[MR][VECS];
  for (int v = 0; v < VECS; ++v) {
    const Vec b = tile.bias ? Vec::load(tile.bias + v * Vec::lanes) : Vec::zero();
    for (int m = 0; m < MR; ++m) acc[m][v] = b;
  }
  const int64_t tap_floats = (tile.range + kUnit - 1) / kUnit * kPanel;
  for (int64_t t = 0; t < tile.taps; ++t) {
    const Element* rows[MR];
    for (int m = 0; m < MR; ++m) rows[m] = tile.rows[t * kRows + m] + tile.first_channel;
    const float* packed = tile.packed + t * tap_floats;
    const Element* next[MR];
    if (tile.next_rows)
      for (int m = 0; m < MR; ++m) next[m] = tile.next_rows[t * kRows + m] + tile.first_channel;
    const float* next_packed = tile.next_packed + t * tap_floats;
    const bool draws = tile.next_packed && (tile.turn + t) % tile.turns == 0;
    if (tile.next_rows && draws)
      accumulate<MR, VECS, true, true>(acc, rows, next, packed, next_packed, tile.range);
    else if (tile.next_rows)
      accumulate<MR, VECS, true, false>(acc, rows, next, packed, nullptr, tile.range);
    else if (draws)
      accumulate<MR, VECS, false, true>(acc, rows, nullptr, packed, next_packed, tile.range);
    else
      accumulate<MR, VECS, false, false>(acc, rows, nullptr, packed, nullptr, tile.range);
  }
  for (int m = 0; m < MR; ++m) {
    if (m >= tile.live) break;
    const int64_t row = tile.in_row[m], position = site_at(call, row);
    const int64_t at = (call.compact_output ? row : position) * call.output_stride + tile.column;
    const Element* residual =
        call.residual ? element_row(call.residual, position * call.residual_stride + tile.column)
                      : nullptr;
    if (kUnit == 1 || !call.float_output)
      store_row<VECS>(acc[m], residual, call.relu, call.stream, (Element*)call.output + at,
                      tile.left);
    else
      store_row<VECS>(acc[m], residual, call.relu, call.stream, (float*)call.output + at,
                      tile.left);
  }
}

template <int VECS>
static inline void dispatch_tile(const ConvCall& call, const Tile& tile) {
#if defined(SPARSIGHT_AVX512)
  if (tile.live > 8) return conv_tile<12, VECS>(call, tile);
  if (tile.live > 4) return conv_tile<8, VECS>(call, tile);
#endif
#if defined(SPARSIGHT_AVX512) || defined(SPARSIGHT_AVX2)
  if (tile.live > 2) return conv_tile<4, VECS>(call, tile);
#endif
  if (tile.live > 1) return conv_tile<2, VECS>(call, tile);
  conv_tile<1, VECS>(call, tile);
}

// Row pointers of up to kRows sites for all taps, [tap][kRows]; missing sites repeat the last one.
static inline void gather_rows(const ConvCall& call, int64_t begin, int live, const Element** rows,
                               int64_t* in_row) {
  const ConvGeometry& g = call.geometry;
  for (int m = 0; m < kRows; ++m) {
    const int64_t i = begin + (m < live ? m : live - 1);
    in_row[m] = i;
    if (call.compact_input) {
      for (int64_t t = 0; t < g.kernel_h * g.kernel_w; ++t)
        rows[t * kRows + m] =
            element_row(call.input, (i * g.kernel_h * g.kernel_w + t) * call.input_stride);
      continue;
    }
    const SiteOrigin o = origin_of(g, site_at(call, i));
    int64_t t = 0;
    for (int64_t ky = 0; ky < g.kernel_h; ++ky)
      for (int64_t kx = 0; kx < g.kernel_w; ++kx, ++t)
        rows[t * kRows + m] = tap_row(call, o, ky, kx);
  }
}

// Grouped and depthwise: a vector of channels stays in its lanes, the input is permuted in them.
template <int WIDTH>
static inline void lanes_site(const ConvCall& call, const Element* const* rows, int64_t stride_rows,
                              int64_t taps, int64_t channel, const float* packed, int64_t position,
                              int64_t row) {
  const ConvGeometry& g = call.geometry;
  const int64_t left = g.out_channels - channel;
  const int count = left < kLaneGroup ? (int)left : kLaneGroup;
  float acc[kLaneGroup];
  for (int l = 0; l < kLaneGroup; ++l)
    acc[l] = call.bias && l < count ? call.bias[channel + l] : 0.0f;
  for (int64_t t = 0; t < taps; ++t) {
    float in[kLaneGroup];
    const Element* source = rows[t * stride_rows] + channel;
    for (int l = 0; l < kLaneGroup; ++l) in[l] = l < count ? to_float(source[l]) : 0.0f;
    const float* w = packed + t * WIDTH * kLaneGroup;
    for (int j = 0; j < WIDTH; ++j)
      for (int l = 0; l < kLaneGroup; ++l)
        acc[l] += in[l / WIDTH * WIDTH + j] * w[j * kLaneGroup + l];
  }
  const int64_t at = (call.compact_output ? row : position) * call.output_stride + channel;
  const Element* res = call.residual
                           ? element_row(call.residual, position * call.residual_stride + channel)
                           : nullptr;
  for (int l = 0; l < count; ++l) {
    acc[l] += res ? to_float(res[l]) : 0.0f;
    acc[l] = call.relu && acc[l] < 0.0f ? 0.0f : acc[l];
  }
  for (int l = 0; l < count; l += Vec::lanes) {
    const int n = count - l < Vec::lanes ? count - l : Vec::lanes;
    if (kUnit == 1 || !call.float_output)
      Vec::load(acc + l).store_part((Element*)call.output + at + l, n);
    else
      Vec::load(acc + l).store_part((float*)call.output + at + l, n);
  }
}

static void conv_lanes(const ConvCall& call, int64_t panel_begin, int64_t panel_end, int64_t begin,
                       int64_t end) {
  const ConvGeometry& g = call.geometry;
  const int64_t taps = g.kernel_h * g.kernel_w;
  const int64_t width = g.in_channels / g.groups;
  const int64_t block = taps * width * kLaneGroup;
  const Element* rows[kMaxTaps * kRows];
  int64_t in_row[kRows];
  for (int64_t tile = begin; tile < end; tile += kRows) {
    const int live = end - tile < kRows ? (int)(end - tile) : kRows;
    gather_rows(call, tile, live, rows, in_row);
    for (int64_t channel = panel_begin * kPanel;
         channel < panel_end * kPanel && channel < g.out_channels; channel += kLaneGroup) {
      const float* packed = call.weight + channel / kLaneGroup * block;
      for (int m = 0; m < live; ++m) {
        const int64_t position = site_at(call, in_row[m]);
        switch (width) {
          case 1:
            lanes_site<1>(call, rows + m, kRows, taps, channel, packed, position, in_row[m]);
            break;
          case 2:
            lanes_site<2>(call, rows + m, kRows, taps, channel, packed, position, in_row[m]);
            break;
          case 4:
            lanes_site<4>(call, rows + m, kRows, taps, channel, packed, position, in_row[m]);
            break;
          case 8:
            lanes_site<8>(call, rows + m, kRows, taps, channel, packed, position, in_row[m]);
            break;
          default:
            lanes_site<16>(call, rows + m, kRows, taps, channel, packed, position, in_row[m]);
        }
      }
    }
  }
}

static inline int live_rows(int64_t left) {
  return left < kRows ? (int)left : kRows;
}

static void conv(const ConvCall& call, int64_t panel_begin, int64_t panel_end, int64_t begin,
                 int64_t end) {
  if (call.kind == PackKind::lanes) return conv_lanes(call, panel_begin, panel_end, begin, end);
  const ConvGeometry& g = call.geometry;
  const Element* buffers[2][kMaxTaps * kRows];
  int64_t in_rows[2][kRows];
  int current = 0;
  if (begin < end) gather_rows(call, begin, live_rows(end - begin), buffers[0], in_rows[0]);
  Tile tile{};
  tile.taps = g.kernel_h * g.kernel_w;
  tile.range = g.in_channels / g.groups;
  const int64_t tiles = (end - begin + kRows - 1) / kRows;
  tile.turns = tiles < kDrawingTiles ? tiles : kDrawingTiles;
  const int64_t panel_floats = packed_offset(g, PackKind::panel, 1, kUnit);
  // Of all positions in order the hardware follows the rows, but not where each is read once.
  const bool draws_rows = call.sites || tile.taps == 1;
  // After the last panels of all, somebody begins with the first ones again.
  const int64_t panels = panel_count(g, PackKind::panel);
  const int64_t next_panels = panel_end < panels ? panel_end - panel_begin : -panel_begin;
  for (int64_t first = begin; first < end; first += kRows) {
    const int64_t tiles_after = (end - first - 1) / kRows;
    const bool is_last = tiles_after == 0;
    tile.live = live_rows(end - first);
    tile.rows = buffers[current];
    tile.in_row = in_rows[current];
    current ^= 1;
    if (!is_last)
      gather_rows(call, first + kRows, live_rows(end - first - kRows), buffers[current],
                  in_rows[current]);
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const Panel at = panel_at(g, panel);
      tile.first_channel = at.first_in;
      tile.next_rows = draws_rows && !is_last && panel == panel_begin ? buffers[current] : nullptr;
      for (int64_t half = 0; half < at.width; half += kColumns) {
        tile.packed = call.weight + panel * panel_floats + half;
        const int64_t next = panel + next_panels;
        tile.next_packed = tiles_after < tile.turns && next < panels
                               ? call.weight + next * panel_floats + half
                               : nullptr;
        tile.turn = (panel - panel_begin) * tile.taps + tiles_after;
        tile.bias = call.bias ? call.bias + panel * kPanel + half : nullptr;
        tile.column = at.first_out + half;
        tile.left = at.width - half;
        if (tile.left > Vec::lanes)
          dispatch_tile<kVecs>(call, tile);
        else
          dispatch_tile<1>(call, tile);
        tile.next_rows = nullptr;
      }
    }
  }
  if (call.stream) stream_fence();
}
