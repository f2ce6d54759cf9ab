"""Optional libraries that are broken, half removed or of another PyTorch: said in one line, and nothing else ends.

They are folders on the path, as an installation leaves them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from madformer.kernels import dispatch, optional

# Without the rest of the package, and so without torch: what is looked at are the libraries.
REPORT = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("optional", sys.argv[1])
optional = importlib.util.module_from_spec(spec)
spec.loader.exec_module(optional)
print(json.dumps({name: optional.refusal(name) for name in ("flash_attn", "xformers")}))
"""


def write(folder: Path, files: dict[str, str]) -> dict[str, str]:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def run(environment: dict[str, str], *command: str) -> str:
    result = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout


# As xFormers 0.0.35 is: its Python part imports, and keeps the error of its extension for itself.
OF_ANOTHER_PYTORCH = """
import sys
class Error(Exception):
    class build_info:
        metadata = {"version": {"torch": "2.10.0+cu128"}}
print("WARNING: several", "lines", sep="\\n", file=sys.stderr)
_cpp_library_load_exception = Error()
"""


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {"flash_attn/left/over.txt": "", "xformers/__init__.py": "", "xformers/_cpp_lib.py": OF_ANOTHER_PYTORCH},
            {
                "flash_attn": "flash-attn is not installed: .*flash_attn holds no package",
                "xformers": "xFormers' extension does not load: it was built for PyTorch 2.10.0.cu128",
            },
        ),
        (
            {
                "flash_attn/cute/__init__.py": "raise ImportError('no cutlass\\nfor you')",
                "xformers/__init__.py": "raise OSError('libcudart.so.12: cannot open')",
            },
            {
                "flash_attn": "flash_attn is installed but does not load: no cutlass for you",
                "xformers": "xformers is installed but does not load: libcudart.so.12: cannot open",
            },
        ),
        (
            {"flash_attn/__init__.py": "import flash_attn_2_cuda"},
            {"flash_attn": ".* No module named 'flash_attn_2_cuda'"},
        ),
        ({"flash_attn/cute/__init__.py": "flash_attn_varlen_func = print"}, {"flash_attn": None}),
    ],
    ids=["left over and of another PyTorch", "broken", "version 2 without its extension", "version 4"],
)
def test_a_report_says_why(files: dict[str, str], expected: dict[str, str | None], tmp_path: Path) -> None:
    reasons = json.loads(run(write(tmp_path, files), "-S", "-c", REPORT, optional.__file__).splitlines()[-1])
    for name, pattern in expected.items():
        if pattern is None:
            assert reasons[name] is None
        else:
            assert re.fullmatch(pattern, reasons[name]), reasons[name]


def test_a_report_and_a_call_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional, "missing", lambda name: None)
    monkeypatch.setattr(optional, "refusal", lambda name: f"{name} is of another PyTorch")
    reasons = {status.backend: status.reason for status in dispatch.report() if not status.available}
    assert reasons["xformers"] == "xformers is of another PyTorch"
    with pytest.raises(dispatch.BackendUnavailableError, match="flash_attn is of another PyTorch"):
        dispatch.resolve("block_causal_attention", "flash_attn", torch.device("cuda"))


# One process for all that may be absent or broken at once: importing everything takes longer than what is tried.
WITHOUT_ALL = """
import sys
for absent in ("triton", "madformer._C"):
    sys.modules[absent] = None  # As if it were not there: importing it raises ModuleNotFoundError.

import torch
from torch import library
import madformer, madformer.engine, madformer.vae
from madformer.cli.main import main
from madformer.kernels import dispatch
from madformer.kernels.denoise_step import denoise_step
from madformer.kernels.swiglu import swiglu

statuses = {status.backend: status for status in dispatch.report()}
cpp, triton, reference = statuses["cpp"], statuses["triton"], statuses["reference"]
assert not cpp.available and {"denoise_step", "qk_norm_rope", "swiglu"} <= set(cpp.ops), cpp
assert "madformer._C is not built" in cpp.reason and "\\n" not in cpp.reason, cpp
assert not triton.available and "swiglu" in triton.ops, triton
assert reference.available and "swiglu" in reference.ops, reference

tensors = torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2, 3), torch.ones(2, 6)
denoise_step(*tensors)
assert tensors[0].eq(4).all() and tensors[2].eq(2).all(), tensors
library.opcheck(torch.ops.madformer.denoise_step_.default, tensors)
swiglu(*tensors[:2])
for backend, call in {"cpp": lambda: denoise_step(*tensors, backend="cpp"),
                      "triton": lambda: swiglu(*tensors[:2], backend="triton")}.items():
    try:
        call()
    except RuntimeError as error:
        print(error)
    else:
        raise AssertionError(f"{backend} was replaced silently")
sys.exit(main(["info"]))
"""


def test_without_triton_the_extension_and_with_a_library_that_breaks_diffusers(tmp_path: Path) -> None:
    """diffusers imports xFormers where it is installed, and fails with it: autoencoder, ``info`` and ops must not."""
    environment = write(
        tmp_path,
        {
            "xformers/__init__.py": "__version__ = '0.0.35'",
            "xformers/ops.py": "from flash_attn.flash_attn_interface import flash_attn_func",
            "xformers-0.0.35.dist-info/METADATA": "Metadata-Version: 2.1\nName: xformers\nVersion: 0.0.35\n",
            "flash_attn/left/over.txt": "",
        },
    )
    step, swiglu, *lines = run(environment, "-c", WITHOUT_ALL).splitlines()
    assert step.startswith("backend='cpp' cannot run denoise_step on cpu: madformer._C is not built")
    assert swiglu == "backend='triton' cannot run swiglu on cpu: Triton is not installed"
    (line,) = [line for line in lines if line.startswith("xformers ") and "  no " in line]
    assert "No module named 'flash_attn.flash_attn_interface'" in line or "does not load" in line


@pytest.mark.parametrize("package", ["triton", "cpp"])
def test_its_absence_is_announced_at_the_end_of_the_tests(package: str, request: pytest.FixtureRequest) -> None:
    """By the very reason that the dispatcher gives, and so do tests that are skipped without it."""
    missing = {"triton": "Triton is not installed", "cpp": "madformer._C is not built; an install with ..."}[package]
    conftest = request.config.pluginmanager.get_plugin(str(Path(__file__).parents[1] / "conftest.py"))
    said: list[str] = []
    reporter = SimpleNamespace(
        stats={"skipped": [SimpleNamespace(longrepr=("test.py", 1, f"Skipped: {missing}"))] * 3},
        section=lambda title, **_: said.append(title),
        line=said.append,
    )
    conftest.pytest_terminal_summary(reporter)
    assert len(said) == 2
    assert said[0].endswith(" skipped")
    assert said[1].startswith("3 tests")
    assert said[1].split(": ")[1] in missing
