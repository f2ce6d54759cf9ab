"""What a step's operators are counted as, and that the parts are those of a step; no timing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import step_kinds
from benchmarks.step_kinds import BETWEEN, KINDS, OTHERS


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("mkldnn::_linear_pointwise", "linear layers"),
        ("mkldnn::_convolution_pointwise", "convolutions"),
        ("madformer::self_attention", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("madformer::group_norm_silu", "group norm"),
        ("madformer::adaln", "norms and activations of the Transformer"),
        ("aten::cat", "copies"),
        ("aten::mul", OTHERS),
    ],
)
def test_kinds(operator: str, kind: str) -> None:
    assert step_kinds.kind_of(operator) == kind


def test_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "record.json"
    words = [
        "--tiny",
        "--repeats",
        "2",
        "--threads",
        "1",
        "--no-compile",
        "--no-int8",
        "--dtype",
        "float32",
        "--out",
        str(out),
    ]
    assert step_kinds.main(words) == 0
    record = json.loads(out.read_text())
    own = record["ways"]["called"]
    assert set(own) == {"step", *KINDS, OTHERS, BETWEEN}
    assert min(own.values()) >= 0
    # the network of a step has each of these
    assert all(own[kind] > 0 for kind in ("linear layers", "convolutions", "attention", "group norm"))
    assert own["step"] <= sum(own.values()) - own["step"] + 1e-9
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == record["metrics"]
