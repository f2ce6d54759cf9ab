// The sums before and after the products of a 3x3 convolution by Winograd's minimal filtering, F(2x2, 3x3)
// (arXiv:1509.09308, section 4.1), free of torch: kernels/conv3x3.py.
#pragma once

#include <cstdint>

#include "vector_kernels.h"

namespace madformer {

// Channels-last maps, and tiles of 2 x 2 results: 16 numbers a channel, of contiguous channels too. Strides
// count elements.
//
// Doubled, the input's maps are half as high and wide, and each of their pixels stands for 2 x 2. The two in
// the middle of a tile's four rows, and of its columns, are the same then, their difference is nothing, and a
// tile has 9 numbers.
struct WinogradTiles {
  float* maps;
  float* tiles;
  const float* bias;                              // added to maps; none where that is null
  int64_t num_maps, height, width, num_channels;  // of the convolution
  bool doubled;
  int64_t stride_tile, stride_number;  // of a tile, and of its numbers

  int64_t rows() const { return (height + 1) / 2; }
  int64_t columns() const { return (width + 1) / 2; }
};

}  // namespace madformer
