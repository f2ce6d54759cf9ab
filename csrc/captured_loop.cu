#include <stdexcept>
#include <vector>

#include "captured_loop.h"
#include "cuda_check.h"

namespace madformer {
namespace {

constexpr int kOldestDriver = 12040;  // CUDA 12.4

// Of one thread each: a graph's kernels run one after the other, so nobody else writes what they read.
__global__ void begin_loop(cudaGraphConditionalHandle again, const int32_t* counter, const int32_t* bound,
                           int32_t* left, int32_t cap) {
  *left = cap;
  cudaGraphSetConditional(again, *counter < *bound && cap > 0);
}

__global__ void end_step(cudaGraphConditionalHandle again, int32_t* counter, const int32_t* bound,
                         int32_t* left) {
  ++*counter;
  --*left;
  cudaGraphSetConditional(again, *counter < *bound && *left > 0);
}

// Makes `device` the current one of this thread for a while.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    MADFORMER_CUDA_CHECK(cudaGetDevice(&before_));
    MADFORMER_CUDA_CHECK(cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

struct NodeKind {
  const char* name;
  bool allowed;
};

// What a conditional node's body may hold (cudaConditionalNodeParams::phGraph_out). It may hold conditional
// nodes too, but a child graph, as which the step is put there, may not (cudaGraphAddChildGraphNode).
NodeKind kind_of(cudaGraphNodeType type) {
  switch (type) {
    case cudaGraphNodeTypeKernel:
      return {"kernel", true};
    case cudaGraphNodeTypeMemcpy:
      return {"memcpy", true};
    case cudaGraphNodeTypeMemset:
      return {"memset", true};
    case cudaGraphNodeTypeGraph:
      return {"child graph", true};
    case cudaGraphNodeTypeEmpty:
      return {"empty", true};
    case cudaGraphNodeTypeHost:
      return {"host function", false};
    case cudaGraphNodeTypeWaitEvent:
      return {"event wait", false};
    case cudaGraphNodeTypeEventRecord:
      return {"event record", false};
    case cudaGraphNodeTypeMemAlloc:
      return {"memory allocation", false};
    case cudaGraphNodeTypeMemFree:
      return {"memory free", false};
    case cudaGraphNodeTypeConditional:
      return {"conditional", false};
    default:
      return {"unknown", false};
  }
}

void count_nodes(cudaGraph_t graph, CapturedLoop::NodeCounts& counts) {
  size_t size = 0;
  MADFORMER_CUDA_CHECK(cudaGraphGetNodes(graph, nullptr, &size));
  std::vector<cudaGraphNode_t> nodes(size);
  MADFORMER_CUDA_CHECK(cudaGraphGetNodes(graph, nodes.data(), &size));
  for (cudaGraphNode_t node : nodes) {
    cudaGraphNodeType type;
    MADFORMER_CUDA_CHECK(cudaGraphNodeGetType(node, &type));
    const NodeKind kind = kind_of(type);
    if (!kind.allowed) {
      throw std::invalid_argument(
          "graph holds a node of the kind \"" + std::string(kind.name) +
          "\": a loop's step may hold kernels, copies, memsets and child graphs of these");
    }
    ++counts[kind.name];
    if (type == cudaGraphNodeTypeGraph) {
      cudaGraph_t child;
      MADFORMER_CUDA_CHECK(cudaGraphChildGraphNodeGetGraph(node, &child));
      count_nodes(child, counts);
    }
  }
}

// Adds a kernel of one thread behind `after`, or at the root where that is null.
template <typename... Arguments>
cudaGraphNode_t add_kernel(cudaGraph_t graph, cudaGraphNode_t after, void (*kernel)(Arguments...),
                           Arguments... arguments) {
  void* pointers[] = {&arguments...};
  cudaKernelNodeParams params = {};
  params.func = reinterpret_cast<void*>(kernel);
  params.gridDim = params.blockDim = dim3(1);
  params.kernelParams = pointers;  // Copied by the call.
  cudaGraphNode_t node;
  MADFORMER_CUDA_CHECK(
      cudaGraphAddKernelNode(&node, graph, after ? &after : nullptr, after ? 1 : 0, &params));
  return node;
}

// Adds a WHILE node behind `after`; returns the graph of its body, which is the node's own.
cudaGraph_t add_while(cudaGraph_t graph, cudaGraphNode_t after, cudaGraphConditionalHandle again) {
  cudaGraphNodeParams params = {};
  params.type = cudaGraphNodeTypeConditional;
  params.conditional.handle = again;
  params.conditional.type = cudaGraphCondTypeWhile;
  params.conditional.size = 1;
  cudaGraphNode_t node;
#if CUDART_VERSION >= 13000
  MADFORMER_CUDA_CHECK(cudaGraphAddNode(&node, graph, &after, nullptr, 1, &params));
#else
  MADFORMER_CUDA_CHECK(cudaGraphAddNode(&node, graph, &after, 1, &params));
#endif
  return params.conditional.phGraph_out[0];
}

}  // namespace

std::string loop_support() {
  try {
    int driver = 0, devices = 0;
    MADFORMER_CUDA_CHECK(cudaDriverGetVersion(&driver));
    if (driver == 0) return "no CUDA driver is installed";
    if (driver < kOldestDriver) {
      return "the driver is for CUDA " + std::to_string(driver / 1000) + "." +
             std::to_string(driver % 1000 / 10) + ", and conditional graph nodes need 12.4";
    }
    MADFORMER_CUDA_CHECK(cudaGetDeviceCount(&devices));
    return devices > 0 ? "" : "no CUDA device";
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

CapturedLoop::CapturedLoop(cudaGraph_t step, int32_t* counter, const int32_t* bound, int32_t cap, int device)
    : device_(device) {
  if (!step || !counter || !bound) throw std::invalid_argument("graph, counter and bound must not be null");
  if (cap < 1) throw std::invalid_argument("cap=" + std::to_string(cap) + " must be positive");
  count_nodes(step, nodes_);
  const DeviceGuard guard(device);
  int32_t* left;
  MADFORMER_CUDA_CHECK(cudaMalloc(reinterpret_cast<void**>(&left), sizeof(int32_t)));
  left_.reset(left);
  cudaGraph_t graph;
  MADFORMER_CUDA_CHECK(cudaGraphCreate(&graph, 0));
  graph_.reset(graph);

  cudaGraphConditionalHandle again;
  MADFORMER_CUDA_CHECK(cudaGraphConditionalHandleCreate(&again, graph, 0, cudaGraphCondAssignDefault));
  const cudaGraphNode_t begin =
      add_kernel(graph, nullptr, begin_loop, again, static_cast<const int32_t*>(counter), bound, left, cap);
  const cudaGraph_t body = add_while(graph, begin, again);
  cudaGraphNode_t one_step;
  MADFORMER_CUDA_CHECK(cudaGraphAddChildGraphNode(&one_step, body, nullptr, 0, step));
  add_kernel(body, one_step, end_step, again, counter, bound, left);

  cudaGraphExec_t exec;
  MADFORMER_CUDA_CHECK(cudaGraphInstantiate(&exec, graph, 0));
  exec_.reset(exec);
  // Ahead of the first launch, which would otherwise wait for it.
  MADFORMER_CUDA_CHECK(cudaGraphUpload(exec, cudaStreamPerThread));
}

void CapturedLoop::launch(cudaStream_t stream) {
  const DeviceGuard guard(device_);
  MADFORMER_CUDA_CHECK(cudaGraphLaunch(exec_.get(), stream));
}

}  // namespace madformer
