// The launch of denoise_step.cu, free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include "denoise_step.h"

namespace madformer {

// On the current device; for float, __nv_bfloat16 and __half. Throws std::runtime_error.
template <typename Output>
void denoise_on_cuda(const DenoiseBatch<Output>& batch, cudaStream_t stream);

}  // namespace madformer
