// Softmax attention of few queries to few keys on the CPU, free of torch: a prefix in a cache and the own
// block, kernels/cached_attention, or tokens to each other, kernels/self_attention.py.
#pragma once

#include <cstdint>

#include "indices.h"
#include "vector_kernels.h"

namespace madformer {

// (B, H, L, D) of contiguous channels; strides count elements.
struct AttentionHeads {
  const void* data;
  int64_t stride_b, stride_h, stride_l;
};

// The result is (B, L, H, D), contiguous.
struct Attention {
  AttentionHeads q;
  AttentionHeads k_cache, v_cache;  // of num_rows rows and capacity keys; not read where that is 0
  AttentionHeads k, v;              // of num_own keys; not read where that is 0
  void* out;
  Dtype dtype;
  int64_t num_heads, num_queries, head_dim, num_rows, capacity, num_own;
  Indices lengths;  // keys of the cache that a sample sees, clamped to the capacity
  Indices rows;     // of nothing: sample b has row b. A row that there is not has no keys
  float scale;
};

// Floats that a call of the kernel needs for itself.
constexpr int64_t attention_scratch(const Attention& op, int64_t queries, int64_t keys) {
  return 2 * op.head_dim * queries + keys * queries + (2 * keys + 1) * op.head_dim;
}

}  // namespace madformer
