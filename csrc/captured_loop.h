// A loop of captured steps as one launch, free of torch: an outer graph whose conditional WHILE node
// (CUDA 12.4) holds the step and a kernel that counts and decides, on the device, whether there is another.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>

namespace madformer {

// Why this machine cannot run such a loop, in one line; empty where it can.
std::string loop_support();

class CapturedLoop {
 public:
  using NodeCounts = std::map<std::string, int64_t>;

  // `step` is copied; the memory that it works on must outlive the loop. The step is run while *counter <
  // *bound, each time followed by ++*counter, but at most `cap` times a launch whatever these say. Both lie
  // on `device`. Throws std::invalid_argument for a step that a conditional node cannot hold,
  // std::runtime_error for CUDA's errors.
  CapturedLoop(cudaGraph_t step, int32_t* counter, const int32_t* bound, int32_t cap, int device);

  // Does not wait. One launch runs at a time: a second waits for the first, on whatever stream.
  void launch(cudaStream_t stream);

  // The nodes of the step by kind, those of its child graphs counted among them.
  const NodeCounts& nodes() const { return nodes_; }

 private:
  struct Release {
    void operator()(int32_t* memory) const { cudaFree(memory); }
    void operator()(cudaGraph_t graph) const { cudaGraphDestroy(graph); }
    void operator()(cudaGraphExec_t exec) const { cudaGraphExecDestroy(exec); }
  };

  int device_;
  NodeCounts nodes_;
  // How many steps the running launch may still take. Freed last: what is running writes to it.
  std::unique_ptr<int32_t, Release> left_;
  std::unique_ptr<CUgraph_st, Release> graph_;
  std::unique_ptr<CUgraphExec_st, Release> exec_;
};

}  // namespace madformer
