#include "denoise_step.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <limits>

#include "ops.h"
#include "tensors.h"

#ifdef MADFORMER_WITH_CUDA
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "denoise_step_cuda.h"
#endif

namespace madformer {
namespace {

using torch::headeronly::ScalarType;

void check(const Tensor& sample, const Tensor& model_output, const Tensor& previous,
           const Tensor& coefficients, const OptionalTensor& unconditional,
           const OptionalTensor& guidance_scale) {
  STD_TORCH_CHECK(sample.dim() >= 1, "sample must have a batch dimension");
  for (const Tensor* tensor : {&model_output, &previous}) {
    STD_TORCH_CHECK(tensor->device() == sample.device() && tensor->sizes().equals(sample.sizes()),
                    "model_output and previous must have the shape and the device of sample");
  }
  STD_TORCH_CHECK(coefficients.device() == sample.device() && coefficients.dim() == 2 &&
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
  STD_TORCH_CHECK(unconditional->device() == sample.device() &&
                      unconditional->sizes().equals(sample.sizes()) &&
                      unconditional->scalar_type() == model_output.scalar_type(),
                  "unconditional must have the shape, the dtype and the device of model_output");
  STD_TORCH_CHECK(guidance_scale->device() == sample.device() && guidance_scale->dim() == 1 &&
                      guidance_scale->size(0) == sample.size(0) &&
                      guidance_scale->scalar_type() == ScalarType::Float,
                  "guidance_scale must be float32 of the shape (", sample.size(0), ",)");
}

void copy_back(Tensor target, const Tensor& source) {
  if (!target.is_contiguous()) torch::stable::copy_(target, source);
}

// The arguments as the kernels take them; no copy where a tensor is contiguous already.
class Arguments {
 public:
  Arguments(const Tensor& sample, const Tensor& model_output, const Tensor& previous,
            const Tensor& coefficients, std::optional<double> clip, const OptionalTensor& unconditional,
            const OptionalTensor& guidance_scale)
      : sample_(sample),
        previous_(previous),
        x_(torch::stable::contiguous(sample)),
        m_(torch::stable::contiguous(model_output)),
        x0_(torch::stable::contiguous(previous)),
        c_(torch::stable::contiguous(coefficients)),
        u_(contiguous(unconditional)),
        s_(contiguous(guidance_scale)),
        clip_(static_cast<float>(clip.value_or(std::numeric_limits<double>::infinity()))) {}

  ScalarType output_type() const { return m_.scalar_type(); }

  template <typename Output>
  DenoiseBatch<Output> batch() const {
    return {.sample = static_cast<float*>(x_.mutable_data_ptr()),
            .model_output = static_cast<const Output*>(m_.const_data_ptr()),
            .unconditional = u_ ? static_cast<const Output*>(u_->const_data_ptr()) : nullptr,
            .previous = static_cast<float*>(x0_.mutable_data_ptr()),
            .coefficients = static_cast<const float*>(c_.const_data_ptr()),
            .guidance_scale = s_ ? static_cast<const float*>(s_->const_data_ptr()) : nullptr,
            .num_rows = x_.size(0),
            .row_size = x_.numel() / x_.size(0),
            .clip = clip_};
  }

  // The two results where they were not computed in place.
  void copy_results_back() const {
    copy_back(sample_, x_);
    copy_back(previous_, x0_);
  }

 private:
  Tensor sample_, previous_, x_, m_, x0_, c_;
  OptionalTensor u_, s_;
  float clip_;
};

template <typename Output>
void run_on_cpu(const Arguments& arguments) {
  const DenoiseBatch<Output> batch = arguments.batch<Output>();
  torch::stable::parallel_for(0, batch.num_rows * batch.row_size, kGrainSize,
                              [&](int64_t begin, int64_t end) { denoise_range(batch, begin, end); });
}

}  // namespace

void denoise_step_cpu(const Tensor& sample, const Tensor& model_output, const Tensor& previous,
                      const Tensor& coefficients, std::optional<double> clip, OptionalTensor unconditional,
                      OptionalTensor guidance_scale) {
  check(sample, model_output, previous, coefficients, unconditional, guidance_scale);
  if (sample.numel() == 0) return;
  const Arguments arguments(sample, model_output, previous, coefficients, clip, unconditional,
                            guidance_scale);
  switch (arguments.output_type()) {
    case ScalarType::Float:
      run_on_cpu<float>(arguments);
      break;
    case ScalarType::BFloat16:
      run_on_cpu<torch::headeronly::BFloat16>(arguments);
      break;
    case ScalarType::Half:
      run_on_cpu<torch::headeronly::Half>(arguments);
      break;
    default:
      STD_TORCH_CHECK(false, "model_output must be float32, bfloat16 or float16");
  }
  arguments.copy_results_back();
}

#ifdef MADFORMER_WITH_CUDA
void denoise_step_cuda(const Tensor& sample, const Tensor& model_output, const Tensor& previous,
                       const Tensor& coefficients, std::optional<double> clip, OptionalTensor unconditional,
                       OptionalTensor guidance_scale) {
  check(sample, model_output, previous, coefficients, unconditional, guidance_scale);
  if (sample.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(sample.get_device_index());
  const Arguments arguments(sample, model_output, previous, coefficients, clip, unconditional,
                            guidance_scale);
  void* current = nullptr;
  // Not by torch's macro for this: it has another name in 2.11 than later.
  STD_TORCH_CHECK(
      aoti_torch_get_current_cuda_stream(sample.get_device_index(), &current) == AOTI_TORCH_SUCCESS,
      "torch tells no current CUDA stream");
  const auto stream = static_cast<cudaStream_t>(current);
  switch (arguments.output_type()) {
    case ScalarType::Float:
      denoise_on_cuda(arguments.batch<float>(), stream);
      break;
    case ScalarType::BFloat16:
      denoise_on_cuda(arguments.batch<__nv_bfloat16>(), stream);
      break;
    case ScalarType::Half:
      denoise_on_cuda(arguments.batch<__half>(), stream);
      break;
    default:
      STD_TORCH_CHECK(false, "model_output must be float32, bfloat16 or float16");
  }
  arguments.copy_results_back();
}
#endif

}  // namespace madformer
