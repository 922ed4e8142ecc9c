#include "pool_operators.h"

#include <algorithm>

#include "operators.h"
#include "threads.h"

namespace sparsight {
namespace {

enum Slot { kTaps, kFloats };

// Sorted rows of a plane, or sums of narrow rows, that stay in L2: 256 KiB and 1 MiB.
constexpr int64_t kPlaneFloats = 1 << 16, kSumFloats = 1 << 18;
// Blocks a thread, where one image or plane is split.
constexpr int64_t kBlocksPerThread = 4;

int64_t volume(const int64_t* extents) {
  return extents[0] * extents[1] * extents[2];
}

// One image of rows or one plane after another, and its index along the split axis.
class Blocks {
 public:
  // As few as possible of at most `most` indices, but enough for all threads; `least` bounds what
  // overlapping windows cost twice.
  Blocks(int64_t images, int64_t extent, int64_t least, int64_t most, int num_threads)
      : extent_(extent) {
    if (images * extent == 0) return;
    const int64_t wanted = (kBlocksPerThread * num_threads + images - 1) / images;
    if (num_threads > 1) most = std::min(most, (extent + wanted - 1) / wanted);
    size_ = std::min(extent, std::max(least, most));
    per_image_ = (extent + size_ - 1) / size_;
    count_ = images * per_image_;
  }
  int64_t count() const { return count_; }
  int64_t size() const { return size_; }
  int64_t image(int64_t block) const { return block / per_image_; }
  int64_t begin(int64_t block) const { return block % per_image_ * size_; }
  int64_t end(int64_t block) const { return std::min(extent_, begin(block) + size_); }

 private:
  int64_t extent_, size_ = 0, per_image_ = 1, count_ = 0;
};

// How far a window reaches beyond its first tap along the split axis.
int64_t halo(const PoolGeometry& g) {
  const int axis = pool_split_axis(g);
  return g.dilation[axis] * (g.kernel[axis] - 1);
}

// Floats of one index along the split axis of a plane whose rows are sorted.
int64_t sorted_slice(const PoolGeometry& g) {
  return (pool_split_axis(g) == 0 ? g.in[1] : 1) * pool_phases(g) * pool_phase_length(g);
}

SoftPoolCall call_at(const KernelTable& table, const SoftPoolArrays& a, int64_t image) {
  SoftPoolCall call{};
  call.geometry = a.geometry;
  call.channels = a.rows ? a.channels : 1;
  const int64_t bytes = volume(a.geometry.in) * call.channels * table.element_size;
  call.input = static_cast<const char*>(a.input) + image * bytes;
  call.taps = thread_scratch().get<int64_t>(kTaps, volume(a.geometry.kernel));
  return call;
}

}  // namespace

void soft_pool(const KernelTable& table, const SoftPoolArrays& a, void* output, int num_threads) {
  const PoolGeometry& g = a.geometry;
  const int64_t images = a.rows ? a.batch : a.batch * a.channels;
  const int64_t out_bytes = volume(g.out) * (a.rows ? a.channels : 1) * table.element_size;
  if (a.rows) {
    const int64_t per = g.out[0] * g.out[1];
    parallel_ranges(num_threads, images * per, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end;) {
        const int64_t image = at / per, stop = std::min(end, (image + 1) * per);
        SoftPoolCall call = call_at(table, a, image);
        call.output = static_cast<char*>(output) + image * out_bytes;
        table.soft_pool_rows(call, at - image * per, stop - image * per);
        at = stop;
      }
    });
    return;
  }
  const int axis = pool_split_axis(g);
  const int64_t slice = sorted_slice(g);
  const int64_t most = (std::max<int64_t>(1, kPlaneFloats / slice) - halo(g)) / g.stride[axis];
  // Two windows at least: what their rows overlap is sorted twice for each block.
  const Blocks blocks(images, g.out[axis], 2, most, num_threads);
  const int64_t sorted =
      std::min(g.in[axis], (blocks.size() - 1) * g.stride[axis] + halo(g) + 1) * slice;
  parallel_ranges(num_threads, blocks.count(), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t image = blocks.image(block);
      SoftPoolCall call = call_at(table, a, image);
      call.output = static_cast<char*>(output) + image * out_bytes;
      call.scratch = thread_scratch().get<float>(kFloats, sorted);
      table.soft_pool_plane(call, blocks.begin(block), blocks.end(block));
    }
  });
}

void soft_pool_backward(const KernelTable& table, const SoftPoolArrays& a, const void* grad,
                        bool detached, void* grad_input, int num_threads) {
  const PoolGeometry& g = a.geometry;
  const int64_t images = a.rows ? a.batch : a.batch * a.channels;
  const int64_t channels = a.rows ? a.channels : 1;
  const int64_t out_bytes = volume(g.out) * channels * table.element_size;
  const int64_t in_bytes = volume(g.in) * channels * table.element_size;
  const int axis = pool_split_axis(g);
  const int64_t positions = (axis == 0 ? g.in[1] : 1) * g.in[2];
  int64_t most = g.in[axis], slice = 0, beside = 0, twice = 0;
  if (!a.rows) {
    // The sorted rows of all windows that reach into a block, their sums, and one row.
    slice = sorted_slice(g);
    most = (kPlaneFloats / slice - 2 * halo(g)) / 2;
    twice = 2 * halo(g);
    beside = g.in[2];
  } else if (table.unit != 1) {
    slice = positions * channels;
    most = kSumFloats / slice;
  }
  const Blocks blocks(images, g.in[axis], 2 * g.stride[axis], most, num_threads);
  const int64_t floats = blocks.size() * slice +
                         (a.rows ? 0 : std::min(g.in[axis], blocks.size() + twice) * slice) +
                         beside;
  parallel_ranges(num_threads, blocks.count(), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t image = blocks.image(block);
      SoftPoolCall call = call_at(table, a, image);
      call.grad = static_cast<const char*>(grad) + image * out_bytes;
      call.grad_input = static_cast<char*>(grad_input) + image * in_bytes;
      call.detached = detached;
      if (floats) call.scratch = thread_scratch().get<float>(kFloats, floats);
      (a.rows ? table.soft_pool_rows_backward : table.soft_pool_plane_backward)(
          call, blocks.begin(block), blocks.end(block));
    }
  });
}

}  // namespace sparsight
