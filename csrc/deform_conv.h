// Deformable convolution at the sites: rows are mixed into a buffer that stays in cache, then
// multiplied as an ordinary convolution.
#pragma once
#include "kernels.h"

namespace sparsight {

// Sites whose mixed rows are held at once, a whole number of any ISA's tiles.
int64_t gather_block(const ConvGeometry& geometry);

// Runs one deformable convolution over `num_sites` sites of one image.
// gather: sites are not null; its output holds gather_block sites x taps x in_channels floats.
// conv: its input, its sites and compact_input are set here.
void run_deform_conv(const KernelTable& table, GatherCall gather, ConvCall conv, int64_t num_sites,
                     int num_threads);

struct DeformArrays {
  ConvGeometry geometry;
  int64_t batch, offset_groups;
  const float* input;       // rows
  const float* offset;      // rows of 2 * offset_groups * taps: y, x of each tap
  const float* modulation;  // rows of offset_groups * taps, or null
  const float* weight;      // (O, C/groups, kh, kw)
  const float* bias;        // O, or null
  const int32_t* index;     // batch x positions
  const int32_t* count;     // batch
  const float* residual;    // rows, or null
  float* output;            // rows; only those of the sites are written
  bool relu;
};
// Packs the weights, then runs image after image.
void deform_conv(const KernelTable& table, const DeformArrays& a, int num_threads);

}  // namespace sparsight
