// Python's door to the kernels: data pointers and sizes in (checked by sparsight/ops/cpu.py, which
// holds the tensors alive), the GIL released, ranges split over threads.
//
// Pointers travel as integers: four arrays through nanobind's ndarray cost 14 us a call, as
// integers 0.7.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "assemble.h"
#include "buffers.h"
#include "deform_conv.h"
#include "kernels.h"
#include "merge_operator.h"
#include "operators.h"
#include "pack.h"
#include "pool_operators.h"
#include "sampled_block.h"
#include "threads.h"

namespace nb = nanobind;
using namespace sparsight;

namespace {

template <class T>
T* ptr(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

const KernelTable& require(const std::string& isa) {
  const KernelTable* table = table_for(isa.c_str());
  if (!table) throw std::runtime_error("isa '" + isa + "' does not run on this machine");
  return *table;
}

ConvGeometry geometry_of(const std::vector<int64_t>& v) {
  if (v.size() != 15) throw std::invalid_argument("geometry needs 15 integers");
  return {v[0], v[1], v[2],  v[3],  v[4],  v[5],  v[6], v[7],
          v[8], v[9], v[10], v[11], v[12], v[13], v[14]};
}

void sampled_conv(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t index, uintptr_t count,
                  uintptr_t residual, uintptr_t output, int64_t batch,
                  std::vector<int64_t> geometry, bool relu, const std::string& isa,
                  int num_threads) {
  const KernelTable& table = require(isa);
  const ConvGeometry g = geometry_of(geometry);
  nb::gil_scoped_release release;
  Scratch& scratch = thread_scratch();
  ConvCall call{};
  call.geometry = g;
  call.kind = pack_kind(g.in_channels, g.out_channels, g.groups);
  const int64_t size = packed_size(g, call.kind, table.unit);
  const int64_t panels = panel_count(g, call.kind);
  float* packed = scratch.get<float>(0, size + panels * kPanel + g.in_channels);
  pack_weight(g, call.kind, ptr<const float>(weight), packed, table.unit);
  float* padded_bias = packed + size;
  float* zero_row = padded_bias + panels * kPanel;
  std::memset(zero_row, 0, sizeof(float) * g.in_channels);
  pack_bias(g, call.kind, ptr<const float>(bias), padded_bias);
  call.weight = packed;
  call.bias = padded_bias;
  call.zero_row = zero_row;
  call.input_stride = g.in_channels;
  call.output_stride = call.residual_stride = g.out_channels;
  call.relu = relu;
  const int64_t out_positions = g.out_height * g.out_width;
  for (int64_t image = 0; image < batch; ++image) {
    call.input = ptr<const float>(x) + image * g.height * g.width * g.in_channels;
    call.output = ptr<float>(output) + image * out_positions * g.out_channels;
    call.residual =
        residual ? ptr<const float>(residual) + image * out_positions * g.out_channels : nullptr;
    call.sites = ptr<const int32_t>(index) + image * out_positions;
    run_conv(table, call, ptr<const int32_t>(count)[image], num_threads);
  }
}

void sampled_deform_conv(uintptr_t x, uintptr_t offset, uintptr_t modulation, uintptr_t weight,
                         uintptr_t bias, uintptr_t index, uintptr_t count, uintptr_t residual,
                         uintptr_t output, int64_t batch, std::vector<int64_t> geometry,
                         int64_t offset_groups, bool relu, const std::string& isa,
                         int num_threads) {
  const KernelTable& table = require(isa);
  const DeformArrays arrays{geometry_of(geometry),
                            batch,
                            offset_groups,
                            ptr<const float>(x),
                            ptr<const float>(offset),
                            ptr<const float>(modulation),
                            ptr<const float>(weight),
                            ptr<const float>(bias),
                            ptr<const int32_t>(index),
                            ptr<const int32_t>(count),
                            ptr<const float>(residual),
                            ptr<float>(output),
                            relu};
  nb::gil_scoped_release release;
  deform_conv(table, arrays, num_threads);
}

// The table whose elements are those of the maps.
const KernelTable& table_for_maps(bool is_bfloat16, const std::string& isa) {
  if (!is_bfloat16) return require(isa);
  const KernelTable* table = bfloat16_table();
  if (!table) throw std::runtime_error("this CPU or this build has no AVX-512 BF16 instructions");
  return *table;
}

// batch, channels, whether rows, then in, out, kernel, stride, pad, dilation: D H W each.
SoftPoolArrays pool_arrays(const std::vector<int64_t>& v, uintptr_t input) {
  if (v.size() != 21) throw std::invalid_argument("a pooling needs 21 integers");
  SoftPoolArrays a{};
  a.batch = v[0];
  a.channels = v[1];
  a.rows = v[2] != 0;
  a.input = ptr<const void>(input);
  int64_t* fields[6] = {a.geometry.in,     a.geometry.out, a.geometry.kernel,
                        a.geometry.stride, a.geometry.pad, a.geometry.dilation};
  for (int field = 0; field < 6; ++field)
    for (int axis = 0; axis < 3; ++axis) fields[field][axis] = v[3 + 3 * field + axis];
  return a;
}

// Shape and strides of the maps, then how many windows, of what size, whether centred.
AssembleArrays assemble_arrays(const std::vector<int64_t>& v, uintptr_t windows) {
  if (v.size() != 11) throw std::invalid_argument("an assembling needs 11 integers");
  return {v[0], v[1], v[2],      v[3], {v[4], v[5], v[6], v[7]}, ptr<const int64_t>(windows),
          v[8], v[9], v[10] != 0};
}

// The table that a block's `spec` asks for.
const KernelTable& table_of(const int64_t* spec, const std::string& isa) {
  return table_for_maps(spec[kUnitChannels] != 1, isa);
}

int64_t sampled_block(uintptr_t x, int64_t element_size, bool planar, uintptr_t shortcut,
                      std::vector<uintptr_t> noise, std::vector<uintptr_t> given, uintptr_t params,
                      uintptr_t spec, int64_t batch, int64_t height, int64_t width,
                      uintptr_t output, uintptr_t masks, uintptr_t logits, bool float_output,
                      const std::string& isa, int num_threads) {
  const KernelTable& table = table_of(ptr<const int64_t>(spec), isa);
  // The one thing that Python cannot see without reading the spec.
  if (element_size != table.element_size)
    throw nb::type_error(
        "sampled_block: the dtype of x is not the one that the block was packed for "
        "(pack_block's dtype); convert x to that.");
  nb::gil_scoped_release release;
  std::vector<const float*> noise_maps;
  std::vector<const uint8_t*> given_maps;
  for (uintptr_t p : noise) noise_maps.push_back(ptr<const float>(p));
  for (uintptr_t p : given) given_maps.push_back(ptr<const uint8_t>(p));
  BlockArrays arrays{ptr<const void>(x),
                     planar,
                     ptr<const void>(shortcut),
                     noise_maps.data(),
                     given_maps.data(),
                     ptr<const float>(params),
                     ptr<const int64_t>(spec),
                     batch,
                     height,
                     width,
                     ptr<void>(output),
                     float_output,
                     ptr<uint8_t>(masks),
                     ptr<float>(logits)};
  return run_block(table, arrays, num_threads);
}

struct Lease {
  void* memory;
  int64_t bytes;
};

// A (batch, channels, height, width) float32 or bfloat16 tensor in channels-last order,
// uninitialised, whose memory goes back to the free list with it.
nb::ndarray<nb::pytorch> new_map(int64_t batch, int64_t channels, int64_t height, int64_t width,
                                 bool is_bfloat16) {
  const nb::dlpack::dtype bfloat16{static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1};
  const nb::dlpack::dtype type = is_bfloat16 ? bfloat16 : nb::dtype<float>();
  const int64_t bytes = batch * channels * height * width * (type.bits / 8);
  auto* lease = new Lease{nullptr, bytes};
  nb::capsule owner(lease, [](void* p) noexcept {
    auto* held = static_cast<Lease*>(p);
    if (held->memory) give_back_buffer(held->memory, held->bytes);
    delete held;
  });
  lease->memory = take_buffer(bytes);
  const size_t shape[4] = {size_t(batch), size_t(channels), size_t(height), size_t(width)};
  const int64_t strides[4] = {height * width * channels, 1, width * channels, channels};
  return nb::ndarray<nb::pytorch>(lease->memory, 4, shape, owner, strides, type);
}

}  // namespace

NB_MODULE(_kernels, m) {
  m.doc() = "Compiled kernels of sparsight; call them through sparsight.ops.";
  m.attr("PANEL") = kPanel;
  m.attr("MAX_TAPS") = kMaxTaps;
  m.attr("MAX_WINDOW") = kMaxWindow;
  m.attr("SPEC_VERSION") = kSpecVersion;
  m.attr("ROW_MERGE_FIELD") = static_cast<int64_t>(kRowMerge);
  m.attr("MASK_FIELDS") = static_cast<int64_t>(kMaskFields);
  m.attr("STAGE_FIELDS") = static_cast<int64_t>(kStageFields);
  m.attr("POOLED_BYTES") = kPooledBytes;
  m.def("new_map", &new_map);
  m.def("drop_buffers", &drop_buffers);
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (const char* name : {"scalar", "avx2", "avx512"})
      if (table_for(name)) names.emplace_back(name);
    return names;
  });
  m.def("threading_runtime", [] { return std::string(threading_runtime()); });
  m.def("list_sites_and_holes",
        [](uintptr_t mask, int64_t batch, int64_t positions, uintptr_t index, uintptr_t count) {
          nb::gil_scoped_release release;
          for (int64_t image = 0; image < batch; ++image)
            ptr<int32_t>(count)[image] = static_cast<int32_t>(
                list_sites_and_holes(ptr<const uint8_t>(mask) + image * positions, positions,
                                     ptr<int32_t>(index) + image * positions));
        });
  m.def("has_bfloat16", [] { return bfloat16_table() != nullptr; });
  m.def("packed_sizes", [](std::vector<int64_t> geometry, int64_t unit) {
    const ConvGeometry g = geometry_of(geometry);
    const PackKind kind = pack_kind(g.in_channels, g.out_channels, g.groups);
    return nb::make_tuple(packed_size(g, kind, unit), panel_count(g, kind) * kPanel);
  });
  m.def("pack", [](std::vector<int64_t> geometry, uintptr_t weight, uintptr_t bias,
                   uintptr_t packed_weight, uintptr_t packed_bias, int64_t unit) {
    const ConvGeometry g = geometry_of(geometry);
    const PackKind kind = pack_kind(g.in_channels, g.out_channels, g.groups);
    nb::gil_scoped_release release;
    pack_weight(g, kind, ptr<const float>(weight), ptr<float>(packed_weight), unit);
    pack_bias(g, kind, ptr<const float>(bias), ptr<float>(packed_bias));
  });
  m.def("packed_heads_size", &packed_heads_size);
  m.def("pack_heads",
        [](int64_t columns, int64_t channels, uintptr_t weight, uintptr_t packed, int64_t unit) {
          pack_heads(columns, channels, ptr<const float>(weight), ptr<float>(packed), unit);
        });
  m.def("fill_tables", [](uintptr_t log_kernel, int64_t window, int64_t unit) {
    OwnedFillTables owned;
    owned.build(ptr<const float>(log_kernel), window, unit == 1 ? kNegligible : kNegligibleNarrow);
    const FillTables& t = *owned.get();
    const auto* words = reinterpret_cast<const int64_t*>(t.level);
    const int64_t num_words = (2 * t.num_levels + 1) * kWindowWords;
    return nb::make_tuple(
        t.num_levels, std::vector<int64_t>(words, words + num_words),
        std::vector<float>(t.ratio, t.ratio + (t.num_levels + 1) * tap_numbers(window)));
  });
  m.def("sampled_conv", &sampled_conv);
  m.def("sampled_deform_conv", &sampled_deform_conv);
  m.def("hard_fill", [](uintptr_t features, uintptr_t mask, uintptr_t log_kernel, int64_t batch,
                        int64_t height, int64_t width, int64_t channels, int64_t window, float eps,
                        uintptr_t output, const std::string& isa, int num_threads) {
    const KernelTable& table = require(isa);
    nb::gil_scoped_release release;
    hard_fill(table, ptr<const float>(features), ptr<const uint8_t>(mask),
              ptr<const float>(log_kernel), batch, height, width, channels, window, eps,
              ptr<float>(output), num_threads);
  });
  m.def("soft_fill",
        [](uintptr_t features, uintptr_t mask, uintptr_t log_kernel, int64_t batch, int64_t height,
           int64_t width, int64_t channels, int64_t window, float eps, uintptr_t output,
           bool is_bfloat16, const std::string& isa, int num_threads) {
          const KernelTable& table = table_for_maps(is_bfloat16, isa);
          nb::gil_scoped_release release;
          const SoftFillArrays a{ptr<const void>(features),
                                 ptr<const float>(mask),
                                 ptr<const float>(log_kernel),
                                 batch,
                                 height,
                                 width,
                                 channels,
                                 window,
                                 eps,
                                 false};
          soft_fill(table, a, ptr<void>(output), num_threads);
        });
  m.def("soft_fill_backward",
        [](uintptr_t features, uintptr_t mask, uintptr_t log_kernel, uintptr_t grad, int64_t batch,
           int64_t height, int64_t width, int64_t channels, int64_t window, float eps, bool hard,
           uintptr_t grad_features, uintptr_t grad_mask, uintptr_t grad_log_kernel,
           bool is_bfloat16, const std::string& isa, int num_threads) {
          const KernelTable& table = table_for_maps(is_bfloat16, isa);
          nb::gil_scoped_release release;
          const SoftFillArrays a{ptr<const void>(features),
                                 ptr<const float>(mask),
                                 ptr<const float>(log_kernel),
                                 batch,
                                 height,
                                 width,
                                 channels,
                                 window,
                                 eps,
                                 hard};
          soft_fill_backward(table, a, ptr<const void>(grad), ptr<void>(grad_features),
                             ptr<float>(grad_mask), ptr<float>(grad_log_kernel), num_threads);
        });
  m.def("soft_pool", [](uintptr_t input, uintptr_t output, std::vector<int64_t> numbers,
                        bool is_bfloat16, const std::string& isa, int num_threads) {
    const KernelTable& table = table_for_maps(is_bfloat16, isa);
    const SoftPoolArrays arrays = pool_arrays(numbers, input);
    nb::gil_scoped_release release;
    soft_pool(table, arrays, ptr<void>(output), num_threads);
  });
  m.def("soft_pool_backward",
        [](uintptr_t grad, uintptr_t input, uintptr_t grad_input, std::vector<int64_t> numbers,
           bool detached, bool is_bfloat16, const std::string& isa, int num_threads) {
          const KernelTable& table = table_for_maps(is_bfloat16, isa);
          const SoftPoolArrays arrays = pool_arrays(numbers, input);
          nb::gil_scoped_release release;
          soft_pool_backward(table, arrays, ptr<const void>(grad), detached, ptr<void>(grad_input),
                             num_threads);
        });
  m.attr("MAX_MERGED") = kMaxMerged;
  // numbers: batch, height, width, sums, resizing, then channels, height, width of each source.
  m.def("merge_maps",
        [](const std::vector<uintptr_t>& maps, const std::vector<int64_t>& numbers,
           uintptr_t output, bool is_bfloat16, const std::string& isa, int num_threads) {
          if (numbers.size() != 5 + 3 * maps.size()) throw std::invalid_argument("3 numbers a map");
          const KernelTable& table = table_for_maps(is_bfloat16, isa);
          MergeArrays a{};
          a.batch = numbers[0];
          a.height = numbers[1];
          a.width = numbers[2];
          a.sums = numbers[3] != 0;
          a.resizing = static_cast<Resizing>(numbers[4]);
          for (size_t i = 0; i < maps.size(); ++i) {
            a.inputs.push_back(ptr<const void>(maps[i]));
            a.channels.push_back(numbers[5 + 3 * i]);
            a.heights.push_back(numbers[6 + 3 * i]);
            a.widths.push_back(numbers[7 + 3 * i]);
          }
          nb::gil_scoped_release release;
          merge_all(table, a, ptr<void>(output), num_threads);
        });
  m.def("assemble", [](uintptr_t maps, uintptr_t windows, uintptr_t output,
                       std::vector<int64_t> numbers, int64_t element_size, int num_threads) {
    const AssembleArrays arrays = assemble_arrays(numbers, windows);
    nb::gil_scoped_release release;
    return assemble(arrays, ptr<const void>(maps), ptr<void>(output), element_size, num_threads);
  });
  m.def("assemble_backward",
        [](uintptr_t grad, uintptr_t windows, uintptr_t grad_maps, std::vector<int64_t> numbers,
           bool rows, int64_t number, int num_threads) {
          const AssembleArrays arrays = assemble_arrays(numbers, windows);
          nb::gil_scoped_release release;
          return assemble_backward(arrays, ptr<const void>(grad), rows, ptr<void>(grad_maps),
                                   static_cast<Number>(number), num_threads);
        });
  m.def("block_sizes", [](uintptr_t spec, int64_t height, int64_t width) {
    const int64_t* s = ptr<const int64_t>(spec);
    std::vector<int64_t> sizes;
    for (int64_t i = 0; i < s[kNumMasks]; ++i) {
      int64_t h, w;
      mask_size(s, i, height, width, &h, &w);
      sizes.push_back(h);
      sizes.push_back(w);
    }
    return sizes;
  });
  m.def("sampled_block", &sampled_block);
}
