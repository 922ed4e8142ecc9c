// Windows assembled from position-sensitive score maps (InstanceFCN), and their gradient.
//
//   for each window w = (image b, row y0, column x0):
//     for i, j in size x size:
//       out[w][i][j] = maps[b][g[i] * k + g[j]][y0 + i][x0 + j], or 0 outside of the map
//
// where g[i] is the bin, of k, that cell i lies in. Backward, the same with grad_maps[..] += grad.
//
// How far a cell lies from the window's corner does not depend on the window: a table of size^2
// distances makes the copy of a window inside the map one loop of a load, a load and a store, for
// maps of any strides. It is compiled for no newer instruction set: a row of a bin is four or five
// numbers long, less than a vector.
#pragma once
#include <cstdint>

namespace sparsight {

struct AssembleArrays {
  int64_t images, channels, height, width;  // of the maps; channels is k^2
  int64_t strides[4];                       // of the maps, in elements: image, channel, row, column
  const int64_t* windows;                   // count x 3: image, row, column
  int64_t count, size;
  bool centred;  // g[i] = floor((i + 0.5) k / size), else floor(i k / size)
};

// Both return the first window that names no image, and do nothing else, or -1.

// maps and out: elements of 2, 4 or 8 bytes, whatever they mean.
int64_t assemble(const AssembleArrays& a, const void* maps, void* out, int64_t element_size,
                 int num_threads);

enum class Number { kFloat32, kFloat64, kBfloat16, kFloat16 };
// grad_maps: all written, dense: rows (channels-last), else planes; strides are not looked at.
// Each element is a sum in the order of the windows, of float32 (float64 of float64).
int64_t assemble_backward(const AssembleArrays& a, const void* grad, bool rows, void* grad_maps,
                          Number number, int num_threads);

}  // namespace sparsight
