"""benchmarks/cpu_kernels.py looks at every op that C++ has, and at what it reads and writes."""

from __future__ import annotations

from benchmarks.cpu_kernels import cases
from madformer.kernels import dispatch


def test_every_op_of_cpp_is_timed() -> None:
    (cpp,) = [status for status in dispatch.report() if status.backend == "cpp"]
    timed = {case.op for case in cases()}
    assert timed == set(cpp.ops) - {"qk_norm_rope_cached"}
    assert all(case.forward_bytes > 0 and "eager" in case.peers for case in cases())
