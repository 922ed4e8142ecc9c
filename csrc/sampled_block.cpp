#include "sampled_block.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "deform_conv.h"
#include "block_masks.h"
#include "operators.h"
#include "pack.h"
#include "threads.h"

namespace sparsight {
namespace {

constexpr int64_t kStreamedBytes = 16 << 20;
// Of a convolution's rows that wait for their pooling: with its weights, less than L2.
constexpr int64_t kPoolingBytes = 640 << 10;
struct Runner : BlockMasks {
  using BlockMasks::BlockMasks;

  FillTables tables;  // of the fill in progress
  char* zero_row = nullptr;

  const void* image_of(const void* maps, int64_t elements) const {
    return static_cast<const char*>(maps) + elements * table.element_size;
  }

  FillCall fill_call(int64_t m, int64_t channels) {
    const int64_t* fields = mask_spec(m);
    const Mask& mask = masks[m];
    FillCall call{};
    call.zero_row = zero_row;
    call.height = mask.height;
    call.width = mask.width;
    call.channels = channels;
    call.window = fields[kWindow];
    call.columns_stride = column_map_stride(mask.width, call.window);
    auto* columns =
        scratch.get<uint8_t>(kColumns, column_map_size(mask.height, mask.width, call.window));
    make_column_map(mask.bytes, mask.height, mask.width, call.window, columns);
    call.columns = columns;
    if (const int64_t levels = fields[kLevels]) {
      using Words = uint64_t[kWindowWords];
      const auto* words = reinterpret_cast<const Words*>(a.spec + fields[kWords]);
      const float* ratios = a.params + fields[kRatios];
      tables = {levels,         words,
                words + levels, words[2 * levels],
                ratios,         ratios + levels * tap_numbers(call.window)};
      call.tables = &tables;
    }
    call.eps = fields[kEps] < 0 ? -1.0f : a.params[fields[kEps]];
    return call;
  }

  // Few input channels (an image) would leave the inner loop a handful of steps. The pixels of one
  // kernel row are neighbours in memory, so a row of a zero-bordered copy is read as kernel_w *
  // channels channels of a kernel one column wide, at the stride of one pixel.
  const void* merge_rows(const void* input, ConvGeometry& g) {
    const int64_t padded_width = g.width + 2 * g.pad_w, padded_height = g.height + 2 * g.pad_h;
    // The last run may reach past the last pixel of the last row, never past its kernel.
    char* padded = scratch.get<char>(
        kMerged, padded_height * padded_width * g.in_channels * table.element_size);
    if (table.element_size == 2)
      copy_padded(static_cast<const uint16_t*>(input), g, reinterpret_cast<uint16_t*>(padded));
    else
      copy_padded(static_cast<const uint32_t*>(input), g, reinterpret_cast<uint32_t*>(padded));
    g.in_channels *= g.kernel_w;
    g.kernel_w = 1;
    g.height = padded_height;
    g.width = padded_width;
    g.pad_h = g.pad_w = 0;
    return padded;
  }

  template <class Bits>
  void copy_padded(const Bits* input, const ConvGeometry& g, Bits* padded) {
    const int64_t channels = g.in_channels, pixels = g.height * g.width;
    const int64_t border = g.pad_w * channels, row = g.width * channels + 2 * border;
    parallel_ranges(threads, g.height + 2 * g.pad_h, [&](int64_t begin, int64_t end) {
      for (int64_t padded_y = begin; padded_y < end; ++padded_y) {
        const int64_t y = padded_y - g.pad_h;
        Bits* out = padded + padded_y * row;
        if (y < 0 || y >= g.height) {
          std::memset(out, 0, sizeof(Bits) * row);
          continue;
        }
        std::memset(out, 0, sizeof(Bits) * border);
        std::memset(out + row - border, 0, sizeof(Bits) * border);
        out += border;
        if (!a.planar) {
          std::memcpy(out, input + y * g.width * channels, sizeof(Bits) * g.width * channels);
          continue;
        }
        for (int64_t c = 0; c < channels; ++c) {
          const Bits* plane = input + c * pixels + y * g.width;
          for (int64_t x = 0; x < g.width; ++x) out[x * channels + c] = plane[x];
        }
      }
    });
  }

