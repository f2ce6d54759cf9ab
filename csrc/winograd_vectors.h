// Compiled for each generation of processors, as vectors.h says.
//
// Of a tile, 4 x 4 pixels of the input with a border of one, the products see B' d B, and the 2 x 2 pixels of
// the result are A' m A. The gradients go the other way with the same matrices.
#if defined(MADFORMER_WINOGRAD_VECTORS_H) == defined(HWY_TARGET_TOGGLE)
#ifdef MADFORMER_WINOGRAD_VECTORS_H
#undef MADFORMER_WINOGRAD_VECTORS_H
#else
#define MADFORMER_WINOGRAD_VECTORS_H
#endif

#include "vectors.h"
#include "winograd.h"

HWY_BEFORE_NAMESPACE();
namespace madformer {
namespace HWY_NAMESPACE {

struct Four {
  Vec at[4];
};

// B' d and its transpose; A' m, whose last two are nothing, and its transpose, which does not read them.
HWY_INLINE Four spread_input(Four d) {
  return {{d.at[0] - d.at[2], d.at[1] + d.at[2], d.at[2] - d.at[1], d.at[1] - d.at[3]}};
}
HWY_INLINE Four gather_input(Four d) {
  return {{d.at[0], d.at[1] - d.at[2] + d.at[3], d.at[1] + d.at[2] - d.at[0], zero() - d.at[3]}};
}
HWY_INLINE Four gather_output(Four m) {
  return {{m.at[0] + m.at[1] + m.at[2], m.at[1] - m.at[2] - m.at[3], zero(), zero()}};
}
HWY_INLINE Four spread_output(Four m) {
  return {{m.at[0], m.at[0] + m.at[1], m.at[0] - m.at[1], zero() - m.at[1]}};
}

// `turn` of the columns of 4 x 4 numbers, then of the rows.
template <typename Turn>
HWY_INLINE void turn_both(Four numbers[4], Turn turn) {
  Four columns[4];
  for (int64_t j = 0; j < 4; ++j) {
    columns[j] = turn(Four{{numbers[0].at[j], numbers[1].at[j], numbers[2].at[j], numbers[3].at[j]}});
  }
  for (int64_t i = 0; i < 4; ++i) {
    numbers[i] = turn(Four{{columns[0].at[i], columns[1].at[i], columns[2].at[i], columns[3].at[i]}});
  }
}

// Calls `step(tile, pixels)` for tiles [begin, end), counted through all maps: kSize x kSize pixels from
// `border` before the tile's first one, null beyond the map. Maps are smaller by `shift`.
template <int64_t kSize, typename Step>
HWY_INLINE void for_tiles(const WinogradTiles& op, int64_t begin, int64_t end, int64_t border, int64_t shift,
                          Step step) {
  const int64_t rows = op.rows(), columns = op.columns();
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t map = tile / (rows * columns);
    const int64_t y = tile / columns % rows * 2 - border, x = tile % columns * 2 - border;
    float* pixels[kSize * kSize];
    for (int64_t i = 0; i < kSize; ++i) {
      for (int64_t j = 0; j < kSize; ++j) {
        const bool inside = y + i >= 0 && y + i < op.height && x + j >= 0 && x + j < op.width;
        const int64_t row = map * (op.height >> shift) + ((y + i) >> shift);
        const int64_t pixel = row * (op.width >> shift) + ((x + j) >> shift);
        pixels[i * kSize + j] = inside ? op.maps + pixel * op.num_channels : nullptr;
      }
    }
    step(op.tiles + tile * op.stride_tile, pixels);
  }
}

template <typename Columns>
HWY_INLINE Vec load_or_zero(const float* from, int64_t c, Columns columns) {
  return from ? load(from + c, columns) : zero();
}

// Calls `step(number, i, j)` for the numbers of a tile that are not nothing.
template <bool kDoubled, typename Step>
HWY_INLINE void for_numbers(Step step) {
  int64_t number = 0;
  for (int64_t i = 0; i < 4; ++i) {
    for (int64_t j = 0; j < 4; ++j) {
      if (!kDoubled || (i != 2 && j != 2)) step(number++, i, j);
    }
  }
}

template <bool kDoubled, typename Columns>
HWY_INLINE void load_tile(Four numbers[4], const float* tile, int64_t stride, Columns columns) {
  for (int64_t i = 0; i < 4; ++i) numbers[i] = Four{{zero(), zero(), zero(), zero()}};
  for_numbers<kDoubled>([&](int64_t number, int64_t i, int64_t j)
                            MADFORMER_STEP { numbers[i].at[j] = load(tile + number * stride, columns); });
}

template <bool kDoubled, typename Columns>
HWY_INLINE void store_tile(const Four numbers[4], float* tile, int64_t stride, Columns columns) {
  for_numbers<kDoubled>([&](int64_t number, int64_t i, int64_t j)
                            MADFORMER_STEP { store(numbers[i].at[j], tile + number * stride, columns); });
}

template <bool kDoubled>
void spread_of(const WinogradTiles& op, int64_t begin, int64_t end) {
  for_tiles<4>(op, begin, end, 1, kDoubled, [&](float* tile, float* const* pixels) MADFORMER_STEP {
    for_columns(op.num_channels, [&](int64_t c, auto columns) MADFORMER_STEP {
      Four numbers[4];
      for (int64_t i = 0; i < 16; ++i) numbers[i / 4].at[i % 4] = load_or_zero(pixels[i], c, columns);
      turn_both(numbers, spread_input);
      store_tile<kDoubled>(numbers, tile + c, op.stride_number, columns);
    });
  });
}

template <bool kDoubled>
void spread_backward_of(const WinogradTiles& op, int64_t begin, int64_t end) {
  const int64_t size = (op.height >> kDoubled) * (op.width >> kDoubled) * op.num_channels;
  const int64_t tiles = op.rows() * op.columns();
  std::fill(op.maps + begin * size, op.maps + end * size, 0.0f);
  for_tiles<4>(op, begin * tiles, end * tiles, 1, kDoubled,
               [&](float* tile, float* const* pixels) MADFORMER_STEP {
                 for_columns(op.num_channels, [&](int64_t c, auto columns) MADFORMER_STEP {
                   Four numbers[4];
                   load_tile<kDoubled>(numbers, tile + c, op.stride_number, columns);
                   turn_both(numbers, gather_input);
                   for (int64_t i = 0; i < 16; ++i) {
                     if (float* to = pixels[i])
                       store(load(to + c, columns) + numbers[i / 4].at[i % 4], to + c, columns);
                   }
                 });
               });
}

template <bool kDoubled>
void gather_of(const WinogradTiles& op, int64_t begin, int64_t end) {
  for_tiles<2>(op, begin, end, 0, 0, [&](float* tile, float* const* pixels) MADFORMER_STEP {
    for_columns(op.num_channels, [&](int64_t c, auto columns) MADFORMER_STEP {
      Four numbers[4];
      load_tile<kDoubled>(numbers, tile + c, op.stride_number, columns);
      turn_both(numbers, gather_output);
      const Vec bias = load_or_zero(op.bias, c, columns);
      for (int64_t i = 0; i < 4; ++i) {
        if (pixels[i]) store(numbers[i / 2].at[i % 2] + bias, pixels[i] + c, columns);
      }
    });
  });
}

template <bool kDoubled>
void gather_backward_of(const WinogradTiles& op, int64_t begin, int64_t end) {
  for_tiles<2>(op, begin, end, 0, 0, [&](float* tile, float* const* pixels) MADFORMER_STEP {
    for_columns(op.num_channels, [&](int64_t c, auto columns) MADFORMER_STEP {
      Four numbers[4];
      for (int64_t i = 0; i < 4; ++i) numbers[i] = Four{{zero(), zero(), zero(), zero()}};
      for (int64_t i = 0; i < 4; ++i) numbers[i / 2].at[i % 2] = load_or_zero(pixels[i], c, columns);
      turn_both(numbers, spread_output);
      store_tile<kDoubled>(numbers, tile + c, op.stride_number, columns);
    });
  });
}

// Maps to what the products see, tiles [begin, end).
inline void winograd_spread(const WinogradTiles& op, int64_t begin, int64_t end) {
  (op.doubled ? spread_of<true> : spread_of<false>)(op, begin, end);
}

// The gradient of that, of maps [begin, end).
inline void winograd_spread_backward(const WinogradTiles& op, int64_t begin, int64_t end) {
  (op.doubled ? spread_backward_of<true> : spread_backward_of<false>)(op, begin, end);
}

// What the products give to maps, and the bias added.
inline void winograd_gather(const WinogradTiles& op, int64_t begin, int64_t end) {
  (op.doubled ? gather_of<true> : gather_of<false>)(op, begin, end);
}

// The gradient of that.
inline void winograd_gather_backward(const WinogradTiles& op, int64_t begin, int64_t end) {
  (op.doubled ? gather_backward_of<true> : gather_backward_of<false>)(op, begin, end);
}

}  // namespace HWY_NAMESPACE
}  // namespace madformer
HWY_AFTER_NAMESPACE();

#endif  // MADFORMER_WINOGRAD_VECTORS_H
