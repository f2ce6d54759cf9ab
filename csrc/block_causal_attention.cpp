#include "block_causal_attention.h"

#include "ops.h"
#include "tensors.h"

namespace madformer {
namespace {

constexpr int64_t kReaderNumbers = 7;

void check_heads(const char* name, const Tensor& tensor, const Tensor& like, int64_t length) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 4 && tensor.scalar_type() == like.scalar_type() &&
                      tensor.size(0) == like.size(0) && tensor.size(1) == like.size(1) &&
                      tensor.size(2) == length && tensor.size(3) == like.size(3),
                  name, " must have the shape (", like.size(0), ", ", like.size(1), ", ", length, ", ",
                  like.size(3), ") and q's dtype");
}

// As kernels/block_causal_attention/compiled.py gives them, within the tensors.
std::vector<BlockReader> readers_of(const std::vector<int64_t>& numbers, int64_t num_queries,
                                    int64_t num_keys) {
  STD_TORCH_CHECK(numbers.size() % kReaderNumbers == 0, "readers must have seven numbers each");
  std::vector<BlockReader> readers;
  for (size_t i = 0; i < numbers.size(); i += kReaderNumbers) {
    const int64_t* n = numbers.data() + i;
    const BlockReader reader{n[0], n[1], {n[2], n[4]}, {n[3], n[5]}, n[6] != 0};
    const auto within = [](int64_t first, int64_t end, int64_t size) {
      return 0 <= first && first <= end && end <= size;
    };
    STD_TORCH_CHECK(within(n[0], n[1], num_queries) && within(n[2], n[3], num_keys) &&
                        within(n[4], n[5], num_keys) && n[2] < n[3] &&
                        (!reader.is_causal || (n[1] - n[0] == n[3] - n[2] && n[4] == n[5])),
                    "readers must be ranges of queries and of keys, of which the first is not empty");
    readers.push_back(reader);
  }
  return readers;
}

AttentionHeads heads_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// (B, L, H, D).
Tensor packed(const Tensor& like) {
  return torch::stable::new_empty(like, {like.size(0), like.size(2), like.size(1), like.size(3)});
}

// All heads of all images, one after the other of a thread.
template <typename Run>
void run(const Tensor& q, int64_t num_keys, int64_t scratch, Run each) {
  in_parallel(q.size(0) * q.size(1), q.size(2) * num_keys, [&](int64_t begin, int64_t end) {
    std::vector<float> own(scratch);
    each(begin, end, own.data());
  });
}

}  // namespace

std::tuple<Tensor, Tensor> block_causal_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                                      const std::vector<int64_t>& readers, double scale) {
  const Dtype dtype = dtype_of("q", q);
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "q and k must have the shape (B, H, L, D)");
  check_heads("k", k, q, k.size(2)), check_heads("v", v, q, k.size(2));
  const std::vector<BlockReader> parts = readers_of(readers, q.size(2), k.size(2));
  const Tensor queries = rows_of(q), keys = rows_of(k), values = rows_of(v), out = packed(q);
  const Tensor lse =
      torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}, torch::headeronly::ScalarType::Float);
  if (out.numel() == 0) return {out, lse};
  const VectorKernels& kernels = vector_kernels();
  const BlockScratch sizes = block_scratch(parts, k.size(2), q.size(3), kernels.block_attention_panel);
  const BlockAttention op{.q = heads_of(queries),
                          .k = heads_of(keys),
                          .v = heads_of(values),
                          .out = out.mutable_data_ptr(),
                          .lse = static_cast<float*>(lse.mutable_data_ptr()),
                          .dtype = dtype,
                          .num_heads = q.size(1),
                          .num_queries = q.size(2),
                          .num_keys = k.size(2),
                          .head_dim = q.size(3),
                          .readers = parts,
                          .scale = static_cast<float>(scale)};
  run(q, k.size(2), sizes.forward(k.size(2), q.size(3)), [&](int64_t begin, int64_t end, float* scratch) {
    kernels.block_attention(op, sizes, begin, end, scratch);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> block_causal_attention_backward_cpu(const Tensor& grad, const Tensor& q,
                                                                       const Tensor& k, const Tensor& v,
                                                                       const Tensor& out, const Tensor& lse,
                                                                       const std::vector<int64_t>& readers,
                                                                       double scale) {
  const Dtype dtype = dtype_of("q", q);
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "q and k must have the shape (B, H, L, D)");
  check_heads("k", k, q, k.size(2)), check_heads("v", v, q, k.size(2));
  check_heads("grad", grad, q, q.size(2)), check_heads("out", out, q, q.size(2));
  STD_TORCH_CHECK(lse.is_cpu() && lse.scalar_type() == torch::headeronly::ScalarType::Float &&
                      lse.dim() == 3 && lse.size(0) == q.size(0) && lse.size(1) == q.size(1) &&
                      lse.size(2) == q.size(2),
                  "lse must be float32 of q's shape without its channels");
  const std::vector<BlockReader> parts = readers_of(readers, q.size(2), k.size(2));
  Tensor dq = packed(q), dk = packed(k), dv = packed(v);
  if (q.numel() == 0) return {dq, torch::stable::fill_(dk, 0), torch::stable::fill_(dv, 0)};
  const Tensor queries = rows_of(q), keys = rows_of(k), values = rows_of(v), grads = rows_of(grad),
               outs = rows_of(out), sums = torch::stable::contiguous(lse);
  const VectorKernels& kernels = vector_kernels();
  const BlockScratch sizes = block_scratch(parts, k.size(2), q.size(3), kernels.block_attention_panel);
  const BlockAttentionBackward op{.q = heads_of(queries),
                                  .k = heads_of(keys),
                                  .v = heads_of(values),
                                  .out = heads_of(outs),
                                  .grad = heads_of(grads),
                                  .lse = static_cast<const float*>(sums.const_data_ptr()),
                                  .dq = dq.mutable_data_ptr(),
                                  .dk = dk.mutable_data_ptr(),
                                  .dv = dv.mutable_data_ptr(),
                                  .dtype = dtype,
                                  .num_heads = q.size(1),
                                  .num_queries = q.size(2),
                                  .num_keys = k.size(2),
                                  .head_dim = q.size(3),
                                  .readers = parts,
                                  .scale = static_cast<float>(scale)};
  run(q, k.size(2), sizes.backward(q.size(2), k.size(2), q.size(3)),
      [&](int64_t begin, int64_t end, float* scratch) {
        kernels.block_attention_backward(op, sizes, begin, end, scratch);
      });
  return {dq, dk, dv};
}

}  // namespace madformer
