// Whole operators on raw pointers: split over threads, scratch memory, one image after another.
#pragma once
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace sparsight {

// Memory that one calling thread reuses from call to call: nothing is allocated once warm.
class Scratch {
 public:
  template <class T>
  T* get(int slot, int64_t count) {
    return static_cast<T*>(bytes(slot, static_cast<int64_t>(sizeof(T)) * count));
  }
  ~Scratch();

 private:
  void* bytes(int slot, int64_t size);
  std::vector<void*> pointers_;
  std::vector<int64_t> sizes_;
};
Scratch& thread_scratch();

// sites: ascending positions where mask != 0, at least 1 row; returns how many.
int64_t list_sites(const uint8_t* mask, int64_t count, int32_t* sites);
// As above, then the holes, ascending: a permutation of all positions.
int64_t list_sites_and_holes(const uint8_t* mask, int64_t count, int32_t* index);

// Runs one convolution over `num_sites` sites, split over sites or over panels.
void run_conv(const KernelTable& table, const ConvCall& call, int64_t num_sites, int num_threads);

// For `fill`, of every position the mask in the column of its window: bit dy of a byte, of two
// bytes where tap_pitch says so, is the position dy - radius below. Rows have a border of radius
// left and right, and are stride bytes long.
int64_t column_map_stride(int64_t width, int64_t window);
int64_t column_map_size(int64_t height, int64_t width, int64_t window);
void make_column_map(const uint8_t* mask, int64_t height, int64_t width, int64_t window,
                     uint8_t* columns);

// FillTables of a kernel, in memory of its own.
class OwnedFillTables {
 public:
  // A tap is left out where it weighs less than `negligible` of the nearest one.
  void build(const float* log_kernel, int64_t window, float negligible);
  const FillTables* get() const { return &tables_; }

 private:
  using Words = uint64_t[kWindowWords];
  FillTables tables_{};
  std::vector<uint64_t> words_;
  std::vector<float> numbers_;
};

struct SoftFillArrays {
  const void* features;  // elements of the table
  const float* mask;
  const float* log_kernel;
  int64_t batch, height, width, channels, window;
  float eps;
  bool hard;
};
void soft_fill(const KernelTable& table, const SoftFillArrays& a, void* output, int num_threads);
// grad_mask may be null. grad_log_kernel: window^2.
void soft_fill_backward(const KernelTable& table, const SoftFillArrays& a, const void* grad,
                        void* grad_features, float* grad_mask, float* grad_log_kernel,
                        int num_threads);
// Hard masks, out of place.
void hard_fill(const KernelTable& table, const float* features, const uint8_t* mask,
               const float* log_kernel, int64_t batch, int64_t height, int64_t width,
               int64_t channels, int64_t window, float eps, float* output, int num_threads);

}  // namespace sparsight
