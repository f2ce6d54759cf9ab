// The kernels for CPUs without PyTorch, over the cases that kernel_cases.py wrote: for sanitizers, and for
// other processors in an emulator. Results lie in memory of their exact size, which is NaN before; they must
// be the truth but for rounding, and the same bit for bit whether one thread or three compute them.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "attention.h"
#include "block_causal_attention.h"
#include "denoise_step.h"
#include "group_norm_silu.h"
#include "half_types.h"
#include "qk_norm_rope.h"
#include "residual_norm.h"
#include "swiglu.h"
#include "vector_kernels.h"
#include "winograd.h"

namespace madformer {
namespace {

constexpr float kEps = 1e-5f;

struct Array {
  int64_t dtype = 0, size = 0;  // 0 to 3: float, bfloat16, float16, double
  std::vector<char> bytes;

  const void* data() const { return size ? bytes.data() : nullptr; }
  template <typename T>
  const T* as() const {
    return reinterpret_cast<const T*>(data());
  }
  Dtype kind() const { return static_cast<Dtype>(dtype); }
};

struct Case {
  std::string name;
  std::vector<int64_t> numbers;
  std::vector<Array> arrays;
};

int64_t read_number(std::istream& in) {
  int64_t number = 0;
  in.read(reinterpret_cast<char*>(&number), sizeof number);
  return number;
}

std::vector<Case> read_cases(const char* path) {
  std::ifstream in(path, std::ios::binary);
  std::vector<Case> cases;
  while (in && in.peek() != EOF) {
    Case& one = cases.emplace_back();
    one.name.resize(read_number(in));
    in.read(one.name.data(), static_cast<std::streamsize>(one.name.size()));
    one.numbers.resize(read_number(in));
    for (int64_t& number : one.numbers) number = read_number(in);
    one.arrays.resize(read_number(in));
    for (Array& array : one.arrays) {
      array.dtype = read_number(in), array.size = read_number(in);
      constexpr int64_t kSizes[] = {4, 2, 2, 8};
      array.bytes.resize(array.size * kSizes[array.dtype]);
      in.read(array.bytes.data(), static_cast<std::streamsize>(array.bytes.size()));
    }
  }
  return cases;
}

// A result of a kernel: memory that is NaN.
class Result {
 public:
  Result(int64_t size, Dtype dtype) : dtype_(dtype), size_(size), bytes_(size * size_of(dtype), '\xFF') {}

  void* data() { return size_ ? bytes_.data() : nullptr; }
  template <typename T>
  T* as() {
    return reinterpret_cast<T*>(data());
  }
  void fill(const Array& values) { bytes_ = values.bytes; }
  const std::vector<char>& bytes() const { return bytes_; }

  float operator[](int64_t i) const {
    const char* at = bytes_.data() + i * size_of(dtype_);
    float wide;
    uint16_t bits;
    if (dtype_ == Dtype::kFloat) return std::memcpy(&wide, at, 4), wide;
    std::memcpy(&bits, at, 2);
    BFloat16 b;
    Float16 h;
    b.bits = h.bits = bits;
    return dtype_ == Dtype::kBFloat16 ? static_cast<float>(b) : static_cast<float>(h);
  }
  int64_t size() const { return size_; }
  Dtype dtype() const { return dtype_; }

