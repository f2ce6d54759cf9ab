// silu(gate) * up on the CPU, free of torch.
#pragma once

#include <cstdint>

#include "vector_kernels.h"

namespace madformer {

// Rows of contiguous columns; strides count elements. The result is contiguous.
struct Swiglu {
  const void* gate;
  const void* up;
  void* out;
  Dtype dtype;
  int64_t num_columns, stride_gate, stride_up;
};

// Its gradients; all rows as above.
struct SwigluBackward {
  const void* grad;
  const void* gate;
  const void* up;
  void* dgate;
  void* dup;
  Dtype dtype;
  int64_t num_columns, stride_grad, stride_gate, stride_up;
};

}  // namespace madformer
