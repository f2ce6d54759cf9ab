// Attention of training on the CPU, free of torch: kernels/block_causal_attention, forward and backward.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "attention.h"
#include "vector_kernels.h"

namespace madformer {

// Queries that attend to the same keys: the first range, and the second one where that is not empty. Causal:
// each only to as many of the first as there are queries up to it.
struct BlockReader {
  int64_t first_query, end_query;
  int64_t first_key[2], end_key[2];
  bool is_causal;

  int64_t num_keys(int64_t range) const { return end_key[range] - first_key[range]; }
};

// Queries are (B, H, Lq, D), keys and values (B, H, Lk, D), of contiguous channels.
struct BlockAttention {
  AttentionHeads q, k, v;
  void* out;   // (B, Lq, H, D), contiguous
  float* lse;  // (B, H, Lq), contiguous
  Dtype dtype;
  int64_t num_heads, num_queries, num_keys, head_dim;
  std::span<const BlockReader> readers;
  float scale;
};

struct BlockAttentionBackward {
  AttentionHeads q, k, v, out, grad;
  const float* lse;    // (B, H, Lq), contiguous
  void *dq, *dk, *dv;  // (B, L, H, D), contiguous
  Dtype dtype;
  int64_t num_heads, num_queries, num_keys, head_dim;
  std::span<const BlockReader> readers;
  float scale;
};

// Memory that a thread needs for itself, in floats: columns are filled up to whole panels.
struct BlockScratch {
  int64_t width;    // of a row of channels
  int64_t keys;     // of a row of transposed keys
  int64_t scores;   // of a row of scores
  int64_t queries;  // rows of a tile

  int64_t forward(int64_t num_keys, int64_t head_dim) const {
    return head_dim * keys + (num_keys + 2 * queries) * width + queries * (scores + 1);
  }
  int64_t backward(int64_t num_queries, int64_t num_keys, int64_t head_dim) const {
    return 2 * head_dim * keys + (2 * num_queries + 3 * num_keys + queries) * width + num_queries +
           2 * queries * scores;
  }
};

constexpr int64_t kMostBlockScores = 1 << 18;  // of a tile: 1 MiB

inline BlockScratch block_scratch(std::span<const BlockReader> readers, int64_t num_keys, int64_t head_dim,
                                  int64_t panel) {
  const auto filled_up = [panel](int64_t size) { return (size + panel - 1) / panel * panel; };
  BlockScratch found{
      .width = filled_up(head_dim), .keys = filled_up(num_keys) + panel, .scores = 0, .queries = 1};
  int64_t most_queries = 1;
  for (const BlockReader& reader : readers) {
    found.scores = std::max(found.scores, filled_up(reader.num_keys(0)) + filled_up(reader.num_keys(1)));
    most_queries = std::max(most_queries, reader.end_query - reader.first_query);
  }
  const int64_t at_once = kMostBlockScores / std::max<int64_t>(1, found.scores) / 8 * 8;
  found.queries = std::min({most_queries, std::max<int64_t>(8, at_once), int64_t{64}});
  return found;
}

}  // namespace madformer
