#include "qk_norm_rope.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <type_traits>
#include <utility>

#include "ops.h"
#include "tensors.h"

namespace madformer {
namespace {

using torch::headeronly::ScalarType;

// Of a backward; more would be long to sum.
constexpr int64_t kMaxChunks = 256;

const float* floats_of(const OptionalTensor& tensor) {
  return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}

void check_float32(const char* name, const OptionalTensor& tensor) {
  STD_TORCH_CHECK(!tensor || (tensor->is_cpu() && tensor->scalar_type() == ScalarType::Float), name,
                  " must be float32");
}

// One stream, checked; what the loops need contiguous is copied where it is not, and lives as long as this.
class Stream {
 public:
  Stream(const Tensor& qkv, const OptionalTensor& q_weight, const OptionalTensor& k_weight,
         const OptionalTensor& cos, const OptionalTensor& sin, int64_t num_heads, int64_t head_dim,
         int64_t axes, double eps)
      : num_heads_(num_heads), head_dim_(head_dim), axes_(axes), eps_(static_cast<float>(eps)) {
    check(qkv, q_weight, k_weight, cos, sin);
    qkv_ = rows_of(qkv);
    q_weight_ = contiguous(q_weight), k_weight_ = contiguous(k_weight);
    cos_ = contiguous(cos), sin_ = contiguous(sin);
  }

  int64_t batch() const { return qkv_.size(0); }
  int64_t num_tokens() const { return qkv_.size(1); }
  int64_t num_queries() const { return has_queries() ? num_tokens() : 0; }
  int64_t num_channels() const { return qkv_.size(2); }
  int64_t num_weights() const { return q_weight_.has_value() + k_weight_.has_value(); }
  bool has_queries() const { return num_channels() == 3 * num_heads_ * head_dim_; }

  template <typename T>
  QkNormRope<T> view() const {
    return {.qkv = static_cast<const T*>(qkv_.const_data_ptr()),
            .stride_xb = qkv_.stride(0),
            .stride_xl = qkv_.stride(1),
            .q_weight = floats_of(q_weight_),
            .k_weight = floats_of(k_weight_),
            .cos = floats_of(cos_),
            .sin = floats_of(sin_),
            .stride_tb = cos_ && cos_->dim() == 3 ? num_tokens() * head_dim_ : 0,
            .stride_tl = cos_ ? head_dim_ : 0,
            .num_tokens = num_tokens(),
            .num_heads = num_heads_,
            .head_dim = head_dim_,
            .axes = axes_,
            .has_queries = has_queries(),
            .eps = eps_};
  }

 private:
  void check(const Tensor& qkv, const OptionalTensor& q_weight, const OptionalTensor& k_weight,
             const OptionalTensor& cos, const OptionalTensor& sin) const {
    STD_TORCH_CHECK(num_heads_ > 0 && head_dim_ > 0 && axes_ > 0 && head_dim_ % (2 * axes_) == 0,
                    "head_dim must be divisible by twice the axes");
    const int64_t part_size = num_heads_ * head_dim_;
    STD_TORCH_CHECK(
        qkv.is_cpu() && qkv.dim() == 3 && (qkv.size(2) == 3 * part_size || qkv.size(2) == 2 * part_size),
        "qkv must have the shape (B, L, ", 3 * part_size, " or ", 2 * part_size, ")");
    check_float32("q_weight", q_weight), check_float32("k_weight", k_weight);
    check_float32("cos", cos), check_float32("sin", sin);
    for (const OptionalTensor* weight : {&q_weight, &k_weight}) {
      STD_TORCH_CHECK(!*weight || ((*weight)->dim() == 1 && (*weight)->size(0) == head_dim_),
                      "weights must have the shape (", head_dim_, ",)");
    }
    STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "cos and sin must come together");
    if (!cos) return;
    const int64_t dim = cos->dim();
    STD_TORCH_CHECK(
        (dim == 2 || (dim == 3 && cos->size(0) == qkv.size(0))) && cos->size(dim - 2) == qkv.size(1) &&
            cos->size(dim - 1) == head_dim_ && sin->sizes().equals(cos->sizes()),
        "cos and sin must have the shape (", qkv.size(1), ", ", head_dim_, "), or that for each sample");
  }

