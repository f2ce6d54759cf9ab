// Per-head RMSNorm and rotary embedding of a packed projection on the CPU, free of torch: queries into a
// tensor of their own, keys and values into a cache. What is computed, and the shapes:
// kernels/qk_norm_rope/__init__.py.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

// The hot loop is compiled for three generations of x86-64, and the right one chosen as the library is
// loaded. With AVX-512 fp32 takes 97 us in place of 164, bf16 113 in place of 165 (16 samples of 16 tokens, 3
// heads of 64, one thread).
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define MADFORMER_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MADFORMER_CLONES
#endif
// Inlined into each of them, and so compiled as they are.
#define MADFORMER_INLINE inline __attribute__((always_inline))

namespace madformer {

// A tensor of int32 or int64, or of nothing.
struct Indices {
  const void* data;
  bool is_int64;

  int64_t operator[](int64_t i) const {
    return is_int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// Channels are contiguous everywhere; strides count elements.
template <typename T>
struct QkNormRope {
  const T* qkv;
  int64_t stride_xb, stride_xl;
  const float* q_weight;  // head_dim; null for no norm
  const float* k_weight;
  const float* cos;  // null for no rotation
  const float* sin;
  int64_t stride_tb, stride_tl;
  T* q;  // (B, L, H, D), contiguous; null without queries
  T* k_cache;
  T* v_cache;
  int64_t stride_cr, stride_ch, stride_cs;
  Indices positions;
  Indices rows;  // of nothing: sample b has row b
  int64_t num_tokens, num_heads, head_dim, axes, num_rows, num_slots;
  float eps;
};

// Normalises a head in place.
MADFORMER_INLINE void normalise(float* x, const float* weight, int64_t head_dim, float eps) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < head_dim; ++i) sum += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(sum / static_cast<float>(head_dim) + eps);
  for (int64_t i = 0; i < head_dim; ++i) x[i] *= scale * weight[i];
}

// Rotates a head: within each axis channel j is paired with channel j + half. `kHalf` is `half` where it is
// known.
template <int64_t kHalf>
MADFORMER_INLINE void rotate(const float* __restrict x, const float* __restrict cos,
                             const float* __restrict sin, int64_t head_dim, int64_t axes,
                             float* __restrict y) {
  const int64_t half = kHalf != 0 ? kHalf : head_dim / (2 * axes);
  for (int64_t first = 0; first < head_dim; first += 2 * half) {
    const int64_t second = first + half;
    for (int64_t j = 0; j < half; ++j) {
      y[first + j] = x[first + j] * cos[first + j] - x[second + j] * sin[first + j];
      y[second + j] = x[second + j] * cos[second + j] + x[first + j] * sin[second + j];
    }
  }
}

// One head of one token from `x` to `y`, in float between; `scratch` holds two heads.
template <int64_t kHalf, typename T>
MADFORMER_INLINE void put_head(const QkNormRope<T>& s, const T* __restrict x, const float* weight,
                               int64_t table, float* __restrict scratch, T* __restrict y) {
  const int64_t size = s.head_dim;
  for (int64_t i = 0; i < size; ++i) scratch[i] = static_cast<float>(x[i]);
  if (weight) normalise(scratch, weight, size, s.eps);
  if (s.cos) {
    rotate<kHalf>(scratch, s.cos + table, s.sin + table, size, s.axes, scratch + size);
    scratch += size;
  }
  for (int64_t i = 0; i < size; ++i) y[i] = static_cast<T>(scratch[i]);
}

// Tokens [begin, end), counted through all samples.
template <int64_t kHalf, typename T>
MADFORMER_CLONES void put_tokens(const QkNormRope<T>& s, int64_t begin, int64_t end) {
  const int64_t part_size = s.num_heads * s.head_dim;
  std::vector<float> scratch(2 * s.head_dim);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / s.num_tokens, l = token % s.num_tokens;
    const int64_t table = b * s.stride_tb + l * s.stride_tl;
    const T* x = s.qkv + b * s.stride_xb + l * s.stride_xl;
    if (s.q) {
      for (int64_t at = 0; at < part_size; at += s.head_dim) {
        put_head<kHalf>(s, x + at, s.q_weight, table, scratch.data(), s.q + token * part_size + at);
      }
      x += part_size;
    }
    const int64_t row = s.rows.data ? s.rows[b] : b, slot = s.positions[b] + l;
    if (row < 0 || row >= s.num_rows || slot < 0 || slot >= s.num_slots) continue;
    for (int64_t h = 0; h < s.num_heads; ++h, x += s.head_dim) {
      const int64_t at = row * s.stride_cr + h * s.stride_ch + slot * s.stride_cs;
      put_head<kHalf>(s, x, s.k_weight, table, scratch.data(), s.k_cache + at);
      std::memcpy(s.v_cache + at, x + part_size, s.head_dim * sizeof(T));
    }
  }
}

// The same with the two pairings of heads of 64 compiled in: there the general one takes 1.5 times as long.
template <typename T>
void qk_norm_rope_range(const QkNormRope<T>& s, int64_t begin, int64_t end) {
  const int64_t half = s.head_dim / (2 * s.axes);
  (half == 16 ? put_tokens<16, T> : half == 32 ? put_tokens<32, T> : put_tokens<0, T>)(s, begin, end);
}

}  // namespace madformer
