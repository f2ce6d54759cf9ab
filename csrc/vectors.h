// Vectors of float as the kernels use them: Highway's where CMake found it, else of one lane. No include
// guard of the usual kind: vector_kernels.cpp compiles this and the kernels once for each generation of
// processors.
//
// Loads widen to float whatever lies in memory, stores round once.
#if defined(MADFORMER_VECTORS_H) == defined(HWY_TARGET_TOGGLE)
#ifdef MADFORMER_VECTORS_H
#undef MADFORMER_VECTORS_H
#else
#define MADFORMER_VECTORS_H
#endif

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "half_types.h"
#include "vector_kernels.h"

#ifdef MADFORMER_HIGHWAY
#include <hwy/highway.h>
#else
#define HWY_NAMESPACE N_SCALAR
#define HWY_BEFORE_NAMESPACE() static_assert(true)
#define HWY_AFTER_NAMESPACE() static_assert(true)
#define HWY_ATTR
#define HWY_INLINE inline __attribute__((always_inline))
#endif

// Of the lambdas that loops call: compiled for the same processors as the loop, and part of it.
#undef MADFORMER_STEP
#define MADFORMER_STEP HWY_ATTR __attribute__((always_inline))

HWY_BEFORE_NAMESPACE();
namespace madformer {
namespace HWY_NAMESPACE {

#ifdef MADFORMER_HIGHWAY
namespace hn = hwy::HWY_NAMESPACE;

#undef MADFORMER_CONVERTS_FLOAT16
// Elsewhere Highway cuts float16 off, or computes it in more steps than the lanes one by one take.
#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_NEON
#define MADFORMER_CONVERTS_FLOAT16 1
#else
#define MADFORMER_CONVERTS_FLOAT16 0
#endif

using Tag = hn::ScalableTag<float>;
using Vec = hn::Vec<Tag>;
constexpr Tag kTag;
constexpr int64_t kLanes = HWY_LANES(float);

HWY_INLINE Vec all(float value) { return hn::Set(kTag, value); }
HWY_INLINE Vec fma(Vec a, Vec b, Vec c) { return hn::MulAdd(a, b, c); }
HWY_INLINE float sum(Vec x) { return hn::GetLane(hn::SumOfLanes(kTag, x)); }
// Of numbers: which of two is given where one is NaN hangs on the processor.
HWY_INLINE Vec max(Vec a, Vec b) { return hn::Max(a, b); }
// `y`, or `x` where that is NaN.
HWY_INLINE Vec keep_nan(Vec x, Vec y) { return hn::IfThenElse(hn::IsNaN(x), x, y); }

// Within one rounding of float but at its ends: zero up to -87.7, infinite from 88.4 on, and undefined for
// NaN. It takes half the instructions of Highway's, which SiLU is made of: 2^n e^r, r at most half of ln 2,
// by a polynomial that was fitted to the relative error.
HWY_INLINE Vec exp(Vec x) {
  // The sum's last bits are n and the bias of an exponent.
  const Vec shift = all(0x1.8p23f + 127.0f);
  const Vec within = hn::Max(hn::Min(x, all(88.8f)), all(-88.0f));
  const Vec sum = fma(within, all(1.44269504f), shift);
  const Vec n = sum - shift;
  const Vec r = fma(n, all(2.12194440e-4f), fma(n, all(-0.693359375f), within));
  Vec y = fma(all(0.00138436072f), r, all(0.00837419555f));
  y = fma(y, r, all(0.0416680053f));
  y = fma(y, r, all(0.166664302f));
  y = fma(y, r, all(0.49999994f));
  y = fma(y, r, all(1.0f));
  y = fma(y, r, all(1.0f));
  const hn::Rebind<int32_t, Tag> integers;
  return y * hn::BitCast(kTag, hn::ShiftLeft<23>(hn::BitCast(integers, sum)));
}

template <typename T>
HWY_INLINE Vec load(const T* p) {
  if constexpr (std::is_same_v<T, float>) {
    return hn::LoadU(kTag, p);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const hn::Rebind<uint32_t, Tag> wide;
    const hn::Rebind<uint16_t, Tag> narrow;
    const auto bits = hn::LoadU(narrow, reinterpret_cast<const uint16_t*>(p));
    return hn::BitCast(kTag, hn::ShiftLeft<16>(hn::PromoteTo(wide, bits)));
  } else if constexpr (MADFORMER_CONVERTS_FLOAT16) {
    const hn::Rebind<hwy::float16_t, Tag> narrow;
    return hn::PromoteTo(kTag, hn::LoadU(narrow, reinterpret_cast<const hwy::float16_t*>(p)));
  } else {
    float lanes[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>(p[i]);
    return hn::LoadU(kTag, lanes);
  }
}

// Rounded to bfloat16, in the lower halves of the lanes. Highway's own conversion cuts off.
HWY_INLINE hn::Vec<hn::Rebind<uint32_t, Tag>> bfloat16_bits(Vec x) {
  const hn::Rebind<uint32_t, Tag> wide;
  const auto bits = hn::BitCast(wide, x);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(wide, 1));
  const auto rounded = hn::ShiftRight<16>(hn::Add(hn::Add(bits, hn::Set(wide, 0x7FFF)), odd));
  return hn::IfThenElse(hn::RebindMask(wide, hn::IsNaN(x)), hn::Set(wide, 0x7FC0), rounded);
}

template <typename T>
HWY_INLINE void store(Vec x, T* p) {
  if constexpr (std::is_same_v<T, float>) {
    hn::StoreU(x, kTag, p);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const hn::Rebind<uint16_t, Tag> narrow;
    const hn::Rebind<int32_t, Tag> wide;
    hn::StoreU(hn::DemoteTo(narrow, hn::BitCast(wide, bfloat16_bits(x))), narrow,
               reinterpret_cast<uint16_t*>(p));
  } else if constexpr (MADFORMER_CONVERTS_FLOAT16) {
    const hn::Rebind<hwy::float16_t, Tag> narrow;
    hn::StoreU(hn::DemoteTo(narrow, x), narrow, reinterpret_cast<hwy::float16_t*>(p));
  } else {
    float lanes[kLanes];
    hn::StoreU(x, kTag, lanes);
    for (int64_t i = 0; i < kLanes; ++i) p[i] = static_cast<T>(lanes[i]);
  }
}

#else  // Without Highway.
using Vec = float;
constexpr int64_t kLanes = 1;

HWY_INLINE Vec all(float value) { return value; }
HWY_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
HWY_INLINE float sum(Vec x) { return x; }
HWY_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
HWY_INLINE Vec keep_nan(Vec x, Vec y) { return x != x ? x : y; }
HWY_INLINE Vec exp(Vec x) { return std::exp(x); }
template <typename T>
HWY_INLINE Vec load(const T* p) {
  return static_cast<float>(*p);
}
template <typename T>
HWY_INLINE void store(Vec x, T* p) {
  *p = static_cast<T>(x);
}
#endif

// Calls `run` with a value of the type.
template <typename Run>
HWY_INLINE void with_dtype(Dtype dtype, Run run) {
  switch (dtype) {
    case Dtype::kFloat:
      return run(float{});
    case Dtype::kBFloat16:
      return run(BFloat16{});
    case Dtype::kFloat16:
      return run(Float16{});
  }
}

HWY_INLINE Vec zero() { return all(0.0f); }

// The columns that a step of a loop takes: as many as a vector has lanes, or, at the end of a row, fewer.
struct Whole {};
struct Part {
  int64_t count;
};

template <typename T>
HWY_INLINE Vec load(const T* p, Whole) {
  return load(p);
}
template <typename T>
HWY_INLINE Vec load(const T* p, Part part) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, part.count * sizeof(T));
  return load(lanes);
}
template <typename T>
HWY_INLINE void store(Vec x, T* p, Whole) {
  store(x, p);
}
template <typename T>
HWY_INLINE void store(Vec x, T* p, Part part) {
  T lanes[kLanes];
  store(x, lanes);
  std::memcpy(p, lanes, part.count * sizeof(T));
}