  Tensor qkv_;
  OptionalTensor q_weight_, k_weight_, cos_, sin_;
  int64_t num_heads_, head_dim_, axes_;
  float eps_;
};

// Calls `run` with a value of the type of qkv.
template <typename Run>
void with_type_of(const Tensor& qkv, Run run) {
  switch (qkv.scalar_type()) {
    case ScalarType::Float:
      return run(float{});
    case ScalarType::BFloat16:
      return run(torch::headeronly::BFloat16{});
    case ScalarType::Half:
      return run(torch::headeronly::Half{});
    default:
      STD_TORCH_CHECK(false, "qkv must be float32, bfloat16 or float16");
  }
}

// (B, H, L, D) over (B, L, H, D) memory.
Tensor empty_heads(const Tensor& like, int64_t num_tokens, int64_t num_heads, int64_t head_dim) {
  const Tensor memory = torch::stable::new_empty(like, {like.size(0), num_tokens, num_heads, head_dim});
  return torch::stable::transpose(memory, 1, 2);
}

// Those of a stream whose first token is `first`.
template <typename T>
Heads<T> heads_of(const Tensor& tensor, int64_t first = 0) {
  T* data;
  if constexpr (std::is_const_v<T>) {
    data = static_cast<T*>(tensor.const_data_ptr());
  } else {
    data = static_cast<T*>(tensor.mutable_data_ptr());
  }
  return {data + first * tensor.stride(2), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

template <typename T>
void put(const Stream& stream, const QkvHeads<T>& out, const Places& places) {
  const QkNormRope<T> view = stream.view<T>();
  const int64_t grain = std::max<int64_t>(1, kGrainSize / stream.num_channels());
  torch::stable::parallel_for(0, stream.batch() * stream.num_tokens(), grain,
                              [&](int64_t begin, int64_t end) { put_range(view, out, places, begin, end); });
}

// Writes the gradient of the projection, and adds those of the weights where they are asked for. Tokens are
// summed in chunks that the shape alone decides: the result is the same whatever the number of threads.
template <typename T>
void pull(const Stream& stream, const QkvHeads<const T>& grads, T* dqkv, float* dweights) {
  const QkNormRope<T> view = stream.view<T>();
  const int64_t num_tokens = stream.batch() * stream.num_tokens(),
                size = stream.num_weights() * view.head_dim;
  const int64_t chunk = std::max(kGrainSize / stream.num_channels(), num_tokens / kMaxChunks + 1);
  const int64_t num_chunks = (num_tokens + chunk - 1) / chunk;
  std::vector<float> shares(num_chunks * size);
  torch::stable::parallel_for(0, num_chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      pull_range(view, grads, i * chunk, std::min((i + 1) * chunk, num_tokens), dqkv,
                 shares.data() + i * size);
    }
  });
  if (!dweights) return;
  for (int64_t i = 0; i < num_chunks * size; ++i) dweights[i % size] += shares[i];
}

// The streams of the ops' lists, which hold nothing for what a stream does not have.
std::vector<Stream> streams_of(const std::vector<Tensor>& qkv, const std::vector<Tensor>& weights,
                               const std::vector<Tensor>& tables, const std::vector<bool>& normalised,
                               const std::vector<int64_t>& axes, int64_t num_heads, int64_t head_dim,
                               double eps) {
  STD_TORCH_CHECK(!qkv.empty() && normalised.size() == qkv.size() && axes.size() == qkv.size(),
                  "normalised and axes must have one entry a stream");
  auto weight = weights.begin(), table = tables.begin();
  const auto next = [](auto& it, const std::vector<Tensor>& list, bool has) -> OptionalTensor {
    if (!has) return std::nullopt;
    STD_TORCH_CHECK(it != list.end(), "weights and tables must hold what the streams have");
    return *it++;
  };
  std::vector<Stream> streams;
  for (size_t i = 0; i < qkv.size(); ++i) {
    const Tensor& x = qkv[i];
    STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == qkv[0].size(0) && x.scalar_type() == qkv[0].scalar_type(),
                    "streams must have one batch size and dtype");
    const bool has_queries = x.size(2) == 3 * num_heads * head_dim, rotated = axes[i] != 0;
    const OptionalTensor q_weight = next(weight, weights, normalised[i] && has_queries);
    const OptionalTensor k_weight = next(weight, weights, normalised[i]);
    const OptionalTensor cos = next(table, tables, rotated), sin = next(table, tables, rotated);
    streams.emplace_back(x, q_weight, k_weight, cos, sin, num_heads, head_dim, rotated ? axes[i] : 1, eps);
  }
  STD_TORCH_CHECK(weight == weights.end() && table == tables.end(),
                  "weights and tables must hold what the streams have, and nothing else");
  return streams;
}

void check_indices(const char* name, const Tensor& indices, int64_t batch) {
  STD_TORCH_CHECK(indices.is_cpu() && indices.dim() == 1 && indices.size(0) == batch, name,
                  " must have the shape (", batch, ",)");
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Int || indices.scalar_type() == ScalarType::Long, name,
                  " must be int32 or int64");
}

void check_cache(const Tensor& qkv, const Tensor& k_cache, const Tensor& v_cache, const Tensor& positions,
                 const OptionalTensor& rows, int64_t num_heads, int64_t head_dim) {
  const int64_t batch = qkv.size(0);
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
}

