#include "assemble.h"

#include <algorithm>
#include <bit>

#include "operators.h"
#include "threads.h"

namespace sparsight {
namespace {

enum Slot { kDistance, kOrder, kFirst, kSums };

// Sums of a band of rows that stay in L2: 256 KiB of float32.
constexpr int64_t kBandSums = 1 << 16;
// Bands a thread: windows crowd where the objects are.
constexpr int64_t kBandsPerThread = 4;

int64_t side_of(int64_t channels) {
  int64_t k = 1;
  while (k * k < channels) ++k;
  return k;
}

// size x size distances from a window's corner, in elements of maps with these strides.
const int64_t* distances(const AssembleArrays& a, int64_t channel, int64_t row, int64_t column) {
  const int64_t k = side_of(a.channels), m = a.size;
  auto bin = [&](int64_t i) { return a.centred ? (2 * i + 1) * k / (2 * m) : i * k / m; };
  int64_t* table = thread_scratch().get<int64_t>(kDistance, m * m);
  for (int64_t j = 0; j < m; ++j) table[j] = bin(j) * channel + j * column;
  // The first row last: the others are made of it.
  for (int64_t i = m - 1; i >= 0; --i) {
    const int64_t down = bin(i) * k * channel + i * row;
    for (int64_t j = 0; j < m; ++j) table[i * m + j] = table[j] + down;
  }
  return table;
}

// The cells [begin, end) along an axis that lie in the map's [low, high).
struct Span {
  // Wholly outside stays so, and no difference overflows.
  Span(int64_t corner, int64_t size, int64_t extent, int64_t low, int64_t high)
      : corner(std::clamp(corner, -size, extent)),
        begin(std::max<int64_t>(0, low - this->corner)),
        end(std::min(size, high - this->corner)) {}
  int64_t corner, begin, end;
};

template <class T>
void assemble_range(const AssembleArrays& a, const int64_t* distance, const T* maps, T* out,
                    int64_t first, int64_t last) {
  const int64_t m = a.size;
  for (int64_t w = first; w < last; ++w) {
    const int64_t* window = a.windows + 3 * w;
    const Span y(window[1], m, a.height, 0, a.height), x(window[2], m, a.width, 0, a.width);
    // Negative where the corner is outside: added before a pointer is made of it.
    const int64_t at = window[0] * a.strides[0] + y.corner * a.strides[2] + x.corner * a.strides[3];
    T* to = out + w * m * m;
    if (y.end - y.begin == m && x.end - x.begin == m) {
      for (int64_t t = 0; t < m * m; ++t) to[t] = maps[at + distance[t]];
      continue;
    }
    if (y.begin >= y.end || x.begin >= x.end) {
      std::fill(to, to + m * m, T{0});
      continue;
    }
    std::fill(to, to + y.begin * m, T{0});
    for (int64_t i = y.begin; i < y.end; ++i) {
      std::fill(to + i * m, to + i * m + x.begin, T{0});
      for (int64_t t = i * m + x.begin; t < i * m + x.end; ++t) to[t] = maps[at + distance[t]];
      std::fill(to + i * m + x.end, to + (i + 1) * m, T{0});
    }
    std::fill(to + y.end * m, to + m * m, T{0});
  }
}

template <class T>
void assemble_all(const AssembleArrays& a, const void* maps, void* out, int num_threads) {
  if (a.count == 0) return;
  const int64_t* distance = distances(a, a.strides[1], a.strides[2], a.strides[3]);
  parallel_ranges(num_threads, a.count, [&](int64_t begin, int64_t end) {
    assemble_range(a, distance, static_cast<const T*>(maps), static_cast<T*>(out), begin, end);
  });
}

// What an element is, what it is summed in, and the way between.
struct Float32 {
  using Element = float;
  using Sum = float;
  static float widen(float x) { return x; }
  static float narrow(float x) { return x; }
};
struct Float64 {
  using Element = double;
  using Sum = double;
  static double widen(double x) { return x; }
  static double narrow(double x) { return x; }
};
struct Bfloat16 {
  using Element = uint16_t;
  using Sum = float;
  static float widen(uint16_t x) { return std::bit_cast<float>(uint32_t{x} << 16); }
  static uint16_t narrow(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;  // rounding could make it infinite
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
  }
};
struct Float16 {
  using Element = uint16_t;
  using Sum = float;
  static float widen(uint16_t x) {
    const uint32_t sign = uint32_t{x & 0x8000u} << 16, size = x & 0x7fffu;
    uint32_t bits = (size << 13) + (112u << 23);  // the exponents' biases are 15 and 127
    if (size >= 0x7c00) bits += 112u << 23;
    if (size < 0x400) bits = std::bit_cast<uint32_t>(static_cast<float>(size) * 0x1p-24f);
    return std::bit_cast<float>(sign | bits);
  }
  static uint16_t narrow(float x) {
    uint32_t bits = std::bit_cast<uint32_t>(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u)
      bits = 0x7e00;
    else if (bits >= 0x477ff000u)  // from halfway behind the largest: infinite
      bits = 0x7c00;
    else if (bits < 0x38800000u)  // no normal number of float16: 1/2 has the same last place
      bits = std::bit_cast<uint32_t>(std::bit_cast<float>(bits) + 0.5f) - 0x3f000000u;
    else
      bits = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1)) >> 13;
    return static_cast<uint16_t>(sign | bits);
  }
};

