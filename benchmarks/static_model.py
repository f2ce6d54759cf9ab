"""What a compiled kernel can reach at most, from its instructions: no GPU.

Of the machine code's innermost loops (of the whole program where there is none) it counts, for one warp and one pass,
the instructions that are issued and those that the matrix units, the special-function units and the load/store units
take. A streaming multiprocessor (SM) issues one instruction a cycle and scheduler; the slowest of its units, with
everything else hidden behind it, bounds the kernel. What a bound leaves out is latency: a kernel with few warps does
not reach it.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SCHEDULERS = 4
SPECIAL_LANES = 16
"""Special functions (exponentials, reciprocals, roots) that an SM finishes a cycle."""
WAIT_CYCLES = 180
"""From the end of a warp group's products to the first instruction that uses them; estimated, not measured."""
SHARED_BYTES = 128
"""That an SM's load/store units move a cycle, to and from shared memory and the L1 cache."""


@dataclass(frozen=True)
class Machine:
    """An architecture's flagship, from NVIDIA's data sheets and the CUDA programming guide.

    Attributes:
        sms: streaming multiprocessors.
        ghz: their boost clock.
        matrix_flops: of the matrix units of one SM in a cycle, in bfloat16 or float16.
        copy_tb_per_s: of device memory, read and written, about nine tenths of the data sheet's.
        shared_bytes: shared memory of an SM; a program takes 1 KiB more than it asks for.
    """

    sms: int
    ghz: float
    matrix_flops: int
    copy_tb_per_s: float
    shared_bytes: int
    registers: int = 65536
    threads: int = 2048
    programs: int = 32

    @property
    def copy_bytes(self) -> float:
        """That one SM's share of the memory moves in a cycle."""
        return self.copy_tb_per_s * 1e3 / self.sms / self.ghz


MACHINES = {
    80: Machine(sms=108, ghz=1.41, matrix_flops=2048, copy_tb_per_s=1.8, shared_bytes=164 * 1024),
    90: Machine(sms=132, ghz=1.755, matrix_flops=4096, copy_tb_per_s=4.3, shared_bytes=228 * 1024),
    100: Machine(sms=148, ghz=1.85, matrix_flops=8192, copy_tb_per_s=7.2, shared_bytes=228 * 1024),
}


@dataclass(frozen=True)
class Counts:
    """Of one warp in one pass of the main loops, or in the whole program.

    Attributes:
        loops: how many; 0 where the whole program was counted.
        issue: instructions.
        matrix, special, memory: those that the matrix, special-function and load/store units take.
        waits: for matrix products that run beside the warp (Hopper's).
        flops: of the matrix instructions.
        shared_bytes: between registers and shared memory.
        read_bytes, write_bytes: of device memory, by one warp; of several loops, those of one.
    """

    loops: int
    issue: int
    matrix: int
    special: int
    memory: int
    waits: int
    flops: int
    shared_bytes: int
    read_bytes: int
    write_bytes: int


def disassembled(text: str) -> tuple[list[str], dict[str, int]]:
    """``nvdisasm -c`` as instructions without addresses, and the labels' places among them."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(instruction[1])
    return instructions, labels


def operation(instruction: str) -> str:
    """``HGMMA.64x64x16.F32.BF16`` of an instruction, without its predicate."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split(maxsplit=1)[0]


def innermost_loops(instructions: Sequence[str], labels: dict[str, int]) -> list[list[str]]:
    """The bodies of loops that contain no other loop."""
    spans = []
    for place, instruction in enumerate(instructions):
        branch = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction)
        # To itself jumps what stands behind the end of every program.
        if branch and branch[1] in labels and labels[branch[1]] < place:
            spans.append((labels[branch[1]], place))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [list(instructions[first : last + 1]) for first, last in inner]


_MATRIX = re.compile(r"^(HGMMA|HMMA|UTCHMMA|UTCQMMA|IMMA|DMMA)\b")
_GLOBAL = re.compile(r"^(LDG|STG|LDGSTS|RED|REDG|ATOMG)\b")
_SHARED = re.compile(r"^(LDS|STS|LDSM|STSM|LDTM|STTM)\b")
_BULK = re.compile(r"^(UTMALDG|UTMASTG|UBLKCP)\b")


def _bytes_of(name: str) -> int:
    """By one warp."""
    if name.startswith(("LDSM", "STSM")):
        return 32 * 4 * int((re.search(r"\.(\d)$", name) or [0, 1])[1])
    width = re.search(r"\.(\d+)(?:\.|$)", name)
    bits = int(width[1]) if width and width[1] in ("64", "128", "256") else 32
    narrow = re.search(r"\.[US](8|16)\b", name)
    return 32 * (int(narrow[1]) if narrow else bits) // 8


def _flops_of(name: str) -> int:
    """Of a matrix instruction, by one of the warps that share it. Blackwell's do not say their shape."""
    if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):
        rows, cols, depth = map(int, shape.groups())
        return 2 * rows * cols * depth // 4
    if shape := re.match(r"HMMA\.(\d+)\.", name):
        return {"16816": 2 * 16 * 8 * 16, "1688": 2 * 16 * 8 * 8, "1684": 2 * 16 * 8 * 4}.get(shape[1], 0)
    return 0


