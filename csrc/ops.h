// The launchers: each checks its arguments and dispatches on the dtype. They use torch's stable ABI only, so
// one build serves every torch from the version in CMakeLists.txt on. Shapes and errors: kernels/<op>, whose
// public functions have already named bad arguments.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace madformer {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Elements per thread below which waking another one costs more than it saves.
constexpr int64_t kGrainSize = 32768;

void denoise_step_cpu(const Tensor& sample, const Tensor& model_output, const Tensor& previous,
                      const Tensor& coefficients, std::optional<double> clip, OptionalTensor unconditional,
                      OptionalTensor guidance_scale);

#ifdef MADFORMER_WITH_CUDA
void denoise_step_cuda(const Tensor& sample, const Tensor& model_output, const Tensor& previous,
                       const Tensor& coefficients, std::optional<double> clip, OptionalTensor unconditional,
                       OptionalTensor guidance_scale);
#endif

// Queries, keys and values of all streams. The lists are those of the op, kernels/qk_norm_rope/ops.py.
std::tuple<Tensor, Tensor, Tensor> qk_norm_rope_cpu(const std::vector<Tensor>& qkv,
                                                    const std::vector<Tensor>& weights,
                                                    const std::vector<Tensor>& tables,
                                                    const std::vector<bool>& normalised,
                                                    const std::vector<int64_t>& axes, int64_t num_heads,
                                                    int64_t head_dim, double eps);

// The gradients of qkv, and in float32 those of the weights, (N, D); none of these where nobody needs them.
std::tuple<std::vector<Tensor>, Tensor> qk_norm_rope_backward_cpu(
    const Tensor& dq, const Tensor& dk, const Tensor& dv, bool needs_weights, const std::vector<Tensor>& qkv,
    const std::vector<Tensor>& weights, const std::vector<Tensor>& tables,
    const std::vector<bool>& normalised, const std::vector<int64_t>& axes, int64_t num_heads,
    int64_t head_dim, double eps);

// Returns the queries, (B, H, L, D); L is 0 without any.
Tensor qk_norm_rope_cached_cpu(const Tensor& qkv, OptionalTensor q_weight, OptionalTensor k_weight,
                               OptionalTensor cos, OptionalTensor sin, const Tensor& k_cache,
                               const Tensor& v_cache, const Tensor& positions, OptionalTensor rows,
                               int64_t num_heads, int64_t head_dim, int64_t axes, double eps);

}  // namespace madformer