// The windows of each image, in their order: those of image b are order[first[b]] to
// order[first[b + 1]].
struct Grouped {
  explicit Grouped(const AssembleArrays& a)
      : order(thread_scratch().get<int64_t>(kOrder, a.count)),
        first(thread_scratch().get<int64_t>(kFirst, a.images + 2)) {
    std::fill(first, first + a.images + 2, 0);
    for (int64_t w = 0; w < a.count; ++w) ++first[a.windows[3 * w] + 2];
    for (int64_t b = 0; b < a.images; ++b) first[b + 2] += first[b + 1];
    for (int64_t w = 0; w < a.count; ++w) order[first[a.windows[3 * w] + 1]++] = w;
  }
  int64_t *order, *first;
};

// Bands of rows of the images. A cell of the maps lies in one band and is summed in the order of
// the windows, whatever the bands are: threads neither wait for each other nor change a bit.
struct Bands {
  Bands(const AssembleArrays& a, int num_threads) : height(a.height) {
    rows = std::max<int64_t>(1, kBandSums / (a.width * a.channels));
    const int64_t wanted = kBandsPerThread * num_threads;
    if (num_threads > 1) rows = std::min(rows, (a.images * a.height + wanted - 1) / wanted);
    rows = std::min(rows, a.height);
    per_image = (a.height + rows - 1) / rows;
    count = a.images * per_image;
  }
  int64_t begin(int64_t band) const { return band % per_image * rows; }
  int64_t end(int64_t band) const { return std::min(height, begin(band) + rows); }
  int64_t height, rows, per_image, count;
};

template <class N>
void backward_all(const AssembleArrays& a, const void* grad, bool is_rows, void* grad_maps,
                  int num_threads) {
  using Element = typename N::Element;
  using Sum = typename N::Sum;
  const auto* from = static_cast<const Element*>(grad);
  auto* out = static_cast<Element*>(grad_maps);
  if (a.images * a.channels * a.height * a.width == 0) return;
  const int64_t m = a.size, plane = a.height * a.width;
  const Grouped windows(a);
  const Bands bands(a, num_threads);
  // The sums of a band lie as the map does.
  const int64_t of_channel = is_rows ? 1 : bands.rows * a.width;
  const int64_t of_column = is_rows ? a.channels : 1, of_row = a.width * of_column;
  const int64_t* distance = a.count ? distances(a, of_channel, of_row, of_column) : nullptr;
  const auto num_workers = static_cast<int>(std::min<int64_t>(num_threads, bands.count));
  // Dealt out like cards, for the reason that there are several a thread.
  run_workers(num_workers, [&](int worker) {
    const int64_t num_sums = bands.rows * a.width * a.channels;
    Sum* sums = thread_scratch().get<Sum>(kSums, num_sums);
    for (int64_t band = worker; band < bands.count; band += num_workers) {
      const int64_t image = band / bands.per_image;
      const int64_t low = bands.begin(band), high = bands.end(band);
      std::fill(sums, sums + num_sums, Sum{0});
      for (int64_t n = windows.first[image]; n < windows.first[image + 1]; ++n) {
        const int64_t w = windows.order[n];
        const Span y(a.windows[3 * w + 1], m, a.height, low, high);
        const Span x(a.windows[3 * w + 2], m, a.width, 0, a.width);
        const int64_t at = (y.corner - low) * of_row + x.corner * of_column;
        const Element* sent = from + w * m * m;
        for (int64_t i = y.begin; i < y.end; ++i)
          for (int64_t t = i * m + x.begin; t < i * m + x.end; ++t)
            sums[at + distance[t]] += N::widen(sent[t]);
      }
      const int64_t length = (high - low) * of_row;
      for (int64_t c = 0; c < (is_rows ? 1 : a.channels); ++c) {
        Element* to = out + (image * a.channels + c) * plane + low * of_row;
        const Sum* of = sums + c * of_channel;
        for (int64_t p = 0; p < length; ++p) to[p] = N::narrow(of[p]);
      }
    }
  });
}

int64_t window_without_image(const AssembleArrays& a) {
  for (int64_t w = 0; w < a.count; ++w)
    if (a.windows[3 * w] < 0 || a.windows[3 * w] >= a.images) return w;
  return -1;
}

}  // namespace

int64_t assemble(const AssembleArrays& a, const void* maps, void* out, int64_t element_size,
                 int num_threads) {
  if (const int64_t w = window_without_image(a); w >= 0) return w;
  if (element_size == 2)
    assemble_all<uint16_t>(a, maps, out, num_threads);
  else if (element_size == 4)
    assemble_all<uint32_t>(a, maps, out, num_threads);
  else
    assemble_all<uint64_t>(a, maps, out, num_threads);
  return -1;
}

int64_t assemble_backward(const AssembleArrays& a, const void* grad, bool rows, void* grad_maps,
                          Number number, int num_threads) {
  if (const int64_t w = window_without_image(a); w >= 0) return w;
  if (number == Number::kFloat32)
    backward_all<Float32>(a, grad, rows, grad_maps, num_threads);
  else if (number == Number::kFloat64)
    backward_all<Float64>(a, grad, rows, grad_maps, num_threads);
  else if (number == Number::kBfloat16)
    backward_all<Bfloat16>(a, grad, rows, grad_maps, num_threads);
  else
    backward_all<Float16>(a, grad, rows, grad_maps, num_threads);
  return -1;
}

}  // namespace sparsight