  // Larger than the caches near a core: written past them, it is not read for ownership first.
  // What is written at once, rows or groups of their channels, must be whole lines.
  static bool streams(const void* output, int64_t bytes, int64_t bytes_at_once) {
    return bytes >= kStreamedBytes && reinterpret_cast<uintptr_t>(output) % 64 == 0 &&
           bytes_at_once % 64 == 0;
  }

  // Offsets and modulation of a deformable stage at its sites, in compact rows.
  const float* run_offsets(const int64_t* stage, const ConvCall& stage_call, const Mask& mask,
                           const void* block_input) {
    const int64_t taps = stage[kOffsetGroups] * stage[kKernelH] * stage[kKernelW];
    const int64_t moves = 2 * taps, columns = stage[kModulated] ? 3 * taps : moves;
    ConvCall call{};
    call.geometry = stage_call.geometry;
    call.geometry.in_channels = stage[kGuided] ? a.spec[kInChannels] : stage[kStageIn];
    call.geometry.out_channels = columns;
    call.geometry.groups = 1;
    call.kind = pack_kind(call.geometry.in_channels, columns, 1);
    call.input = stage[kGuided] ? block_input : stage_call.input;
    call.input_stride = call.geometry.in_channels;
    call.zero_row = stage_call.zero_row;
    call.sites = stage_call.sites;
    call.weight = a.params + stage[kOffsetWeight];
    call.bias = a.params + stage[kOffsetBias];
    float* rows = scratch.get<float>(kOffsets, std::max<int64_t>(1, mask.count) * columns);
    call.output = rows;
    call.float_output = true;
    call.output_stride = columns;
    call.compact_output = true;
    run_conv(table, call, mask.count, threads);
    if (stage[kModulated])
      parallel_ranges(threads, mask.count, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          for (float* x = rows + i * columns + moves; x < rows + (i + 1) * columns; ++x)
            *x = 1.0f / (1.0f + std::exp(-*x));
      });
    return rows;
  }

  // The list of sites of a stage without a mask.
  const int32_t* every_position(int64_t count) {
    auto* sites = scratch.get<int32_t>(kEveryPosition, count);
    for (int64_t i = 0; i < count; ++i) sites[i] = static_cast<int32_t>(i);
    return sites;
  }

  // One convolution at the sites of its mask, deformable or not. What a deformable one reads of its
  // input is known only here, so that the input is complete.
  void run_stage(const int64_t* stage, const ConvCall& call, const Mask& mask,
                 const void* block_input) {
    if (!is_deformable(stage)) {
      run_conv(table, call, mask.count, threads);
      return;
    }
    const ConvGeometry& g = call.geometry;
    const int64_t taps = g.kernel_h * g.kernel_w;
    GatherCall gather{};
    gather.geometry = g;
    gather.offset_groups = stage[kOffsetGroups];
    gather.input = call.input;
    gather.input_stride = call.input_stride;
    gather.zero_row = call.zero_row;
    gather.sites = mask.sites ? mask.sites : every_position(mask.count);
    gather.offset = run_offsets(stage, call, mask, block_input);
    gather.offset_stride = (stage[kModulated] ? 3 : 2) * gather.offset_groups * taps;
    if (stage[kModulated]) gather.modulation = gather.offset + 2 * gather.offset_groups * taps;
    gather.modulation_stride = gather.offset_stride;
    gather.compact_offset = true;
    gather.output =
        scratch.get<char>(kMixed, gather_block(g) * taps * g.in_channels * table.element_size);
    run_deform_conv(table, gather, call, mask.count, threads);
  }