 private:
  Dtype dtype_;
  int64_t size_;
  std::vector<char> bytes_;
};

using Parallel = std::function<void(int64_t, int64_t, const std::function<void(int64_t, int64_t)>&)>;

Parallel threads_of(int64_t num_threads) {
  return [num_threads](int64_t count, int64_t, const std::function<void(int64_t, int64_t)>& run) {
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < num_threads; ++i) {
      const int64_t begin = i * count / num_threads, end = (i + 1) * count / num_threads;
      if (begin < end) threads.emplace_back([&run, begin, end] { run(begin, end); });
    }
    for (std::thread& thread : threads) thread.join();
  };
}

struct Expected {
  Result result;
  const Array* truth;
  // Of the coarsest dtype that a value was rounded to on the way, in units of the largest value.
  Dtype rounded;
  // How many times that may be missed: more where terms of a sum cancel each other.
  double slack = 1.0;
};

double rounding_of(Dtype dtype) {
  return dtype == Dtype::kFloat ? 0x1p-19 : dtype == Dtype::kBFloat16 ? 0x1p-6 : 0x1p-9;
}

Dtype coarser(Dtype one, Dtype other) { return rounding_of(one) > rounding_of(other) ? one : other; }

using Results = std::vector<Expected>;

Results run_swiglu(const Case& c, int64_t num_threads) {
  const int64_t rows = c.numbers[0], columns = c.numbers[1], size = rows * columns;
  const Array &both = c.arrays[0], &grad = c.arrays[1];
  const Dtype dtype = both.kind();
  Results out;
  for (size_t i = 2; i < 5; ++i) out.push_back({Result(size, dtype), &c.arrays[i], dtype});
  if (size == 0) return out;
  const void* up = both.as<char>() + columns * size_of(dtype);
  const Swiglu forward{both.data(), up, out[0].result.data(), dtype, columns, 2 * columns, 2 * columns};
  const SwigluBackward backward{.grad = grad.data(),
                                .gate = both.data(),
                                .up = up,
                                .dgate = out[1].result.data(),
                                .dup = out[2].result.data(),
                                .dtype = dtype,
                                .num_columns = columns,
                                .stride_grad = columns,
                                .stride_gate = 2 * columns,
                                .stride_up = 2 * columns};
  threads_of(num_threads)(size, 1, [&](int64_t begin, int64_t end) {
    vector_kernels().swiglu(forward, begin, end);
    vector_kernels().swiglu_backward(backward, begin, end);
  });
  return out;
}

Results run_residual_norm(const Case& c, int64_t num_threads) {
  const int64_t samples = c.numbers[0], blocks = c.numbers[1], tokens = c.numbers[2], columns = c.numbers[3];
  const bool whole = c.numbers[4] != 0;  // LayerNorm with all parts; else RMSNorm of x alone
  const int64_t length = blocks * tokens, size = samples * length * columns,
                rows = samples * blocks * columns;
  const auto& a = c.arrays;
  const Array &x = a[0], &modulation = a[1], &weight = a[2], &bias = a[3], &residual = a[4];
  const Dtype dtype = x.kind(), stream = whole ? residual.kind() : dtype, rounded = coarser(dtype, stream);
  Results out;
  const auto add = [&](size_t truth, int64_t count, Dtype kind) {
    out.push_back({Result(a[truth].size ? count : 0, kind), &a[truth], rounded});
  };
  add(7, size, dtype), add(8, size, stream), add(9, size, dtype);  // y, total, dx
  add(10, rows, dtype), add(11, rows, dtype);                      // dshift, dscale
  add(12, columns, Dtype::kFloat), add(13, columns, Dtype::kFloat);
  add(14, size, stream), add(15, rows, dtype);  // dresidual, dgate
  if (size == 0) return {};
  const auto memory = [&](size_t i) { return out[i].result.data(); };
  const auto part = [&](int64_t which) {
    return whole ? Modulation{modulation.as<char>() + which * columns * size_of(dtype), 3 * columns}
                 : Modulation{};
  };
  const auto view = [&](const void* data) {
    return data ? Rows<const void*>{data, length * columns, columns} : Rows<const void*>{};
  };
  const int64_t block = whole ? tokens : samples * length;
  const ResidualNorm forward{.x = view(x.data()),
                             .residual = view(residual.data()),
                             .y = memory(0),
                             .total = whole ? memory(1) : nullptr,
                             .dtype = dtype,
                             .stream_dtype = stream,
                             .modulation_dtype = dtype,
                             .weight = weight.as<float>(),
                             .bias = bias.as<float>(),
                             .gate = part(2),
                             .scale = part(1),
                             .shift = part(0),
                             .num_samples = samples,
                             .length = length,
                             .num_columns = columns,
                             .tokens_of_block = block,
                             .centred = whole,
                             .eps = kEps};
  const Parallel parallel = threads_of(num_threads);
  parallel(samples * length, columns,
           [&](int64_t begin, int64_t end) { vector_kernels().residual_norm(forward, begin, end); });
  const ResidualNormBackward backward{.grad_y = view(a[5].data()),
                                      .grad_total = view(whole ? a[6].data() : nullptr),
                                      .total = view(whole ? memory(1) : x.data()),
                                      .x = view(x.data()),
                                      .dx = memory(2),
                                      .dtotal = memory(7),
                                      .dshift = memory(3),
                                      .dscale = memory(4),
                                      .dgate = memory(8),
                                      .dweight = memory(5),
                                      .dbias = memory(6),
                                      .dtype = dtype,
                                      .stream_dtype = stream,
                                      .modulation_dtype = dtype,
                                      .weight_dtype = Dtype::kFloat,
                                      .bias_dtype = Dtype::kFloat,
                                      .weight = weight.as<float>(),
                                      .bias = bias.as<float>(),
                                      .gate = part(2),
                                      .scale = part(1),
                                      .num_samples = samples,
                                      .length = length,
                                      .num_columns = columns,
                                      .tokens_of_block = block,
                                      .centred = whole,
                                      .eps = kEps};
  residual_norm_backward(backward, vector_kernels(), parallel);
  return out;
}

Results run_group_norm_silu(const Case& c, int64_t num_threads) {
  const auto& n = c.numbers;
  const int64_t maps = n[0], channels = n[1], pixels = n[2] * n[3], groups = n[4],
                size = maps * channels * pixels;
  const bool planes = n[5] != 0;
  const auto& a = c.arrays;  // x, grad, y, dx, weight, bias, temb, dweight, dbias, dtemb
  const Dtype dtype = a[0].kind();
  Results out;
  out.push_back({Result(size, dtype), &a[2], dtype});
  out.push_back({Result(size, dtype), &a[3], dtype});
  for (const size_t i : {7, 8, 9}) out.push_back({Result(a[i].size, Dtype::kFloat), &a[i], dtype, 8.0});
  out[2].result = out[3].result = Result(channels, Dtype::kFloat);
  std::memset(out[2].result.data(), 0, channels * 4), std::memset(out[3].result.data(), 0, channels * 4);
  std::vector<float> mean(maps * groups), scale(maps * groups);
  const int64_t stride = planes ? pixels : channels;
  const GroupNorm forward{.x = {a[0].data(), channels * pixels, stride},
                          .y = {out[0].result.data(), channels * pixels, stride},
                          .dtype = dtype,
                          .planes = planes,
                          .weight = a[4].as<float>(),
                          .bias = a[5].as<float>(),
                          .temb = a[6].as<float>(),
                          .num_maps = maps,
                          .num_channels = channels,
                          .num_pixels = pixels,
                          .num_groups = groups,
                          .eps = kEps,
                          .silu = true,
                          .mean = mean.data(),
                          .scale = scale.data()};
  group_norm_silu(forward, vector_kernels(), num_threads, threads_of(num_threads));
  const GroupNormBackward backward{.grad = {a[1].data(), channels * pixels, stride},
                                   .x = forward.x,
                                   .dx = {out[1].result.data(), channels * pixels, stride},
                                   .dtype = dtype,
                                   .planes = planes,
                                   .weight = forward.weight,
                                   .bias = forward.bias,
                                   .temb = forward.temb,
                                   .num_maps = maps,
                                   .num_channels = channels,
                                   .num_pixels = pixels,
                                   .num_groups = groups,
                                   .silu = true,
                                   .mean = mean.data(),
                                   .scale = scale.data(),
                                   .dtemb = out[4].result.as<float>(),
                                   .dweight = out[2].result.as<float>(),
                                   .dbias = out[3].result.as<float>()};
  group_norm_silu_backward(backward, vector_kernels(), num_threads, threads_of(num_threads));
  return out;
}

template <typename T>
Results qk_norm_rope_of(const Case& c, int64_t num_threads) {
  const auto& n = c.numbers;
  const int64_t batch = n[0], tokens = n[1], heads = n[2], size = n[3], part = heads * size;
  const auto& a = c.arrays;  // qkv, weights, cos, sin, dq, dk, dv, q, k, v, dqkv, dweights
  const Dtype dtype = a[0].kind();
  Results out;
  for (const size_t i : {7, 8, 9, 10}) out.push_back({Result(a[i].size, dtype), &a[i], dtype});
  const QkNormRope<T> stream{.qkv = a[0].as<T>(),
                             .stride_xb = tokens * 3 * part,
                             .stride_xl = 3 * part,
                             .q_weight = a[1].as<float>(),
                             .k_weight = a[1].as<float>() + size,
                             .cos = a[2].as<float>(),
                             .sin = a[3].as<float>(),
                             .stride_tb = 0,
                             .stride_tl = size,
                             .num_tokens = tokens,
                             .num_heads = heads,
                             .head_dim = size,
                             .axes = n[4],
                             .has_queries = true,
                             .eps = kEps};
  const auto heads_at = [&](auto* data) {
    return Heads<std::remove_pointer_t<decltype(data)>>{data, tokens * part, size, part};
  };
  const QkvHeads<T> results{heads_at(out[0].result.as<T>()), heads_at(out[1].result.as<T>()),
                            heads_at(out[2].result.as<T>())};
  const QkvHeads<const T> grads{heads_at(a[4].as<T>()), heads_at(a[5].as<T>()), heads_at(a[6].as<T>())};
  const Places places{.num_rows = batch, .num_slots = tokens, .positions = {}, .rows = {}};
  std::vector<std::vector<float>> shares(batch * tokens, std::vector<float>(2 * size));
  threads_of(num_threads)(batch * tokens, part, [&](int64_t begin, int64_t end) {
    put_range(stream, results, places, begin, end);
    for (int64_t token = begin; token < end; ++token) {
      pull_range(stream, grads, token, token + 1, out[3].result.as<T>(), shares[token].data());
    }
  });
  Result weights(2 * size, Dtype::kFloat);
  std::memset(weights.data(), 0, 2 * size * sizeof(float));
  for (const auto& share : shares) {
    for (int64_t i = 0; i < 2 * size; ++i) weights.as<float>()[i] += share[i];
  }
  out.push_back({weights, &a[11], dtype});
  return out;
}

Results run_attention(const Case& c, int64_t num_threads) {
  const auto& n = c.numbers;  // batch, heads, queries, head dim, capacity, own keys, lengths
  const auto& a = c.arrays;   // q, cached k and v, own k and v, the result
  const int64_t batch = n[0], heads = n[1], queries = n[2], head_dim = n[3], capacity = n[4], own = n[5];
  const auto of = [&](const Array& array, int64_t length) -> AttentionHeads {
    return {array.data(), heads * length * head_dim, length * head_dim, head_dim};
  };
  Results out;
  out.push_back({Result(batch * queries * heads * head_dim, a[0].kind()), &a[5], a[0].kind()});
  const Attention op{.q = of(a[0], queries),
                     .k_cache = of(a[1], capacity),
                     .v_cache = of(a[2], capacity),
                     .k = of(a[3], own),
                     .v = of(a[4], own),
                     .out = out[0].result.data(),
                     .dtype = a[0].kind(),
                     .num_heads = heads,
                     .num_queries = queries,
                     .head_dim = head_dim,
                     .num_rows = batch,
                     .capacity = capacity,
                     .num_own = own,
                     .lengths = {.data = n.data() + 6, .is_int64 = true},
                     .rows = {},
                     .scale = 1.0f / std::sqrt(static_cast<float>(head_dim))};
  const VectorKernels& kernels = vector_kernels();
  const int64_t tile = kernels.attention_queries(queries);
  const int64_t items = batch * heads * ((queries + tile - 1) / tile);
  threads_of(num_threads)(items, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(attention_scratch(op, tile, kernels.attention_keys),
                               std::numeric_limits<float>::quiet_NaN());
    kernels.attention(op, begin, end, scratch.data());
  });
  return out;
}

