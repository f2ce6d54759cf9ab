// Per-head RMSNorm and rotary embedding of a packed projection on the CPU, free of torch: queries, keys and
// values into tensors of heads, or into a cache; and the gradient of that. What is computed, and the shapes:
// kernels/qk_norm_rope/__init__.py.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "indices.h"

// The hot loops are compiled for three generations of x86-64, and the right one chosen as the library is
// loaded. With AVX-512 fp32 takes 36 us forward and 69 backward in place of 56 and 84, bf16 49 and 65 in
// place of 85 and 109 (16 samples of 16 tokens, 3 heads of 64, one thread).
#if defined(MADFORMER_CLONES)
// Sanitizers need it empty: the choice would run before they do.
#elif defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define MADFORMER_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MADFORMER_CLONES
#endif
// Inlined into each of them, and so compiled as they are.
#define MADFORMER_INLINE inline __attribute__((always_inline))

namespace madformer {

// One stream. Channels are contiguous everywhere; strides count elements.
template <typename T>
struct QkNormRope {
  const T* qkv;
  int64_t stride_xb, stride_xl;
  const float* q_weight;  // head_dim; null for no norm
  const float* k_weight;
  const float* cos;  // null for no rotation
  const float* sin;
  int64_t stride_tb, stride_tl;  // 0 without tables
  int64_t num_tokens, num_heads, head_dim, axes;
  bool has_queries;
  float eps;
};

// (B, H, L, D).
template <typename T>
struct Heads {
  T* data;
  int64_t stride_b, stride_h, stride_l;

  T* at(int64_t b, int64_t h, int64_t l) const { return data + b * stride_b + h * stride_h + l * stride_l; }
};

// What a stream becomes.
template <typename T>
struct QkvHeads {
  Heads<T> q, k, v;  // k and v of one layout
};

// Where its keys and values are put.
struct Places {
  int64_t num_rows, num_slots;
  Indices positions;  // of nothing: tokens from slot 0 on
  Indices rows;       // of nothing: sample b has row b
};

// A sum of `term(i)` over the channels of a head, in an order that the compiler can keep in vectors.
template <typename Term>
MADFORMER_INLINE float sum_over(int64_t size, Term term) {
  constexpr int64_t kLanes = 16;
  float lanes[kLanes] = {};
  const int64_t whole = size / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += term(i + lane);
  }
  for (int64_t i = whole; i < size; ++i) lanes[i - whole] += term(i);
  float halves[8], quarters[4];
  for (int64_t i = 0; i < 8; ++i) halves[i] = lanes[i] + lanes[i + 8];
  for (int64_t i = 0; i < 4; ++i) quarters[i] = halves[i] + halves[i + 4];
  return (quarters[0] + quarters[2]) + (quarters[1] + quarters[3]);
}

// What the heads of one part of a token share.
struct HeadMap {
  const float* weight;  // null for no norm
  const float* cos;     // null for no rotation
  const float* sin;
  int64_t size, axes;
  float eps;
};

// Widens a head; returns the reciprocal of its root mean square.
template <typename T>
MADFORMER_INLINE float load_head(const HeadMap& map, const T* __restrict x, float* __restrict y) {
  const float sum = sum_over(map.size, [&](int64_t i) __attribute__((always_inline)) {
    y[i] = static_cast<float>(x[i]);
    return y[i] * y[i];
  });
  return 1.0f / std::sqrt(sum / static_cast<float>(map.size) + map.eps);
}

// Rotates a head, or back by the transposed map: within each axis channel i is paired with channel i + half.
template <bool kBack, typename X, typename Y>
MADFORMER_INLINE void rotate(const HeadMap& map, const X* __restrict x, Y* __restrict y) {
  const float* __restrict cos = map.cos;
  const float* __restrict sin = map.sin;
  const int64_t half = map.size / (2 * map.axes);
  for (int64_t first = 0; first < map.size; first += 2 * half) {
    for (int64_t i = first, j = first + half; i < first + half; ++i, ++j) {
      const float x1 = static_cast<float>(x[i]), x2 = static_cast<float>(x[j]);
      y[i] = static_cast<Y>(x1 * cos[i] + x2 * (kBack ? sin[j] : -sin[i]));
      y[j] = static_cast<Y>(x2 * cos[j] + x1 * (kBack ? -sin[i] : sin[j]));
    }
  }
}

// One head from `x` to `y`, in float between; `scratch` holds it.
template <typename T>
MADFORMER_INLINE void put_head(const HeadMap& map, const T* __restrict x, float* __restrict scratch,
                               T* __restrict y) {
  const float scale = load_head(map, x, scratch);
  if (map.weight) {
    for (int64_t i = 0; i < map.size; ++i) scratch[i] *= scale * map.weight[i];
  }
  if (map.cos) {
    rotate<false>(map, scratch, y);
  } else {
    for (int64_t i = 0; i < map.size; ++i) y[i] = static_cast<T>(scratch[i]);
  }
}

