// The launchers: each checks its arguments and dispatches on the dtype. They use torch's stable ABI only, so
// one build serves every torch from the version in CMakeLists.txt on.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace madformer {

// Shapes and errors: kernels/denoise_step.py, whose public function has already named bad arguments.
void denoise_step_cpu(const torch::stable::Tensor& sample, const torch::stable::Tensor& model_output,
                      const torch::stable::Tensor& previous, const torch::stable::Tensor& coefficients,
                      std::optional<double> clip, std::optional<torch::stable::Tensor> unconditional,
                      std::optional<torch::stable::Tensor> guidance_scale);

}  // namespace madformer