Results run_block_attention(const Case& c, int64_t num_threads) {
  const auto& n = c.numbers;  // batch, heads, queries, keys, head dim, seven of each reader
  // q, k, v and the gradient of the result; the result, the log-sum-exp, the gradients
  const auto& a = c.arrays;
  const int64_t batch = n[0], heads = n[1], queries = n[2], keys = n[3], head_dim = n[4];
  std::vector<BlockReader> readers;
  for (size_t i = 5; i < n.size(); i += 7) {
    readers.push_back(
        {n[i], n[i + 1], {n[i + 2], n[i + 4]}, {n[i + 3], n[i + 5]}, static_cast<bool>(n[i + 6])});
  }
  const auto of = [&](const void* data, int64_t length) -> AttentionHeads {
    return {data, heads * length * head_dim, length * head_dim, head_dim};
  };
  const Dtype dtype = a[0].kind();
  Results out;
  out.push_back({Result(a[4].size, dtype), &a[4], dtype});
  // Of what was rounded before nothing is left: sums are float.
  out.push_back({Result(a[5].size, Dtype::kFloat), &a[5], Dtype::kFloat});
  for (size_t i = 6; i < 9; ++i) out.push_back({Result(a[i].size, dtype), &a[i], dtype});
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  const VectorKernels& kernels = vector_kernels();
  const BlockScratch sizes = block_scratch(readers, keys, head_dim, kernels.block_attention_panel);
  const BlockAttention forward{.q = of(a[0].data(), queries),
                               .k = of(a[1].data(), keys),
                               .v = of(a[2].data(), keys),
                               .out = out[0].result.data(),
                               .lse = out[1].result.as<float>(),
                               .dtype = dtype,
                               .num_heads = heads,
                               .num_queries = queries,
                               .num_keys = keys,
                               .head_dim = head_dim,
                               .readers = readers,
                               .scale = scale};
  // Each thread has memory of its own, all NaN.
  const auto each = [&](int64_t size, auto run) {
    threads_of(num_threads)(batch * heads, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(size, std::numeric_limits<float>::quiet_NaN());
      run(begin, end, scratch.data());
    });
  };
  each(sizes.forward(keys, head_dim), [&](int64_t begin, int64_t end, float* scratch) {
    kernels.block_attention(forward, sizes, begin, end, scratch);
  });
  const BlockAttentionBackward backward{
      .q = forward.q,
      .k = forward.k,
      .v = forward.v,
      .out = {out[0].result.data(), heads * queries * head_dim, head_dim, heads * head_dim},
      .grad = of(a[3].data(), queries),
      .lse = forward.lse,
      .dq = out[2].result.data(),
      .dk = out[3].result.data(),
      .dv = out[4].result.data(),
      .dtype = dtype,
      .num_heads = heads,
      .num_queries = queries,
      .num_keys = keys,
      .head_dim = head_dim,
      .readers = readers,
      .scale = scale};
  each(sizes.backward(queries, keys, head_dim), [&](int64_t begin, int64_t end, float* scratch) {
    kernels.block_attention_backward(backward, sizes, begin, end, scratch);
  });
  return out;
}

