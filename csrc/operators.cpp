#include "operators.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <new>

#include "buffers.h"
#include "pack.h"
#include "threads.h"

namespace sparsight {

Scratch::~Scratch() {
  for (void* p : pointers_) std::free(p);
}

void* Scratch::bytes(int slot, int64_t size) {
  if (slot >= static_cast<int>(pointers_.size())) {
    pointers_.resize(slot + 1, nullptr);
    sizes_.resize(slot + 1, 0);
  }
  if (sizes_[slot] < size) {
    std::free(pointers_[slot]);
    pointers_[slot] = nullptr;
    sizes_[slot] = 0;
    pointers_[slot] = allocate_pages(size);
    sizes_[slot] = size;
  }
  return pointers_[slot];
}

Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

int64_t list_sites(const uint8_t* mask, int64_t count, int32_t* sites) {
  int64_t n = 0;
  // Branch-free: at density 0.5 a predicted branch would miss half the time.
  for (int64_t i = 0; i < count; ++i) {
    sites[n] = static_cast<int32_t>(i);
    n += mask[i] != 0;
  }
  return n;
}

int64_t list_sites_and_holes(const uint8_t* mask, int64_t count, int32_t* index) {
  int64_t active = 0;
  for (int64_t i = 0; i < count; ++i) active += mask[i] != 0;
  int64_t site = 0, hole = active;
  for (int64_t i = 0; i < count; ++i) index[mask[i] ? site++ : hole++] = static_cast<int32_t>(i);
  return active;
}

void run_conv(const KernelTable& table, const ConvCall& call, int64_t num_sites, int num_threads) {
  if (num_sites <= 0) return;
  const ConvGeometry& g = call.geometry;
  const int64_t panels = panel_count(g, call.kind);
  const int64_t tiles = (num_sites + table.conv_tile - 1) / table.conv_tile;
  const int64_t panel_bytes = packed_size(g, call.kind, table.unit) * 4 / panels;
  // Panels whose weights stay in L2 while a range of sites passes over them.
  const int64_t group =
      std::max<int64_t>(1, std::min<int64_t>(panels, 393216 / std::max<int64_t>(1, panel_bytes)));
  const int64_t groups = (panels + group - 1) / group;
  const int64_t weight_bytes = panel_bytes * panels;
  const int64_t input_bytes = table.element_size * g.in_channels *
                              std::min(num_sites * g.kernel_h * g.kernel_w, g.height * g.width);
  const bool by_panel = num_threads > 1 && panels >= num_threads &&
                        (tiles < 2 * num_threads || weight_bytes > 2 * input_bytes);
  if (by_panel) {
    const int64_t per = std::max<int64_t>(1, std::min(group, panels / num_threads));
    std::atomic<int64_t> next{0};
    run_workers(num_threads, [&](int) {
      for (int64_t begin; (begin = next.fetch_add(per)) < panels;)
        table.conv(call, begin, std::min(begin + per, panels), 0, num_sites);
    });
    return;
  }
  const int workers = static_cast<int>(std::min<int64_t>(num_threads, tiles));
  if (workers <= 1) {
    for (int64_t p = 0; p < groups; ++p)
      table.conv(call, p * group, std::min((p + 1) * group, panels), 0, num_sites);
    return;
  }
  // A few chunks each: a core that the machine slows down takes fewer of them.
  const int64_t chunks = std::min<int64_t>(tiles, workers * 4);
  std::atomic<int64_t> next{0};
  run_workers(workers, [&](int) {
    for (int64_t chunk; (chunk = next.fetch_add(1)) < chunks;) {
      const int64_t begin = tiles * chunk / chunks * table.conv_tile;
      const int64_t end = std::min(num_sites, tiles * (chunk + 1) / chunks * table.conv_tile);
      for (int64_t p = 0; p < groups; ++p)
        table.conv(call, p * group, std::min((p + 1) * group, panels), begin, end);
    }
  });
}

int64_t column_map_stride(int64_t width, int64_t window) {
  // A window is read as kWindowWords words from its first column on.
  return (width + window) * tap_pitch(window) / 8 + 8 * kWindowWords;
}

int64_t column_map_size(int64_t height, int64_t width, int64_t window) {
  return height * column_map_stride(width, window);
}

namespace {

template <class Column>
void fill_columns(const uint8_t* mask, int64_t height, int64_t width, int64_t window,
                  uint8_t* columns) {
  const int64_t radius = window / 2, stride = column_map_stride(width, window);
  std::memset(columns, 0, column_map_size(height, width, window));
  for (int64_t y = 0; y < height; ++y) {
    auto* row = reinterpret_cast<Column*>(columns + y * stride) + radius;
    const int64_t first = std::max<int64_t>(0, radius - y);
    const int64_t last = std::min(window, height + radius - y);
    for (int64_t dy = first; dy < last; ++dy) {
      const uint8_t* source = mask + (y + dy - radius) * width;
      const auto bit = static_cast<Column>(1u << dy);
      for (int64_t x = 0; x < width; ++x) row[x] |= source[x] ? bit : Column{0};
    }
  }
}

}  // namespace

void make_column_map(const uint8_t* mask, int64_t height, int64_t width, int64_t window,
                     uint8_t* columns) {
  if (tap_pitch(window) == 8)
    fill_columns<uint8_t>(mask, height, width, window, columns);
  else
    fill_columns<uint16_t>(mask, height, width, window, columns);
}

void OwnedFillTables::build(const float* log_kernel, int64_t window, float negligible) {
  const int64_t taps = window * window, pitch = tap_pitch(window), numbers = tap_numbers(window);
  std::vector<float> values(log_kernel, log_kernel + taps);
  std::sort(values.begin(), values.end(), std::greater<float>());
  values.erase(std::unique(values.begin(), values.end()), values.end());
  // A kernel value of zero is a site unseen.
  while (!values.empty() && !(values.back() > -std::numeric_limits<float>::infinity()))
    values.pop_back();
  const int64_t levels = static_cast<int64_t>(values.size()) + 1;
  words_.assign((2 * levels + 1) * kWindowWords, 0);
  numbers_.assign((levels + 1) * numbers, 0.0f);
  auto* words = reinterpret_cast<Words*>(words_.data());
  const auto set = [](uint64_t* set_words, int64_t tap) {
    set_words[tap >> 6] |= 1ull << (tap & 63);
  };
  const int64_t middle = window / 2 * pitch + window / 2;
  set(words[0], middle);
  set(words[levels], middle);
  numbers_[middle] = 1.0f;
  for (int64_t t = 0; t < taps; ++t) {
    const int64_t tap = t % window * pitch + t / window;
    for (int64_t l = 1; l < levels; ++l) {
      if (log_kernel[t] == values[l - 1]) set(words[l], tap);
      const float ratio = std::exp(log_kernel[t] - values[l - 1]);
      numbers_[l * numbers + tap] = ratio;
      if (ratio > negligible) set(words[levels + l], tap);
    }
    numbers_[levels * numbers + tap] = std::exp(log_kernel[t]);
    if (numbers_[levels * numbers + tap] > 0.0f) set(words[2 * levels], tap);
  }
  tables_ = {levels,          words,
             words + levels,  words[2 * levels],
             numbers_.data(), numbers_.data() + levels * numbers};
}

namespace {

// The kernel of a soft fill in both forms, made once a call. Exact sums do not depend on its scale:
// it is taken relative to its largest value, so that no useful weight under- or overflows.
class SoftKernel {
 public:
  explicit SoftKernel(const SoftFillArrays& a) : log_kernel_(a.window * a.window) {
    const int64_t taps = a.window * a.window;
    float largest = 0.0f;
    if (a.eps < 0.0f) {
      largest = *std::max_element(a.log_kernel, a.log_kernel + taps);
      if (!std::isfinite(largest)) largest = 0.0f;
    }
    for (int64_t t = 0; t < taps; ++t) {
      log_kernel_[t] = a.log_kernel[t] - largest;
      kernel_.push_back(std::exp(log_kernel_[t]));
    }
    flipped_.assign(kernel_.rbegin(), kernel_.rend());
  }
  SoftFillCall call(const SoftFillArrays& a, int64_t image, int64_t element_size) const {
    SoftFillCall call{};
    call.height = a.height;
    call.width = a.width;
    call.channels = a.channels;
    call.window = a.window;
    call.log_kernel = log_kernel_.data();
    call.kernel = kernel_.data();
    call.kernel_flipped = flipped_.data();
    call.eps = a.eps;
    call.hard = a.hard;
    const int64_t positions = a.height * a.width;
    call.mask = a.mask + image * positions;
    call.features =
        static_cast<const char*>(a.features) + image * positions * a.channels * element_size;
    return call;
  }

