// silu(group_norm(x + temb)) on the CPU, free of torch: how a call is cut, and how moments are put together.
//
// A map's statistics and its result are two passes over its pixels, each in cache-sized pieces. Moments are
// taken of each channel: the time embedding, one number a channel, then moves a mean and needs no pass.
// Pieces follow from the shape alone, and are put together in their order, so that the result does not depend
// on the number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "vector_kernels.h"

namespace madformer {

// N maps of C channels and P pixels. Either pixels of neighbouring channels lie one after the other
// (channels-last), or channels of neighbouring pixels do (planes). Strides count elements.
template <typename Pointer>
struct Maps {
  Pointer data;
  int64_t stride_n, stride;  // from a map to the next; from a pixel, or from a plane, to the next
};

struct GroupNorm {
  Maps<const void*> x;
  Maps<void*> y;
  Dtype dtype;
  bool planes;
  const float* weight;  // (C,)
  const float* bias;
  const float* temb;  // (N, C), null for none
  int64_t num_maps, num_channels, num_pixels, num_groups;
  float eps;
  bool silu;
  float* mean;   // (N, G), results: of x + temb
  float* scale;  // the reciprocal of the deviation
};

// Elements of a piece: as many of float as half of a small first-level cache holds, so that a second look is
// cheap.
constexpr int64_t kPieceSize = 4096;
// Elements of a map from which threads may share it.
constexpr int64_t kSharedMapSize = 1 << 17;
constexpr int64_t kMaxShares = 64;

// Mean and sum of squared deviations of every channel, over some pixels.
struct ChannelMoments {
  explicit ChannelMoments(int64_t num_channels) : mean(num_channels), squares(num_channels) {}

  // Chan, Golub and LeVeque's formula.
  void add(const ChannelMoments& other, int64_t its_count) {
    const float total = static_cast<float>(count + its_count);
    const float its_part = static_cast<float>(its_count) / total,
                weight = static_cast<float>(count) * its_part;
    for (size_t c = 0; c < mean.size(); ++c) {
      const float distance = other.mean[c] - mean[c];
      mean[c] += distance * its_part;
      squares[c] += other.squares[c] + distance * distance * weight;
    }
    count += its_count;
  }