def _counted(body: Sequence[str]) -> tuple[collections.Counter[str], int, int]:
    names = [operation(instruction) for instruction in body]
    counts: collections.Counter[str] = collections.Counter(issue=len(names))
    reads = writes = 0
    for name in names:
        if _MATRIX.match(name):
            counts["matrix"] += 1
            counts["flops"] += _flops_of(name)
        elif name.startswith("WARPGROUP.DEPBAR"):
            counts["waits"] += 1
        elif name.startswith("MUFU"):
            counts["special"] += 1
        elif _SHARED.match(name):
            counts["memory"] += 1
            counts["shared_bytes"] += _bytes_of(name)
        elif _GLOBAL.match(name):
            counts["memory"] += 1
            reads += _bytes_of(name) if name.startswith("LDG") else 0
            writes += 0 if name.startswith("LDG") else _bytes_of(name)
        elif _BULK.match(name):
            counts["memory"] += 1
    return counts, reads, writes


def count(text: str) -> Counts:
    """The counts of a kernel's disassembly.

    The main loops are those with matrix products; without any, those that touch device memory.
    """
    instructions, labels = disassembled(text)
    counted = [_counted(body) for body in innermost_loops(instructions, labels)]
    main = [each for each in counted if each[0]["matrix"]] or [each for each in counted if each[1] or each[2]]
    if main and main[0][0]["matrix"]:
        # Of a loop that was compiled twice, with and without masks, the one that runs most.
        main = [max(main, key=lambda each: each[0]["flops"] / each[0]["issue"])]
    loops = len(main)
    if not main:
        main = [_counted(instructions)]
    total: collections.Counter[str] = sum((each[0] for each in main), collections.Counter())
    fields = ("issue", "matrix", "special", "memory", "waits", "flops", "shared_bytes")
    # A second reading of the same is from the caches, and what is written twice leaves them once.
    reads, writes = (max(each[place] for each in main) for place in (1, 2))
    return Counts(loops, *(total[name] for name in fields), reads, writes)


def occupancy(registers: int, shared_bytes: int, num_warps: int, capability: int) -> int:
    """Programs that fit an SM at once."""
    machine = MACHINES[capability]
    by_registers = machine.registers // (-(-max(1, registers) // 8) * 8 * 32 * num_warps)
    by_shared = machine.shared_bytes // (shared_bytes + 1024)
    return min(by_registers, by_shared, machine.threads // (32 * num_warps), machine.programs)


@dataclass(frozen=True)
class Bound:
    """Cycles of one pass of one program's main loop on its SM, by unit, and what follows from the longest.

    Attributes:
        chain: where the warps wait for products, that nothing of the program overlaps: its instructions, the products,
            and a latency each time; shared among the programs of the SM, which fill each other's gaps.
        tflops: at most, of the whole GPU; 0 for kernels without matrix products.
        share_of_copy: at most, above 1 where the memory is the limit; 0 for kernels with matrix products.
    """

    issue: float
    matrix: float
    special: float
    memory: float
    chain: float
    by: str
    tflops: float
    share_of_copy: float


def bound(counts: Counts, num_warps: int, capability: int, programs: int, flops: int | None = None) -> Bound:
    """What bounds a kernel.

    Args:
        programs: on an SM at once.
        flops: of one pass of a program, where the instructions do not say.
    """
    machine = MACHINES[capability]
    flops = counts.flops * num_warps if flops is None else flops
    moved = (counts.read_bytes + counts.write_bytes) * num_warps
    cycles = {
        "issue": counts.issue * num_warps / SCHEDULERS,
        "matrix": flops / machine.matrix_flops,
        "special": counts.special * num_warps * 32 / SPECIAL_LANES,
        "memory": (counts.shared_bytes * num_warps + moved) / SHARED_BYTES,
    }
    cycles["chain"] = 0.0
    if counts.waits:
        cycles["chain"] = (cycles["issue"] + cycles["matrix"] + counts.waits * WAIT_CYCLES) / max(1, programs)
    slowest = max(cycles, key=lambda name: cycles[name])
    tflops = share = 0.0
    if flops:
        tflops = flops / cycles[slowest] * machine.sms * machine.ghz / 1e3
    elif moved:
        share = moved / machine.copy_bytes / max(cycles.values())
    return Bound(**cycles, by=slowest, tflops=tflops, share_of_copy=share)


def tensor_memory_flops(ttgir: str) -> int:
    """Of the products of one pass of the main loop, where they are Blackwell's: from Triton's own listing."""
    best = 0
    for body in _loop_bodies(ttgir):
        flops = 0
        for line in body:
            if "ttng.tc_gen5_mma " in line:
                shapes = re.findall(r"memdesc<(?:1x)?(\d+)x(\d+)x", line)
                (rows, depth), (_, cols) = (tuple(map(int, shape)) for shape in shapes[:2])
                flops += 2 * rows * depth * cols
        best = max(best, flops)
    return best


def _loop_bodies(ttgir: str) -> Iterator[list[str]]:
    lines = ttgir.splitlines()
    for place, line in enumerate(lines):
        if " scf.for " in line or line.lstrip().startswith("scf.for "):
            indent = len(line) - len(line.lstrip())
            body = []
            for inner in lines[place + 1 :]:
                if len(inner) - len(inner.lstrip()) <= indent and inner.strip():
                    break
                body.append(inner)
            yield body
