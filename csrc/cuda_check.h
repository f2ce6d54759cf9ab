// Errors of the CUDA runtime as exceptions.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace madformer {

inline void check_cuda(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // It is reported here, and must not surface again at a later call.
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
}

}  // namespace madformer

#define MADFORMER_CUDA_CHECK(call) ::madformer::check_cuda((call), #call)