Results run_winograd(const Case& c, int64_t num_threads) {
  const auto& n =
      c.numbers;  // maps, height and width of the convolution, channels, whether pixels count for four
  // Maps, bias, gradient of their tiles, products and the gradient of their maps; then a result of each
  // kernel.
  const auto& a = c.arrays;
  Results out;
  for (size_t i = 5; i < 9; ++i) out.push_back({Result(a[i].size, Dtype::kFloat), &a[i], Dtype::kFloat});
  const int64_t numbers = n[4] ? 9 : 16;
  const auto run = [&](auto* maps, auto* tiles, const Array* bias, auto kernel, bool by_map) {
    const auto writable = [](const void* data) { return static_cast<float*>(const_cast<void*>(data)); };
    const WinogradTiles op{.maps = writable(maps),
                           .tiles = writable(tiles),
                           .bias = bias ? bias->as<float>() : nullptr,
                           .num_maps = n[0],
                           .height = n[1],
                           .width = n[2],
                           .num_channels = n[3],
                           .doubled = n[4] != 0,
                           .stride_tile = numbers * n[3],
                           .stride_number = n[3]};
    threads_of(num_threads)(by_map ? n[0] : n[0] * op.rows() * op.columns(), 1,
                            [&](int64_t begin, int64_t end) { kernel(op, begin, end); });
  };
  const VectorKernels& kernels = vector_kernels();
  const auto memory = [&](size_t i) { return out[i].result.data(); };
  run(a[0].data(), memory(0), nullptr, kernels.winograd_spread, false);
  run(memory(1), a[2].data(), nullptr, kernels.winograd_spread_backward, true);
  run(memory(2), a[3].data(), &a[1], kernels.winograd_gather, false);
  run(a[4].data(), memory(3), nullptr, kernels.winograd_gather_backward, false);
  return out;
}

