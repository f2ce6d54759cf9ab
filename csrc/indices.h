// Indices in memory, as the kernels read them.
#pragma once

#include <cstdint>

namespace madformer {

// A tensor of int32 or int64, or of nothing.
struct Indices {
  const void* data = nullptr;
  bool is_int64 = false;

  int64_t operator[](int64_t i) const {
    return is_int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

}  // namespace madformer