// The gradient of the head `x` from that of its result; adds to that of the weight. `scratch` holds two
// heads.
template <typename T>
MADFORMER_INLINE void pull_head(const HeadMap& map, const T* __restrict x, const T* __restrict dy,
                                float* __restrict scratch, float* __restrict dweight, T* __restrict dx) {
  float* __restrict grad = scratch, * __restrict normal = scratch + map.size;
  if (map.cos) {
    rotate<true>(map, dy, grad);
  } else {
    for (int64_t i = 0; i < map.size; ++i) grad[i] = static_cast<float>(dy[i]);
  }
  if (map.weight) {
    const float scale = load_head(map, x, normal);
    const float along = sum_over(map.size, [&](int64_t i) __attribute__((always_inline)) {
      normal[i] *= scale;
      dweight[i] += grad[i] * normal[i];
      grad[i] *= map.weight[i];
      return grad[i] * normal[i];
    });
    const float mean = along / static_cast<float>(map.size);
    for (int64_t i = 0; i < map.size; ++i) grad[i] = scale * (grad[i] - mean * normal[i]);
  }
  for (int64_t i = 0; i < map.size; ++i) dx[i] = static_cast<T>(grad[i]);
}

// Tokens [begin, end), counted through all samples. `kHeadDim` and `kAxes` are the stream's where they are
// known.
template <int64_t kHeadDim, int64_t kAxes, typename T>
MADFORMER_CLONES void put_tokens(const QkNormRope<T>& s, const QkvHeads<T>& out, const Places& places,
                                 int64_t begin, int64_t end) {
  const int64_t size = kHeadDim != 0 ? kHeadDim : s.head_dim, axes = kAxes != 0 ? kAxes : s.axes;
  std::vector<float> scratch(size);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / s.num_tokens, l = token % s.num_tokens;
    const int64_t table = b * s.stride_tb + l * s.stride_tl;
    HeadMap map{s.q_weight, s.cos + table, s.sin + table, size, axes, s.eps};
    const T* x = s.qkv + b * s.stride_xb + l * s.stride_xl;
    if (s.has_queries) {
      for (int64_t h = 0; h < s.num_heads; ++h, x += size) {
        put_head(map, x, scratch.data(), out.q.at(b, h, l));
      }
    }
    const int64_t row = places.rows.data ? places.rows[b] : b;
    const int64_t slot = places.positions.data ? places.positions[b] + l : l;
    if (row < 0 || row >= places.num_rows || slot < 0 || slot >= places.num_slots) continue;
    map.weight = s.k_weight;
    for (int64_t h = 0; h < s.num_heads; ++h, x += size) {
      put_head(map, x, scratch.data(), out.k.at(row, h, slot));
      std::memcpy(out.v.at(row, h, slot), x + s.num_heads * size, size * sizeof(T));
    }
  }
}

// The gradient of the projection of tokens [begin, end), which is contiguous. Adds their share of those of
// the weights, queries' before keys', to `dweights`.
template <int64_t kHeadDim, int64_t kAxes, typename T>
MADFORMER_CLONES void pull_tokens(const QkNormRope<T>& s, const QkvHeads<const T>& grads, int64_t begin,
                                  int64_t end, T* dqkv, float* dweights) {
  const int64_t size = kHeadDim != 0 ? kHeadDim : s.head_dim, axes = kAxes != 0 ? kAxes : s.axes;
  const int64_t part_size = s.num_heads * size;
  float* const dk_weight = s.has_queries && s.q_weight ? dweights + size : dweights;
  std::vector<float> scratch(2 * size);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / s.num_tokens, l = token % s.num_tokens;
    const int64_t table = b * s.stride_tb + l * s.stride_tl;
    HeadMap map{s.q_weight, s.cos + table, s.sin + table, size, axes, s.eps};
    const T* x = s.qkv + b * s.stride_xb + l * s.stride_xl;
    T* dx = dqkv + token * (s.has_queries ? 3 : 2) * part_size;
    if (s.has_queries) {
      for (int64_t h = 0; h < s.num_heads; ++h, x += size, dx += size) {
        pull_head(map, x, grads.q.at(b, h, l), scratch.data(), dweights, dx);
      }
    }
    map.weight = s.k_weight;
    for (int64_t h = 0; h < s.num_heads; ++h, x += size, dx += size) {
      pull_head(map, x, grads.k.at(b, h, l), scratch.data(), dk_weight, dx);
      std::memcpy(dx + part_size, grads.v.at(b, h, l), size * sizeof(T));
    }
  }
}

// Both with the two pairings of heads of 64 compiled in: there the general ones take up to 3.5 times as long.
template <typename T>
void put_range(const QkNormRope<T>& s, const QkvHeads<T>& out, const Places& places, int64_t begin,
               int64_t end) {
  const int64_t axes = s.head_dim == 64 ? s.axes : 0;
  (axes == 1   ? put_tokens<64, 1, T>
   : axes == 2 ? put_tokens<64, 2, T>
               : put_tokens<0, 0, T>)(s, out, places, begin, end);
}

template <typename T>
void pull_range(const QkNormRope<T>& s, const QkvHeads<const T>& grads, int64_t begin, int64_t end, T* dqkv,
                float* dweights) {
  const int64_t axes = s.head_dim == 64 ? s.axes : 0;
  (axes == 1   ? pull_tokens<64, 1, T>
   : axes == 2 ? pull_tokens<64, 2, T>
               : pull_tokens<0, 0, T>)(s, grads, begin, end, dqkv, dweights);
}

}  // namespace madformer