// Lanes beyond a part as zeros, which a sum does not see.
HWY_INLINE Vec live(Vec x, Whole) { return x; }
HWY_INLINE Vec live(Vec x, Part part) {
  float lanes[kLanes];
  store(x, lanes);
  return load(lanes, part);
}

// Calls `step(first, columns)` for all columns of a row.
template <typename Step>
HWY_INLINE void for_columns(int64_t size, Step step) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) step(i, Whole{});
  if (i < size) step(i, Part{size - i});
}

// The sum of `term(first, columns)` over all columns, in four sums that do not wait for one another.
template <typename Term>
HWY_INLINE float sum_columns(int64_t size, Term term) {
  Vec sums[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= size; i += 4 * kLanes) {
    for (int64_t k = 0; k < 4; ++k) sums[k] = sums[k] + term(i + k * kLanes, Whole{});
  }
  for (int64_t k = 0; i + kLanes <= size; i += kLanes, ++k) sums[k] = sums[k] + term(i, Whole{});
  if (i < size) sums[3] = sums[3] + term(i, Part{size - i});
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

HWY_INLINE Vec sigmoid(Vec x) { return all(1.0f) / (all(1.0f) + exp(zero() - x)); }
HWY_INLINE Vec silu(Vec x) { return x / (all(1.0f) + exp(zero() - x)); }

}  // namespace HWY_NAMESPACE
}  // namespace madformer
HWY_AFTER_NAMESPACE();

#endif  // MADFORMER_VECTORS_H
