"""Bench: the speed of every backend beside dense attention, each verified before it is timed.

    speedup             = dense SDPA seconds / seconds
    fraction_of_ideal   = speedup * block density
    sparsity_efficiency = seconds of the same backend at density 1 / seconds * block density
    gflops              = 4 * head_dim * pairs in visited blocks / seconds
    peak_gflops         = what the CPU's multiply-add instruction does in registers
    share_of_dense      = seconds of a block mass / dense SDPA seconds

Dense SDPA, the GEMM, the peak and the masses are timed in the same rounds as the backends.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from dit_sparse.environment import environment
from dit_sparse.kernels import native
from dit_sparse.kernels.attention import sparse_attention
from dit_sparse.kernels.calibration import (
    Calibration,
    Cost,
    Kind,
    Work,
    device_name,
    fit,
    path_of,
    work_of,
)
from dit_sparse.kernels.call import AttentionCall
from dit_sparse.kernels.mass import block_mass
from dit_sparse.kernels.stage import STAGES, Calls
from dit_sparse.measurement import accepting, candidates, interleaved, verify, verify_mass
from dit_sparse.runs import prepare_folder
from dit_sparse.video import replacing
from dit_sparse.workload import Workload

OnRound = Callable[[int, int], None]

_GEMM_SIDE = {"cpu": 2048}
_GEMM_SIDE_ELSEWHERE = 8192
_STAGE_DENSITY = 0.25
_MASS_ROWS = 16  # of each block, as searches by mass look at


@dataclass(frozen=True, slots=True)
class Row:
    """One backend on one workload; `density` is the block density that was computed, keys pooled
    by `2^r` counted `1 / 2^r`."""

    backend: str
    device: str
    dtype: str
    heads: int
    head_dim: int
    tokens: int
    block: int
    pattern: str
    density: float
    seconds: float
    dense_seconds: float
    speedup: float
    fraction_of_ideal: float
    sparsity_efficiency: float | None
    gflops: float
    gemm_gflops: float
    peak_gflops: float | None
    max_error: float


@dataclass(frozen=True, slots=True)
class MassRow:
    """The exact mass of every pair of blocks, from `rows` queries of each or from all."""

    device: str
    dtype: str
    heads: int
    head_dim: int
    tokens: int
    block: int
    rows: int | None
    seconds: float
    dense_seconds: float
    share_of_dense: float
    gflops: float
    max_error: float


@dataclass(frozen=True, slots=True)
class Bench:
    """All rows, and why a backend has none for a workload."""

    rows: list[Row]
    masses: list[MassRow]
    refusals: list[dict[str, Any]]
    repeats: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON, with what a reader of the figures must know."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "masses": [asdict(row) for row in self.masses],
            "refusals": self.refusals,
            "protocol": {
                "verified": "output and LSE of sampled rows against float64, before timing",
                "timing": f"interleaved in one process, median of {self.repeats} rounds",
                "round": "one call of each, on an accelerator ten in a row",
                "peak": "native's own multiply-add on registers, all threads; CPUs only",
                "dense": "torch.nn.functional.scaled_dot_product_attention, heads first",
            },
            "environment": environment(),
        }


def bench(
    workloads: Sequence[Workload],
    backends: Sequence[str] = (),
    repeats: int = 5,
    on_round: OnRound | None = None,
) -> Bench:
    """Verify and time `backends` (of these names; all by default) on every workload.

    Raises:
        ValueError: a backend that was named refuses, all refuse, or one is wrong.
    """
    chosen = candidates(backends)
    found, weighed = Bench([], [], [], repeats), set[Workload]()
    for workload in workloads:
        call = workload.call()
        accepted, reasons = accepting(chosen, call)
        for name, reason in reasons.items():
            if name in backends:
                raise ValueError(f"backend {name!r} refuses {describe(workload)}: {reason}")
            found.refusals.append({"backend": name, **_values(workload), "reason": reason})
        if not accepted:
            table = "".join(f"\n  {name}: {reason}" for name, reason in reasons.items())
            raise ValueError(f"no backend accepts {describe(workload)}:{table}")
        errors = {backend.name: verify(backend, call) for backend in accepted}
        full = AttentionCall(
            call.query, call.key, call.value, workload.dense().blocks(), call.scale
        )
        jobs: dict[tuple[str, str | int | None], Callable[[], object]] = {
            ("dense", "SDPA"): _dense(call),
            ("dense", "GEMM"): _gemm(call),
        }
        operations = native.peak(call.query.dtype) if workload.device == "cpu" else None
        if operations is not None:
            jobs["dense", "peak"] = partial(native.peak, call.query.dtype)
        # All pairs of blocks are weighed, whatever is listed.
        weighable = replace(workload.dense(), pattern="blocks")
        masses: dict[int | None, float] = {}
        if weighable not in weighed:
            weighed.add(weighable)
            masses = _add_masses(full, jobs)
        for backend in accepted:
            jobs[backend.name, "sparse"] = partial(backend.run, call)
            if backend.supports(full) is None:
                verify(backend, full)
                jobs[backend.name, "full"] = partial(backend.run, full)
        seconds = interleaved(jobs, repeats, call.query.device, on_round)
        density = call.blocks.density().weighted
        peak = None if operations is None else operations / seconds["dense", "peak"] / 1e9
        for name, error in errors.items():
            found.rows.append(_row(workload, name, density, seconds, peak, error))
        for rows, error in masses.items():
            found.masses.append(_mass_row(workload, rows, seconds, error))
    return found


def _add_masses(
    full: AttentionCall, jobs: dict[tuple[str, str | int | None], Callable[[], object]]
) -> dict[int | None, float]:
    """Adds what weighs every pair of blocks to the jobs; the error of each, by its rows."""
    query, key, value, blocks = full.query, full.key, full.value, full.blocks
    _, lse = sparse_attention(query, key, value, blocks, scale=full.scale)
    errors = {}
    for rows in (_MASS_ROWS, None):
        job = partial(block_mass, query, key, lse, blocks, scale=full.scale, rows=rows)
        errors[rows] = verify_mass(full, lse, rows, job())
        jobs["mass", rows] = job
    return errors


def _mass_row(
    workload: Workload,
    rows: int | None,
    seconds: dict[tuple[str, str | int | None], float],
    error: float,
) -> MassRow:
    own, dense = seconds["mass", rows], seconds["dense", "SDPA"]
    values, tokens = _values(workload), workload.grid.tokens
    looked_at = tokens if rows is None else -(-tokens // workload.block) * rows
    return MassRow(
        **{name: values[name] for name in ("device", "dtype", "heads", "head_dim", "tokens")},
        block=workload.block,
        rows=rows,
        seconds=own,
        dense_seconds=dense,
        share_of_dense=own / dense,
        gflops=2 * workload.head_dim * looked_at * tokens * workload.heads / own / 1e9,
        max_error=error,
    )


def _row(
    workload: Workload,
    backend: str,
    density: float,
    seconds: dict[tuple[str, str | int | None], float],
    peak: float | None,
    error: float,
) -> Row:
    own, dense = seconds[backend, "sparse"], seconds["dense", "SDPA"]
    full = seconds.get((backend, "full"))
    tokens = workload.grid.tokens
    pairs = density * tokens**2 * workload.heads
    return Row(
        backend=backend,
        **{**_values(workload), "density": density},
        seconds=own,
        dense_seconds=dense,
        speedup=dense / own,
        fraction_of_ideal=dense / own * density,
        sparsity_efficiency=None if full is None else full / own * density,
        gflops=4 * workload.head_dim * pairs / own / 1e9,
        gemm_gflops=2 * _gemm_side(workload.device) ** 3 / seconds["dense", "GEMM"] / 1e9,
        peak_gflops=peak,
        max_error=error,
    )


def _values(workload: Workload) -> dict[str, Any]:
    return {
        "device": workload.device,
        "dtype": workload.dtype,
        "heads": workload.heads,
        "head_dim": workload.head_dim,
        "tokens": workload.grid.tokens,
        "block": workload.block,
        "pattern": workload.pattern,
        "density": workload.density,
    }


def describe(workload: Workload) -> str:
    """A workload in a line."""
    return (
        f"{workload.pattern} of density {workload.density:g} on {workload.grid.tokens} tokens, "
        f"head_dim {workload.head_dim}, {workload.dtype} on {workload.device}"
    )


def _dense(call: AttentionCall) -> Callable[[], object]:
    query, key, value = (
        x.transpose(1, 2).contiguous() for x in (call.query, call.key, call.value)
    )
    return partial(scaled_dot_product_attention, query, key, value, scale=call.scale)


def _gemm(call: AttentionCall) -> Callable[[], object]:
    side = _gemm_side(call.query.device.type)
    # Of zeros or ones, the product would be faster.
    left, right = torch.randn(2, side, side, dtype=call.query.dtype, device=call.query.device)
    return partial(torch.mm, left, right)


def _gemm_side(device: str) -> int:
    return _GEMM_SIDE.get(torch.device(device).type, _GEMM_SIDE_ELSEWHERE)


def calibrate(
    workloads: Sequence[Workload],
    backends: Sequence[str] = (),
    repeats: int = 5,
    on_round: OnRound | None = None,
) -> Calibration:
    """The costs of `backends` on the one device of `workloads`, which are also verified, and of
    all stages there.

    Raises:
        ValueError: a backend that was named refuses everything, or one is wrong, or too little
            was measured.
    """
    chosen = candidates(backends)
    samples: dict[Kind, list[tuple[Work, float]]] = {}
    for workload in workloads:
        call = workload.call()
        accepted, _ = accepting(chosen, call)
        for backend in accepted:
            verify(backend, call)
        jobs = {backend.name: partial(backend.run, call) for backend in accepted}
        work = work_of(call.blocks)
        for name, seconds in interleaved(jobs, repeats, call.query.device, on_round).items():
            kind = name, workload.dtype, workload.head_dim
            samples.setdefault(kind, []).append((work, seconds))
    silent = [name for name in backends if name not in {kind[0] for kind in samples}]
    if silent or not samples:
        refusing = silent or [backend.name for backend in chosen]
        _, reasons = accepting(candidates(refusing), workloads[0].call())
        table = "".join(f"\n  {name}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"nothing to calibrate:{table}")
    for workload in stage_workloads(workloads):
        calls = _calls(workload)
        batch, tokens, heads, head_dim = calls.call.query.shape
        jobs = {stage: stage.job(calls) for stage in STAGES}
        for stage, seconds in interleaved(
            jobs, repeats, calls.call.query.device, on_round
        ).items():
            work = stage.work(batch, tokens, heads, workload.block)
            samples.setdefault((str(stage), workload.dtype, head_dim), []).append((work, seconds))
    device = device_name(torch.device(workloads[0].device))
    costs: dict[Kind, Cost] = {kind: fit(measured) for kind, measured in samples.items()}
    return Calibration(device, costs)


def stage_workloads(workloads: Sequence[Workload]) -> list[Workload]:
    """What stages are timed on: tokens and arithmetic of `workloads`, with as many heads and half
    of them, in blocks of as many tokens and of half of them."""
    found = [
        replace(workload, pattern="blocks", density=_STAGE_DENSITY, heads=heads, block=block)
        for workload in workloads
        for heads in (workload.heads, workload.heads // 2 or 2)
        for block in (workload.block, workload.block // 2 or 2)
    ]
    return list(dict.fromkeys(found))


def _calls(workload: Workload) -> Calls:
    call = workload.call()
    operands = call.query, call.key, call.value
    dense = sparse_attention(*operands, workload.dense().blocks(), scale=call.scale)
    return Calls(call, dense, sparse_attention(*operands, call.blocks, scale=call.scale))


def calibration_to_dict(calibrations: Sequence[Calibration]) -> dict[str, Any]:
    """As JSON, with what a reader of the figures must know."""
    return {
        "costs": [
            {
                "device": calibration.device,
                "name": name,
                "dtype": dtype,
                "head_dim": head_dim,
                **asdict(cost),
            }
            for calibration in calibrations
            for (name, dtype, head_dim), cost in calibration.costs.items()
        ],
        "files": [str(path_of(calibration.device)) for calibration in calibrations],
        "environment": environment(),
    }


def write_bench(path: Path, data: dict[str, Any]) -> None:
    """Write a result as JSON."""
    prepare_folder(path.parent)
    with replacing(path) as partial_file:
        partial_file.write_text(json.dumps(data, indent=1) + "\n")
