// What the launchers share: tensors as the kernels take them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "ops.h"
#include "vector_kernels.h"

namespace madformer {

// What is not contiguous in its last dimension is copied.
inline Tensor rows_of(const Tensor& tensor) {
  return tensor.stride(tensor.dim() - 1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

inline OptionalTensor rows_of(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(rows_of(*tensor)) : std::nullopt;
}

inline OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(torch::stable::contiguous(*tensor)) : std::nullopt;
}

// The distance of neighbouring rows, all dimensions but the last joined; nothing where it is not one number.
inline std::optional<int64_t> row_stride(const Tensor& tensor) {
  int64_t stride = tensor.size(tensor.dim() - 1), span = 0;
  for (int64_t d = tensor.dim() - 2; d >= 0; --d) {
    if (tensor.size(d) == 1) continue;
    if (span == 0) {
      stride = tensor.stride(d);
    } else if (tensor.stride(d) != span) {
      return std::nullopt;
    }
    span = tensor.stride(d) * tensor.size(d);
    // Rows that all lie at one place are not told from those that have been looked at.
    if (span == 0)
      return tensor.numel() == tensor.size(d) * tensor.size(tensor.dim() - 1) ? std::optional(stride)
                                                                              : std::nullopt;
  }
  return stride;
}

// The tensor, or a copy where its rows are not evenly spaced.
inline Tensor even_rows_of(const Tensor& tensor) {
  return tensor.stride(tensor.dim() - 1) == 1 && row_stride(tensor) ? tensor
                                                                    : torch::stable::contiguous(tensor);
}

inline std::optional<Dtype> find_dtype(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return Dtype::kFloat;
    case torch::headeronly::ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case torch::headeronly::ScalarType::Half:
      return Dtype::kFloat16;
    default:
      return std::nullopt;
  }
}

inline Dtype dtype_of(const char* name, const Tensor& tensor) {
  const std::optional<Dtype> dtype = find_dtype(tensor);
  STD_TORCH_CHECK(tensor.is_cpu() && dtype, name, " must be float32, bfloat16 or float16 on the CPU");
  return *dtype;
}

// A parameter or rows of them in float32, contiguous: the tensor's own memory, or a copy. Empty for none.
class Floats {
 public:
  Floats(const char* name, const OptionalTensor& tensor) {
    if (!tensor) return;
    const Dtype dtype = dtype_of(name, *tensor);
    source_ = torch::stable::contiguous(*tensor);
    data_ = static_cast<const float*>(source_->const_data_ptr());
    if (dtype == Dtype::kFloat) return;
    copy_.resize(source_->numel());
    vector_kernels().widen(data_, dtype, source_->numel(), copy_.data());
    data_ = copy_.data();
  }

  const float* data() const { return data_; }

 private:
  OptionalTensor source_;
  std::vector<float> copy_;
  const float* data_ = nullptr;
};

// `run(begin, end)` for parts of [0, count), each of which works on so many elements.
template <typename Run>
void in_parallel(int64_t count, int64_t elements, Run run) {
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kGrainSize / std::max<int64_t>(1, elements)),
                              run);
}

}  // namespace madformer