 private:
  std::vector<float> log_kernel_, kernel_, flipped_;
};

}  // namespace

void soft_fill(const KernelTable& table, const SoftFillArrays& a, void* output, int num_threads) {
  const int64_t map_bytes = a.height * a.width * a.channels * table.element_size;
  const SoftKernel kernel(a);
  for (int64_t image = 0; image < a.batch; ++image) {
    SoftFillCall call = kernel.call(a, image, table.element_size);
    call.output = static_cast<char*>(output) + image * map_bytes;
    parallel_ranges(num_threads, a.height,
                    [&](int64_t b, int64_t e) { table.soft_fill(call, b, e); });
  }
}

void soft_fill_backward(const KernelTable& table, const SoftFillArrays& a, const void* grad,
                        void* grad_features, float* grad_mask, float* grad_log_kernel,
                        int num_threads) {
  const int64_t positions = a.height * a.width, taps = a.window * a.window;
  const int64_t map_bytes = positions * a.channels * table.element_size;
  const SoftKernel kernel(a);
  Scratch& scratch = thread_scratch();
  float* products = scratch.get<float>(0, positions * taps);
  float* maps = scratch.get<float>(1, 3 * positions);
  float* rows = scratch.get<float>(2, a.height * taps);
  std::memset(grad_log_kernel, 0, sizeof(float) * taps);
  for (int64_t image = 0; image < a.batch; ++image) {
    SoftFillCall call = kernel.call(a, image, table.element_size);
    call.grad = static_cast<const char*>(grad) + image * map_bytes;
    call.grad_features = static_cast<char*>(grad_features) + image * map_bytes;
    call.grad_mask = grad_mask ? grad_mask + image * positions : nullptr;
    call.products = products;
    call.shift = maps;
    call.inverse = maps + positions;
    call.projected = maps + 2 * positions;
    call.grad_log_kernel_rows = rows;
    std::memset(rows, 0, sizeof(float) * a.height * taps);
    parallel_ranges(num_threads, a.height,
                    [&](int64_t b, int64_t e) { table.soft_fill_backward_rows(call, b, e); });
    parallel_ranges(num_threads, a.height,
                    [&](int64_t b, int64_t e) { table.soft_fill_backward_sites(call, b, e); });
    // In row order, whatever thread made a row: one thread and n threads agree bit for bit.
    for (int64_t y = 0; y < a.height; ++y)
      for (int64_t t = 0; t < taps; ++t) grad_log_kernel[t] += rows[y * taps + t];
  }
}

void hard_fill(const KernelTable& table, const float* features, const uint8_t* mask,
               const float* log_kernel, int64_t batch, int64_t height, int64_t width,
               int64_t channels, int64_t window, float eps, float* output, int num_threads) {
  const int64_t positions = height * width;
  uint8_t* columns = thread_scratch().get<uint8_t>(0, column_map_size(height, width, window));
  void* zero_row = thread_scratch().get<char>(1, channels * table.element_size);
  std::memset(zero_row, 0, channels * table.element_size);
  OwnedFillTables tables;
  tables.build(log_kernel, window, kNegligible);
  for (int64_t image = 0; image < batch; ++image) {
    make_column_map(mask + image * positions, height, width, window, columns);
    FillCall call{};
    call.height = height;
    call.width = width;
    call.channels = channels;
    call.window = window;
    call.columns = columns;
    call.columns_stride = column_map_stride(width, window);
    call.tables = tables.get();
    call.zero_row = zero_row;
    call.eps = eps;
    call.values = features + image * positions * channels;
    call.values_stride = channels;
    call.output = output + image * positions * channels;
    call.output_stride = channels;
    parallel_ranges(num_threads, positions, [&](int64_t b, int64_t e) { table.fill(call, b, e); });
  }
}

}  // namespace sparsight
