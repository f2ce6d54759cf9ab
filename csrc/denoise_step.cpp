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

using OptionalTensor = std::optional<Tensor>;

void check(const Tensor& sample, const Tensor& model_output, const Tensor& previous,
           const Tensor& coefficients, const OptionalTensor& unconditional,
           const OptionalTensor& guidance_scale) {
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
  STD_TORCH_CHECK(unconditional.has_value() == guidance_scale.has_value(),
                  "unconditional and guidance_scale must come together");
  if (!unconditional) return;
  STD_TORCH_CHECK(unconditional->is_cpu() && unconditional->sizes().equals(sample.sizes()) &&
                      unconditional->scalar_type() == model_output.scalar_type(),
                  "unconditional must have the shape, the dtype and the device of model_output");
  STD_TORCH_CHECK(guidance_scale->is_cpu() && guidance_scale->dim() == 1 &&
                      guidance_scale->size(0) == sample.size(0) &&
                      guidance_scale->scalar_type() == ScalarType::Float,
                  "guidance_scale must be float32 of the shape (", sample.size(0), ",)");
}

// All contiguous.
template <typename Output>
void launch(const Tensor& sample, const Tensor& model_output, const Tensor& previous,
            const Tensor& coefficients, const OptionalTensor& unconditional,
            const OptionalTensor& guidance_scale, float clip) {
  const DenoiseBatch<Output> batch{
      .sample = static_cast<float*>(sample.mutable_data_ptr()),
      .model_output = static_cast<const Output*>(model_output.const_data_ptr()),
      .unconditional = unconditional ? static_cast<const Output*>(unconditional->const_data_ptr()) : nullptr,
      .previous = static_cast<float*>(previous.mutable_data_ptr()),
      .coefficients = static_cast<const float*>(coefficients.const_data_ptr()),
      .guidance_scale =
          guidance_scale ? static_cast<const float*>(guidance_scale->const_data_ptr()) : nullptr,
      .row_size = sample.numel() / sample.size(0),
      .clip = clip};
  torch::stable::parallel_for(0, sample.numel(), kGrainSize,
                              [&](int64_t begin, int64_t end) { denoise_range(batch, begin, end); });
}

OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(torch::stable::contiguous(*tensor)) : std::nullopt;
}

}  // namespace

void denoise_step_cpu(const Tensor& sample, const Tensor& model_output, const Tensor& previous,
                      const Tensor& coefficients, std::optional<double> clip, OptionalTensor unconditional,
                      OptionalTensor guidance_scale) {
  check(sample, model_output, previous, coefficients, unconditional, guidance_scale);
  if (sample.numel() == 0) return;
  // No copy where a tensor is contiguous already; otherwise the two results are copied back.
  const Tensor x = torch::stable::contiguous(sample);
  const Tensor m = torch::stable::contiguous(model_output);
  const Tensor x0 = torch::stable::contiguous(previous);
  const Tensor c = torch::stable::contiguous(coefficients);
  const OptionalTensor u = contiguous(unconditional), s = contiguous(guidance_scale);
  const float bound = static_cast<float>(clip.value_or(std::numeric_limits<double>::infinity()));
  switch (m.scalar_type()) {
    case ScalarType::Float:
      launch<float>(x, m, x0, c, u, s, bound);
      break;
    case ScalarType::BFloat16:
      launch<torch::headeronly::BFloat16>(x, m, x0, c, u, s, bound);
      break;
    case ScalarType::Half:
      launch<torch::headeronly::Half>(x, m, x0, c, u, s, bound);
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
