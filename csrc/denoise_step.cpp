#include "denoise_step.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <limits>

#include "ops.h"

namespace madformer {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Elements per thread below which waking another one costs more than it saves.
constexpr int64_t kGrainSize = 32768;

void check(const Tensor& sample, const Tensor& model_output, const Tensor& previous,
           const Tensor& coefficients) {
  STD_TORCH_CHECK(sample.dim() >= 1, "sample must have a batch dimension");
  for (const Tensor* tensor : {&model_output, &previous}) {
    STD_TORCH_CHECK(tensor->is_cpu() && tensor->sizes().equals(sample.sizes()),
                    "model_output and previous must have the shape and the device of sample");
  }
  STD_TORCH_CHECK(coefficients.is_cpu() && coefficients.dim() == 2 &&
                      coefficients.size(0) == sample.size(0) &&
                      coefficients.size(1) == kNumDenoiseCoefficients,
                  "coefficients must have the shape (", sample.size(0), ", ", kNumDenoiseCoefficients, ")");
  for (const Tensor* tensor : {&sample, &previous, &coefficients}) {
    STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float,
                    "sample, previous and coefficients must be float32");
  }
}

template <typename Output>
void launch(const Tensor& sample, const Tensor& model_output, const Tensor& previous,
            const Tensor& coefficients, float clip) {
  auto* x = static_cast<float*>(sample.mutable_data_ptr());
  const auto* m = static_cast<const Output*>(model_output.const_data_ptr());
  auto* x0 = static_cast<float*>(previous.mutable_data_ptr());
  const auto* c = static_cast<const float*>(coefficients.const_data_ptr());
  const int64_t row_size = sample.numel() / sample.size(0);
  torch::stable::parallel_for(0, sample.numel(), kGrainSize, [=](int64_t begin, int64_t end) {
    denoise_range(x, m, x0, c, clip, row_size, begin, end);
  });
}

}  // namespace

void denoise_step_cpu(const Tensor& sample, const Tensor& model_output, const Tensor& previous,
                      const Tensor& coefficients, std::optional<double> clip) {
  check(sample, model_output, previous, coefficients);
  if (sample.numel() == 0) return;
  // No copy where a tensor is contiguous already; otherwise the two results are copied back.
  const Tensor x = torch::stable::contiguous(sample);
  const Tensor m = torch::stable::contiguous(model_output);
  Tensor x0 = torch::stable::contiguous(previous);
  const Tensor c = torch::stable::contiguous(coefficients);
  const float bound = static_cast<float>(clip.value_or(std::numeric_limits<double>::infinity()));
  switch (m.scalar_type()) {
    case ScalarType::Float:
      launch<float>(x, m, x0, c, bound);
      break;
    case ScalarType::BFloat16:
      launch<torch::headeronly::BFloat16>(x, m, x0, c, bound);
      break;
    case ScalarType::Half:
      launch<torch::headeronly::Half>(x, m, x0, c, bound);
      break;
    default:
      STD_TORCH_CHECK(false, "model_output must be float32, bfloat16 or float16");
  }
  if (!sample.is_contiguous()) {
    Tensor target = sample;
    torch::stable::copy_(target, x);
  }
  if (!previous.is_contiguous()) {
    Tensor target = previous;
    torch::stable::copy_(target, x0);
  }
}

}  // namespace madformer
