#include "swiglu.h"

#include "ops.h"
#include "tensors.h"

namespace madformer {

Tensor swiglu_cpu(const Tensor& gate, const Tensor& up) {
  const Dtype dtype = dtype_of("gate", gate);
  STD_TORCH_CHECK(up.is_cpu() && up.sizes().equals(gate.sizes()) && up.scalar_type() == gate.scalar_type(),
                  "up must have gate's shape, dtype and device");
  const Tensor out = torch::stable::new_empty(gate, gate.sizes());
  const int64_t size = gate.numel();
  if (size == 0) return out;
  const bool joined = gate.is_contiguous() && up.is_contiguous();
  const Tensor gates = joined ? gate : even_rows_of(gate), ups = joined ? up : even_rows_of(up);
  const Swiglu op{.gate = gates.const_data_ptr(),
                  .up = ups.const_data_ptr(),
                  .out = out.mutable_data_ptr(),
                  .dtype = dtype,
                  .num_columns = joined ? size : gate.size(gate.dim() - 1),
                  .stride_gate = joined ? 0 : *row_stride(gates),
                  .stride_up = joined ? 0 : *row_stride(ups)};
  in_parallel(size, 1, [&](int64_t begin, int64_t end) { vector_kernels().swiglu(op, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> swiglu_backward_cpu(const Tensor& grad, const Tensor& gate, const Tensor& up) {
  const Dtype dtype = dtype_of("gate", gate);
  for (const Tensor* tensor : {&grad, &up}) {
    STD_TORCH_CHECK(tensor->is_cpu() && tensor->sizes().equals(gate.sizes()) &&
                        tensor->scalar_type() == gate.scalar_type(),
                    "grad and up must have gate's shape, dtype and device");
  }
  const Tensor dgate = torch::stable::new_empty(gate, gate.sizes());
  const Tensor dup = torch::stable::new_empty(gate, gate.sizes());
  const int64_t size = gate.numel();
  if (size == 0) return {dgate, dup};
  const Tensor grads = even_rows_of(grad), gates = even_rows_of(gate), ups = even_rows_of(up);
  const SwigluBackward op{.grad = grads.const_data_ptr(),
                          .gate = gates.const_data_ptr(),
                          .up = ups.const_data_ptr(),
                          .dgate = dgate.mutable_data_ptr(),
                          .dup = dup.mutable_data_ptr(),
                          .dtype = dtype,
                          .num_columns = gate.size(gate.dim() - 1),
                          .stride_grad = *row_stride(grads),
                          .stride_gate = *row_stride(gates),
                          .stride_up = *row_stride(ups)};
  in_parallel(size, 1, [&](int64_t begin, int64_t end) { vector_kernels().swiglu_backward(op, begin, end); });
  return {dgate, dup};
}

}  // namespace madformer
