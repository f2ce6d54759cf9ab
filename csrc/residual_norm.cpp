#include "residual_norm.h"

#include "ops.h"
#include "tensors.h"

namespace madformer {
namespace {

void check_columns(const char* name, const OptionalTensor& tensor, int64_t num_columns) {
  STD_TORCH_CHECK(!tensor || (tensor->dim() == 1 && tensor->size(0) == num_columns), name,
                  " must have the shape (", num_columns, ",)");
}

void check_modulation(const Tensor& x, const OptionalTensor& first, const OptionalTensor& other) {
  if (!first && !other) return;
  const Tensor& rows = first ? *first : *other;
  STD_TORCH_CHECK(x.dim() == 3 && rows.dim() == 3 && rows.size(0) == x.size(0) && rows.size(2) == x.size(2) &&
                      rows.size(1) > 0 && x.size(1) % rows.size(1) == 0,
                  "shift, scale and gate must have the shape (B, M, C), M a divisor of the tokens of x");
  STD_TORCH_CHECK(!first || !other ||
                      (first->sizes().equals(other->sizes()) && first->scalar_type() == other->scalar_type()),
                  "shift, scale and gate must have one shape and dtype");
}

// Tensors of one shape as samples of evenly spaced rows; what is not so is copied.
class Samples {
 public:
  Samples(const Tensor& like, bool modulated) {
    const int64_t dim = like.dim();
    columns = like.size(dim - 1);
    rows_ = columns == 0 ? 0 : like.numel() / columns;
    modulated_ = modulated;
    num_samples = modulated ? like.size(0) : 1;
    length = modulated ? like.size(1) : rows_;
  }

  // The tensor, which must be given away to whoever keeps the rows.
  Tensor take(const Tensor& tensor) const { return modulated_ ? rows_of(tensor) : even_rows_of(tensor); }

  Rows<const void*> view(const Tensor& taken) const {
    if (modulated_) return {taken.const_data_ptr(), taken.stride(0), taken.stride(1)};
    return {taken.const_data_ptr(), 0, *row_stride(taken)};
  }

  int64_t num_samples, length, columns;

 private:
  int64_t rows_;
  bool modulated_;
};

OptionalTensor even_rows_of(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(madformer::even_rows_of(*tensor)) : std::nullopt;
}

Modulation modulation_of(const OptionalTensor& rows) {
  return rows ? Modulation{rows->const_data_ptr(), *row_stride(*rows)} : Modulation{};
}

}  // namespace

std::tuple<Tensor, Tensor> residual_norm_cpu(const Tensor& x, OptionalTensor shift, OptionalTensor scale,
                                             OptionalTensor weight, OptionalTensor bias,
                                             OptionalTensor residual, OptionalTensor gate, bool centred,
                                             double eps) {
  const Dtype dtype = dtype_of("x", x);
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) > 0, "x must have columns");
  const int64_t columns = x.size(x.dim() - 1);
  check_columns("weight", weight, columns), check_columns("bias", bias, columns);
  check_modulation(x, shift, scale), check_modulation(x, scale, gate), check_modulation(x, shift, gate);
  STD_TORCH_CHECK(!residual || residual->sizes().equals(x.sizes()), "residual must have the shape of x");
  STD_TORCH_CHECK(!gate || residual, "gate needs a residual to add x to");
  const Tensor y = torch::stable::new_empty(x, x.sizes());
  const Tensor total =
      residual ? torch::stable::new_empty(*residual, x.sizes()) : torch::stable::new_empty(x, {0});
  if (x.numel() == 0) return {y, total};

  const OptionalTensor& rows = scale ? scale : shift ? shift : gate;
  const Samples samples(x, rows.has_value());
  const Tensor branch = samples.take(x);
  const OptionalTensor stream = residual ? OptionalTensor(samples.take(*residual)) : std::nullopt;
  const Floats weights("weight", weight), biases("bias", bias);
  const OptionalTensor gates = even_rows_of(gate), scales = even_rows_of(scale), shifts = even_rows_of(shift);
  const ResidualNorm op{.x = samples.view(branch),
                        .residual = stream ? samples.view(*stream) : Rows<const void*>{},
                        .y = y.mutable_data_ptr(),
                        .total = stream ? total.mutable_data_ptr() : nullptr,
                        .dtype = dtype,
                        .stream_dtype = stream ? dtype_of("residual", *stream) : dtype,
                        .modulation_dtype = rows ? dtype_of("scale", *rows) : Dtype::kFloat,
                        .weight = weights.data(),
                        .bias = biases.data(),
                        .gate = modulation_of(gates),
                        .scale = modulation_of(scales),
                        .shift = modulation_of(shifts),
                        .num_samples = samples.num_samples,
                        .length = samples.length,
                        .num_columns = columns,
                        .tokens_of_block = rows ? samples.length / rows->size(1) : samples.length,
                        .centred = centred,
                        .eps = static_cast<float>(eps)};
  in_parallel(samples.num_samples * samples.length, columns,
              [&](int64_t begin, int64_t end) { vector_kernels().residual_norm(op, begin, end); });
  return {y, total};
}

