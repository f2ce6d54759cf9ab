"""The static model: counts of a listing that was counted by hand, and that a kernel that got worse is told."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import static_model
from tests.helpers import environment

# A program with a loop in a loop; the inner one has two products of a warp group, and one wait for them.
LISTING = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/                   IADD3 R1, R1, 0x1, RZ ;
.L_x_2:
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0040*/              @!P0 HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0060*/                   MUFU.EX2 R4, R4 ;
        /*0070*/              @P1  LDS.128 R8, [R1] ;
        /*0080*/                   LDSM.16.M88.4 R8, [R1] ;
        /*0090*/                   FFMA R4, R4, R5, R6 ;
        /*00a0*/              @P0  BRA `(.L_x_2) ;
        /*00b0*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*00c0*/              @P2  BRA `(.L_x_1) ;
        /*00d0*/                   EXIT ;
.L_x_3:
        /*00e0*/                   BRA `(.L_x_3) ;
"""
FLOPS = 2 * 64 * 64 * 16  # of one product of a warp group


def test_counts_of_the_innermost_loop() -> None:
    counts = static_model.count(LISTING)
    assert counts == static_model.Counts(
        loops=1,
        issue=8,
        matrix=2,
        special=1,
        memory=2,
        waits=1,
        flops=2 * FLOPS // 4,
        shared_bytes=32 * 16 + 32 * 16,
        read_bytes=0,
        write_bytes=0,
    )


def test_without_products_the_loops_that_touch_memory_count() -> None:
    listing = LISTING.replace("HGMMA.64x64x16.F32.BF16", "FADD").replace("LDS.128", "LDG.E.128")
    counts = static_model.count(listing)
    assert (counts.loops, counts.issue, counts.matrix) == (1, 8, 0)
    assert (counts.read_bytes, counts.write_bytes) == (32 * 16, 0)
    straight = static_model.count("\n".join(line for line in listing.splitlines() if "BRA" not in line))
    assert (straight.loops, straight.issue) == (0, 12)
    assert (straight.read_bytes, straight.write_bytes) == (2 * 32 * 16, 32 * 8)


def test_bound_is_the_slowest_unit() -> None:
    counts, warps = static_model.count(LISTING), 4
    machine = static_model.MACHINES[90]
    bound = static_model.bound(counts, warps, 90, programs=1)
    assert (bound.issue, bound.matrix, bound.special) == (8, 2 * FLOPS / 4096, 8)
    assert bound.chain == 8 + bound.matrix + static_model.WAIT_CYCLES
    assert bound.by == "chain"
    assert bound.tflops == pytest.approx(2 * FLOPS / bound.chain * machine.sms * machine.ghz / 1e3)
    shared = static_model.bound(counts, warps, 90, programs=4)
    assert shared.by == "matrix"
    # Matrix products as fast as the units: the data sheet's 949 TFLOP/s at this clock.
    assert shared.tflops == pytest.approx(949, abs=1)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "programs"),
    [(168, 66584, 4, 3), (169, 66584, 4, 2), (32, 0, 8, 8), (32, 0, 1, 32), (255, 200_000, 8, 1)],
)
def test_occupancy(registers: int, shared: int, warps: int, programs: int) -> None:
    assert static_model.occupancy(registers, shared, warps, 90) == programs


def test_products_in_tensor_memory_are_read_from_tritons_listing() -> None:
    shapes = ", ".join(f"!ttg.memdesc<{shape}, #s>" for shape in ("128x64xbf16", "64x32xbf16", "128x32xf32"))
    line = f"ttng.tc_gen5_mma %a, %b, %d : {shapes}"
    listing = f"  {line}\n  %r = scf.for %i = %a to %b {{\n    {line}\n    {line}\n  }}\n  {line}\n"
    assert static_model.tensor_memory_flops(listing) == 2 * 2 * 128 * 64 * 32


@pytest.mark.slow
def test_a_kernel_that_got_worse_is_told(tmp_path: Path) -> None:
    """Against a record of itself nothing is told; with fewer instructions or more programs in it, each kernel is."""
    pytest.importorskip("triton", reason="Triton is not installed: kernels are NOT compiled here")
    own = environment()
    own.pop("TRITON_INTERPRET", None)
    record = tmp_path / "record.json"

    def check(*options: str) -> subprocess.CompletedProcess[str]:
        script = ["-m", "benchmarks.kernel_check", "--op", "swiglu", "--sm", "90", "--dtype", "bf16", *options]
        return subprocess.run([sys.executable, *script], env=own, capture_output=True, text=True)

    result = check("--record", str(record))
    assert result.returncode == 0, result.stderr
    kept = json.loads(record.read_text())
    assert check("--against", str(record)).returncode == 0
    for change in ("issue", "occupancy"):
        better = copy.deepcopy(kept)
        for row in better["rows"]:
            if change == "issue":
                row["counts"]["issue"] = int(row["counts"]["issue"] * 0.9)
            else:
                row["occupancy"] += 1
        record.write_text(json.dumps(better))
        result = check("--against", str(record))
        assert result.returncode == 1
        assert len(result.stderr.splitlines()) == len(kept["rows"])
        assert "before" in result.stderr
