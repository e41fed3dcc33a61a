"""Sass: what a compiled NVIDIA kernel is made of, counted loop by loop without running it.

The tools that take a binary apart come with Triton's wheel.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

_CLASSES = {
    "mma": r"HMMA|HGMMA|QGMMA|UTC\w*MMA",
    "ex2": r"MUFU\.EX2",
    "async_copies": r"LDGSTS|UTMALDG",
    "spills": r"LDL|STL",
}
_INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)(.*)")
_LABEL = re.compile(r"\s*(\.L\w+):")
_TARGET = re.compile(r"`\((\.L\w+)\)")


@dataclass(frozen=True, slots=True)
class Loop:
    """Instructions of one pass through a loop, and those of some kinds among them."""

    instructions: int
    mma: int
    ex2: int
    async_copies: int


@dataclass(frozen=True, slots=True)
class Sass:
    """One kernel: its innermost loops that multiply matrices or copy tiles, in order; registers
    of a thread; loads and stores of spilled registers anywhere."""

    loops: tuple[Loop, ...]
    registers: int
    spills: int


def missing_tools(folder: Path) -> str | None:
    """Why kernels cannot be taken apart with the tools in `folder`, or `None`."""
    absent = [name for name in ("ptxas", "nvdisasm", "cuobjdump") if not (folder / name).is_file()]
    return f"no {', '.join(absent)} in {folder}" if absent else None


def disassemble(cubin: bytes, folder: Path) -> Sass:
    """`cubin` taken apart with the tools in `folder`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = _output(folder / "nvdisasm", "-c", file.name)
        usage = _output(folder / "cuobjdump", "-res-usage", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise ValueError(f"cuobjdump names no registers: {usage[:200]!r}")
    return parse(listing, int(registers.group(1)))


def parse(listing: str, registers: int) -> Sass:
    """What `nvdisasm -c` printed."""
    labels: dict[str, int] = {}
    names: list[str] = []
    jumps: list[tuple[int, str]] = []
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label.group(1)] = len(names)
        elif found := _INSTRUCTION.search(line):
            if found.group(1).startswith("BRA") and (to := _TARGET.search(found.group(2))):
                jumps.append((len(names), to.group(1)))
            names.append(found.group(1))
    # Behind the last exit lie the slow paths of barriers, which jump back as well.
    last = max((i for i, name in enumerate(names) if name.startswith("EXIT")), default=len(names))
    spans = [(labels[to], at) for at, to in jumps if at < last and labels.get(to, at + 1) <= at]
    loops: list[tuple[int, int]] = []
    for start, stop in sorted(spans, key=lambda span: span[1] - span[0]):
        counts = _counts(names[start : stop + 1])
        inner = any(start <= a and b <= stop for a, b in loops)
        if not inner and (counts["mma"] or counts["ex2"] > 4):
            loops.append((start, stop))
    return Sass(
        tuple(_loop(names[a : b + 1]) for a, b in sorted(loops)),
        registers,
        _counts(names)["spills"],
    )


def _loop(names: list[str]) -> Loop:
    counts = _counts(names)
    return Loop(len(names), counts["mma"], counts["ex2"], counts["async_copies"])


def _counts(names: list[str]) -> Counter[str]:
    return Counter(
        kind for name in names for kind, wanted in _CLASSES.items() if re.match(wanted, name)
    )


def _output(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
