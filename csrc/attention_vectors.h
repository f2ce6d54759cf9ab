// Compiled for each generation of processors, as vectors.h says.
//
// The lanes of vectors are queries. Queries are transposed once; keys and values are read as they lie, one
// number for all lanes; and softmax runs over keys, lane by lane, without a sum across lanes.
#if defined(MADFORMER_ATTENTION_VECTORS_H) == defined(HWY_TARGET_TOGGLE)
#ifdef MADFORMER_ATTENTION_VECTORS_H
#undef MADFORMER_ATTENTION_VECTORS_H
#else
#define MADFORMER_ATTENTION_VECTORS_H
#endif

#include "attention.h"
#include "vectors.h"

HWY_BEFORE_NAMESPACE();
namespace madformer {
namespace HWY_NAMESPACE {

constexpr int64_t kTileKeys = 128;
// Vectors that sums are kept in: with factors and queries AVX2's sixteen registers are full.
constexpr int64_t kSumVectors = 12;

// Queries of a tile: two vectors of them, or one where there are no more.
inline int64_t attention_queries(int64_t num_queries) { return num_queries <= kLanes ? kLanes : 2 * kLanes; }

// sums[i] += one(i, step) * others[step], over all steps, for `kCount` neighbouring i; of kVectors each.
template <int64_t kVectors, int64_t kCount, bool kFresh, typename One>
HWY_INLINE void multiply(int64_t num_steps, const float* others, float* sums, One one) {
  Vec kept[kCount][kVectors];
#pragma GCC unroll 12
  for (int64_t i = 0; i < kCount; ++i) {
#pragma GCC unroll 2
    for (int64_t j = 0; j < kVectors; ++j)
      kept[i][j] = kFresh ? zero() : load(sums + (i * kVectors + j) * kLanes);
  }
  for (int64_t step = 0; step < num_steps; ++step) {
    Vec other[kVectors];
#pragma GCC unroll 2
    for (int64_t j = 0; j < kVectors; ++j) other[j] = load(others + (step * kVectors + j) * kLanes);
#pragma GCC unroll 12
    for (int64_t i = 0; i < kCount; ++i) {
      const Vec factor = all(one(i, step));
#pragma GCC unroll 2
      for (int64_t j = 0; j < kVectors; ++j) kept[i][j] = fma(factor, other[j], kept[i][j]);
    }
  }
#pragma GCC unroll 12
  for (int64_t i = 0; i < kCount; ++i) {
#pragma GCC unroll 2
    for (int64_t j = 0; j < kVectors; ++j) store(kept[i][j], sums + (i * kVectors + j) * kLanes);
  }
}

template <int64_t kVectors, bool kFresh, typename One>
HWY_INLINE void multiply_all(int64_t count, int64_t num_steps, const float* others, float* sums, One one) {
  int64_t i = 0;
  const auto part = [&]<int64_t kCount>(std::integral_constant<int64_t, kCount>) MADFORMER_STEP {
    const int64_t first = i;
    multiply<kVectors, kCount, kFresh>(num_steps, others, sums + first * kVectors * kLanes,
                                       [&](int64_t k, int64_t step)
                                           MADFORMER_STEP { return one(first + k, step); });
    i += kCount;
  };
  constexpr int64_t kSums = kSumVectors / kVectors;
  while (i + kSums <= count) part(std::integral_constant<int64_t, kSums>{});
  while (i + 2 <= count) part(std::integral_constant<int64_t, 2>{});
  if (i < count) part(std::integral_constant<int64_t, 1>{});
}

// A tile of queries of one head on its way through the keys.
template <int64_t kVectors>
struct TileSums {
  const float* q;  // (D, queries), scaled
  float* scores;   // (keys, queries)
  float* out;      // (D, queries)
  Vec largest[kVectors], total[kVectors];
  bool is_empty = true;
};

// Takes in some keys and values.
template <int64_t kVectors>
HWY_INLINE void attend_to(TileSums<kVectors>& tile, const float* k, int64_t stride_k, const float* v,
                          int64_t stride_v, int64_t num_keys, int64_t head_dim) {
  multiply_all<kVectors, true>(num_keys, head_dim, tile.q, tile.scores,
                               [&](int64_t key, int64_t d) MADFORMER_STEP { return k[key * stride_k + d]; });
  for (int64_t j = 0; j < kVectors; ++j) {
    Vec largest = load(tile.scores + j * kLanes);
    for (int64_t key = 1; key < num_keys; ++key)
      largest = max(largest, load(tile.scores + (key * kVectors + j) * kLanes));
    if (!tile.is_empty) {
      largest = max(largest, tile.largest[j]);
      const Vec fading = exp(tile.largest[j] - largest);
      tile.total[j] = tile.total[j] * fading;
      for (int64_t d = 0; d < head_dim; ++d)
        store(load(tile.out + (d * kVectors + j) * kLanes) * fading, tile.out + (d * kVectors + j) * kLanes);
    }
    for (int64_t key = 0; key < num_keys; ++key) {
      float* score = tile.scores + (key * kVectors + j) * kLanes;
      const Vec below = load(score) - largest;
      const Vec weight = keep_nan(below, exp(below));
      tile.total[j] = tile.total[j] + weight;
      store(weight, score);
    }
    tile.largest[j] = largest;
  }
  const auto value = [&](int64_t d, int64_t key) MADFORMER_STEP { return v[key * stride_v + d]; };
  if (tile.is_empty) {
    multiply_all<kVectors, true>(head_dim, num_keys, tile.scores, tile.out, value);
  } else {
    multiply_all<kVectors, false>(head_dim, num_keys, tile.scores, tile.out, value);
  }
  tile.is_empty = false;
}

// The keys of one head in one place, in pieces of a tile; other dtypes than float are widened.
template <int64_t kVectors, typename T>
HWY_INLINE void attend_to_range(TileSums<kVectors>& tile, const T* k, int64_t stride_k, const T* v,
                                int64_t stride_v, int64_t num_keys, int64_t head_dim, float* widened) {
  for (int64_t first = 0; first < num_keys; first += kTileKeys) {
    const int64_t count = std::min(kTileKeys, num_keys - first);
    const T *keys = k + first * stride_k, *values = v + first * stride_v;
    if constexpr (std::is_same_v<T, float>) {
      attend_to(tile, keys, stride_k, values, stride_v, count, head_dim);
    } else {
      float *wide_keys = widened, *wide_values = widened + kTileKeys * head_dim;
      for (int64_t key = 0; key < count; ++key) {
        for_columns(head_dim, [&](int64_t d, auto columns) MADFORMER_STEP {
          store(load(keys + key * stride_k + d, columns), wide_keys + key * head_dim + d, columns);
          store(load(values + key * stride_v + d, columns), wide_values + key * head_dim + d, columns);
        });
      }
      attend_to(tile, wide_keys, head_dim, wide_values, head_dim, count, head_dim);
    }
  }
}

template <typename T>
HWY_INLINE const T* head_of(const AttentionHeads& heads, int64_t b, int64_t h) {
  return static_cast<const T*>(heads.data) + b * heads.stride_b + h * heads.stride_h;
}

template <int64_t kVectors, typename T>
void attention_of(const Attention& op, int64_t begin, int64_t end, float* scratch) {
  constexpr int64_t kQueries = kVectors * kLanes;
  const int64_t num_tiles = (op.num_queries + kQueries - 1) / kQueries, head_dim = op.head_dim;
  float* queries = scratch;
  float* row = queries + 2 * head_dim * kQueries + kTileKeys * kQueries;
  float* widened = row + head_dim;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / (num_tiles * op.num_heads), h = item / num_tiles % op.num_heads;
    const int64_t first = item % num_tiles * kQueries;
    const int64_t count = std::min(kQueries, op.num_queries - first);
    TileSums<kVectors> tile;
    tile.q = queries;
    tile.out = queries + head_dim * kQueries;
    tile.scores = tile.out + head_dim * kQueries;
    for (int64_t j = 0; j < kVectors; ++j) tile.largest[j] = tile.total[j] = zero();
    const T* q = head_of<T>(op.q, b, h) + first * op.q.stride_l;
    for (int64_t i = 0; i < kQueries; ++i) {
      for (int64_t d = 0; d < head_dim; ++d) {
        queries[d * kQueries + i] =
            i < count ? op.scale * static_cast<float>(q[i * op.q.stride_l + d]) : 0.0f;
      }
    }
    const int64_t cached = op.rows.data ? op.rows[b] : b;
    if (op.capacity && cached >= 0 && cached < op.num_rows) {
      const int64_t length = std::clamp<int64_t>(op.lengths[b], 0, op.capacity);
      attend_to_range(tile, head_of<T>(op.k_cache, cached, h), op.k_cache.stride_l,
                      head_of<T>(op.v_cache, cached, h), op.v_cache.stride_l, length, head_dim, widened);
    }
    if (op.num_own) {
      attend_to_range(tile, head_of<T>(op.k, b, h), op.k.stride_l, head_of<T>(op.v, b, h), op.v.stride_l,
                      op.num_own, head_dim, widened);
    }
    float totals[kQueries];
    for (int64_t j = 0; j < kVectors; ++j) {
      store(tile.is_empty ? all(1.0f) : tile.total[j], totals + j * kLanes);
    }
    T* out = static_cast<T*>(op.out) + ((b * op.num_queries + first) * op.num_heads + h) * head_dim;
    for (int64_t i = 0; i < count; ++i, out += op.num_heads * head_dim) {
      for (int64_t d = 0; d < head_dim; ++d) {
        row[d] = tile.is_empty ? 0.0f : tile.out[d * kQueries + i];
      }
      const Vec share = all(1.0f / totals[i]);
      for_columns(head_dim, [&](int64_t d, auto columns)
                                MADFORMER_STEP { store(load(row + d, columns) * share, out + d, columns); });
    }
  }
}

inline void attention(const Attention& op, int64_t begin, int64_t end, float* scratch) {
  with_dtype(op.dtype, [&]<typename T>(T) MADFORMER_STEP {
    if (attention_queries(op.num_queries) == kLanes) {
      attention_of<1, T>(op, begin, end, scratch);
    } else {
      attention_of<2, T>(op, begin, end, scratch);
    }
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace madformer
HWY_AFTER_NAMESPACE();

#endif  // MADFORMER_ATTENTION_VECTORS_H
