// One denoising update of a batch of rows on the CPU, free of torch:
//
//   x0 = clamp(c[0] * x + c[1] * m, -clip, clip)
//   x' = c[2] * x + c[3] * m + c[4] * x0 + c[5] * previous
//
// with one row of coefficients `c` for each row of `x`. Both `x` (to x') and `previous` (to x0) are replaced.
#pragma once

#include <algorithm>
#include <cstdint>

namespace madformer {

constexpr int64_t kNumDenoiseCoefficients = 6;

// `count` neighbouring elements of one row. Without `kReadsPrevious` the previous prediction is only written:
// it may be uninitialised, and 0 * NaN would be NaN.
template <bool kReadsPrevious, typename Output>
void denoise_span(float* sample, const Output* model_output, float* previous, const float* coefficients,
                  float clip, int64_t count) {
  // Copied, because the compiler must assume that the stores below may change them.
  const float to_x0_sample = coefficients[0], to_x0_output = coefficients[1];
  const float to_sample = coefficients[2], to_output = coefficients[3], to_x0 = coefficients[4];
  const float to_previous = coefficients[5];
  for (int64_t i = 0; i < count; ++i) {
    const float x = sample[i];
    const float m = static_cast<float>(model_output[i]);
    float x0 = to_x0_sample * x + to_x0_output * m;
    // Comparisons in this order let a NaN through, as torch.clamp does.
    x0 = x0 < -clip ? -clip : (x0 > clip ? clip : x0);
    float next = to_sample * x + to_output * m + to_x0 * x0;
    if constexpr (kReadsPrevious) next += to_previous * previous[i];
    sample[i] = next;
    previous[i] = x0;
  }
}

// Elements [begin, end) of a batch of contiguous rows of `row_size` elements: threads may share a row.
template <typename Output>
void denoise_range(float* sample, const Output* model_output, float* previous, const float* coefficients,
                   float clip, int64_t row_size, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t row = begin / row_size;
    const int64_t count = std::min(end, (row + 1) * row_size) - begin;
    const float* c = coefficients + row * kNumDenoiseCoefficients;
    const auto span = c[5] == 0.0f ? denoise_span<false, Output> : denoise_span<true, Output>;
    span(sample + begin, model_output + begin, previous + begin, c, clip, count);
    begin += count;
  }
}

}  // namespace madformer
