// One denoising update of a batch of rows on the CPU, free of torch:
//
//   m  = u + s * (m - u)                                  where there is guidance
//   x0 = clamp(c[0] * x + c[1] * m, -clip, clip)
//   x' = c[2] * x + c[3] * m + c[4] * x0 + c[5] * previous
//
// with one row of coefficients `c` and one guidance scale `s` for each row of `x`. Both `x` (to x') and
// `previous` (to x0) are replaced.
#pragma once

#include <algorithm>
#include <cstdint>

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
  int64_t row_size;
  float clip;  // infinite for none
};

// `count` neighbouring elements from `begin`, all of `row`. Without `kReadsPrevious` the previous prediction
// is only written: it may be uninitialised, and 0 * NaN would be NaN.
template <bool kReadsPrevious, bool kGuides, typename Output>
void denoise_span(const DenoiseBatch<Output>& batch, int64_t row, int64_t begin, int64_t count) {
  // Copied, because the compiler must assume that the stores below may change them.
  const float* c = batch.coefficients + row * kNumDenoiseCoefficients;
  const float to_x0_sample = c[0], to_x0_output = c[1];
  const float to_sample = c[2], to_output = c[3], to_x0 = c[4], to_previous = c[5];
  const float clip = batch.clip, scale = kGuides ? batch.guidance_scale[row] : 1.0f;
  float* sample = batch.sample + begin;
  float* previous = batch.previous + begin;
  const Output* model_output = batch.model_output + begin;
  const Output* unconditional = kGuides ? batch.unconditional + begin : nullptr;
  for (int64_t i = 0; i < count; ++i) {
    const float x = sample[i];
    float m = static_cast<float>(model_output[i]);
    if constexpr (kGuides) {
      const float u = static_cast<float>(unconditional[i]);
      m = u + scale * (m - u);
    }
    float x0 = to_x0_sample * x + to_x0_output * m;
    // Comparisons in this order let a NaN through, as torch.clamp does.
    x0 = x0 < -clip ? -clip : (x0 > clip ? clip : x0);
    float next = to_sample * x + to_output * m + to_x0 * x0;
    if constexpr (kReadsPrevious) next += to_previous * previous[i];
    sample[i] = next;
    previous[i] = x0;
  }
}

// Elements [begin, end) of a batch: threads may share a row.
template <typename Output>
void denoise_range(const DenoiseBatch<Output>& batch, int64_t begin, int64_t end) {
  constexpr decltype(&denoise_span<false, false, Output>) spans[2][2] = {
      {denoise_span<false, false, Output>, denoise_span<false, true, Output>},
      {denoise_span<true, false, Output>, denoise_span<true, true, Output>}};
  while (begin < end) {
    const int64_t row = begin / batch.row_size;
    const int64_t count = std::min(end, (row + 1) * batch.row_size) - begin;
    const bool reads_previous = batch.coefficients[row * kNumDenoiseCoefficients + 5] != 0.0f;
    spans[reads_previous][batch.unconditional != nullptr](batch, row, begin, count);
    begin += count;
  }
}

}  // namespace madformer