  // A convolution and the max pooling after it, a few rows at a time: the map between them stays
  // near the core. Each worker pools a range of rows; what two of them need is computed by both.
  void run_pooled(ConvCall call, int64_t image) {
    const ConvGeometry& g = call.geometry;
    const int64_t pool_h = a.spec[kPoolH], pool_w = a.spec[kPoolW];
    const int64_t stride_h = a.spec[kPoolStrideH], stride_w = a.spec[kPoolStrideW];
    const int64_t pad_h = a.spec[kPoolPadH], pad_w = a.spec[kPoolPadW];
    const int64_t height = out_size(g.out_height, pool_h, stride_h, pad_h, 1);
    const int64_t width = out_size(g.out_width, pool_w, stride_w, pad_w, 1);
    const int64_t row_bytes = g.out_width * g.out_channels * table.element_size;
    const int64_t step = std::max<int64_t>(1, (kPoolingBytes / row_bytes - pool_h) / stride_h);
    const int64_t kept_rows = (step - 1) * stride_h + pool_h;
    const int64_t output_size = a.float_output ? sizeof(float) : table.element_size;
    char* output =
        static_cast<char*>(a.output) + image * height * width * g.out_channels * output_size;
    const int64_t panels = panel_count(g, call.kind);
    parallel_ranges(threads, height, [&](int64_t begin, int64_t end) {
      char* rows = thread_scratch().get<char>(kPooled, kept_rows * row_bytes);
      ConvCall part = call;
      int64_t done = 0;  // rows of the convolution before this one are computed
      int64_t first_kept = 0;
      for (int64_t y = begin; y < end; y += step) {
        const int64_t last = std::min(end, y + step);
        const int64_t from = std::max<int64_t>(0, y * stride_h - pad_h);
        const int64_t to = std::min(g.out_height, (last - 1) * stride_h - pad_h + pool_h);
        if (done > from)
          std::memmove(rows, rows + (from - first_kept) * row_bytes, (done - from) * row_bytes);
        done = std::max(done, from);
        first_kept = from;
        // Rows are numbered on through the map: the buffer begins with row `from`.
        part.output = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(rows) - from * row_bytes);
        if (done < to) table.conv(part, 0, panels, done * g.out_width, to * g.out_width);
        done = std::max(done, to);
        for (int64_t py = y; py < last; ++py)
          for (int64_t px = 0; px < width; ++px) {
            const void* window[kMaxTaps];
            int count = 0;
            for (int64_t ky = 0; ky < pool_h; ++ky) {
              const int64_t cy = py * stride_h - pad_h + ky;
              if (cy < 0 || cy >= g.out_height) continue;
              for (int64_t kx = 0; kx < pool_w; ++kx) {
                const int64_t cx = px * stride_w - pad_w + kx;
                if (cx < 0 || cx >= g.out_width) continue;
                window[count++] =
                    rows + (cy - from) * row_bytes + cx * g.out_channels * table.element_size;
              }
            }
            table.max_rows(window, count, g.out_channels,
                           output + (py * width + px) * g.out_channels * output_size,
                           a.float_output);
          }
      }
    });
  }

