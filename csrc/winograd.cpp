#include "winograd.h"

#include <torch/headeronly/core/MemoryFormat.h>

#include "ops.h"
#include "tensors.h"

namespace madformer {
namespace {

void check_maps(const char* name, const Tensor& maps) {
  STD_TORCH_CHECK(maps.dim() == 4 && maps.size(1) > 0 && maps.size(2) > 0 && maps.size(3) > 0 &&
                      dtype_of(name, maps) == Dtype::kFloat,
                  name, " must be (N, C, H, W) of float32, with channels and pixels");
}

Tensor channels_last(const Tensor& maps) {
  const int64_t c = maps.size(1), h = maps.size(2), w = maps.size(3);
  const bool as_is = maps.stride(1) == 1 && maps.stride(3) == c && maps.stride(2) == w * c &&
                     (maps.size(0) <= 1 || maps.stride(0) == h * w * c);
  return as_is ? maps : torch::stable::contiguous(maps, torch::headeronly::MemoryFormat::ChannelsLast);
}

int64_t numbers_of(bool doubled) { return doubled ? 9 : 16; }

// Of (S, T, C) tiles, in whatever order in memory, and of the maps that they make up: those of the input
// where they are `smaller`.
WinogradTiles view(const Tensor& maps, const Tensor& tiles, bool doubled, bool smaller = false) {
  return {.maps = static_cast<float*>(const_cast<void*>(maps.const_data_ptr())),
          .tiles = static_cast<float*>(const_cast<void*>(tiles.const_data_ptr())),
          .bias = nullptr,
          .num_maps = maps.size(0),
          .height = maps.size(2) << smaller,
          .width = maps.size(3) << smaller,
          .num_channels = maps.size(1),
          .doubled = doubled,
          .stride_tile = tiles.stride(1),
          .stride_number = tiles.stride(0)};
}

int64_t tiles_of(int64_t height, int64_t width, bool smaller) {
  return smaller ? height * width : ((height + 1) / 2) * ((width + 1) / 2);
}

// A tile's numbers lie together: sixteen places far from each other would meet in the same lines of the
// cache.
Tensor empty_tiles(const Tensor& maps, bool doubled, bool smaller = false) {
  const int64_t count = maps.size(0) * tiles_of(maps.size(2), maps.size(3), smaller);
  const Tensor memory = torch::stable::new_empty(maps, {count, numbers_of(doubled), maps.size(1)});
  return torch::stable::transpose(memory, 0, 1);
}

// Of so many pixels.
Tensor empty_maps(const Tensor& tiles, int64_t height, int64_t width, bool doubled, bool smaller = false) {
  STD_TORCH_CHECK(tiles.dim() == 3 && tiles.size(0) == numbers_of(doubled) &&
                      dtype_of("tiles", tiles) == Dtype::kFloat &&
                      (tiles.stride(2) == 1 || tiles.size(2) == 1),
                  "tiles must be (", numbers_of(doubled), ", T, C) of float32 and contiguous channels");
  STD_TORCH_CHECK(height > 0 && width > 0 && tiles.size(1) % tiles_of(height, width, smaller) == 0,
                  "tiles must be those of whole maps");
  const int64_t count = tiles.size(1) / tiles_of(height, width, smaller);
  const Tensor memory = torch::stable::new_empty(tiles, {count, height, width, tiles.size(2)});
  return torch::stable::transpose(torch::stable::transpose(memory, 1, 3), 2, 3);
}

void for_all_tiles(const WinogradTiles& op, void (*run)(const WinogradTiles&, int64_t, int64_t)) {
  in_parallel(op.num_maps * op.rows() * op.columns(), 16 * op.num_channels,
              [&](int64_t begin, int64_t end) { run(op, begin, end); });
}

}  // namespace

Tensor winograd_spread_cpu(const Tensor& maps, bool doubled) {
  check_maps("maps", maps);
  const Tensor given = channels_last(maps), tiles = empty_tiles(maps, doubled, doubled);
  for_all_tiles(view(given, tiles, doubled, doubled), vector_kernels().winograd_spread);
  return tiles;
}

Tensor winograd_spread_backward_cpu(const Tensor& tiles, int64_t height, int64_t width, bool doubled) {
  const Tensor maps = empty_maps(tiles, height, width, doubled, doubled);
  const WinogradTiles op = view(maps, tiles, doubled, doubled);
  // Neighbouring tiles add to the same pixels, those of two maps do not.
  in_parallel(op.num_maps, 16 * op.rows() * op.columns() * op.num_channels,
              [&](int64_t begin, int64_t end) { vector_kernels().winograd_spread_backward(op, begin, end); });
  return maps;
}

Tensor winograd_gather_cpu(const Tensor& tiles, OptionalTensor bias, int64_t height, int64_t width,
                           bool doubled) {
  const Tensor maps = empty_maps(tiles, height, width, doubled);
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == tiles.size(2)), "bias must have the shape (",
                  tiles.size(2), ",)");
  const Floats biases("bias", bias);
  WinogradTiles op = view(maps, tiles, doubled);
  op.bias = biases.data();
  for_all_tiles(op, vector_kernels().winograd_gather);
  return maps;
}

Tensor winograd_gather_backward_cpu(const Tensor& grad, bool doubled) {
  check_maps("grad", grad);
  const Tensor given = channels_last(grad), tiles = empty_tiles(grad, doubled);
  for_all_tiles(view(given, tiles, doubled), vector_kernels().winograd_gather_backward);
  return tiles;
}

}  // namespace madformer