template <typename T>
Results denoise_step_of(const Case& c, int64_t num_threads) {
  const int64_t rows = c.numbers[0], columns = c.numbers[1];
  const auto& a = c.arrays;  // sample, output, unconditional, previous, coefficients, guidance, both after it
  Results out;
  for (const size_t i : {6, 7}) out.push_back({Result(rows * columns, Dtype::kFloat), &a[i], Dtype::kFloat});
  out[0].result.fill(a[0]), out[1].result.fill(a[3]);
  const DenoiseBatch<T> step{.sample = out[0].result.as<float>(),
                             .model_output = a[1].as<T>(),
                             .unconditional = a[2].as<T>(),
                             .previous = out[1].result.as<float>(),
                             .coefficients = a[4].as<float>(),
                             .guidance_scale = a[5].as<float>(),
                             .num_rows = rows,
                             .row_size = columns,
                             .clip = 1.0f};
  threads_of(num_threads)(rows * columns, 1,
                          [&](int64_t begin, int64_t end) { denoise_range(step, begin, end); });
  return out;
}

// By the type of an array.
#define MADFORMER_BY_TYPE(function, array)                                   \
  ((array).kind() == Dtype::kFloat      ? function<float>(c, num_threads)    \
   : (array).kind() == Dtype::kBFloat16 ? function<BFloat16>(c, num_threads) \
                                        : function<Float16>(c, num_threads))

