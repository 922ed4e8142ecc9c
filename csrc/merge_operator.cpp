#include "merge_operator.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "operators.h"
#include "threads.h"

namespace sparsight {
namespace {

// What is larger than the last cache is written past it.
constexpr int64_t kStreamedBytes = 48 << 20;

// torch's choice of source positions (area_pixel_compute_source_index), in its float32.
void make_taps(Resizing resizing, int64_t in, int64_t out, MergeTap* taps) {
  const bool corners = resizing == Resizing::bilinear_corners;
  float scale = static_cast<float>(in) / static_cast<float>(out);
  if (corners) scale = out > 1 ? static_cast<float>(in - 1) / static_cast<float>(out - 1) : 0.0f;
  const auto last = static_cast<int32_t>(in - 1);
  for (int64_t i = 0; i < out; ++i) {
    const auto at = static_cast<float>(i);
    MergeTap& tap = taps[i];
    if (in == out) {
      tap = {static_cast<int32_t>(i), static_cast<int32_t>(i), 0.0f};
    } else if (resizing == Resizing::nearest) {
      tap.near = std::min(static_cast<int32_t>(std::floor(at * scale)), last);
      tap.far = tap.near;
      tap.far_weight = 0.0f;
    } else {
      const float source = corners ? scale * at : std::max(0.0f, scale * (at + 0.5f) - 0.5f);
      tap.near = std::min(static_cast<int32_t>(source), last);
      tap.far = std::min(tap.near + 1, last);
      tap.far_weight = std::min(std::max(source - static_cast<float>(tap.near), 0.0f), 1.0f);
    }
  }
}

}  // namespace

void merge_all(const KernelTable& table, const MergeArrays& a, void* output, int num_threads) {
  const auto count = static_cast<int64_t>(a.inputs.size());
  std::vector<MergeSource> sources(count);
  MergeTap* taps = thread_scratch().get<MergeTap>(0, count * (a.height + a.width));
  MergeCall call{};
  call.width = a.width;
  call.num_sources = count;
  call.sources_per_segment = a.sums ? count : 1;
  bool whole_lines = true;
  for (int64_t s = 0; s < count; ++s) {
    MergeSource& source = sources[s];
    source.channels = a.channels[s];
    source.height = a.heights[s];
    source.width = a.widths[s];
    source.is_mixed =
        a.resizing != Resizing::nearest && (source.height != a.height || source.width != a.width);
    make_taps(a.resizing, source.height, a.height, taps);
    make_taps(a.resizing, source.width, a.width, taps + a.height);
    source.rows = taps;
    source.columns = taps + a.height;
    taps += a.height + a.width;
    if (!a.sums || s == 0) {
      call.channels += source.channels;
      // Pairs of vectors are streamed.
      whole_lines &= source.channels % 32 == 0;
    }
  }
  const int64_t bytes = a.height * a.width * call.channels * table.element_size;
  call.stream = whole_lines && a.batch * bytes >= kStreamedBytes &&
                reinterpret_cast<uintptr_t>(output) % 64 == 0;
  parallel_ranges(num_threads, a.batch * a.height, [&](int64_t begin, int64_t end) {
    std::vector<MergeSource> here = sources;
    for (int64_t image = begin / a.height; image * a.height < end; ++image) {
      MergeCall part = call;
      for (int64_t s = 0; s < count; ++s)
        here[s].input = static_cast<const char*>(a.inputs[s]) +
                        image * a.heights[s] * a.widths[s] * a.channels[s] * table.element_size;
      part.sources = here.data();
      part.output = static_cast<char*>(output) + image * bytes;
      const int64_t first = image * a.height;
      table.merge(part, std::max(begin, first) - first, std::min(end, first + a.height) - first);
    }
  });
}

}  // namespace sparsight
