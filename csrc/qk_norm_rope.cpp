#include "qk_norm_rope.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

#include "ops.h"

namespace madformer {
namespace {

using torch::headeronly::ScalarType;

void check_indices(const char* name, const Tensor& indices, int64_t batch) {
  STD_TORCH_CHECK(indices.is_cpu() && indices.dim() == 1 && indices.size(0) == batch, name,
                  " must have the shape (", batch, ",)");
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Int || indices.scalar_type() == ScalarType::Long, name,
                  " must be int32 or int64");
}

void check_float32(const char* name, const OptionalTensor& tensor) {
  STD_TORCH_CHECK(!tensor || (tensor->is_cpu() && tensor->scalar_type() == ScalarType::Float), name,
                  " must be float32");
}

void check(const Tensor& qkv, const OptionalTensor& q_weight, const OptionalTensor& k_weight,
           const OptionalTensor& cos, const OptionalTensor& sin, const Tensor& k_cache, const Tensor& v_cache,
           const Tensor& positions, const OptionalTensor& rows, int64_t num_heads, int64_t head_dim,
           int64_t axes) {
  STD_TORCH_CHECK(num_heads > 0 && head_dim > 0 && axes > 0 && head_dim % (2 * axes) == 0,
                  "head_dim must be divisible by twice the axes");
  const int64_t part_size = num_heads * head_dim;
  STD_TORCH_CHECK(
      qkv.is_cpu() && qkv.dim() == 3 && (qkv.size(2) == 3 * part_size || qkv.size(2) == 2 * part_size),
      "qkv must have the shape (B, L, ", 3 * part_size, " or ", 2 * part_size, ")");
  const int64_t batch = qkv.size(0), num_tokens = qkv.size(1);
  for (const Tensor* cache : {&k_cache, &v_cache}) {
    STD_TORCH_CHECK(cache->is_cpu() && cache->dim() == 4 && cache->scalar_type() == qkv.scalar_type() &&
                        cache->size(1) == num_heads && cache->size(3) == head_dim && cache->stride(3) == 1 &&
                        cache->sizes().equals(k_cache.sizes()) && cache->strides().equals(k_cache.strides()),
                    "caches must have the shape (R, ", num_heads, ", S, ", head_dim,
                    "), qkv's dtype, one layout and contiguous channels");
  }
  STD_TORCH_CHECK(rows || k_cache.size(0) == batch, "without rows caches must have a row for each sample");
  check_indices("positions", positions, batch);
  if (rows) check_indices("rows", *rows, batch);

  check_float32("q_weight", q_weight), check_float32("k_weight", k_weight);
  check_float32("cos", cos), check_float32("sin", sin);
  for (const OptionalTensor* weight : {&q_weight, &k_weight}) {
    STD_TORCH_CHECK(!*weight || ((*weight)->dim() == 1 && (*weight)->size(0) == head_dim),
                    "weights must have the shape (", head_dim, ",)");
  }
  STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "cos and sin must come together");
  if (!cos) return;
  const int64_t dim = cos->dim();
  STD_TORCH_CHECK((dim == 2 || (dim == 3 && cos->size(0) == batch)) && cos->size(dim - 2) == num_tokens &&
                      cos->size(dim - 1) == head_dim && sin->sizes().equals(cos->sizes()),
                  "cos and sin must have the shape (", num_tokens, ", ", head_dim,
                  "), or that for each sample");
}

// What is not contiguous in its last dimension is copied.
Tensor rows_of(const Tensor& tensor) {
  return tensor.stride(tensor.dim() - 1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(torch::stable::contiguous(*tensor)) : std::nullopt;
}

const float* floats_of(const OptionalTensor& tensor) {
  return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}

Indices indices_of(const OptionalTensor& tensor) {
  if (!tensor) return {.data = nullptr, .is_int64 = false};
  return {.data = tensor->const_data_ptr(), .is_int64 = tensor->scalar_type() == ScalarType::Long};
}

}  // namespace

Tensor qk_norm_rope_cached_cpu(const Tensor& qkv, OptionalTensor q_weight, OptionalTensor k_weight,
                               OptionalTensor cos, OptionalTensor sin, const Tensor& k_cache,
                               const Tensor& v_cache, const Tensor& positions, OptionalTensor rows,
                               int64_t num_heads, int64_t head_dim, int64_t axes, double eps) {
  check(qkv, q_weight, k_weight, cos, sin, k_cache, v_cache, positions, rows, num_heads, head_dim, axes);
  const int64_t batch = qkv.size(0), num_tokens = qkv.size(1);
  const bool has_queries = qkv.size(2) == 3 * num_heads * head_dim;
  const Tensor q = torch::stable::new_empty(qkv, {batch, has_queries ? num_tokens : 0, num_heads, head_dim});
  const Tensor x = rows_of(qkv), p = torch::stable::contiguous(positions);
  const OptionalTensor r = contiguous(rows), q_scale = contiguous(q_weight), k_scale = contiguous(k_weight);
  const OptionalTensor cosines = contiguous(cos), sines = contiguous(sin);

  const auto run = [&]<typename T>(T) {
    const QkNormRope<T> stream{.qkv = static_cast<const T*>(x.const_data_ptr()),
                               .stride_xb = x.stride(0),
                               .stride_xl = x.stride(1),
                               .q_weight = floats_of(q_scale),
                               .k_weight = floats_of(k_scale),
                               .cos = floats_of(cosines),
                               .sin = floats_of(sines),
                               .stride_tb = cos && cos->dim() == 3 ? num_tokens * head_dim : 0,
                               .stride_tl = head_dim,
                               .q = has_queries ? static_cast<T*>(q.mutable_data_ptr()) : nullptr,
                               .k_cache = static_cast<T*>(k_cache.mutable_data_ptr()),
                               .v_cache = static_cast<T*>(v_cache.mutable_data_ptr()),
                               .stride_cr = k_cache.stride(0),
                               .stride_ch = k_cache.stride(1),
                               .stride_cs = k_cache.stride(2),
                               .positions = indices_of(p),
                               .rows = indices_of(r),
                               .num_tokens = num_tokens,
                               .num_heads = num_heads,
                               .head_dim = head_dim,
                               .axes = axes,
                               .num_rows = k_cache.size(0),
                               .num_slots = k_cache.size(2),
                               .eps = static_cast<float>(eps)};
    torch::stable::parallel_for(0, batch * num_tokens, std::max<int64_t>(1, kGrainSize / qkv.size(2)),
                                [&](int64_t begin, int64_t end) { qk_norm_rope_range(stream, begin, end); });
  };
  switch (qkv.scalar_type()) {
    case ScalarType::Float:
      run(float{});
      break;
    case ScalarType::BFloat16:
      run(torch::headeronly::BFloat16{});
      break;
    case ScalarType::Half:
      run(torch::headeronly::Half{});
      break;
    default:
      STD_TORCH_CHECK(false, "qkv must be float32, bfloat16 or float16");
  }
  return torch::stable::transpose(q, 1, 2);
}

}  // namespace madformer
