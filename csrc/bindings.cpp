// What madformer._C holds: the compiled ops, and, where it is built with CUDA, the captured loop. The schemas
// of the ops are defined in Python, beside each op's reference, so that an op exists with and without this
// library. The module uses Python's limited API, as the ops use torch's stable ABI: one build serves every
// Python from 3.11 on.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <exception>
#include <memory>
#include <stdexcept>
#include <string>

#include "content_hash.h"
#include "ops.h"

#ifdef MADFORMER_WITH_CUDA
#include "captured_loop.h"
#endif

STABLE_TORCH_LIBRARY_IMPL(madformer, CPU, library) {
  library.impl("denoise_step_", TORCH_BOX(&madformer::denoise_step_cpu));
  library.impl("qk_norm_rope_cpp", TORCH_BOX(&madformer::qk_norm_rope_cpu));
  library.impl("qk_norm_rope_backward_cpp", TORCH_BOX(&madformer::qk_norm_rope_backward_cpu));
  library.impl("qk_norm_rope_cached_cpp", TORCH_BOX(&madformer::qk_norm_rope_cached_cpu));
}

#ifdef MADFORMER_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(madformer, CUDA, library) {
  library.impl("denoise_step_", TORCH_BOX(&madformer::denoise_step_cuda));
}
#endif

