// Compiled for each generation of processors, as vectors.h says.
//
// A thread takes one head of one image at a time, widened to float in memory of its own, where rows are
// filled up to whole panels of vectors. Scores are a matrix product of some queries and all keys of a range;
// what is in the columns beyond a range is never read.
#if defined(MADFORMER_BLOCK_CAUSAL_ATTENTION_VECTORS_H) == defined(HWY_TARGET_TOGGLE)
#ifdef MADFORMER_BLOCK_CAUSAL_ATTENTION_VECTORS_H
#undef MADFORMER_BLOCK_CAUSAL_ATTENTION_VECTORS_H
#else
#define MADFORMER_BLOCK_CAUSAL_ATTENTION_VECTORS_H
#endif

#include <cmath>
#include <limits>

#include "attention_vectors.h"
#include "block_causal_attention.h"
#include "vectors.h"

HWY_BEFORE_NAMESPACE();
namespace madformer {
namespace HWY_NAMESPACE {

constexpr int64_t kPanel = 2 * kLanes;
// AVX2 has sixteen registers, half as many as the others.
constexpr int64_t kPanelRows = kLanes == 8 ? 4 : 8;

// A matrix whose element (i, step) is data[i * row + step * column].
struct Factors {
  const float* data;
  int64_t row, column;
};

// kCount rows of a panel of the result: factors times others, whose rows lie `width` apart.
template <int64_t kCount, bool kAdd>
HWY_INLINE void multiply_panel(int64_t num_steps, const Factors& factors, const float* others, int64_t width,
                               float* sums, int64_t stride) {
  Vec left[kCount], right[kCount];
#pragma GCC unroll 8
  for (int64_t i = 0; i < kCount; ++i) {
    left[i] = kAdd ? load(sums + i * stride) : zero();
    right[i] = kAdd ? load(sums + i * stride + kLanes) : zero();
  }
  const float* factor = factors.data;
  for (int64_t step = 0; step < num_steps; ++step, factor += factors.column, others += width) {
    const Vec first = load(others), second = load(others + kLanes);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kCount; ++i) {
      const Vec one = all(factor[i * factors.row]);
      left[i] = fma(one, first, left[i]);
      right[i] = fma(one, second, right[i]);
    }
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < kCount; ++i) {
    store(left[i], sums + i * stride);
    store(right[i], sums + i * stride + kLanes);
  }
}

// (rows, columns) = factors (rows, num_steps) times others (num_steps, columns); columns in whole panels.
template <bool kAdd>
HWY_INLINE void multiply_matrix(int64_t rows, int64_t columns, int64_t num_steps, const Factors& factors,
                                const float* others, int64_t width, float* sums, int64_t stride) {
  for (int64_t j = 0; j < columns; j += kPanel) {
    int64_t i = 0;
    const auto part = [&]<int64_t kCount>(std::integral_constant<int64_t, kCount>) MADFORMER_STEP {
      multiply_panel<kCount, kAdd>(num_steps, {factors.data + i * factors.row, factors.row, factors.column},
                                   others + j, width, sums + i * stride + j, stride);
      i += kCount;
    };
    while (i + kPanelRows <= rows) part(std::integral_constant<int64_t, kPanelRows>{});
    while (i + 2 <= rows) part(std::integral_constant<int64_t, 2>{});
    if (i < rows) part(std::integral_constant<int64_t, 1>{});
  }
}

constexpr int64_t filled_up(int64_t size) { return (size + kPanel - 1) / kPanel * kPanel; }

// Rows of channels as floats times a factor, each filled up with zeros.
template <typename T>
HWY_INLINE void take_rows(const T* from, int64_t stride, int64_t count, int64_t head_dim, float factor,
                          float* to, int64_t width) {
  for (int64_t i = 0; i < count; ++i) {
    float* row = to + i * width;
    std::fill(row + head_dim, row + width, 0.0f);
    for_columns(head_dim, [&](int64_t d, auto columns) MADFORMER_STEP {
      store(load(from + i * stride + d, columns) * all(factor), row + d, columns);
    });
  }
}

template <typename T>
HWY_INLINE void take_transposed(const T* from, int64_t stride, int64_t count, int64_t head_dim, float* to,
                                int64_t width) {
  for (int64_t d = 0; d < head_dim; ++d) std::fill(to + d * width + count, to + (d + 1) * width, 0.0f);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < head_dim; ++d) to[d * width + i] = static_cast<float>(from[i * stride + d]);
  }
}

