"""Our calls of optional libraries against the signatures of the real ones, read from their wheels.

``MADFORMER_PEERS`` names a folder with a package each, unpacked: ``flash-attn``, ``flash-attn-4``, ``xformers``.
``make matrix`` fetches them. Nothing of theirs is imported: on a machine without a GPU it would not load.
"""

from __future__ import annotations

import ast
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from madformer.kernels.block_causal_attention import peers
from madformer.kernels.block_causal_attention.peers import Sequences

PEERS = Path(os.environ.get("MADFORMER_PEERS", ""))
CALL = [torch.zeros(6, 2, 8)] * 3, Sequences((2, 4), (2, 4)), 0.5


def package(name: str) -> Path:
    if "MADFORMER_PEERS" not in os.environ:
        pytest.skip("MADFORMER_PEERS names no folder of unpacked packages: make matrix fetches them")
    # Who names a folder wants its packages looked at: one that is missing is no reason to skip.
    assert (PEERS / name).is_dir(), f"{PEERS} holds no {name}"
    return PEERS / name


def stand_in(source: Path, qualified: str, calls: list[dict[str, Any]], result: object) -> Callable[..., Any]:
    """A function of the very signature, which notes its arguments."""
    node: Any = ast.parse(source.read_text())
    for part in qualified.split("."):
        node = [x for x in node.body if getattr(x, "name", "") == part][-1]
    arguments = node.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        argument.annotation = None
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [default and ast.Constant(None) for default in arguments.kw_defaults]
    made = f"def made({ast.unparse(arguments)}):\n    calls.append(dict(locals()))\n    return result"
    namespace: dict[str, Any] = {"calls": calls, "result": result}
    exec(made, namespace)
    return namespace["made"]


def exports(init: Path, name: str) -> bool:
    tree = ast.parse(init.read_text())
    return any(
        name in (alias.asname or alias.name)
        for x in ast.walk(tree)
        if isinstance(x, ast.ImportFrom)
        for alias in x.names
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("name", "source", "init"),
    [
        ("flash-attn", "flash_attn/flash_attn_interface.py", "flash_attn/__init__.py"),
        ("flash-attn-4", "flash_attn/cute/interface.py", "flash_attn/cute/__init__.py"),
    ],
)
def test_flash_attn(name: str, source: str, init: str, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, calls = package(name), list[dict[str, Any]]()
    is_version_2 = name == "flash-attn"
    assert (folder / "flash_attn/__init__.py").exists() == is_version_2
    assert exports(folder / init, "flash_attn_varlen_func")
    out, lse = torch.ones(6, 2, 8), torch.ones(2, 6)
    function = stand_in(folder / source, "flash_attn_varlen_func", calls, (out, lse, None))
    module = types.SimpleNamespace(**({"flash_attn_varlen_func": function} if is_version_2 else {}))

    def load(backend: str, module_name: str, attribute: str | None = None) -> Any:
        assert module_name in ("flash_attn", "flash_attn" if is_version_2 else "flash_attn.cute")
        return module if attribute is None else function

    monkeypatch.setattr(peers, "_load", load)
    (q, k, v), sequences, scale = CALL
    sequences = Sequences(sequences.queries, sequences.keys, causal)
    assert peers._flash_attn(q, k, v, sequences, scale, return_lse=True)[1] is not None
    (call,) = calls
    assert call["cu_seqlens_q"].tolist() == [0, 2, 6]
    assert (call["max_seqlen_k"], call["softmax_scale"], call["causal"]) == (4, scale, causal)


@pytest.mark.parametrize("causal", [False, True])
def test_xformers(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, calls = package("xformers") / "xformers", list[dict[str, Any]]()
    biases = folder / "ops/fmha/attn_bias.py"
    names = {node.name: node for node in ast.parse(biases.read_text()).body if isinstance(node, ast.ClassDef)}
    assert [base.id for base in names["BlockDiagonalCausalMask"].bases if isinstance(base, ast.Name)] == [
        "BlockDiagonalMask"
    ]
    assert "_cpp_library_load_exception" in (folder / "_cpp_lib.py").read_text()
    assert exports(folder / "ops/__init__.py", "memory_efficient_attention")
    made = stand_in(biases, "BlockDiagonalMask.from_seqlens", calls, "bias")
    kind = type("Kind", (), {"from_seqlens": classmethod(made)})
    attend = stand_in(folder / "ops/fmha/__init__.py", "memory_efficient_attention", calls, torch.ones(1, 6, 2, 8))
    found = {
        "xformers.ops": attend,
        "xformers.ops.fmha.attn_bias": types.SimpleNamespace(BlockDiagonalMask=kind, BlockDiagonalCausalMask=kind),
    }
    monkeypatch.setattr(peers, "_load", lambda backend, module, name=None: found[module])
    peers._block_diagonal_bias.cache_clear()
    (q, k, v), sequences, scale = CALL
    out, _ = peers._xformers(q, k, v, Sequences(sequences.queries, sequences.keys, causal), scale)
    peers._block_diagonal_bias.cache_clear()
    assert out.shape == (6, 2, 8)
    made_with, called_with = calls
    assert (made_with["q_seqlen"], made_with["kv_seqlen"]) == ((2, 4), (2, 4))
    assert (called_with["attn_bias"], called_with["scale"]) == ("bias", scale)
