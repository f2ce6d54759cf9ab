// The vector kernels of this processor, free of torch. Each works on a part of a call, which whoever calls
// shares among threads; swiglu.h, residual_norm.h and group_norm_silu.h say what they take.
#pragma once

#include <cstdint>

namespace madformer {

enum class Dtype { kFloat, kBFloat16, kFloat16 };

constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat ? 4 : 2; }

struct Swiglu;
struct SwigluBackward;
struct ResidualNorm;
struct ResidualNormBackward;
struct GroupNorm;
struct GroupNormBackward;
struct GroupNormChannels;
struct Attention;
struct BlockAttention;
struct BlockAttentionBackward;
struct BlockScratch;
struct WinogradTiles;
struct TokenSums;

struct VectorKernels {
  const char* target;  // whose instructions they use

  void (*widen)(const void* from, Dtype dtype, int64_t size, float* to);

  void (*narrow)(const float* from, int64_t size, Dtype dtype, void* to);

  void (*swiglu)(const Swiglu& op, int64_t begin, int64_t end);
  void (*swiglu_backward)(const SwigluBackward& op, int64_t begin, int64_t end);
  void (*residual_norm)(const ResidualNorm& op, int64_t begin, int64_t end);
  void (*residual_norm_backward)(const ResidualNormBackward& op, int64_t begin, int64_t end,
                                 const TokenSums& sums);
  void (*channel_moments)(const GroupNorm& op, int64_t map, int64_t begin, int64_t end, float* mean,
                          float* squares);
  void (*normalise)(const GroupNorm& op, int64_t map, int64_t begin, int64_t end, const float* factor,
                    const float* offset);
  void (*normalise_sums)(const GroupNormBackward& op, int64_t map, int64_t begin, int64_t end,
                         const GroupNormChannels& channels, float* sums, float* along);
  void (*normalise_backward)(const GroupNormBackward& op, int64_t map, int64_t begin, int64_t end,
                             const GroupNormChannels& channels, float* sums);

  int64_t attention_keys;                             // of a tile
  int64_t (*attention_queries)(int64_t num_queries);  // of a tile, of so many
  void (*attention)(const Attention& op, int64_t begin, int64_t end, float* scratch);

  int64_t block_attention_panel;  // columns that a product of matrices has at once
  void (*block_attention)(const BlockAttention& op, const BlockScratch& sizes, int64_t begin, int64_t end,
                          float* scratch);
  void (*block_attention_backward)(const BlockAttentionBackward& op, const BlockScratch& sizes, int64_t begin,
                                   int64_t end, float* scratch);

  void (*winograd_spread)(const WinogradTiles& op, int64_t begin, int64_t end);
  void (*winograd_spread_backward)(const WinogradTiles& op, int64_t begin, int64_t end);
  void (*winograd_gather)(const WinogradTiles& op, int64_t begin, int64_t end);
  void (*winograd_gather_backward)(const WinogradTiles& op, int64_t begin, int64_t end);
};

// Those of the newest instructions that this processor has.
const VectorKernels& vector_kernels();

}  // namespace madformer
