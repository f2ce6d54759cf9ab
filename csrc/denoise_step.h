// One denoising update of a batch of rows, free of torch:
//
//   m  = u + s * (m - u)                                  where there is guidance
//   x0 = clamp(c[0] * x + c[1] * m, -clip, clip)
//   x' = c[2] * x + c[3] * m + c[4] * x0 + c[5] * previous
//
// with one row of coefficients `c` and one guidance scale `s` for each row of `x`. Both `x` (to x') and
// `previous` (to x0) are replaced. The arithmetic is one for the CPU, below, and for CUDA, in
// denoise_step.cu.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef __CUDACC__
#define MADFORMER_HOST_DEVICE __host__ __device__
#else
#define MADFORMER_HOST_DEVICE
#endif

namespace madformer {

constexpr int64_t kNumDenoiseCoefficients = 6;

// Contiguous rows of `row_size` elements; the last two, one each a row.
template <typename Output>
struct DenoiseBatch {
  float* sample;                // x
  const Output* model_output;   // m
  const Output* unconditional;  // u, null without guidance
  float* previous;
  const float* coefficients;    // kNumDenoiseCoefficients a row
  const float* guidance_scale;  // s, null without guidance
  int64_t num_rows;
  int64_t row_size;
  float clip;  // infinite for none
};

// What all elements of a row share. A copy, because the compiler must assume that a store may change the
// original.
struct DenoiseRow {
  float to_x0_sample, to_x0_output, to_sample, to_output, to_x0, to_previous, guidance_scale, clip;

  template <typename Output>
  MADFORMER_HOST_DEVICE DenoiseRow(const DenoiseBatch<Output>& batch, int64_t row)
      : guidance_scale(batch.guidance_scale ? batch.guidance_scale[row] : 1.0f), clip(batch.clip) {
    const float* c = batch.coefficients + row * kNumDenoiseCoefficients;
    to_x0_sample = c[0], to_x0_output = c[1];
    to_sample = c[2], to_output = c[3], to_x0 = c[4], to_previous = c[5];
  }

  // Where `to_previous` is 0 the previous prediction is only written: it may be uninitialised, and 0 * NaN is
  // NaN.
  MADFORMER_HOST_DEVICE bool reads_previous() const { return to_previous != 0.0f; }

  MADFORMER_HOST_DEVICE float guide(float m, float u) const { return u + guidance_scale * (m - u); }

  template <bool kReadsPrevious>
  MADFORMER_HOST_DEVICE void update(float m, float& x, float& previous) const {
    float x0 = to_x0_sample * x + to_x0_output * m;
    // Comparisons in this order let a NaN through, as torch.clamp does.
    x0 = x0 < -clip ? -clip : (x0 > clip ? clip : x0);
    float next = to_sample * x + to_output * m + to_x0 * x0;
    if constexpr (kReadsPrevious) next += to_previous * previous;
    x = next;
    previous = x0;
  }
};

// `count` neighbouring elements from `begin`, all of one row.
template <bool kReadsPrevious, bool kGuides, typename Output>
void denoise_span(const DenoiseBatch<Output>& batch, const DenoiseRow row, int64_t begin, int64_t count) {
  float* sample = batch.sample + begin;
  float* previous = batch.previous + begin;
  const Output* model_output = batch.model_output + begin;
  const Output* unconditional = kGuides ? batch.unconditional + begin : nullptr;
  for (int64_t i = 0; i < count; ++i) {
    float m = static_cast<float>(model_output[i]);
    if constexpr (kGuides) m = row.guide(m, static_cast<float>(unconditional[i]));
    row.update<kReadsPrevious>(m, sample[i], previous[i]);
  }
}

// Elements [begin, end) of a batch on the CPU: threads may share a row.
template <typename Output>
void denoise_range(const DenoiseBatch<Output>& batch, int64_t begin, int64_t end) {
  constexpr decltype(&denoise_span<false, false, Output>) spans[2][2] = {
      {denoise_span<false, false, Output>, denoise_span<false, true, Output>},
      {denoise_span<true, false, Output>, denoise_span<true, true, Output>}};
  while (begin < end) {
    const int64_t index = begin / batch.row_size;
    const int64_t count = std::min(end, (index + 1) * batch.row_size) - begin;
    const DenoiseRow row(batch, index);
    spans[row.reads_previous()][batch.unconditional != nullptr](batch, row, begin, count);
    begin += count;
  }
}

}  // namespace madformer
