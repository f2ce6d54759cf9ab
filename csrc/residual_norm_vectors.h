// Compiled for each generation of processors, as vectors.h says.
#if defined(MADFORMER_RESIDUAL_NORM_VECTORS_H) == defined(HWY_TARGET_TOGGLE)
#ifdef MADFORMER_RESIDUAL_NORM_VECTORS_H
#undef MADFORMER_RESIDUAL_NORM_VECTORS_H
#else
#define MADFORMER_RESIDUAL_NORM_VECTORS_H
#endif

#include <vector>

#include "residual_norm.h"
#include "vectors.h"

HWY_BEFORE_NAMESPACE();
namespace madformer {
namespace HWY_NAMESPACE {

// What the tokens of a block share, in float: y = normalised * factor + offset.
struct BlockModulation {
  explicit BlockModulation(int64_t size) : gate(size), factor(size), offset(size) {}

  // Of a forward or a backward pass; the latter has no shift, and needs no offset.
  template <typename Op>
  void read(const Op& op, int64_t block) {
    with_dtype(op.modulation_dtype, [&]<typename T>(T) MADFORMER_STEP {
      const auto row = [&](const Modulation& rows) {
        return rows.data ? static_cast<const T*>(rows.data) + block * rows.stride : nullptr;
      };
      const T *gates = row(op.gate), *scales = row(op.scale), *shifts = nullptr;
      if constexpr (std::is_same_v<Op, ResidualNorm>) shifts = row(op.shift);
      for_columns(op.num_columns, [&](int64_t i, auto columns) MADFORMER_STEP {
        const Vec scale = scales ? all(1.0f) + load(scales + i, columns) : all(1.0f);
        const Vec weight = op.weight ? load(op.weight + i, columns) : all(1.0f);
        Vec shift = shifts ? load(shifts + i, columns) : zero();
        if (op.bias) shift = fma(load(op.bias + i, columns), scale, shift);
        store(weight * scale, factor.data() + i, columns);
        store(shift, offset.data() + i, columns);
        if (gates) store(load(gates + i, columns), gate.data() + i, columns);
      });
    });
  }

