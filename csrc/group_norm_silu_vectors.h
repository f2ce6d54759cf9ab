// Compiled for each generation of processors, as vectors.h says.
#if defined(MADFORMER_GROUP_NORM_SILU_VECTORS_H) == defined(HWY_TARGET_TOGGLE)
#ifdef MADFORMER_GROUP_NORM_SILU_VECTORS_H
#undef MADFORMER_GROUP_NORM_SILU_VECTORS_H
#else
#define MADFORMER_GROUP_NORM_SILU_VECTORS_H
#endif

#include <vector>

#include "group_norm_silu.h"
#include "vectors.h"

HWY_BEFORE_NAMESPACE();
namespace madformer {
namespace HWY_NAMESPACE {

// Adds distances of pixels from `origin`, and their squares, to sums for every channel; four pixels a step,
// as the sums are in memory.
template <typename T>
void add_distances(const T* first, int64_t stride, int64_t num_pixels, int64_t num_channels,
                   const float* origin, float* sums, float* squares) {
  const auto add = [&](int64_t c, auto columns, auto... x) MADFORMER_STEP {
    const Vec at = load(origin + c, columns);
    Vec sum = load(sums + c, columns), square = load(squares + c, columns);
    for (const Vec distance : {(x - at)...}) sum = sum + distance, square = fma(distance, distance, square);
    store(sum, sums + c, columns);
    store(square, squares + c, columns);
  };
  int64_t p = 0;
  for (; p + 4 <= num_pixels; p += 4) {
    const T* x = first + p * stride;
    for_columns(num_channels, [&](int64_t c, auto columns) MADFORMER_STEP {
      add(c, columns, load(x + c, columns), load(x + stride + c, columns), load(x + 2 * stride + c, columns),
          load(x + 3 * stride + c, columns));
    });
  }
  for (; p < num_pixels; ++p) {
    const T* x = first + p * stride;
    for_columns(num_channels,
                [&](int64_t c, auto columns) MADFORMER_STEP { add(c, columns, load(x + c, columns)); });
  }
}

// Mean and sum of squared deviations of every channel over pixels [begin, end) of a map.
template <typename T>
void channel_moments_of(const GroupNorm& op, int64_t map, int64_t begin, int64_t end, float* mean,
                        float* squares) {
  const T* x = static_cast<const T*>(op.x.data) + map * op.x.stride_n;
  const int64_t count = end - begin;
  const float part = 1.0f / static_cast<float>(count);
  if (op.planes) {
    for (int64_t c = 0; c < op.num_channels; ++c) {
      const T* plane = x + c * op.x.stride + begin;
      mean[c] = part * sum_columns(count, [&](int64_t i, auto columns)
                                              MADFORMER_STEP { return load(plane + i, columns); });
      squares[c] = sum_columns(count, [&](int64_t i, auto columns) MADFORMER_STEP {
        const Vec distance = live(load(plane + i, columns) - all(mean[c]), columns);
        return distance * distance;
      });
    }
    return;
  }
  // From the mean of four pixels, so that squares of distances are no more than a few times those of
  // deviations.
  x += begin * op.x.stride;
  const int64_t few = std::min<int64_t>(count, 4);
  std::vector<float> origin(op.num_channels);
  for_columns(op.num_channels, [&](int64_t c, auto columns) MADFORMER_STEP {
    Vec sum = zero();
    for (int64_t p = 0; p < few; ++p) sum = sum + load(x + p * op.x.stride + c, columns);
    store(sum * all(1.0f / static_cast<float>(few)), origin.data() + c, columns);
    store(zero(), mean + c, columns);
    store(zero(), squares + c, columns);
  });
  add_distances(x, op.x.stride, count, op.num_channels, origin.data(), mean, squares);
  for_columns(op.num_channels, [&](int64_t c, auto columns) MADFORMER_STEP {
    const Vec sum = load(mean + c, columns), distance = sum * all(part);
    store(load(origin.data() + c, columns) + distance, mean + c, columns);
    store(load(squares + c, columns) - sum * distance, squares + c, columns);
  });
}

template <typename T, bool kSilu>
void normalise_of(const GroupNorm& op, int64_t map, int64_t begin, int64_t end, const float* factor,
                  const float* offset) {
  const T* x = static_cast<const T*>(op.x.data) + map * op.x.stride_n;
  T* y = static_cast<T*>(op.y.data) + map * op.y.stride_n;
  const auto result = [](Vec x, Vec factor, Vec offset) MADFORMER_STEP {
    const Vec normal = fma(x, factor, offset);
    return kSilu ? silu(normal) : normal;
  };
  if (op.planes) {
    for (int64_t c = 0; c < op.num_channels; ++c) {
      const T* from = x + c * op.x.stride + begin;
      T* to = y + c * op.y.stride + begin;
      const Vec a = all(factor[c]), b = all(offset[c]);
      for_columns(end - begin, [&](int64_t i, auto columns) MADFORMER_STEP {
        store(result(load(from + i, columns), a, b), to + i, columns);
      });
    }
    return;
  }
  for (int64_t p = begin; p < end; ++p) {
    const T* from = x + p * op.x.stride;
    T* to = y + p * op.y.stride;
    for_columns(op.num_channels, [&](int64_t c, auto columns) MADFORMER_STEP {
      store(result(load(from + c, columns), load(factor + c, columns), load(offset + c, columns)), to + c,
            columns);
    });
  }
}

// Calls `step(x, dy, at, channel, columns)`, vectors and where they lie in dx, for all elements of pixels
// [begin, end); channels without `columns` are one for a whole vector.
template <typename T, bool kPlanes, typename Step>
HWY_INLINE void for_elements(const GroupNormBackward& op, int64_t map, int64_t begin, int64_t end,
                             Step step) {
  const T* xs = static_cast<const T*>(op.x.data) + map * op.x.stride_n;
  const T* grads = static_cast<const T*>(op.grad.data) + map * op.grad.stride_n;
  if constexpr (kPlanes) {
    for (int64_t c = 0; c < op.num_channels; ++c) {
      const T *x = xs + c * op.x.stride + begin, *grad = grads + c * op.grad.stride + begin;
      for_columns(end - begin, [&](int64_t i, auto columns) MADFORMER_STEP {
        step(x + i, grad + i, c * op.dx.stride + begin + i, c, columns);
      });
    }
    return;
  }
  for (int64_t p = begin; p < end; ++p) {
    for_columns(op.num_channels, [&](int64_t c, auto columns) MADFORMER_STEP {
      step(xs + p * op.x.stride + c, grads + p * op.grad.stride + c, p * op.dx.stride + c, c, columns);
    });
  }
}

// Numbers of channels as vectors: of neighbouring channels, or of one.
template <bool kPlanes>
struct ChannelVectors {
  template <typename Columns>
  static HWY_INLINE Vec get(const std::vector<float>& values, int64_t c, Columns columns) {
    return get(values.data(), c, columns);
  }
  template <typename Columns>
  static HWY_INLINE Vec get(const float* values, int64_t c, Columns columns) {
    return kPlanes ? all(values[c]) : load(values + c, columns);
  }
  template <typename Columns>
  static HWY_INLINE void add(float* values, int64_t c, Columns columns, Vec value) {
    if constexpr (kPlanes) {
      values[c] += sum(live(value, columns));
    } else {
      store(load(values + c, columns) + value, values + c, columns);
    }
  }
};

// The gradient of z = n * weight + bias.
template <bool kSilu>
HWY_INLINE Vec before_silu(Vec dy, Vec z) {
  if constexpr (!kSilu) return dy;
  const Vec part = sigmoid(z);
  return dy * fma(z * part, all(1.0f) - part, part);
}

template <typename T, bool kSilu, bool kPlanes>
void normalise_sums_of(const GroupNormBackward& op, int64_t map, int64_t begin, int64_t end,
                       const GroupNormChannels& channels, float* sums, float* along) {
  using In = ChannelVectors<kPlanes>;
  for_elements<T, kPlanes>(
      op, map, begin, end, [&](const T* x, const T* dy, int64_t, int64_t c, auto columns) MADFORMER_STEP {
        const Vec n =
            fma(load(x, columns), In::get(channels.scale, c, columns), In::get(channels.offset, c, columns));
        const Vec z = fma(n, In::get(op.weight, c, columns), In::get(op.bias, c, columns));
        const Vec dz = before_silu<kSilu>(load(dy, columns), z);
        In::add(sums, c, columns, dz);
        In::add(along, c, columns, dz * n);
      });
}

template <typename T, bool kSilu, bool kPlanes>
void normalise_backward_of(const GroupNormBackward& op, int64_t map, int64_t begin, int64_t end,
                           const GroupNormChannels& channels, float* sums) {
  using In = ChannelVectors<kPlanes>;
  T* dx = static_cast<T*>(op.dx.data) + map * op.dx.stride_n;
  for_elements<T, kPlanes>(
      op, map, begin, end, [&](const T* x, const T* dy, int64_t at, int64_t c, auto columns) MADFORMER_STEP {
        const Vec n =
            fma(load(x, columns), In::get(channels.scale, c, columns), In::get(channels.offset, c, columns));
        const Vec z = fma(n, In::get(op.weight, c, columns), In::get(op.bias, c, columns));
        const Vec dz = before_silu<kSilu>(load(dy, columns), z);
        const Vec sunk = fma(n, In::get(channels.tilt, c, columns), In::get(channels.shift, c, columns));
        const Vec result = dz * In::get(channels.factor, c, columns) - sunk;
        store(result, dx + at, columns);
        if (op.dtemb) In::add(sums, c, columns, result);
      });
}

// Calls `run` with a value of the type of the maps, and two numbers that say whether SiLU follows and how
// maps lie.
template <typename Run>
HWY_INLINE void with_kind(const GroupNormBackward& op, Run run) {
  with_dtype(op.dtype, [&]<typename T>(T x) MADFORMER_STEP {
    const auto with_silu = [&](auto silu) MADFORMER_STEP {
      op.planes ? run(x, silu, std::true_type{}) : run(x, silu, std::false_type{});
    };
    op.silu ? with_silu(std::true_type{}) : with_silu(std::false_type{});
  });
}

inline void normalise_sums(const GroupNormBackward& op, int64_t map, int64_t begin, int64_t end,
                           const GroupNormChannels& channels, float* sums, float* along) {
  with_kind(op, [&]<typename T>(T, auto silu, auto planes) MADFORMER_STEP {
    normalise_sums_of<T, silu.value, planes.value>(op, map, begin, end, channels, sums, along);
  });
}

inline void normalise_backward(const GroupNormBackward& op, int64_t map, int64_t begin, int64_t end,
                               const GroupNormChannels& channels, float* sums) {
  with_kind(op, [&]<typename T>(T, auto silu, auto planes) MADFORMER_STEP {
    normalise_backward_of<T, silu.value, planes.value>(op, map, begin, end, channels, sums);
  });
}

inline void channel_moments(const GroupNorm& op, int64_t map, int64_t begin, int64_t end, float* mean,
                            float* squares) {
  with_dtype(op.dtype, [&]<typename T>(T)
                           MADFORMER_STEP { channel_moments_of<T>(op, map, begin, end, mean, squares); });
}

inline void normalise(const GroupNorm& op, int64_t map, int64_t begin, int64_t end, const float* factor,
                      const float* offset) {
  with_dtype(op.dtype, [&]<typename T>(T) MADFORMER_STEP {
    (op.silu ? normalise_of<T, true> : normalise_of<T, false>)(op, map, begin, end, factor, offset);
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace madformer
HWY_AFTER_NAMESPACE();

#endif  // MADFORMER_GROUP_NORM_SILU_VECTORS_H