  void run_image(int64_t image) {
    const int64_t stages = a.spec[kNumStages];
    const void* block_input = image_of(a.x, image * a.height * a.width * a.spec[kInChannels]);
    const void* input = block_input;
    int64_t height = a.height, width = a.width;
    int64_t widest = 0;
    for (int64_t s = 0; s < stages; ++s)
      widest = std::max({widest, stage_spec(s)[kStageIn], stage_spec(s)[kStageOut]});
    zero_row = scratch.get<char>(kZeroRow, widest * table.element_size);
    std::memset(zero_row, 0, widest * table.element_size);
    bool compact = false;
    for (int64_t s = 0; s < stages; ++s) {
      const int64_t* stage = stage_spec(s);
      const int64_t m = stage[kStageMask];
      ConvCall call{};
      call.geometry = stage_geometry(stage, height, width);
      const Mask everywhere = {call.geometry.out_height, call.geometry.out_width,
                               call.geometry.out_height * call.geometry.out_width};
      const Mask& mask = m < 0 ? everywhere : masks[m];
      const bool last = s + 1 == stages;
      const int64_t* next = last ? nullptr : stage_spec(s + 1);
      const bool stays =
          !last && is_pointwise(next) && !is_deformable(next) && next[kStageMask] == m;
      if (a.spec[kRowMerge]) {
        input = merge_rows(input, call.geometry);
        call.geometry.groups = 1;
      }
      call.kind = pack_kind(stage[kStageIn], stage[kStageOut], stage[kStageGroups]);
      call.input = input;
      call.input_stride = a.spec[kRowMerge] ? a.spec[kInChannels] : stage[kStageIn];
      call.compact_input = compact;
      call.zero_row = zero_row;
      call.sites = mask.full() ? nullptr : mask.sites;
      call.weight = a.params + stage[kStageWeight];
      call.bias = stage[kStageBias] < 0 ? nullptr : a.params + stage[kStageBias];
      call.output_stride = stage[kStageOut];
      call.relu = stage[kStageRelu];
      call.compact_output = last || stays;
      const int64_t map = mask.height * mask.width * stage[kStageOut];
      const int64_t output_size = a.float_output ? sizeof(float) : table.element_size;
      char* image_output = static_cast<char*>(a.output) + image * map * output_size;
      const void* shortcut = a.shortcut ? image_of(a.shortcut, image * map) : nullptr;
      if (a.spec[kPoolH]) {
        call.relu = stage[kStageRelu];
        call.compact_output = false;
        run_pooled(call, image);
        return;
      }
      if (last && mask.full()) {
        call.output = image_output;
        call.float_output = a.float_output;
        // Of the lanes layout no whole lines are written.
        call.stream = call.kind == PackKind::panel &&
                      streams(image_output, map * output_size,
                              stage[kStageOut] / stage[kStageGroups] * output_size);
        call.residual = shortcut;
        call.residual_stride = stage[kStageOut];
        call.relu = a.spec[kReluOut] || stage[kStageRelu];
        run_stage(stage, call, mask, block_input);
        return;
      }
      const int64_t rows = call.compact_output ? mask.count : mask.height * mask.width;
      char* output =
          scratch.get<char>(s % 2 ? kStageB : kStageA,
                            std::max<int64_t>(1, rows) * stage[kStageOut] * table.element_size);
      call.output = output;
      run_stage(stage, call, mask, block_input);
      if (last) {
        auto* row_of = scratch.get<int32_t>(kRowOf, mask.height * mask.width);
        for (int64_t i = 0; i < mask.count; ++i) row_of[mask.sites[i]] = static_cast<int32_t>(i);
        FillCall fill = fill_call(m, stage[kStageOut]);
        fill.values = output;
        fill.values_stride = stage[kStageOut];
        fill.row_of = row_of;
        fill.residual = shortcut;
        fill.residual_stride = stage[kStageOut];
        fill.output = image_output;
        fill.output_stride = stage[kStageOut];
        fill.relu = a.spec[kReluOut];
        fill.float_output = a.float_output;
        fill.stream = streams(image_output, map * output_size, stage[kStageOut] * output_size);
        parallel_ranges(threads, mask.height * mask.width,
                        [&](int64_t begin, int64_t end) { table.fill(fill, begin, end); });
        return;
      }
      if (!stays && !mask.full()) {
        auto* holes = scratch.get<int32_t>(kHoles, mask.height * mask.width + 1);
        const ConvGeometry reader = stage_geometry(next, mask.height, mask.width);
        FillCall fill = fill_call(m, stage[kStageOut]);
        fill.values = fill.output = output;
        fill.values_stride = fill.output_stride = stage[kStageOut];
        fill.positions = holes;
        // A reader without a mask reads everything.
        const int64_t next_mask = next[kStageMask];
        const Mask all = {reader.out_height, reader.out_width, reader.out_height * reader.out_width,
                          nullptr, nullptr};
        const int64_t count =
            is_deformable(next)
                ? all_holes(m, holes)
                : needed_holes(m, reader, next_mask < 0 ? all : masks[next_mask], holes);
        parallel_ranges(threads, count,
                        [&](int64_t begin, int64_t end) { table.fill(fill, begin, end); });
      }
      input = output;
      height = mask.height;
      width = mask.width;
      compact = stays;
    }
  }

  int64_t run() {
    for (int64_t m = 0; m < a.spec[kNumMasks]; ++m) {
      mask_size(a.spec, m, a.height, a.width, &masks[m].height, &masks[m].width);
      mask_positions += masks[m].height * masks[m].width;
    }
    for (int64_t image = 0; image < a.batch; ++image) {
      if (!decide(image, image_of(a.x, image * a.height * a.width * a.spec[kInChannels])))
        return image;
      run_image(image);
    }
    return -1;
  }
};

}  // namespace

void mask_size(const int64_t* spec, int64_t m, int64_t height, int64_t width, int64_t* out_height,
               int64_t* out_width) {
  // A mask has the size of the output of the first stage that it gates.
  for (int64_t s = 0; s < spec[kNumStages]; ++s) {
    const int64_t* stage = stage_fields(spec, s);
    const ConvGeometry g = stage_geometry(stage, height, width);
    height = g.out_height;
    width = g.out_width;
    if (stage[kStageMask] == m) break;
  }
  *out_height = height;
  *out_width = width;
}

int64_t block_out_channels(const int64_t* spec) {
  return stage_fields(spec, spec[kNumStages] - 1)[kStageOut];
}

int64_t run_block(const KernelTable& table, const BlockArrays& arrays, int num_threads) {
  Runner runner(table, arrays, num_threads);
  return runner.run();
}

}  // namespace sparsight
