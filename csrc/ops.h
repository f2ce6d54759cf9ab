// The launchers: each checks its arguments and dispatches on the dtype. They use torch's stable ABI only, so
// one build serves every torch from the version in CMakeLists.txt on. Shapes and errors: kernels/<op>, whose
// public functions have already named bad arguments.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

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

// Returns the queries, (B, L, H, D); without any, (B, 0, H, D).
Tensor qk_norm_rope_cached_cpu(const Tensor& qkv, OptionalTensor q_weight, OptionalTensor k_weight,
                               OptionalTensor cos, OptionalTensor sin, const Tensor& k_cache,
                               const Tensor& v_cache, const Tensor& positions, OptionalTensor rows,
                               int64_t num_heads, int64_t head_dim, int64_t axes, double eps);

}  // namespace madformer
