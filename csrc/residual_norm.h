// total = residual + gate * x, n = normalise(total) * weight + bias, y = n * (1 + scale) + shift, with parts
// left out, on the CPU, free of torch: what rms_norm and adaln share, kernels/norm_common/__init__.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "vector_kernels.h"

namespace madformer {

// (B, L, C) with contiguous columns; strides count elements.
template <typename Pointer>
struct Rows {
  Pointer data;
  int64_t stride_b, stride_l;
};

// (B * M, C) rows of modulation, of any dtype; null for none.
struct Modulation {
  const void* data = nullptr;
  int64_t stride = 0;
};

struct ResidualNorm {
  Rows<const void*> x, residual;                // the latter null for none
  void* y;                                      // contiguous
  void* total;                                  // contiguous; null without a residual
  Dtype dtype, stream_dtype, modulation_dtype;  // of x and y, of residual and total, of gate, scale and shift
  const float* weight;                          // (C,); null for none
  const float* bias;
  Modulation gate, scale, shift;
  int64_t num_samples, length, num_columns;
  int64_t tokens_of_block;  // that share a row of modulation
  bool centred;
  float eps;
};

// The gradients of the above; what is not wanted is null. Results are contiguous.
struct ResidualNormBackward {
  Rows<const void*> grad_y, grad_total;  // the latter null for none
  Rows<const void*> total, x;            // what was normalised; x is read for the gradient of gate alone
  void *dx, *dtotal;
  void *dshift, *dscale, *dgate;                // (B * M, C)
  void *dweight, *dbias;                        // (C,)
  Dtype dtype, stream_dtype, modulation_dtype;  // of grad_y and x; of total and its gradient; of modulation
  Dtype weight_dtype, bias_dtype;
  const float* weight;
  const float* bias;
  Modulation gate, scale;
  int64_t num_samples, length, num_columns, tokens_of_block;
  bool centred;
  float eps;
};

// Sums over tokens, one for each column: of the gradient of y, of that times the normalised row, and of the
// gradient of total times x. Null where nobody needs it.
struct TokenSums {
  float *grad, *along, *gate;
};

// At least so many elements are summed one after the other, in chunks that the shape alone decides: the
// result is the same whatever the number of threads.
constexpr int64_t kChunkSize = 1 << 15;
constexpr int64_t kMaxChunksOfBlock = 64;

// From the sums of all blocks to gradients.
inline void finish_residual_norm_backward(const ResidualNormBackward& op, const VectorKernels& kernels,
                                          int64_t num_blocks, const std::vector<float>& grads,
                                          const std::vector<float>& alongs, const std::vector<float>& gates) {
  const int64_t columns = op.num_columns;
  std::vector<float> scale(columns, 0.0f), row(columns), dweight(columns, 0.0f), dbias(columns, 0.0f);
  const auto put = [&](void* into, int64_t block, const float* values) {
    char* at = static_cast<char*>(into) + block * columns * size_of(op.modulation_dtype);
    kernels.narrow(values, columns, op.modulation_dtype, at);
  };
  for (int64_t block = 0; block < num_blocks; ++block) {
    const float* grad = grads.empty() ? nullptr : grads.data() + block * columns;
    const float* along = alongs.empty() ? nullptr : alongs.data() + block * columns;
    if (op.scale.data) {
      const int64_t offset = block * op.scale.stride * size_of(op.modulation_dtype);
      const char* scales = static_cast<const char*>(op.scale.data) + offset;
      kernels.widen(scales, op.modulation_dtype, columns, scale.data());
    }
    if (op.dshift) put(op.dshift, block, grad);
    if (op.dgate) put(op.dgate, block, gates.data() + block * columns);
    if (op.dscale) {
      for (int64_t c = 0; c < columns; ++c) {
        row[c] = (op.weight ? op.weight[c] : 1.0f) * along[c] + (op.bias ? op.bias[c] * grad[c] : 0.0f);
      }
      put(op.dscale, block, row.data());
    }
    for (int64_t c = 0; c < columns; ++c) {
      if (op.dweight) dweight[c] += (1.0f + scale[c]) * along[c];
      if (op.dbias) dbias[c] += (1.0f + scale[c]) * grad[c];
    }
  }
  if (op.dweight) kernels.narrow(dweight.data(), columns, op.weight_dtype, op.dweight);
  if (op.dbias) kernels.narrow(dbias.data(), columns, op.bias_dtype, op.dbias);
}

// `parallel` as in group_norm_silu.h.
template <typename Parallel>
void residual_norm_backward(const ResidualNormBackward& op, const VectorKernels& kernels, Parallel parallel) {
  const int64_t tokens = op.num_samples * op.length, columns = op.num_columns;
  const int64_t block_size = op.tokens_of_block, num_blocks = block_size ? tokens / block_size : 0;
  const int64_t chunk = std::max({int64_t{1}, kChunkSize / columns, block_size / kMaxChunksOfBlock + 1});
  const int64_t chunks = (block_size + chunk - 1) / chunk;
  const auto sums_if = [&](bool needed) {
    return std::vector<float>(needed ? num_blocks * chunks * columns : 0);
  };
  std::vector<float> grads = sums_if(op.dshift || op.dbias || (op.dscale && op.bias));
  std::vector<float> alongs = sums_if(op.dscale || op.dweight), gates = sums_if(op.dgate);
  parallel(num_blocks * chunks, std::min(chunk, block_size) * columns, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i / chunks * block_size, end = begin + block_size,
                    from = begin + i % chunks * chunk;
      const auto sums = [&](std::vector<float>& all) {
        return all.empty() ? nullptr : all.data() + i * columns;
      };
      kernels.residual_norm_backward(op, from, std::min(end, from + chunk),
                                     {sums(grads), sums(alongs), sums(gates)});
    }
  });
  // Of a block's chunks to the first, and that to the block's place.
  for (std::vector<float>* all : {&grads, &alongs, &gates}) {
    if (all->empty() || chunks == 1) continue;
    for (int64_t block = 0; block < num_blocks; ++block) {
      float* first = all->data() + block * chunks * columns;
      for (int64_t i = columns; i < chunks * columns; ++i) first[i % columns] += first[i];
      std::copy_n(first, columns, all->data() + block * columns);
    }
  }
  finish_residual_norm_backward(op, kernels, num_blocks, grads, alongs, gates);
}

}  // namespace madformer
