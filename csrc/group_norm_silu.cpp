#include "group_norm_silu.h"

#include <torch/headeronly/core/MemoryFormat.h>

#include "ops.h"
#include "tensors.h"

namespace madformer {
namespace {

using torch::headeronly::MemoryFormat;

// Maps that lie in memory as the kernels read them: planes where they are contiguous, else channels-last,
// copied where neither pixels nor channels are evenly spaced.
class MapTensor {
 public:
  explicit MapTensor(const Tensor& x, bool planes) : planes_(planes) {
    const bool as_is = planes ? x.is_contiguous() : x.size(1) == 1 || x.stride(1) == 1;
    const int64_t height = x.size(2), width = x.size(3);
    const bool even = height == 1 || width == 1 || x.stride(2) == width * x.stride(3);
    tensor_ = as_is && (planes || even) ? x
              : planes                  ? torch::stable::contiguous(x)
                                        : torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
  }

  Maps<const void*> view() const {
    const Tensor& x = tensor_;
    const int64_t pixels = x.size(2) * x.size(3);
    if (planes_) return {x.const_data_ptr(), x.size(1) * pixels, pixels};
    return {x.const_data_ptr(), x.stride(0), x.size(3) == 1 ? x.stride(2) : x.stride(3)};
  }

 private:
  Tensor tensor_;
  bool planes_;
};

bool are_planes(const Tensor& x) { return x.is_contiguous() && x.size(1) > 1 && x.size(2) * x.size(3) > 1; }

// Of the shape of x, contiguous where that is, else channels-last.
Tensor empty_maps(const Tensor& x) {
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  if (x.is_contiguous()) return torch::stable::new_empty(x, x.sizes());
  if (x.stride(0) == h * w * c && x.stride(1) == 1 && x.stride(2) == w * c && x.stride(3) == c) {
    return torch::stable::empty_like(x);
  }
  const Tensor memory = torch::stable::new_empty(x, {n, h, w, c});
  return torch::stable::transpose(torch::stable::transpose(memory, 1, 3), 2, 3);
}

void check(const Tensor& x, const OptionalTensor& temb, const Tensor& weight, const Tensor& bias,
           int64_t num_groups) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0,
                  "x must be (N, C, H, W) with channels and pixels");
  const int64_t channels = x.size(1);
  STD_TORCH_CHECK(num_groups > 0 && channels % num_groups == 0, "num_groups must divide the channels of x");
  for (const Tensor* tensor : {&weight, &bias}) {
    STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == channels,
                    "weight and bias must have the shape (", channels, ",)");
  }
  STD_TORCH_CHECK(!temb || (temb->dim() == 2 && temb->size(0) == x.size(0) && temb->size(1) == channels),
                  "temb must have the shape (", x.size(0), ", ", channels, ")");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_cpu(const Tensor& x, OptionalTensor temb,
                                                       const Tensor& weight, const Tensor& bias,
                                                       int64_t num_groups, double eps, bool silu) {
  const Dtype dtype = dtype_of("x", x);
  check(x, temb, weight, bias, num_groups);
  const Tensor y = empty_maps(x);
  const Tensor mean =
      torch::stable::new_empty(x, {x.size(0), num_groups}, torch::headeronly::ScalarType::Float);
  const Tensor scale =
      torch::stable::new_empty(x, {x.size(0), num_groups}, torch::headeronly::ScalarType::Float);
  if (x.size(0) == 0) return {y, mean, scale};
  const bool planes = are_planes(x);
  const MapTensor maps(x, planes);
  const int64_t pixels = x.size(2) * x.size(3), channels = x.size(1);
  const Floats weights("weight", weight), biases("bias", bias), tembs("temb", temb);
  const GroupNorm op{.x = maps.view(),
                     .y = {y.mutable_data_ptr(), channels * pixels, planes ? pixels : channels},
                     .dtype = dtype,
                     .planes = planes,
                     .weight = weights.data(),
                     .bias = biases.data(),
                     .temb = tembs.data(),
                     .num_maps = x.size(0),
                     .num_channels = channels,
                     .num_pixels = pixels,
                     .num_groups = num_groups,
                     .eps = static_cast<float>(eps),
                     .silu = silu,
                     .mean = static_cast<float*>(mean.mutable_data_ptr()),
                     .scale = static_cast<float*>(scale.mutable_data_ptr())};
  group_norm_silu(op, vector_kernels(), torch::stable::get_num_threads(),
                  [](int64_t count, int64_t elements, auto run) { in_parallel(count, elements, run); });
  return {y, mean, scale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_silu_backward_cpu(
    const Tensor& grad, const Tensor& x, OptionalTensor temb, const Tensor& weight, const Tensor& bias,
    const Tensor& mean, const Tensor& rstd, int64_t num_groups, bool silu) {
  using torch::headeronly::ScalarType;
  const Dtype dtype = dtype_of("x", x);
  check(x, temb, weight, bias, num_groups);
  STD_TORCH_CHECK(grad.sizes().equals(x.sizes()) && grad.scalar_type() == x.scalar_type(),
                  "grad must have the shape and dtype of x");
  for (const Tensor* tensor : {&mean, &rstd}) {
    STD_TORCH_CHECK(tensor->dim() == 2 && tensor->size(0) == x.size(0) && tensor->size(1) == num_groups &&
                        tensor->scalar_type() == ScalarType::Float && tensor->is_contiguous(),
                    "mean and rstd must be contiguous float32 of the shape (", x.size(0), ", ", num_groups,
                    ")");
  }
  const Tensor dx = empty_maps(x);
  const Tensor dtemb =
      temb ? torch::stable::new_empty(*temb, temb->sizes()) : torch::stable::new_empty(x, {0});
  const Tensor dweight = torch::stable::new_empty(weight, weight.sizes());
  const Tensor dbias = torch::stable::new_empty(bias, bias.sizes());
  const bool planes = are_planes(x);
  const MapTensor maps(x, planes), grads(grad, planes);
  const int64_t pixels = x.size(2) * x.size(3), channels = x.size(1);
  const Floats weights("weight", weight), biases("bias", bias), tembs("temb", temb);
  std::vector<float> sum_temb(temb ? x.size(0) * channels : 0), sum_weight(channels, 0.0f),
      sum_bias(channels, 0.0f);
  const GroupNormBackward op{.grad = grads.view(),
                             .x = maps.view(),
                             .dx = {dx.mutable_data_ptr(), channels * pixels, planes ? pixels : channels},
                             .dtype = dtype,
                             .planes = planes,
                             .weight = weights.data(),
                             .bias = biases.data(),
                             .temb = tembs.data(),
                             .num_maps = x.size(0),
                             .num_channels = channels,
                             .num_pixels = pixels,
                             .num_groups = num_groups,
                             .silu = silu,
                             .mean = static_cast<const float*>(mean.const_data_ptr()),
                             .scale = static_cast<const float*>(rstd.const_data_ptr()),
                             .dtemb = temb ? sum_temb.data() : nullptr,
                             .dweight = sum_weight.data(),
                             .dbias = sum_bias.data()};
  group_norm_silu_backward(
      op, vector_kernels(), torch::stable::get_num_threads(),
      [](int64_t count, int64_t elements, auto run) { in_parallel(count, elements, run); });
  const auto put = [](const std::vector<float>& from, const char* name, const Tensor& to) {
    vector_kernels().narrow(from.data(), static_cast<int64_t>(from.size()), dtype_of(name, to),
                            to.mutable_data_ptr());
  };
  put(sum_weight, "weight", dweight), put(sum_bias, "bias", dbias);
  if (temb) put(sum_temb, "temb", dtemb);
  return {dx, dtemb, dweight, dbias};
}

}  // namespace madformer