std::vector<Tensor> empty_gradients(const std::vector<const OptionalTensor*>& likes, const Tensor& total,
                                    const std::vector<bool>& wanted) {
  std::vector<Tensor> gradients;
  for (size_t i = 0; i < likes.size(); ++i) {
    const bool is_there = wanted[i] && likes[i]->has_value();
    gradients.push_back(is_there ? torch::stable::new_empty(**likes[i], (*likes[i])->sizes())
                                 : torch::stable::new_empty(total, {0}));
  }
  return gradients;
}

Gradients residual_norm_backward_cpu(const Tensor& grad_y, OptionalTensor grad_total, const Tensor& total,
                                     OptionalTensor x, OptionalTensor scale, OptionalTensor gate,
                                     OptionalTensor weight, OptionalTensor bias, bool centred, double eps,
                                     const std::vector<bool>& wanted) {
  STD_TORCH_CHECK(wanted.size() == 7, "wanted must have one entry for each argument");
  STD_TORCH_CHECK(total.dim() >= 1 && total.size(total.dim() - 1) > 0, "total must have columns");
  STD_TORCH_CHECK(grad_y.sizes().equals(total.sizes()), "grad_y must have the shape of total");
  for (const OptionalTensor* tensor : {&grad_total, &x}) {
    STD_TORCH_CHECK(!*tensor || (*tensor)->sizes().equals(total.sizes()),
                    "grad_total and x must have total's shape");
  }
  STD_TORCH_CHECK(!grad_total || grad_total->scalar_type() == total.scalar_type(),
                  "grad_total must have the dtype of total");
  const int64_t columns = total.size(total.dim() - 1);
  check_columns("weight", weight, columns), check_columns("bias", bias, columns);
  check_modulation(total, scale, gate);
  const OptionalTensor like_x = grad_y, like_total = total;
  std::vector<Tensor> out =
      empty_gradients({&like_x, &scale, &scale, &weight, &bias, &like_total, &gate}, total, wanted);
  const auto result = [&] { return Gradients{out[0], out[1], out[2], out[3], out[4], out[5], out[6]}; };
  if (total.numel() == 0) {
    for (Tensor& gradient : out) torch::stable::zero_(gradient);
    return result();
  }
  const auto memory = [&](size_t i) { return out[i].numel() ? out[i].mutable_data_ptr() : nullptr; };
  STD_TORCH_CHECK(!memory(6) || x, "the gradient of gate needs x");

  const OptionalTensor& rows = scale ? scale : gate;
  const Samples samples(total, rows.has_value());
  const auto taken = [&](const OptionalTensor& tensor) {
    return tensor ? OptionalTensor(samples.take(*tensor)) : std::nullopt;
  };
  const Tensor grad = samples.take(grad_y), stream = samples.take(total);
  const OptionalTensor stream_grad = taken(grad_total), branch = memory(6) ? taken(x) : std::nullopt;
  const auto view = [&](const OptionalTensor& tensor) {
    return tensor ? samples.view(*tensor) : Rows<const void*>{};
  };
  const Floats weights("weight", weight), biases("bias", bias);
  const OptionalTensor gates = even_rows_of(gate), scales = even_rows_of(scale);
  const ResidualNormBackward op{.grad_y = samples.view(grad),
                                .grad_total = view(stream_grad),
                                .total = samples.view(stream),
                                .x = view(branch),
                                .dx = memory(0),
                                .dtotal = memory(5),
                                .dshift = memory(1),
                                .dscale = memory(2),
                                .dgate = memory(6),
                                .dweight = memory(3),
                                .dbias = memory(4),
                                .dtype = dtype_of("grad_y", grad_y),
                                .stream_dtype = dtype_of("total", total),
                                .modulation_dtype = rows ? dtype_of("scale", *rows) : Dtype::kFloat,
                                .weight_dtype = weight ? dtype_of("weight", *weight) : Dtype::kFloat,
                                .bias_dtype = bias ? dtype_of("bias", *bias) : Dtype::kFloat,
                                .weight = weights.data(),
                                .bias = biases.data(),
                                .gate = modulation_of(gates),
                                .scale = modulation_of(scales),
                                .num_samples = samples.num_samples,
                                .length = samples.length,
                                .num_columns = columns,
                                .tokens_of_block = rows ? samples.length / rows->size(1) : samples.length,
                                .centred = centred,
                                .eps = static_cast<float>(eps)};
  residual_norm_backward(op, vector_kernels(), [](int64_t count, int64_t elements, auto run) {
    in_parallel(count, elements, run);
  });
  return result();
}

}  // namespace madformer