  std::vector<float> gate, factor, offset;
};

// Mean, or zero, and the reciprocal of the deviation, or of the root mean square, of a row.
struct RowMoments {
  float mean, scale;
};

template <typename T>
HWY_INLINE RowMoments moments_of(const T* row, int64_t size, bool centred, float eps) {
  const float count = static_cast<float>(size);
  float mean = 0.0f;
  if (centred)
    mean = sum_columns(size, [&](int64_t i, auto columns) MADFORMER_STEP { return load(row + i, columns); }) /
           count;
  const float squares = sum_columns(size, [&](int64_t i, auto columns) MADFORMER_STEP {
    const Vec x = live(load(row + i, columns) - all(mean), columns);
    return x * x;
  });
  return {mean, 1.0f / std::sqrt(squares / count + eps)};
}

// Tokens [begin, end), counted through all samples. X is the type of x and y, S of the stream.
template <typename X, typename S>
void residual_norm_of(const ResidualNorm& op, int64_t begin, int64_t end) {
  const int64_t size = op.num_columns;
  BlockModulation modulation(size);
  const float *gate = modulation.gate.data(), *factor = modulation.factor.data(),
              *offset = modulation.offset.data();
  int64_t block = -1;
  // The row that is normalised, in S or, where x is, in X.
  const auto finish = [&](const auto* row, X* y) MADFORMER_STEP {
    const RowMoments moments = moments_of(row, size, op.centred, op.eps);
    const Vec mean = all(moments.mean), scale = all(moments.scale);
    for_columns(size, [&](int64_t i, auto columns) MADFORMER_STEP {
      const Vec normal = (load(row + i, columns) - mean) * scale;
      store(fma(normal, load(factor + i, columns), load(offset + i, columns)), y + i, columns);
    });
  };
  for (int64_t token = begin; token < end; ++token) {
    if (token / op.tokens_of_block != block) modulation.read(op, block = token / op.tokens_of_block);
    const int64_t b = token / op.length, l = token % op.length;
    const X* x = static_cast<const X*>(op.x.data) + b * op.x.stride_b + l * op.x.stride_l;
    X* y = static_cast<X*>(op.y) + token * size;
    if (!op.total) {
      finish(x, y);
      continue;
    }
    const S* residual =
        static_cast<const S*>(op.residual.data) + b * op.residual.stride_b + l * op.residual.stride_l;
    S* total = static_cast<S*>(op.total) + token * size;
    if (op.gate.data) {
      for_columns(size, [&](int64_t i, auto columns) MADFORMER_STEP {
        const Vec branch = load(gate + i, columns) * load(x + i, columns);
        store(load(residual + i, columns) + branch, total + i, columns);
      });
    } else {
      for_columns(size, [&](int64_t i, auto columns) MADFORMER_STEP {
        store(load(residual + i, columns) + load(x + i, columns), total + i, columns);
      });
    }
    finish(static_cast<const S*>(total), y);
  }
}

// The gradients of tokens [begin, end), counted through all samples and all of one block. Adds to sums over
// them.
template <typename X, typename S>
void residual_norm_backward_of(const ResidualNormBackward& op, int64_t begin, int64_t end,
                               const TokenSums& sums) {
  const int64_t size = op.num_columns;
  const float count = static_cast<float>(size);
  BlockModulation modulation(size);
  modulation.read(op, begin / op.tokens_of_block);
  const float* gate = op.gate.data ? modulation.gate.data() : nullptr;
  const float* factor = modulation.factor.data();
  const auto add = [&](float* into, int64_t i, auto columns, Vec value)
                       MADFORMER_STEP { store(load(into + i, columns) + value, into + i, columns); };
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / op.length, l = token % op.length;
    const auto row = [&]<typename T>(const Rows<const void*>& rows, T) {
      return rows.data ? static_cast<const T*>(rows.data) + b * rows.stride_b + l * rows.stride_l : nullptr;
    };
    const X *grad = row(op.grad_y, X{}), *x = row(op.x, X{});
    const S *total = row(op.total, S{}), *grad_total = row(op.grad_total, S{});
    const RowMoments moments = moments_of(total, size, op.centred, op.eps);
    const Vec mean = all(moments.mean), scale = all(moments.scale);
    Vec sum = zero(), along = zero();
    for_columns(size, [&](int64_t i, auto columns) MADFORMER_STEP {
      const Vec normal = (load(total + i, columns) - mean) * scale, dy = load(grad + i, columns);
      const Vec weighted = dy * load(factor + i, columns);
      sum = sum + weighted;
      along = fma(weighted, normal, along);
      if (sums.grad) add(sums.grad, i, columns, dy);
      if (sums.along) add(sums.along, i, columns, dy * normal);
    });
    const Vec mean_grad = all(op.centred ? madformer::HWY_NAMESPACE::sum(sum) / count : 0.0f);
    const Vec mean_along = all(madformer::HWY_NAMESPACE::sum(along) / count);
    S* dtotal = op.dtotal ? static_cast<S*>(op.dtotal) + token * size : nullptr;
    X* dx = op.dx ? static_cast<X*>(op.dx) + token * size : nullptr;
    for_columns(size, [&](int64_t i, auto columns) MADFORMER_STEP {
      const Vec normal = (load(total + i, columns) - mean) * scale;
      const Vec weighted = load(grad + i, columns) * load(factor + i, columns);
      Vec result = scale * (weighted - mean_grad - normal * mean_along);
      if (grad_total) result = result + load(grad_total + i, columns);
      if (dtotal) store(result, dtotal + i, columns);
      if (sums.gate) add(sums.gate, i, columns, result * load(x + i, columns));
      if (dx) store(gate ? result * load(gate + i, columns) : result, dx + i, columns);
    });
  }
}

inline void residual_norm_backward(const ResidualNormBackward& op, int64_t begin, int64_t end,
                                   const TokenSums& sums) {
  with_dtype(op.dtype, [&]<typename X>(X) MADFORMER_STEP {
    with_dtype(op.stream_dtype,
               [&]<typename S>(S) MADFORMER_STEP { residual_norm_backward_of<X, S>(op, begin, end, sums); });
  });
}

inline void residual_norm(const ResidualNorm& op, int64_t begin, int64_t end) {
  with_dtype(op.dtype, [&]<typename X>(X) MADFORMER_STEP {
    if (!op.total) return residual_norm_of<X, X>(op, begin, end);
    with_dtype(op.stream_dtype,
               [&]<typename S>(S) MADFORMER_STEP { residual_norm_of<X, S>(op, begin, end); });
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace madformer
HWY_AFTER_NAMESPACE();

#endif  // MADFORMER_RESIDUAL_NORM_VECTORS_H