Results run(const Case& c, int64_t num_threads) {
  if (c.name == "swiglu") return run_swiglu(c, num_threads);
  if (c.name == "residual_norm") return run_residual_norm(c, num_threads);
  if (c.name == "group_norm_silu") return run_group_norm_silu(c, num_threads);
  if (c.name == "qk_norm_rope") return MADFORMER_BY_TYPE(qk_norm_rope_of, c.arrays[0]);
  if (c.name == "attention") return run_attention(c, num_threads);
  if (c.name == "block_causal_attention") return run_block_attention(c, num_threads);
  if (c.name == "winograd") return run_winograd(c, num_threads);
  if (c.name == "denoise_step") return MADFORMER_BY_TYPE(denoise_step_of, c.arrays[1]);
  std::fprintf(stderr, "no kernel is called %s\n", c.name.c_str());
  std::exit(2);
}

// Whether a result is the truth but for rounding; says where it is not.
bool is_right(const Case& c, size_t number, const Expected& one) {
  const Array& truth = *one.truth;
  double largest = 0.0, error = 0.0;
  for (int64_t i = 0; i < one.result.size(); ++i) {
    const double expected = truth.dtype == 3 ? truth.as<double>()[i] : truth.as<float>()[i];
    largest = std::fmax(largest, std::fabs(expected));
    const double distance = std::fabs(one.result[i] - expected);
    if (!(distance <= error)) error = distance;  // also NaN, which stays
    if (error != error) break;
  }
  const double budget = one.slack * rounding_of(one.rounded) * largest;
  const bool right = one.result.size() == truth.size && error <= budget;
  if (!right) {
    std::fprintf(stderr, "%s", c.name.c_str());
    for (const int64_t n : c.numbers) std::fprintf(stderr, " %lld", static_cast<long long>(n));
    std::fprintf(stderr, ", dtype %lld, result %zu: error %.3g of at most %.3g, %lld of %lld values\n",
                 static_cast<long long>(c.arrays[0].dtype), number, error, budget,
                 static_cast<long long>(one.result.size()), static_cast<long long>(truth.size));
  }
  return right;
}

int check(const char* path) {
  const std::vector<Case> cases = read_cases(path);
  int64_t wrong = 0;
  for (const Case& c : cases) {
    const Results one = run(c, 1), three = run(c, 3);
    for (size_t i = 0; i < one.size(); ++i) {
      if (one[i].truth->size == 0) continue;
      wrong += !is_right(c, i, one[i]);
      if (one[i].result.bytes() == three[i].result.bytes()) continue;
      std::fprintf(stderr, "%s, result %zu: three threads give another one\n", c.name.c_str(), i);
      ++wrong;
    }
  }
  const char* target = vector_kernels().target;
  std::printf("%zu cases, %s: %lld wrong\n", cases.size(), *target ? target : "without vectors",
              static_cast<long long>(wrong));
  return cases.empty() || wrong != 0;
}

}  // namespace
}  // namespace madformer

int main(int count, char** arguments) {
  if (count == 2) return madformer::check(arguments[1]);
  std::fprintf(stderr, "usage: kernel_driver FILE\n");
  return 2;
}
