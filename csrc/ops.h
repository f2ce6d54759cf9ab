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

// The rest are those of kernels/swiglu.py, norm_common/op.py and group_norm_silu/__init__.py.
Tensor swiglu_cpu(const Tensor& gate, const Tensor& up);

std::tuple<Tensor, Tensor> swiglu_backward_cpu(const Tensor& grad, const Tensor& gate, const Tensor& up);

std::tuple<Tensor, Tensor> residual_norm_cpu(const Tensor& x, OptionalTensor shift, OptionalTensor scale,
                                             OptionalTensor weight, OptionalTensor bias,
                                             OptionalTensor residual, OptionalTensor gate, bool centred,
                                             double eps);

// Of x, shift, scale, weight, bias, total and gate; without elements where not wanted.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients residual_norm_backward_cpu(const Tensor& grad_y, OptionalTensor grad_total, const Tensor& total,
                                     OptionalTensor x, OptionalTensor scale, OptionalTensor gate,
                                     OptionalTensor weight, OptionalTensor bias, bool centred, double eps,
                                     const std::vector<bool>& wanted);

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_cpu(const Tensor& x, OptionalTensor temb,
                                                       const Tensor& weight, const Tensor& bias,
                                                       int64_t num_groups, double eps, bool silu);

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_silu_backward_cpu(
    const Tensor& grad, const Tensor& x, OptionalTensor temb, const Tensor& weight, const Tensor& bias,
    const Tensor& mean, const Tensor& rstd, int64_t num_groups, bool silu);

// (B, L, H, D), as kernels/cached_attention has it.
Tensor cached_attention_cpu(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                            const Tensor& lengths, OptionalTensor k, OptionalTensor v, OptionalTensor rows,
                            double scale);

// As kernels/self_attention.py.
Tensor self_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v, int64_t num_heads);

// (B, L, H, D) and the log-sum-exp (B, H, L) in float32, as kernels/block_causal_attention/compiled.py.
std::tuple<Tensor, Tensor> block_causal_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                                      const std::vector<int64_t>& readers, double scale);

// The gradients of q, k and v, (B, L, H, D).
std::tuple<Tensor, Tensor, Tensor> block_causal_attention_backward_cpu(const Tensor& grad, const Tensor& q,
                                                                       const Tensor& k, const Tensor& v,
                                                                       const Tensor& out, const Tensor& lse,
                                                                       const std::vector<int64_t>& readers,
                                                                       double scale);

// Maps (N, C, H, W) to tiles (S, T, C) and back, as kernels/conv3x3.py: S is 16, doubled 9.
Tensor winograd_spread_cpu(const Tensor& maps, bool doubled);

Tensor winograd_spread_backward_cpu(const Tensor& tiles, int64_t height, int64_t width, bool doubled);

Tensor winograd_gather_cpu(const Tensor& tiles, OptionalTensor bias, int64_t height, int64_t width,
                           bool doubled);

Tensor winograd_gather_backward_cpu(const Tensor& grad, bool doubled);

}  // namespace madformer