template <typename T>
HWY_INLINE void give_row(const float* from, int64_t head_dim, float factor, T* to) {
  for_columns(head_dim, [&](int64_t d, auto columns) MADFORMER_STEP {
    store(load(from + d, columns) * all(factor), to + d, columns);
  });
}

// How many keys of a range a query sees.
HWY_INLINE int64_t seen(const BlockReader& reader, int64_t range, int64_t query) {
  return reader.is_causal ? query - reader.first_query + 1 : reader.num_keys(range);
}

// Products of some rows with both ranges of keys, side by side.
HWY_INLINE void multiply_keys(const BlockReader& reader, int64_t count, int64_t head_dim, const float* rows,
                              int64_t width, const float* transposed, int64_t num_columns, float* scores,
                              int64_t stride) {
  int64_t place = 0;
  for (int64_t range = 0; range < 2; ++range) {
    const int64_t columns = filled_up(reader.num_keys(range));
    multiply_matrix<false>(count, columns, head_dim, {rows, width, 1}, transposed + reader.first_key[range],
                           num_columns, scores + place, stride);
    place += columns;
  }
}

// Weighted sums of rows of both ranges of keys.
HWY_INLINE void sum_keys(const BlockReader& reader, int64_t count, int64_t head_dim, const float* weights,
                         int64_t stride, const float* keys, int64_t width, float* sums) {
  const int64_t columns = filled_up(head_dim), second = filled_up(reader.num_keys(0));
  multiply_matrix<false>(count, columns, reader.num_keys(0), {weights, stride, 1},
                         keys + reader.first_key[0] * width, width, sums, width);
  if (reader.num_keys(1)) {
    multiply_matrix<true>(count, columns, reader.num_keys(1), {weights + second, stride, 1},
                          keys + reader.first_key[1] * width, width, sums, width);
  }
}

// Adds to the sums of each key what these rows, weighted, give.
HWY_INLINE void add_to_keys(const BlockReader& reader, int64_t count, int64_t head_dim, const float* weights,
                            int64_t stride, const float* rows, int64_t width, float* sums) {
  int64_t place = 0;
  for (int64_t range = 0; range < 2; ++range) {
    multiply_matrix<true>(reader.num_keys(range), filled_up(head_dim), count, {weights + place, 1, stride},
                          rows, width, sums + reader.first_key[range] * width, width);
    place += filled_up(reader.num_keys(range));
  }
}

// Calls `step(scores, columns)` for what a query sees, and sets what it does not see to a value first.
template <typename Step>
HWY_INLINE void for_seen(const BlockReader& reader, int64_t query, float* scores, Step step) {
  for (int64_t range = 0; range < 2; ++range) {
    const int64_t count = std::min(seen(reader, range, query), reader.num_keys(range));
    for_columns(count, [&](int64_t i, auto columns) MADFORMER_STEP { step(scores + i, columns); });
    scores += filled_up(reader.num_keys(range));
  }
}

// Weights that are no query's: those of a text's later tokens.
HWY_INLINE void hide(const BlockReader& reader, int64_t query, float* scores) {
  if (reader.is_causal) std::fill(scores + seen(reader, 0, query), scores + reader.num_keys(0), 0.0f);
}

HWY_INLINE float lane_max(Vec x) {
  float lanes[kLanes];
  store(x, lanes);
  return *std::max_element(lanes, lanes + kLanes);
}

