// Compiled for each generation of processors, as vectors.h says.
#if defined(MADFORMER_SWIGLU_VECTORS_H) == defined(HWY_TARGET_TOGGLE)
#ifdef MADFORMER_SWIGLU_VECTORS_H
#undef MADFORMER_SWIGLU_VECTORS_H
#else
#define MADFORMER_SWIGLU_VECTORS_H
#endif

#include "swiglu.h"
#include "vectors.h"

HWY_BEFORE_NAMESPACE();
namespace madformer {
namespace HWY_NAMESPACE {

// Elements [begin, end), counted through all rows.
template <typename T>
void swiglu_of(const Swiglu& op, int64_t begin, int64_t end) {
  const T* gates = static_cast<const T*>(op.gate);
  const T* ups = static_cast<const T*>(op.up);
  T* out = static_cast<T*>(op.out);
  while (begin < end) {
    const int64_t row = begin / op.num_columns, first = begin % op.num_columns;
    const int64_t count = std::min(end - begin, op.num_columns - first);
    const T* gate = gates + row * op.stride_gate + first;
    const T* up = ups + row * op.stride_up + first;
    T* y = out + begin;
    for_columns(count, [&](int64_t i, auto columns) MADFORMER_STEP {
      store(silu(load(gate + i, columns)) * load(up + i, columns), y + i, columns);
    });
    begin += count;
  }
}

template <typename T>
void swiglu_backward_of(const SwigluBackward& op, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t row = begin / op.num_columns, first = begin % op.num_columns;
    const int64_t count = std::min(end - begin, op.num_columns - first);
    const T* grad = static_cast<const T*>(op.grad) + row * op.stride_grad + first;
    const T* gate = static_cast<const T*>(op.gate) + row * op.stride_gate + first;
    const T* up = static_cast<const T*>(op.up) + row * op.stride_up + first;
    T* dgate = static_cast<T*>(op.dgate) + begin;
    T* dup = static_cast<T*>(op.dup) + begin;
    for_columns(count, [&](int64_t i, auto columns) MADFORMER_STEP {
      const Vec x = load(gate + i, columns), dy = load(grad + i, columns), part = sigmoid(x), y = x * part;
      store(dy * y, dup + i, columns);
      store(dy * load(up + i, columns) * fma(y, all(1.0f) - part, part), dgate + i, columns);
    });
    begin += count;
  }
}

inline void swiglu_backward(const SwigluBackward& op, int64_t begin, int64_t end) {
  with_dtype(op.dtype, [&]<typename T>(T) MADFORMER_STEP { swiglu_backward_of<T>(op, begin, end); });
}

inline void swiglu(const Swiglu& op, int64_t begin, int64_t end) {
  with_dtype(op.dtype, [&]<typename T>(T) MADFORMER_STEP { swiglu_of<T>(op, begin, end); });
}

}  // namespace HWY_NAMESPACE
}  // namespace madformer
HWY_AFTER_NAMESPACE();

#endif  // MADFORMER_SWIGLU_VECTORS_H
