#include "block_masks.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "pack.h"
#include "threads.h"

namespace sparsight {
namespace {

constexpr int64_t kHeadBytes = 192 << 10;  // of the heads' rows that wait for their sums

// Without a stride: the readers' map moved by every tap.
void mark_windows(const ConvGeometry& next, const Mask& readers, uint8_t* needed) {
  for (int64_t y = 0; y < readers.height; ++y)
    for (int64_t ky = 0; ky < next.kernel_h; ++ky) {
      const int64_t iy = y - next.pad_h + ky * next.dilation_h;
      if (iy < 0 || iy >= next.height) continue;
      for (int64_t kx = 0; kx < next.kernel_w; ++kx) {
        const int64_t shift = kx * next.dilation_w - next.pad_w;
        const int64_t first = std::max<int64_t>(0, -shift);
        const int64_t last = std::min(readers.width, next.width - shift);
        const uint8_t* from = readers.bytes + y * readers.width;
        uint8_t* to = needed + iy * next.width + shift;
        for (int64_t x = first; x < last; ++x) to[x] |= from[x];
      }
    }
}

void mark_reads(const ConvGeometry& next, const Mask& readers, uint8_t* needed) {
  for (int64_t i = 0; i < readers.count; ++i) {
    const int64_t site = readers.sites[i];
    const int64_t y0 = site / readers.width * next.stride_h - next.pad_h;
    const int64_t x0 = site % readers.width * next.stride_w - next.pad_w;
    for (int64_t ky = 0; ky < next.kernel_h; ++ky) {
      const int64_t y = y0 + ky * next.dilation_h;
      if (y < 0 || y >= next.height) continue;
      for (int64_t kx = 0; kx < next.kernel_w; ++kx) {
        const int64_t x = x0 + kx * next.dilation_w;
        if (x >= 0 && x < next.width) needed[y * next.width + x] = 1;
      }
    }
  }
}

}  // namespace

int64_t BlockMasks::head_stride() const {
  return std::max(a.spec[kHeadCount], head_vector_columns(a.spec[kHeadCount]));
}

// Logit of one position whose window may reach over the left or the right border. Rows outside
// the map are zeros.
float BlockMasks::logit_at(const float* const* rows, int64_t x, int64_t stride) const {
  float logit = 0.0f;
  for (int64_t ky = 0; ky < 3; ++ky)
    for (int64_t kx = 0; kx < 3; ++kx)
      if (x + kx - 1 >= 0 && x + kx - 1 < a.width)
        logit += rows[ky][(x + kx - 1) * stride + ky * 3 + kx];
  return logit;
}

bool BlockMasks::threshold_row(int64_t m, int64_t image, int64_t y, const float* const* head_rows,
                               float* row) const {
  const int64_t* fields = mask_spec(m);
  const Mask& mask = masks[m];
  const int64_t stride_w = fields[kMaskStrideW], grid = fields[kGridStride];
  const int64_t stride = head_stride();
  const float bias = a.params[fields[kHeadBias]];
  const float* rows[3];
  for (int ky = 0; ky < 3; ++ky) rows[ky] = head_rows[ky] + fields[kHeadColumn];
  for (int64_t x = 0; x < mask.width; ++x) {
    const int64_t ix = x * stride_w;
    if (ix == 0 || ix + 1 >= a.width) {
      row[x] = bias + logit_at(rows, ix, stride);
      continue;
    }
    const float* r0 = rows[0] + (ix - 1) * stride;
    const float* r1 = rows[1] + (ix - 1) * stride;
    const float* r2 = rows[2] + (ix - 1) * stride;
    const float top = r0[0] + r0[stride + 1] + r0[2 * stride + 2];
    const float middle = r1[3] + r1[stride + 4] + r1[2 * stride + 5];
    const float bottom = r2[6] + r2[stride + 7] + r2[2 * stride + 8];
    row[x] = bias + (top + middle + bottom);
  }
  const float* noise = a.noise[m] + (image * mask.height + y) * mask.width;
  uint8_t* bytes = mask.bytes + y * mask.width;
  bool nan = false;
  for (int64_t x = 0; x < mask.width; ++x) {
    nan |= row[x] != row[x];
    bytes[x] = row[x] + noise[x] >= 0.0f;
  }
  if (grid && y % grid == 0)
    for (int64_t x = 0; x < mask.width; x += grid) bytes[x] = 1;
  return !nan;
}

// z[p][column] = x[p] . head column; a logit is then a sum of nine shifted columns: a 3x3
// convolution to one channel read as a GEMM, so that x is streamed once for all the heads of the
// block. z is made a few rows at a time: it stays near the core until its sums are taken.
bool BlockMasks::run_heads(int64_t image, const void* x, float* logits) {
  HeadCall call{};
  call.channels = a.spec[kInChannels];
  call.weight = a.params + a.spec[kHeadWeight];
  call.columns = a.spec[kHeadCount];
  call.vector_columns = head_vector_columns(call.columns);
  call.output_stride = head_stride();
  const int64_t row = a.width * call.output_stride;
  const int64_t step = std::max<int64_t>(1, kHeadBytes / (row * int64_t{sizeof(float)}) - 2);
  float* outside = scratch.get<float>(kZeroHeads, row);
  std::memset(outside, 0, sizeof(float) * row);
  std::atomic<bool> bad{false};
  parallel_ranges(threads, a.height, [&](int64_t begin, int64_t end) {
    float* z = thread_scratch().get<float>(kHeads, (std::min(step, end - begin) + 2) * row);
    bool finite = true;
    int64_t done = std::max<int64_t>(0, begin - 1);  // rows before this one need no more
    for (int64_t from = begin; from < end; from += step) {
      const int64_t to = std::min(end, from + step), last = std::min(a.height, to + 1);
      // The buffer begins with row from - 1. Two rows are there already.
      if (from > begin) std::memmove(z, z + step * row, sizeof(float) * 2 * row);
      HeadCall part = call;
      part.input =
          static_cast<const char*>(x) + done * a.width * call.channels * table.element_size;
      part.output = z + (done - (from - 1)) * row;
      table.heads(part, 0, (last - done) * a.width);
      done = last;
      float* of_mask = logits;
      for (int64_t m = 0; m < a.spec[kNumMasks]; ++m) {
        const Mask& mask = masks[m];
        const int64_t stride = mask_spec(m)[kMaskStrideH];
        if (mask_spec(m)[kParent] < 0 && !a.given[m])
          for (int64_t y = (from + stride - 1) / stride; y < mask.height && y * stride < to; ++y) {
            const float* rows[3];
            for (int64_t ky = 0; ky < 3; ++ky) {
              const int64_t iy = y * stride + ky - 1;
              rows[ky] = iy < 0 || iy >= a.height ? outside : z + (iy - (from - 1)) * row;
            }
            finite &= threshold_row(m, image, y, rows, of_mask + y * mask.width);
          }
        of_mask += mask.height * mask.width;
      }
    }
    if (!finite) bad = true;
  });
  return !bad;
}

bool BlockMasks::decide(int64_t image, const void* x) {
  uint8_t* bytes = a.masks + image * mask_positions;
  int32_t* sites = scratch.get<int32_t>(kSites, mask_positions + 1);
  bool has_heads = false;
  for (int64_t m = 0; m < a.spec[kNumMasks]; ++m) {
    masks[m].bytes = bytes;
    masks[m].sites = sites;
    bytes += masks[m].height * masks[m].width;
    sites += masks[m].height * masks[m].width;
    has_heads |= mask_spec(m)[kParent] < 0 && !a.given[m];
  }
  const bool finite = !has_heads || run_heads(image, x, a.logits + image * mask_positions);
  for (int64_t m = 0; m < a.spec[kNumMasks]; ++m) {
    Mask& mask = masks[m];
    const int64_t positions = mask.height * mask.width;
    const int64_t* fields = mask_spec(m);
    if (fields[kParent] >= 0) {
      const Mask& parent = masks[fields[kParent]];
      for (int64_t y = 0; y < mask.height; ++y)
        for (int64_t px = 0; px < mask.width; ++px)
          mask.bytes[y * mask.width + px] =
              parent.bytes[y * fields[kMaskStrideH] * parent.width + px * fields[kMaskStrideW]];
    } else if (a.given[m]) {
      std::memcpy(mask.bytes, a.given[m] + image * positions, positions);
    }
    mask.count = list_sites(mask.bytes, positions, mask.sites);
  }
  return finite;
}

int64_t BlockMasks::needed_holes(int64_t m, const ConvGeometry& next, const Mask& readers,
                                 int32_t* holes) {
  const Mask& mask = masks[m];
  const int64_t positions = mask.height * mask.width;
  auto* needed = scratch.get<uint8_t>(kNeeded, positions);
  if (readers.full()) {
    std::memset(needed, 1, positions);
  } else {
    std::memset(needed, 0, positions);
    if (next.stride_h == 1 && next.stride_w == 1)
      mark_windows(next, readers, needed);
    else
      mark_reads(next, readers, needed);
  }
  for (int64_t p = 0; p < positions; ++p) needed[p] = needed[p] && !mask.bytes[p];
  return list_sites(needed, positions, holes);
}

int64_t BlockMasks::all_holes(int64_t m, int32_t* holes) {
  const Mask& mask = masks[m];
  const int64_t positions = mask.height * mask.width;
  auto* needed = scratch.get<uint8_t>(kNeeded, positions);
  for (int64_t p = 0; p < positions; ++p) needed[p] = !mask.bytes[p];
  return list_sites(needed, positions, holes);
}

}  // namespace sparsight
