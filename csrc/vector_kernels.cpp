// The vector kernels, compiled once for each generation of processors, and the choice among them.
#ifdef MADFORMER_HIGHWAY
// AVX2, AVX-512 and NEON, and what the compiler was told that every processor has. Highway's own choice at
// run time would need its shared library.
#define HWY_DISABLED_TARGETS \
  (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "vector_kernels.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
#endif

#include "attention_vectors.h"
#include "block_causal_attention_vectors.h"
#include "group_norm_silu_vectors.h"
#include "residual_norm_vectors.h"
#include "swiglu_vectors.h"
#include "vector_kernels.h"
#include "vectors.h"
#include "winograd_vectors.h"

HWY_BEFORE_NAMESPACE();
namespace madformer {
namespace HWY_NAMESPACE {

inline void widen(const void* from, Dtype dtype, int64_t size, float* to) {
  with_dtype(dtype, [&]<typename T>(T) MADFORMER_STEP {
    for_columns(size, [&](int64_t i, auto columns) MADFORMER_STEP {
      store(load(static_cast<const T*>(from) + i, columns), to + i, columns);
    });
  });
}

inline void narrow(const float* from, int64_t size, Dtype dtype, void* to) {
  with_dtype(dtype, [&]<typename T>(T) MADFORMER_STEP {
    for_columns(size, [&](int64_t i, auto columns) MADFORMER_STEP {
      store(load(from + i, columns), static_cast<T*>(to) + i, columns);
    });
  });
}

VectorKernels kernels(const char* target) {
  return {.target = target,
          .widen = widen,
          .narrow = narrow,
          .swiglu = swiglu,
          .swiglu_backward = swiglu_backward,
          .residual_norm = residual_norm,
          .residual_norm_backward = residual_norm_backward,
          .channel_moments = channel_moments,
          .normalise = normalise,
          .normalise_sums = normalise_sums,
          .normalise_backward = normalise_backward,
          .attention_keys = kTileKeys,
          .attention_queries = attention_queries,
          .attention = attention,
          .block_attention_panel = kPanel,
          .block_attention = block_attention,
          .block_attention_backward = block_attention_backward,
          .winograd_spread = winograd_spread,
          .winograd_spread_backward = winograd_spread_backward,
          .winograd_gather = winograd_gather,
          .winograd_gather_backward = winograd_gather_backward};
}

}  // namespace HWY_NAMESPACE
}  // namespace madformer
HWY_AFTER_NAMESPACE();

#if !defined(MADFORMER_HIGHWAY) || HWY_ONCE
namespace madformer {
namespace {

VectorKernels choose() {
#ifdef MADFORMER_HIGHWAY
#if HWY_TARGETS & HWY_AVX3
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512cd")) {
    return N_AVX3::kernels("AVX-512");
  }
#endif
#if HWY_TARGETS & HWY_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    return N_AVX2::kernels("AVX2");
  }
#endif
#if HWY_ARCH_ARM_A64 && (HWY_TARGETS & HWY_NEON)
  return N_NEON::kernels("NEON");
#else
  return HWY_STATIC_DISPATCH(kernels)(hwy::TargetName(HWY_STATIC_TARGET));
#endif
#else
  return N_SCALAR::kernels("");
#endif
}

}  // namespace

const VectorKernels& vector_kernels() {
  static const VectorKernels chosen = choose();
  return chosen;
}

}  // namespace madformer
#endif