HWY_INLINE float largest_of(const BlockReader& reader, int64_t query, const float* scores) {
  float largest = -std::numeric_limits<float>::infinity();
  for (int64_t range = 0; range < 2; ++range) {
    const int64_t count = std::min(seen(reader, range, query), reader.num_keys(range));
    Vec most = all(largest);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) most = max(most, load(scores + i));
    largest = lane_max(most);
    for (; i < count; ++i) largest = std::max(largest, scores[i]);
    scores += filled_up(reader.num_keys(range));
  }
  return largest;
}

template <typename T>
void block_attention_of(const BlockAttention& op, const BlockScratch& sizes, int64_t begin, int64_t end,
                        float* scratch) {
  const int64_t width = sizes.width, head_dim = op.head_dim;
  float* keys = scratch;
  float* values = keys + head_dim * sizes.keys;
  float* queries = values + op.num_keys * width;
  float* sums = queries + sizes.queries * width;
  float* scores = sums + sizes.queries * width;
  float* totals = scores + sizes.queries * sizes.scores;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / op.num_heads, h = item % op.num_heads;
    take_transposed(head_of<T>(op.k, b, h), op.k.stride_l, op.num_keys, head_dim, keys, sizes.keys);
    take_rows(head_of<T>(op.v, b, h), op.v.stride_l, op.num_keys, head_dim, 1.0f, values, width);
    for (const BlockReader& reader : op.readers) {
      for (int64_t first = reader.first_query; first < reader.end_query; first += sizes.queries) {
        const int64_t count = std::min(sizes.queries, reader.end_query - first);
        take_rows(head_of<T>(op.q, b, h) + first * op.q.stride_l, op.q.stride_l, count, head_dim, op.scale,
                  queries, width);
        multiply_keys(reader, count, head_dim, queries, width, keys, sizes.keys, scores, sizes.scores);
        for (int64_t i = 0; i < count; ++i) {
          float* row = scores + i * sizes.scores;
          const float largest = largest_of(reader, first + i, row);
          Vec total = zero();
          for_seen(reader, first + i, row, [&](float* score, auto columns) MADFORMER_STEP {
            const Vec below = load(score, columns) - all(largest);
            const Vec weight = keep_nan(below, exp(below));
            total = total + live(weight, columns);
            store(weight, score, columns);
          });
          hide(reader, first + i, row);
          totals[i] = sum(total);
          op.lse[item * op.num_queries + first + i] = largest + std::log(totals[i]);
        }
        sum_keys(reader, count, head_dim, scores, sizes.scores, values, width, sums);
        T* out = static_cast<T*>(op.out) + ((b * op.num_queries + first) * op.num_heads + h) * head_dim;
        for (int64_t i = 0; i < count; ++i) {
          give_row(sums + i * width, head_dim, 1.0f / totals[i], out + i * op.num_heads * head_dim);
        }
      }
    }
  }
}