namespace {

// Python gives handles, addresses and sizes as integers; for "O&" of an argument's format.
int to_unsigned(PyObject* number, void* result) {
  const unsigned long long value = PyLong_AsUnsignedLongLong(number);
  if (PyErr_Occurred() != nullptr) return 0;
  *static_cast<std::uintptr_t*>(result) = value;
  return 1;
}

template <typename... Results>
bool parse(PyObject* positional, PyObject* named, const char* format, const char* const* names,
           Results... results) {
  return PyArg_ParseTupleAndKeywords(positional, named, format, const_cast<char**>(names), results...) != 0;
}

template <typename Function>
PyCFunction as_method(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyObject* content_hash(PyObject*, PyObject* positional, PyObject* named) {
  static const char* const names[] = {"address", "size", nullptr};
  std::uintptr_t address = 0, size = 0;
  if (!parse(positional, named, "O&O&:content_hash", names, to_unsigned, &address, to_unsigned, &size)) {
    return nullptr;
  }
  uint64_t hash = 0;
  Py_BEGIN_ALLOW_THREADS;
  hash = madformer::content_hash(reinterpret_cast<const unsigned char*>(address), size);
  Py_END_ALLOW_THREADS;
  return PyLong_FromUnsignedLongLong(hash);
}

#ifdef MADFORMER_WITH_CUDA

const char* const kArchitectures = MADFORMER_WITH_CUDA;

// Runs `work` without the interpreter's lock. Its C++ exception becomes Python's; false if there was one.
template <typename Work>
bool unlocked(Work work) {
  PyObject* kind = nullptr;
  std::string message;
  Py_BEGIN_ALLOW_THREADS;
  try {
    work();
  } catch (const std::invalid_argument& error) {
    kind = PyExc_ValueError;
    message = error.what();
  } catch (const std::exception& error) {
    kind = PyExc_RuntimeError;
    message = error.what();
  }
  Py_END_ALLOW_THREADS;
  if (kind != nullptr) PyErr_SetString(kind, message.c_str());
  return kind == nullptr;
}

PyObject* loop_support(PyObject*, PyObject*) {
  std::string reason;
  if (!unlocked([&] { reason = madformer::loop_support(); })) return nullptr;
  return PyUnicode_FromString(reason.c_str());
}

struct Loop {
  PyObject_HEAD;
  madformer::CapturedLoop* loop;
};

madformer::CapturedLoop& loop_of(PyObject* self) { return *reinterpret_cast<Loop*>(self)->loop; }

PyObject* loop_new(PyTypeObject* type, PyObject* positional, PyObject* named) {
  static const char* const names[] = {"graph", "counter", "bound", "cap", "device", nullptr};
  std::uintptr_t graph = 0, counter = 0, bound = 0;
  int cap = 0, device = 0;
  if (!parse(positional, named, "O&O&O&ii:CapturedLoop", names, to_unsigned, &graph, to_unsigned, &counter,
             to_unsigned, &bound, &cap, &device)) {
    return nullptr;
  }
  std::unique_ptr<madformer::CapturedLoop> made;
  const bool is_made = unlocked([&] {
    made = std::make_unique<madformer::CapturedLoop>(reinterpret_cast<cudaGraph_t>(graph),
                                                     reinterpret_cast<int32_t*>(counter),
                                                     reinterpret_cast<const int32_t*>(bound), cap, device);
  });
  PyObject* self = is_made ? PyType_GenericAlloc(type, 0) : nullptr;
  if (self != nullptr) reinterpret_cast<Loop*>(self)->loop = made.release();
  return self;
}

void loop_delete(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  delete reinterpret_cast<Loop*>(self)->loop;
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

PyObject* loop_launch(PyObject* self, PyObject* positional, PyObject* named) {
  static const char* const names[] = {"stream", nullptr};
  std::uintptr_t stream = 0;
  if (!parse(positional, named, "O&:launch", names, to_unsigned, &stream)) return nullptr;
  if (!unlocked([&] { loop_of(self).launch(reinterpret_cast<cudaStream_t>(stream)); })) return nullptr;
  Py_RETURN_NONE;
}

PyObject* loop_nodes(PyObject* self, void*) {
  PyObject* nodes = PyDict_New();
  for (const auto& [kind, count] : loop_of(self).nodes()) {
    PyObject* number = nodes == nullptr ? nullptr : PyLong_FromLongLong(count);
    if (number == nullptr || PyDict_SetItemString(nodes, kind.c_str(), number) != 0) Py_CLEAR(nodes);
    Py_XDECREF(number);
  }
  return nodes;
}

PyMethodDef loop_methods[] = {
    {"launch", as_method(loop_launch), METH_VARARGS | METH_KEYWORDS,
     "Puts one launch on the stream, a ``cudaStream_t`` as ``torch.cuda.Stream.cuda_stream`` gives it; does "
     "not "
     "wait."},
    {nullptr, nullptr, 0, nullptr},
};

PyGetSetDef loop_properties[] = {
    {"nodes", loop_nodes, nullptr, "How many nodes of each kind the step has.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

const char* const kLoopDoc = R"(A loop of captured steps as one launch.

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
    RuntimeError: CUDA's error, with the call that gave it.)";

PyType_Slot loop_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(loop_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(loop_delete)},
    {Py_tp_methods, loop_methods},
    {Py_tp_getset, loop_properties},
    {Py_tp_doc, const_cast<char*>(kLoopDoc)},
    {0, nullptr},
};

PyType_Spec loop_spec = {"madformer._C.CapturedLoop", sizeof(Loop), 0, Py_TPFLAGS_DEFAULT, loop_slots};

bool add_loop(PyObject* module) {
  PyObject* type = PyType_FromSpec(&loop_spec);
  const bool added = type != nullptr && PyModule_AddType(module, reinterpret_cast<PyTypeObject*>(type)) == 0;
  Py_XDECREF(type);
  return added;
}

#else

const char* const kArchitectures = "";

PyObject* loop_support(PyObject*, PyObject*) {
  return PyUnicode_FromString("madformer._C was built without CUDA");
}

bool add_loop(PyObject*) { return true; }

#endif

PyMethodDef functions[] = {
    {"content_hash", as_method(content_hash), METH_VARARGS | METH_KEYWORDS,
     "64 bits that tell ``size`` bytes at an ``address`` from others."},
    {"loop_support", loop_support, METH_NOARGS, "Why no CapturedLoop can run here; empty where it can."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "madformer._C", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  if (PyModule_AddStringConstant(module, "cuda_architectures", kArchitectures) != 0 || !add_loop(module)) {
    Py_CLEAR(module);
  }
  return module;
}
