#include "attention.h"

#include <cmath>

#include "ops.h"
#include "tensors.h"

namespace madformer {
namespace {

using torch::headeronly::ScalarType;

void check_heads(const char* name, const Tensor& tensor, const Tensor& q, int64_t num_samples) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 4 && tensor.scalar_type() == q.scalar_type() &&
                      tensor.size(0) == num_samples && tensor.size(1) == q.size(1) &&
                      tensor.size(3) == q.size(3) && (tensor.stride(3) == 1 || q.size(3) == 1),
                  name, " must have the shape (", num_samples, ", ", q.size(1), ", S, ", q.size(3),
                  "), q's dtype and contiguous channels");
}

void check_indices(const char* name, const Tensor& indices, int64_t batch) {
  STD_TORCH_CHECK(indices.is_cpu() && indices.dim() == 1 && indices.size(0) == batch &&
                      (indices.scalar_type() == ScalarType::Int || indices.scalar_type() == ScalarType::Long),
                  name, " must be int32 or int64 of the shape (", batch, ",)");
}

AttentionHeads heads_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

Indices indices_of(const OptionalTensor& tensor) {
  if (!tensor) return {};
  return {.data = tensor->const_data_ptr(), .is_int64 = tensor->scalar_type() == ScalarType::Long};
}

// All heads of so many samples.
void run(const Attention& op, int64_t batch) {
  const VectorKernels& kernels = vector_kernels();
  const int64_t queries = kernels.attention_queries(op.num_queries);
  const int64_t tiles = (op.num_queries + queries - 1) / queries;
  const int64_t scratch = attention_scratch(op, queries, kernels.attention_keys);
  // A multiplication takes an eighth of the time of what is counted elsewhere.
  const int64_t work = queries * (op.capacity + op.num_own + 1) * op.head_dim / 8;
  in_parallel(batch * op.num_heads * tiles, work, [&](int64_t begin, int64_t end) {
    std::vector<float> own(scratch);
    kernels.attention(op, begin, end, own.data());
  });
}

}  // namespace

Tensor cached_attention_cpu(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                            const Tensor& lengths, OptionalTensor k, OptionalTensor v, OptionalTensor rows,
                            double scale) {
  const Dtype dtype = dtype_of("q", q);
  STD_TORCH_CHECK(q.dim() == 4 && (q.stride(3) == 1 || q.size(3) == 1),
                  "q must have the shape (B, H, L, D) and contiguous channels");
  const int64_t batch = q.size(0), num_rows = rows ? k_cache.size(0) : batch;
  check_heads("k_cache", k_cache, q, num_rows), check_heads("v_cache", v_cache, q, num_rows);
  STD_TORCH_CHECK(v_cache.size(2) == k_cache.size(2), "v_cache must have k_cache's shape");
  STD_TORCH_CHECK(k.has_value() == v.has_value(), "k and v must come together");
  if (k) {
    check_heads("k", *k, q, batch), check_heads("v", *v, q, batch);
    STD_TORCH_CHECK(v->size(2) == k->size(2), "v must have k's shape");
  }
  check_indices("lengths", lengths, batch);
  if (rows) check_indices("rows", *rows, batch);
  const Tensor out = torch::stable::new_empty(q, {batch, q.size(2), q.size(1), q.size(3)});
  if (out.numel() == 0) return out;
  const OptionalTensor ends = contiguous(OptionalTensor(lengths)), places = contiguous(rows);
  run({.q = heads_of(q),
       .k_cache = heads_of(k_cache),
       .v_cache = heads_of(v_cache),
       .k = k ? heads_of(*k) : AttentionHeads{},
       .v = v ? heads_of(*v) : AttentionHeads{},
       .out = out.mutable_data_ptr(),
       .dtype = dtype,
       .num_heads = q.size(1),
       .num_queries = q.size(2),
       .head_dim = q.size(3),
       .num_rows = num_rows,
       .capacity = k_cache.size(2),
       .num_own = k ? k->size(2) : 0,
       .lengths = indices_of(ends),
       .rows = indices_of(places),
       .scale = static_cast<float>(scale)},
      batch);
  return out;
}

Tensor self_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v, int64_t num_heads) {
  const Dtype dtype = dtype_of("q", q);
  STD_TORCH_CHECK(q.dim() == 3 && num_heads > 0 && q.size(2) % num_heads == 0,
                  "q must have the shape (B, L, H * D)");
  for (const Tensor* tensor : {&k, &v}) {
    STD_TORCH_CHECK(
        tensor->is_cpu() && tensor->sizes().equals(q.sizes()) && tensor->scalar_type() == q.scalar_type(),
        "k and v must have q's shape, dtype and device");
  }
  const Tensor out = torch::stable::new_empty(q, q.sizes());
  if (out.numel() == 0) return out;
  const int64_t head_dim = q.size(2) / num_heads;
  const Tensor queries = rows_of(q), keys = rows_of(k), values = rows_of(v);
  const auto heads = [head_dim](const Tensor& tensor) -> AttentionHeads {
    return {tensor.const_data_ptr(), tensor.stride(0), head_dim, tensor.stride(1)};
  };
  run({.q = heads(queries),
       .k_cache = {},
       .v_cache = {},
       .k = heads(keys),
       .v = heads(values),
       .out = out.mutable_data_ptr(),
       .dtype = dtype,
       .num_heads = num_heads,
       .num_queries = q.size(1),
       .head_dim = head_dim,
       .num_rows = 0,
       .capacity = 0,
       .num_own = q.size(1),
       .lengths = {},
       .rows = {},
       .scale = 1.0f / std::sqrt(static_cast<float>(head_dim))},
      q.size(0));
  return out;
}

}  // namespace madformer
