// Registers the compiled ops and makes the library importable as `madformer._C`. The schemas are defined in
// Python, beside each op's reference, so that an op exists with and without this library.
#include "ops.h"

#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_IMPL(madformer, CPU, library) {
  library.impl("denoise_step_", TORCH_BOX(&madformer::denoise_step_cpu));
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