template <typename T>
void block_attention_backward_of(const BlockAttentionBackward& op, const BlockScratch& sizes, int64_t begin,
                                 int64_t end, float* scratch) {
  const int64_t width = sizes.width, head_dim = op.head_dim, stride = sizes.scores;
  float* transposed_keys = scratch;
  float* transposed_values = transposed_keys + head_dim * sizes.keys;
  float* queries = transposed_values + head_dim * sizes.keys;
  float* grads = queries + op.num_queries * width;
  float* keys = grads + op.num_queries * width;
  float* dkeys = keys + op.num_keys * width;
  float* dvalues = dkeys + op.num_keys * width;
  float* sums = dvalues + op.num_keys * width;
  float* deltas = sums + sizes.queries * width;
  float* weights = deltas + op.num_queries;
  float* dscores = weights + sizes.queries * stride;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / op.num_heads, h = item % op.num_heads;
    take_transposed(head_of<T>(op.k, b, h), op.k.stride_l, op.num_keys, head_dim, transposed_keys,
                    sizes.keys);
    take_transposed(head_of<T>(op.v, b, h), op.v.stride_l, op.num_keys, head_dim, transposed_values,
                    sizes.keys);
    take_rows(head_of<T>(op.q, b, h), op.q.stride_l, op.num_queries, head_dim, op.scale, queries, width);
    take_rows(head_of<T>(op.grad, b, h), op.grad.stride_l, op.num_queries, head_dim, 1.0f, grads, width);
    take_rows(head_of<T>(op.k, b, h), op.k.stride_l, op.num_keys, head_dim, 1.0f, keys, width);
    std::fill(dkeys, sums, 0.0f);  // those of values too
    for (int64_t i = 0; i < op.num_queries; ++i) {
      const T* out = head_of<T>(op.out, b, h) + i * op.out.stride_l;
      deltas[i] = sum_columns(head_dim, [&](int64_t d, auto columns) MADFORMER_STEP {
        return load(out + d, columns) * load(grads + i * width + d, columns);
      });
    }
    for (const BlockReader& reader : op.readers) {
      for (int64_t first = reader.first_query; first < reader.end_query; first += sizes.queries) {
        const int64_t count = std::min(sizes.queries, reader.end_query - first);
        const float *rows = queries + first * width, *grad_rows = grads + first * width;
        multiply_keys(reader, count, head_dim, rows, width, transposed_keys, sizes.keys, weights, stride);
        multiply_keys(reader, count, head_dim, grad_rows, width, transposed_values, sizes.keys, dscores,
                      stride);
        for (int64_t i = 0; i < count; ++i) {
          const Vec lse = all(op.lse[item * op.num_queries + first + i]), delta = all(deltas[first + i]);
          float* row = weights + i * stride;
          for_seen(reader, first + i, row, [&](float* score, auto columns) MADFORMER_STEP {
            float* dscore = score + (dscores - weights);
            const Vec below = load(score, columns) - lse;
            const Vec weight = keep_nan(below, exp(below));
            store(weight * (load(dscore, columns) - delta), dscore, columns);
            store(weight, score, columns);
          });
          hide(reader, first + i, row);
          hide(reader, first + i, row + (dscores - weights));
        }
        add_to_keys(reader, count, head_dim, weights, stride, grad_rows, width, dvalues);
        add_to_keys(reader, count, head_dim, dscores, stride, rows, width, dkeys);
        sum_keys(reader, count, head_dim, dscores, stride, keys, width, sums);
        T* dq = static_cast<T*>(op.dq) + ((b * op.num_queries + first) * op.num_heads + h) * head_dim;
        for (int64_t i = 0; i < count; ++i)
          give_row(sums + i * width, head_dim, op.scale, dq + i * op.num_heads * head_dim);
      }
    }
    const int64_t place = (b * op.num_keys * op.num_heads + h) * head_dim;
    for (int64_t i = 0; i < op.num_keys; ++i) {
      const int64_t at = place + i * op.num_heads * head_dim;
      give_row(dkeys + i * width, head_dim, 1.0f, static_cast<T*>(op.dk) + at);
      give_row(dvalues + i * width, head_dim, 1.0f, static_cast<T*>(op.dv) + at);
    }
  }
}

inline void block_attention(const BlockAttention& op, const BlockScratch& sizes, int64_t begin, int64_t end,
                            float* scratch) {
  with_dtype(op.dtype,
             [&]<typename T>(T) MADFORMER_STEP { block_attention_of<T>(op, sizes, begin, end, scratch); });
}

inline void block_attention_backward(const BlockAttentionBackward& op, const BlockScratch& sizes,
                                     int64_t begin, int64_t end, float* scratch) {
  with_dtype(op.dtype, [&]<typename T>(T) MADFORMER_STEP {
    block_attention_backward_of<T>(op, sizes, begin, end, scratch);
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace madformer
HWY_AFTER_NAMESPACE();

#endif  // MADFORMER_BLOCK_CAUSAL_ATTENTION_VECTORS_H
