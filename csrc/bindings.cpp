// What madformer._C holds: the compiled ops, and, where it is built with CUDA, the captured loop. The schemas
// of the ops are defined in Python, beside each op's reference, so that an op exists with and without this
// library.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include "content_hash.h"
#include "ops.h"
#include "vector_kernels.h"

#ifdef MADFORMER_WITH_CUDA
#include "captured_loop.h"
#endif

namespace py = pybind11;

STABLE_TORCH_LIBRARY_IMPL(madformer, CPU, library) {
  library.impl("denoise_step_", TORCH_BOX(&madformer::denoise_step_cpu));
  library.impl("qk_norm_rope_cpp", TORCH_BOX(&madformer::qk_norm_rope_cpu));
  library.impl("qk_norm_rope_backward_cpp", TORCH_BOX(&madformer::qk_norm_rope_backward_cpu));
  library.impl("qk_norm_rope_cached_cpp", TORCH_BOX(&madformer::qk_norm_rope_cached_cpu));
  library.impl("swiglu_cpp", TORCH_BOX(&madformer::swiglu_cpu));
  library.impl("swiglu_backward_cpp", TORCH_BOX(&madformer::swiglu_backward_cpu));
  library.impl("residual_norm_cpp", TORCH_BOX(&madformer::residual_norm_cpu));
  library.impl("residual_norm_backward_cpp", TORCH_BOX(&madformer::residual_norm_backward_cpu));
  library.impl("group_norm_silu_cpp", TORCH_BOX(&madformer::group_norm_silu_cpu));
  library.impl("group_norm_silu_backward_cpp", TORCH_BOX(&madformer::group_norm_silu_backward_cpu));
  library.impl("cached_attention_cpp", TORCH_BOX(&madformer::cached_attention_cpu));
  library.impl("self_attention_cpp", TORCH_BOX(&madformer::self_attention_cpu));
  library.impl("block_causal_attention_cpp", TORCH_BOX(&madformer::block_causal_attention_cpu));
  library.impl("block_causal_attention_backward_cpp",
               TORCH_BOX(&madformer::block_causal_attention_backward_cpu));
  library.impl("winograd_spread_cpp", TORCH_BOX(&madformer::winograd_spread_cpu));
  library.impl("winograd_spread_backward_cpp", TORCH_BOX(&madformer::winograd_spread_backward_cpu));
  library.impl("winograd_gather_cpp", TORCH_BOX(&madformer::winograd_gather_cpu));
  library.impl("winograd_gather_backward_cpp", TORCH_BOX(&madformer::winograd_gather_backward_cpu));
}

#ifdef MADFORMER_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(madformer, CUDA, library) {
  library.impl("denoise_step_", TORCH_BOX(&madformer::denoise_step_cuda));
}

namespace {

// Python gives handles and addresses as integers.
template <typename T>
T pointer(std::uintptr_t address) {
  return reinterpret_cast<T>(address);
}

void bind_captured_loop(py::module_& module) {
  using madformer::CapturedLoop;
  const auto make = [](std::uintptr_t graph, std::uintptr_t counter, std::uintptr_t bound, int32_t cap,
                       int device) {
    const py::gil_scoped_release unlocked;
    return std::make_unique<CapturedLoop>(pointer<cudaGraph_t>(graph), pointer<int32_t*>(counter),
                                          pointer<const int32_t*>(bound), cap, device);
  };
  py::class_<CapturedLoop>(module, "CapturedLoop", R"(A loop of captured steps as one launch.

A launch runs the step while ``*counter < *bound``, and adds one to the counter after each. Both are read on the device:
set the counter to zero, and the bound to what you like, on the stream before the launch.

Args:
    graph: the ``cudaGraph_t`` of one step, ``torch.cuda.CUDAGraph.raw_cuda_graph()``. It is copied, but the memory that it
        works on is the CUDAGraph's: keep that. A step that draws from torch's generators would draw the same each time.
    counter, bound: addresses of an int32 each, on the device.
    cap: no launch runs more steps than this, whatever counter and bound say.
    device: the index of the device.

Raises:
    ValueError: the step holds a node that a conditional node may not hold, such as a host function.
    RuntimeError: CUDA's error, with the call that gave it.)")
      .def(py::init(make), py::kw_only(), py::arg("graph"), py::arg("counter"), py::arg("bound"),
           py::arg("cap"), py::arg("device"))
      .def(
          "launch",
          [](CapturedLoop& loop, std::uintptr_t stream) { loop.launch(pointer<cudaStream_t>(stream)); },
          py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
          "Puts one launch on the stream, a ``cudaStream_t`` as ``torch.cuda.Stream.cuda_stream`` gives it; "
          "does not wait.")
      .def_property_readonly("nodes", &CapturedLoop::nodes, "How many nodes of each kind the step has.");
}

}  // namespace
#endif

PYBIND11_MODULE(_C, module) {
  module.def(
      "content_hash",
      [](std::uintptr_t address, size_t size) {
        return madformer::content_hash(reinterpret_cast<const unsigned char*>(address), size);
      },
      py::arg("address"), py::arg("size"), py::call_guard<py::gil_scoped_release>(),
      "64 bits that tell ``size`` bytes at an address from others.");
  module.attr("vectors") = madformer::vector_kernels().target;
#ifdef MADFORMER_WITH_CUDA
  module.attr("cuda_architectures") = MADFORMER_WITH_CUDA;
  module.def("loop_support", &madformer::loop_support,
             "Why no CapturedLoop can run here; empty where it can.");
  bind_captured_loop(module);
#else
  module.attr("cuda_architectures") = "";
  module.def(
      "loop_support", [] { return "madformer._C was built without CUDA"; },
      "Why no CapturedLoop can run here; empty where it can.");
#endif
}