  std::vector<float> mean, squares;
  int64_t count = 0;
};

// Moments of pixels [begin, end) of a map.
inline ChannelMoments moments_of(const GroupNorm& op, const VectorKernels& kernels, int64_t map,
                                 int64_t begin, int64_t end) {
  const int64_t channels = op.planes ? 1 : op.num_channels;
  const int64_t piece = std::max<int64_t>(16, kPieceSize / channels);
  ChannelMoments all(op.num_channels), one(op.num_channels);
  while (begin < end) {
    const int64_t next = std::min(end, begin + piece);
    ChannelMoments& into = all.count ? one : all;
    kernels.channel_moments(op, map, begin, next, into.mean.data(), into.squares.data());
    if (all.count) {
      all.add(one, next - begin);
    } else {
      all.count = next - begin;
    }
    begin = next;
  }
  return all;
}

// What a map's values are multiplied by, and what is added, before SiLU.
struct Affine {
  explicit Affine(int64_t num_channels) : factor(num_channels), offset(num_channels) {}
  std::vector<float> factor, offset;
};

// From the moments of its channels to those of a map's groups, which it keeps, and to its factors and
// offsets.
inline Affine affine_of(const GroupNorm& op, int64_t map, const ChannelMoments& moments) {
  const int64_t group_channels = op.num_channels / op.num_groups;
  const float* temb = op.temb ? op.temb + map * op.num_channels : nullptr;
  const double pixels = static_cast<double>(op.num_pixels);
  Affine affine(op.num_channels);
  for (int64_t g = 0; g < op.num_groups; ++g) {
    const int64_t first = g * group_channels, last = first + group_channels;
    const auto mean_of = [&](int64_t c) { return double{moments.mean[c]} + (temb ? temb[c] : 0.0f); };
    double mean = 0.0, squares = 0.0;
    for (int64_t c = first; c < last; ++c) mean += mean_of(c);
    mean /= static_cast<double>(group_channels);
    for (int64_t c = first; c < last; ++c) {
      const double distance = mean_of(c) - mean;
      squares += moments.squares[c] + pixels * distance * distance;
    }
    const double scale = 1.0 / std::sqrt(squares / (pixels * static_cast<double>(group_channels)) + op.eps);
    op.mean[map * op.num_groups + g] = static_cast<float>(mean);
    op.scale[map * op.num_groups + g] = static_cast<float>(scale);
    for (int64_t c = first; c < last; ++c) {
      affine.factor[c] = static_cast<float>(scale * op.weight[c]);
      affine.offset[c] = static_cast<float>(((temb ? temb[c] : 0.0f) - mean) * affine.factor[c] + op.bias[c]);
    }
  }
  return affine;
}

// Into how many parts of its pixels a map falls.
inline int64_t shares_of_map(int64_t num_channels, int64_t num_pixels) {
  return std::clamp<int64_t>(num_channels * num_pixels / kSharedMapSize, 1, std::min(kMaxShares, num_pixels));
}

// `parallel(count, elements, run)` calls `run(begin, end)` for parts of [0, count), each of which works on so
// many elements, maybe at once.
template <typename Parallel>
void group_norm_silu(const GroupNorm& op, const VectorKernels& kernels, int64_t num_threads,
                     Parallel parallel) {
  const int64_t shares = shares_of_map(op.num_channels, op.num_pixels),
                map_size = op.num_channels * op.num_pixels;
  const auto begin_of = [&](int64_t share) { return share * op.num_pixels / shares; };
  const auto measure = [&](int64_t map, int64_t share) {
    return moments_of(op, kernels, map, begin_of(share), begin_of(share + 1));
  };
  const auto write = [&](int64_t map, int64_t share, const Affine& affine) {
    kernels.normalise(op, map, begin_of(share), begin_of(share + 1), affine.factor.data(),
                      affine.offset.data());
  };
  if (shares == 1 || op.num_maps >= num_threads) {
    parallel(op.num_maps, map_size, [&](int64_t begin, int64_t end) {
      for (int64_t map = begin; map < end; ++map) {
        ChannelMoments moments = measure(map, 0);
        for (int64_t share = 1; share < shares; ++share) {
          const ChannelMoments more = measure(map, share);
          moments.add(more, more.count);
        }
        const Affine affine = affine_of(op, map, moments);
        // Backwards: what was read last is still in the caches.
        for (int64_t share = shares; share-- > 0;) write(map, share, affine);
      }
    });
    return;
  }
  for (int64_t map = 0; map < op.num_maps; ++map) {
    std::vector<ChannelMoments> parts(shares, ChannelMoments(0));
    parallel(shares, map_size / shares, [&](int64_t begin, int64_t end) {
      for (int64_t share = begin; share < end; ++share) parts[share] = measure(map, share);
    });
    for (int64_t share = 1; share < shares; ++share) parts[0].add(parts[share], parts[share].count);
    const Affine affine = affine_of(op, map, parts[0]);
    parallel(shares, map_size / shares, [&](int64_t begin, int64_t end) {
      for (int64_t share = begin; share < end; ++share) write(map, share, affine);
    });
  }
}

// The gradients of the above. Those of x lie as x does, the others are contiguous.
struct GroupNormBackward {
  Maps<const void*> grad, x;
  Maps<void*> dx;
  Dtype dtype;
  bool planes;
  const float* weight;
  const float* bias;
  const float* temb;
  int64_t num_maps, num_channels, num_pixels, num_groups;
  bool silu;
  const float* mean;  // (N, G)
  const float* scale;
  float* dtemb;  // (N, C), null without an embedding
  float *dweight, *dbias;
};

// What the pixels of a channel share: n = x * scale + offset, z = n * weight + bias, and, once the sums are
// known, dx = dz * factor - shift - n * tilt.
struct GroupNormChannels {
  explicit GroupNormChannels(int64_t size)
      : scale(size), offset(size), factor(size), shift(size), tilt(size) {}
  std::vector<float> scale, offset, factor, shift, tilt;
};

// From the sums over a map, of dz and of dz * n, to what is subtracted.
inline void finish_channels(const GroupNormBackward& op, int64_t map, const float* sums, const float* along,
                            GroupNormChannels& channels) {
  const int64_t group_channels = op.num_channels / op.num_groups;
  const double count = static_cast<double>(group_channels * op.num_pixels);
  for (int64_t g = 0; g < op.num_groups; ++g) {
    const int64_t first = g * group_channels, last = first + group_channels;
    const float scale = op.scale[map * op.num_groups + g];
    double sum = 0.0, sum_along = 0.0;
    for (int64_t c = first; c < last; ++c) {
      sum += double{op.weight[c]} * sums[c];
      sum_along += double{op.weight[c]} * along[c];
    }
    for (int64_t c = first; c < last; ++c) {
      channels.factor[c] = scale * op.weight[c];
      channels.shift[c] = static_cast<float>(scale * sum / count);
      channels.tilt[c] = static_cast<float>(scale * sum_along / count);
    }
  }
}

inline GroupNormChannels channels_of(const GroupNormBackward& op, int64_t map) {
  GroupNormChannels channels(op.num_channels);
  for (int64_t c = 0; c < op.num_channels; ++c) {
    const int64_t at = map * op.num_groups + c * op.num_groups / op.num_channels;
    const double temb = op.temb ? op.temb[map * op.num_channels + c] : 0.0f;
    channels.scale[c] = op.scale[at];
    channels.offset[c] = static_cast<float>((temb - op.mean[at]) * op.scale[at]);
  }
  return channels;
}

template <typename Parallel>
void group_norm_silu_backward(const GroupNormBackward& op, const VectorKernels& kernels, int64_t num_threads,
                              Parallel parallel) {
  const int64_t size = op.num_channels, shares = shares_of_map(size, op.num_pixels);
  const auto begin_of = [&](int64_t share) { return share * op.num_pixels / shares; };
  // Of every map and share: dz, dz * n, dx, each summed over pixels.
  std::vector<float> sums(op.num_maps * shares * 3 * size, 0.0f);
  const auto sums_of = [&](int64_t map, int64_t share, int64_t which) {
    return sums.data() + ((map * shares + share) * 3 + which) * size;
  };
  // To those of the first share; which are dz's and dz * n's, or dx's.
  const auto join = [&](int64_t map, int64_t first, int64_t count) {
    float* into = sums_of(map, 0, first);
    for (int64_t share = 1; share < shares; ++share) {
      const float* from = sums_of(map, share, first);
      for (int64_t i = 0; i < count * size; ++i) into[i] += from[i];
    }
  };
  const auto look = [&](int64_t map, int64_t share, const GroupNormChannels& channels) {
    kernels.normalise_sums(op, map, begin_of(share), begin_of(share + 1), channels, sums_of(map, share, 0),
                           sums_of(map, share, 1));
  };
  const auto write = [&](int64_t map, int64_t share, const GroupNormChannels& channels) {
    kernels.normalise_backward(op, map, begin_of(share), begin_of(share + 1), channels,
                               sums_of(map, share, 2));
  };
  const bool by_map = shares == 1 || op.num_maps >= num_threads;
  const auto run = [&](int64_t map, auto each_share) {
    GroupNormChannels channels = channels_of(op, map);
    each_share([&](int64_t share) { look(map, share, channels); });
    join(map, 0, 2);
    finish_channels(op, map, sums_of(map, 0, 0), sums_of(map, 0, 1), channels);
    each_share([&](int64_t share) { write(map, share, channels); });
    join(map, 2, 1);
    if (op.dtemb) std::copy_n(sums_of(map, 0, 2), size, op.dtemb + map * size);
  };
  const int64_t map_size = size * op.num_pixels;
  if (by_map) {
    parallel(op.num_maps, map_size, [&](int64_t begin, int64_t end) {
      for (int64_t map = begin; map < end; ++map) {
        run(map, [&](auto call) {
          for (int64_t share = 0; share < shares; ++share) call(share);
        });
      }
    });
  } else {
    for (int64_t map = 0; map < op.num_maps; ++map) {
      run(map, [&](auto call) {
        parallel(shares, map_size / shares, [&](int64_t begin, int64_t end) {
          for (int64_t share = begin; share < end; ++share) call(share);
        });
      });
    }
  }
  for (int64_t map = 0; map < op.num_maps; ++map) {
    for (int64_t c = 0; c < size; ++c) {
      op.dbias[c] += sums_of(map, 0, 0)[c];
      op.dweight[c] += sums_of(map, 0, 1)[c];
    }
  }
}

}  // namespace madformer