Indices indices_of(const OptionalTensor& tensor) {
  if (!tensor) return {};
  return {.data = tensor->const_data_ptr(), .is_int64 = tensor->scalar_type() == ScalarType::Long};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> qk_norm_rope_cpu(const std::vector<Tensor>& qkv,
                                                    const std::vector<Tensor>& weights,
                                                    const std::vector<Tensor>& tables,
                                                    const std::vector<bool>& normalised,
                                                    const std::vector<int64_t>& axes, int64_t num_heads,
                                                    int64_t head_dim, double eps) {
  const auto streams = streams_of(qkv, weights, tables, normalised, axes, num_heads, head_dim, eps);
  int64_t num_queries = 0, num_tokens = 0;
  for (const Stream& stream : streams) num_queries += stream.num_queries(), num_tokens += stream.num_tokens();
  const Tensor q = empty_heads(qkv[0], num_queries, num_heads, head_dim);
  const Tensor k = empty_heads(qkv[0], num_tokens, num_heads, head_dim);
  const Tensor v = empty_heads(qkv[0], num_tokens, num_heads, head_dim);
  with_type_of(qkv[0], [&]<typename T>(T) {
    int64_t query = 0, token = 0;
    for (const Stream& stream : streams) {
      put<T>(stream, {heads_of<T>(q, query), heads_of<T>(k, token), heads_of<T>(v, token)},
             {.num_rows = stream.batch(), .num_slots = stream.num_tokens(), .positions = {}, .rows = {}});
      query += stream.num_queries(), token += stream.num_tokens();
    }
  });
  return {q, k, v};
}

std::tuple<std::vector<Tensor>, Tensor> qk_norm_rope_backward_cpu(
    const Tensor& dq, const Tensor& dk, const Tensor& dv, bool needs_weights, const std::vector<Tensor>& qkv,
    const std::vector<Tensor>& weights, const std::vector<Tensor>& tables,
    const std::vector<bool>& normalised, const std::vector<int64_t>& axes, int64_t num_heads,
    int64_t head_dim, double eps) {
  const auto streams = streams_of(qkv, weights, tables, normalised, axes, num_heads, head_dim, eps);
  int64_t num_queries = 0, num_tokens = 0;
  for (const Stream& stream : streams) num_queries += stream.num_queries(), num_tokens += stream.num_tokens();
  for (const auto& [grad, length] : {std::pair(&dq, num_queries), {&dk, num_tokens}, {&dv, num_tokens}}) {
    STD_TORCH_CHECK(grad->is_cpu() && grad->scalar_type() == qkv[0].scalar_type() && grad->dim() == 4 &&
                        grad->size(0) == qkv[0].size(0) && grad->size(1) == num_heads &&
                        grad->size(2) == length && grad->size(3) == head_dim,
                    "gradients must have the shape (", qkv[0].size(0), ", ", num_heads, ", ", length, ", ",
                    head_dim, ") and the dtype of qkv");
  }
  const Tensor q = rows_of(dq), k = rows_of(dk), v = rows_of(dv);
  const int64_t num_weights = needs_weights ? static_cast<int64_t>(weights.size()) : 0;
  const Tensor dweights = torch::stable::new_zeros(dk, {num_weights, head_dim}, ScalarType::Float);
  std::vector<Tensor> dqkv;
  for (const Tensor& x : qkv) dqkv.push_back(torch::stable::new_empty(x, x.sizes()));
  with_type_of(qkv[0], [&]<typename T>(T) {
    int64_t query = 0, token = 0;
    float* next = needs_weights ? static_cast<float*>(dweights.mutable_data_ptr()) : nullptr;
    for (size_t i = 0; i < streams.size(); ++i) {
      const Stream& stream = streams[i];
      pull<T>(stream, {heads_of<const T>(q, query), heads_of<const T>(k, token), heads_of<const T>(v, token)},
              static_cast<T*>(dqkv[i].mutable_data_ptr()), next);
      if (next) next += stream.num_weights() * head_dim;
      query += stream.num_queries(), token += stream.num_tokens();
    }
  });
  return {dqkv, dweights};
}

Tensor qk_norm_rope_cached_cpu(const Tensor& qkv, OptionalTensor q_weight, OptionalTensor k_weight,
                               OptionalTensor cos, OptionalTensor sin, const Tensor& k_cache,
                               const Tensor& v_cache, const Tensor& positions, OptionalTensor rows,
                               int64_t num_heads, int64_t head_dim, int64_t axes, double eps) {
  const Stream stream(qkv, q_weight, k_weight, cos, sin, num_heads, head_dim, axes, eps);
  check_cache(qkv, k_cache, v_cache, positions, rows, num_heads, head_dim);
  const Tensor q = empty_heads(qkv, stream.num_queries(), num_heads, head_dim);
  const OptionalTensor p = contiguous(positions), r = contiguous(rows);
  with_type_of(qkv, [&]<typename T>(T) {
    put<T>(stream, {heads_of<T>(q), heads_of<T>(k_cache), heads_of<T>(v_cache)},
           {.num_rows = k_cache.size(0),
            .num_slots = k_cache.size(2),
            .positions = indices_of(p),
            .rows = indices_of(r)});
  });
  return q;
}

}  // namespace madformer
