#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda_check.h"
#include "denoise_step_cuda.h"

namespace madformer {
namespace {

// A step of one sample is latency and nothing else: short blocks spread its few kilobytes over many
// multiprocessors.
constexpr int kThreads = 128;
constexpr int kMostElements = 4;  // a thread: 16 bytes of float a load

// Neighbours that are loaded and stored as one.
template <typename Element, int kElements>
struct alignas(sizeof(Element) * kElements) Pack {
  Element elements[kElements];
};

// A block takes kThreads * kElements columns of one row.
template <int kElements, typename Output>
__global__ void __launch_bounds__(kThreads)
    denoise_kernel(DenoiseBatch<Output> batch, unsigned blocks_per_row) {
  using Floats = Pack<float, kElements>;
  using Outputs = Pack<Output, kElements>;
  const int64_t index = blockIdx.x / blocks_per_row;
  const int64_t column =
      (static_cast<int64_t>(blockIdx.x % blocks_per_row) * kThreads + threadIdx.x) * kElements;
  if (column >= batch.row_size) return;
  const int64_t at = index * batch.row_size + column;
  const DenoiseRow row(batch, index);

  Floats x = *reinterpret_cast<const Floats*>(batch.sample + at);
  const Outputs m = *reinterpret_cast<const Outputs*>(batch.model_output + at);
  Outputs u = m;
  if (batch.unconditional) u = *reinterpret_cast<const Outputs*>(batch.unconditional + at);
  Floats previous = {};
  if (row.reads_previous()) previous = *reinterpret_cast<const Floats*>(batch.previous + at);
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    float guided = static_cast<float>(m.elements[i]);
    if (batch.unconditional) guided = row.guide(guided, static_cast<float>(u.elements[i]));
    row.update<true>(guided, x.elements[i], previous.elements[i]);
  }
  *reinterpret_cast<Floats*>(batch.sample + at) = x;
  *reinterpret_cast<Floats*>(batch.previous + at) = previous;
}

template <int kElements>
bool is_aligned(const void* pointer, size_t element_size) {
  return reinterpret_cast<uintptr_t>(pointer) % (kElements * element_size) == 0;
}

template <int kElements, typename Output>
void launch(const DenoiseBatch<Output>& batch, cudaStream_t stream) {
  constexpr int64_t kColumns = kThreads * kElements;
  const auto blocks_per_row = static_cast<unsigned>((batch.row_size + kColumns - 1) / kColumns);
  const dim3 grid(static_cast<unsigned>(batch.num_rows * blocks_per_row));
  denoise_kernel<kElements><<<grid, kThreads, 0, stream>>>(batch, blocks_per_row);
  MADFORMER_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

template <typename Output>
void denoise_on_cuda(const DenoiseBatch<Output>& batch, cudaStream_t stream) {
  const bool aligned = batch.row_size % kMostElements == 0 &&
                       is_aligned<kMostElements>(batch.sample, sizeof(float)) &&
                       is_aligned<kMostElements>(batch.previous, sizeof(float)) &&
                       is_aligned<kMostElements>(batch.model_output, sizeof(Output)) &&
                       is_aligned<kMostElements>(batch.unconditional, sizeof(Output));
  aligned ? launch<kMostElements>(batch, stream) : launch<1>(batch, stream);
}

template void denoise_on_cuda(const DenoiseBatch<float>&, cudaStream_t);
template void denoise_on_cuda(const DenoiseBatch<__nv_bfloat16>&, cudaStream_t);
template void denoise_on_cuda(const DenoiseBatch<__half>&, cudaStream_t);

}  // namespace madformer
