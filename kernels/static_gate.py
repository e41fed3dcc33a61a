"""Static gate: what the Triton kernels compile to, counted without a GPU and held to bars.

    a row = one kernel on one architecture and head_dim: the instructions of its main loop, those
    of its yardstick's (`loop_ratio`), registers, spills, matrix products, exponentials, copies

Yardsticks: `whole` against `dense`, the same kernel walking all tiles in sequence; `partial` and
`pooled` against the loop of whole tiles in their own kernel; `mass` against `whole`. `model_ratio`
compares cycles, from instruction counts alone: matrix products plus the larger of exponentials and
issued instructions, nothing overlapped. It is for tracking changes; it does not forecast time.

Numbers move with Triton's version, so they are stored for each, and only a worsening fails.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dit_sparse.kernels.sass import Loop, missing_tools
from dit_sparse.kernels.target import Target

Row = dict[str, Any]

ARCHITECTURES = 80, 90, 100
HEAD_DIMS = 64, 128
KERNELS = "whole", "partial", "pooled", "mass"
STORED = Path(__file__).with_name("static")

# Of sm_90 at head_dim 128.
BARS = {"whole": 1.05, "partial": 1.55}

# Dense multiply-adds of half precision that a multiprocessor does in a cycle, twice; exponentials
# and instructions are 16 and 128 threads' a cycle everywhere.
_FLOPS = {80: 2048, 90: 4096, 100: 8192}
_YARDSTICK = {"whole": "dense", "mass": "whole"}
# Figures of which more is worse, with the share by which they may grow unnoticed.
_SLACK = {"loop_ratio": 0.01, "instructions": 0.02, "registers": 0.05, "spills": 0.0}


def unavailable() -> str | None:
    """Why the gate cannot run here, or `None`."""
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        return "triton is not installed"
    return missing_tools(_tools(spec.origin))


def rows(
    architectures: Iterable[int] = ARCHITECTURES,
    head_dims: Iterable[int] = HEAD_DIMS,
    kernels: Iterable[str] = KERNELS,
) -> list[Row]:
    """Compile and count; seconds for each kernel that Triton's cache does not hold."""
    reason = unavailable()
    if reason is not None:
        raise ValueError(f"the static gate needs Triton with its compilers: {reason}")
    kernels = list(kernels)
    found = []
    for architecture in architectures:
        for head_dim in head_dims:
            counted = {
                name: _count(architecture, head_dim, name)
                for name in dict.fromkeys(["dense", "whole", *kernels])
            }
            found += [_row(architecture, head_dim, name, counted) for name in kernels]
    return found


def worsened(found: list[Row], stored: list[Row]) -> list[str]:
    """Each figure that is worse than the stored one or past its bar, in words."""
    known = {_key(row): row for row in stored}
    lines = []
    for row in found:
        where = f"sm_{row['arch']} head_dim {row['head_dim']} {row['kernel']}"
        before = known.get(_key(row))
        for name, slack in _SLACK.items():
            if before is not None and row[name] > before[name] * (1 + slack):
                lines.append(f"{where}: {name} {row[name]}, stored {before[name]}")
        for name in ("mma", "ex2", "async_copies"):
            if before is not None and row[name] < before[name]:
                lines.append(f"{where}: {name} {row[name]}, stored {before[name]}; work was lost")
        if (row["arch"], row["head_dim"]) == (90, 128):
            bar = BARS.get(row["kernel"])
            if bar is not None and row["loop_ratio"] > bar:
                lines.append(f"{where}: loop_ratio {row['loop_ratio']}, at most {bar} is allowed")
            if row["spills"]:
                lines.append(f"{where}: spills {row['spills']}, none are allowed")
    return lines


def stored_rows() -> list[Row]:
    """The figures kept for the installed Triton; none for a version not seen before."""
    path = stored_path()
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def stored_path() -> Path:
    """The file of the installed Triton's figures."""
    try:
        major, minor = version("triton").split(".")[:2]
    except PackageNotFoundError:
        major, minor = "0", "0"
    return STORED / f"triton-{major}.{minor}.json"


def store(found: list[Row]) -> Path:
    """Keep `found` as the figures of the installed Triton, beside those of other kernels."""
    merged = {_key(row): row for row in [*stored_rows(), *found]}
    path = stored_path()
    lines = ",\n".join(json.dumps(merged[key]) for key in sorted(merged))
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'{{"rows": [\n{lines}\n]}}\n')
    return path


def _key(row: Row) -> tuple[int, int, str]:
    return row["arch"], row["head_dim"], row["kernel"]


def _tools(origin: str) -> Path:
    return Path(origin).parent / "backends" / "nvidia" / "bin"


def _count(architecture: int, head_dim: int, name: str) -> Row:
    """The loop that a kernel is about, which is its last, and `beside` it the first."""
    from dit_sparse.kernels.aot_triton import Variant, compile_attend, compile_mass, tiles_of
    from dit_sparse.kernels.sass import disassemble

    variants = {
        "dense": Variant(dense=True),
        "whole": Variant(),
        "partial": Variant(masked=True, word_axes=3),
        "pooled": Variant(pooled=True),
    }
    target, variant = Target("cuda", architecture), variants.get(name, Variant())
    compiled = (
        compile_mass(target, head_dim)
        if name == "mass"
        else compile_attend(target, head_dim, variant)
    )
    spec = find_spec("triton")
    assert spec is not None, "checked before"
    assert spec.origin is not None
    sass = disassemble(compiled.asm["cubin"], _tools(spec.origin))
    if not sass.loops:
        raise ValueError(
            f"sm_{architecture} head_dim {head_dim} {name} was compiled to no loop of matrix "
            "products; Triton does not support these tiles"
        )
    sizes = tiles_of(target, head_dim, variant)
    warps = 4 if name == "mass" else sizes.warps
    rows_of_tile, products = (64, 1) if name == "mass" else (sizes.block_q, 2)
    multiply = 2 * products * rows_of_tile * sizes.block_k * head_dim / _FLOPS[architecture]

    def counts(loop: Loop) -> Row:
        other = max(loop.ex2 * 32 * warps / 16, loop.instructions * warps / 4)
        return {**asdict(loop), "cycles": round(multiply + other)}

    return {
        **counts(sass.loops[-1]),
        "registers": sass.registers,
        "spills": sass.spills,
        "shared": compiled.metadata.shared,
        "beside": counts(sass.loops[0]),
    }


def _row(architecture: int, head_dim: int, name: str, counted: dict[str, Row]) -> Row:
    own, yardstick = dict(counted[name]), _YARDSTICK.get(name, "beside")
    beside = own.pop("beside")
    against: Row = {"beside": beside, **counted}[yardstick]
    return {
        "arch": architecture,
        "head_dim": head_dim,
        "kernel": name,
        "yardstick": yardstick,
        "loop_ratio": round(own["instructions"] / against["instructions"], 3),
        "model_ratio": round(own["cycles"] / against["cycles"], 3),
        **own,
    }
