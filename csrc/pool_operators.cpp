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
// Channels that one part of a row has at least, and a multiple of: four cache lines of float32.
constexpr int64_t kPartChannels = 64;

int64_t volume(const int64_t* extents) {
  return extents[0] * extents[1] * extents[2];
}

// One image of rows or one plane after another, and its index along the split axis.
class Blocks {
 public:
  // As few as possible of at most `most` indices, but enough for all threads; `least` bounds what
  // overlapping windows cost twice. A `multiple` of indices in all but the last of an image.
  Blocks(int64_t images, int64_t extent, int64_t least, int64_t most, int64_t multiple,
         int num_threads)
      : extent_(extent) {
    if (images * extent == 0) return;
    const int64_t wanted = (kBlocksPerThread * num_threads + images - 1) / images;
    if (num_threads > 1) most = std::min(most, (extent + wanted - 1) / wanted);
    size_ = std::max(least, most);
    size_ = std::min(extent, (size_ + multiple - 1) / multiple * multiple);
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

// The channels of a row in parts, where there are fewer blocks than threads could use: a global
// pooling has one output per image.
class Parts {
 public:
  Parts(int64_t blocks, int64_t channels, int num_threads) : channels_(channels), size_(channels) {
    const int64_t wanted = kBlocksPerThread * num_threads;
    if (num_threads == 1 || blocks == 0 || 2 * blocks > wanted) return;
    const int64_t most = (channels + kPartChannels - 1) / kPartChannels;
    const int64_t each = (most * blocks + wanted - 1) / wanted;
    size_ = std::min(channels, each * kPartChannels);
    count_ = (channels + size_ - 1) / size_;
  }
  int64_t count() const { return count_; }
  int64_t begin(int64_t part) const { return part * size_; }
  int64_t size(int64_t part) const { return std::min(size_, channels_ - begin(part)); }

 private:
  int64_t channels_, size_, count_ = 1;
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

// One image or plane; of an image, `channels` from `first` on.
SoftPoolCall call_at(const KernelTable& table, const SoftPoolArrays& a, int64_t image,
                     int64_t first, int64_t channels) {
  SoftPoolCall call{};
  call.geometry = a.geometry;
  call.channels = channels;
  call.pitch = a.rows ? a.channels : 1;
  const int64_t at = image * volume(a.geometry.in) * call.pitch + first;
  call.input = static_cast<const char*>(a.input) + at * table.element_size;
  call.taps = thread_scratch().get<int64_t>(kTaps, volume(a.geometry.kernel));
  return call;
}

}  // namespace

void soft_pool(const KernelTable& table, const SoftPoolArrays& a, void* output, int num_threads) {
  const PoolGeometry& g = a.geometry;
  const int64_t images = a.rows ? a.batch : a.batch * a.channels;
  const int64_t out_elements = volume(g.out) * (a.rows ? a.channels : 1);
  char* const out = static_cast<char*>(output);
  if (a.rows) {
    const int64_t per = volume(g.out);
    const Parts parts(images * per, a.channels, num_threads);
    // The parts of an output, one output after another: all of it where there is one part.
    parallel_ranges(num_threads, images * per * parts.count(), [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end;) {
        const int64_t part = at % parts.count(), output_at = at / parts.count();
        const int64_t image = output_at / per, first = output_at % per;
        const int64_t last = parts.count() > 1 ? first + 1 : std::min(end - image * per, per);
        SoftPoolCall call = call_at(table, a, image, parts.begin(part), parts.size(part));
        call.output = out + (image * out_elements + parts.begin(part)) * table.element_size;
        table.soft_pool_rows(call, first, last);
        at += last - first;
      }
    });
    return;
  }
  const int axis = pool_split_axis(g);
  const int64_t slice = sorted_slice(g);
  const int64_t most = (std::max<int64_t>(1, kPlaneFloats / slice) - halo(g)) / g.stride[axis];
  // Two windows at least: what their rows overlap is sorted twice for each block.
  const Blocks blocks(images, g.out[axis], 2, most, 1, num_threads);
  const int64_t sorted =
      std::min(g.in[axis], (blocks.size() - 1) * g.stride[axis] + halo(g) + 1) * slice;
  parallel_ranges(num_threads, blocks.count(), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t image = blocks.image(block);
      SoftPoolCall call = call_at(table, a, image, 0, 1);
      call.output = out + image * out_elements * table.element_size;
      call.scratch = thread_scratch().get<float>(kFloats, sorted);
      table.soft_pool_plane(call, blocks.begin(block), blocks.end(block));
    }
  });
}

void soft_pool_backward(const KernelTable& table, const SoftPoolArrays& a, const void* grad,
                        bool detached, void* grad_input, int num_threads) {
  const PoolGeometry& g = a.geometry;
  const int64_t images = a.rows ? a.batch : a.batch * a.channels;
  const int64_t pitch = a.rows ? a.channels : 1;
  const int axis = pool_split_axis(g);
  const int64_t positions = (axis == 0 ? g.in[1] : 1) * g.in[2];
  // Rows whose windows lie side by side are written as they come.
  const bool direct = a.rows && pool_tiles(g);
  int64_t most = g.in[axis], slice = 0, beside = 0, twice = 0;
  if (!a.rows) {
    // The sorted rows of all windows that reach into a block, their sums, and one row.
    slice = sorted_slice(g);
    most = (kPlaneFloats / slice - 2 * halo(g)) / 2;
    twice = 2 * halo(g);
    beside = g.in[2];
  } else if (table.unit != 1 && !direct) {
    slice = positions * pitch;
    most = kSumFloats / slice;
  }
  const Blocks blocks(images, g.in[axis], direct ? g.stride[axis] : 2 * g.stride[axis], most,
                      direct ? g.stride[axis] : 1, num_threads);
  const Parts parts(blocks.count(), pitch, num_threads);
  const int64_t floats = blocks.size() * slice +
                         (a.rows ? 0 : std::min(g.in[axis], blocks.size() + twice) * slice) +
                         beside;
  parallel_ranges(num_threads, blocks.count() * parts.count(), [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t block = at / parts.count(), part = at % parts.count();
      const int64_t image = blocks.image(block), first = parts.begin(part);
      SoftPoolCall call = call_at(table, a, image, first, parts.size(part));
      call.grad = static_cast<const char*>(grad) +
                  (image * volume(g.out) * pitch + first) * table.element_size;
      call.grad_input = static_cast<char*>(grad_input) +
                        (image * volume(g.in) * pitch + first) * table.element_size;
      call.detached = detached;
      if (floats) call.scratch = thread_scratch().get<float>(kFloats, floats);
      (a.rows ? table.soft_pool_rows_backward : table.soft_pool_plane_backward)(
          call, blocks.begin(block), blocks.end(block));
    }
  });
}

}  // namespace sparsight
