"""Measurement: whether a backend is right, and how long things take side by side.

Right: output and LSE of rows from every part of the sequence, against attention written out in
float64. Long: every job once unmeasured, then all of them in turn, round after round; medians. An
accelerator gets ten calls in a row, so that launching hides behind computing, as in a model.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor

from dit_sparse.kernels.backend import BACKENDS, Backend
from dit_sparse.kernels.blocks import WHOLE, BlockIndices
from dit_sparse.kernels.call import AttentionCall
from dit_sparse.kernels.sample import sampled_rows

Name = TypeVar("Name")

LARGEST_ERROR = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

# Of a block mass, at least: it ranks blocks, so exponentials are rounded.
_MASS_ERROR = 2e-4

# The specification is no candidate: it is timed only when it is asked for.
_UNTIMED = ("reference",)

_CALLS, _CALLS_ELSEWHERE = {"cpu": 1}, 10

# Blocks of queries whose mass is looked at.
_MASS_BLOCKS = 4

# Rows that are looked at, in all heads together; at least so many in each.
_ROWS, _LEAST_ROWS = 1024, 16


def candidates(names: Sequence[str] = ()) -> list[Backend]:
    """The backends of these names; without names, all that can be worth timing."""
    known = {backend.name: backend for backend in BACKENDS}
    for name in names:
        if name not in known:
            raise ValueError(f"unknown backend {name!r}; use one of {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)] or [
        backend for name, backend in known.items() if name not in _UNTIMED
    ]


def accepting(
    backends: Sequence[Backend], call: AttentionCall
) -> tuple[list[Backend], dict[str, str]]:
    """Those that accept `call`, and the reasons of the others."""
    reasons = {backend.name: backend.supports(call) for backend in backends}
    refusals = {name: reason for name, reason in reasons.items() if reason is not None}
    return [backend for backend in backends if backend.name not in refusals], refusals


def verify(backend: Backend, call: AttentionCall) -> float:
    """The largest error of output and LSE on the rows that are looked at.

    That of the output is relative to the largest output, that of the LSE to the LSE, or to 1
    where it is smaller.

    Raises:
        ValueError: the error is larger than rounding can explain.
    """
    output, lse = backend.run(call)
    errors = []
    for head in range(call.blocks.heads):
        rows = _sample(call.blocks)
        true_output, true_lse = exact(call, head, rows)
        rows = rows.to(output.device)
        for came, true, scale in (
            (output[0, rows, head], true_output, true_output.abs().max()),
            (lse[0, head, rows], true_lse, true_lse.abs().clamp_min(1)),
        ):
            errors.append(((came.double() - true).abs() / scale).max())
    limit = LARGEST_ERROR[call.query.dtype]
    return _held(errors, limit, f"backend {backend.name!r}", call)


def exact(call: AttentionCall, head: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Output and LSE of some queries (raster tokens) of the first sample, in float64."""
    query, key, value = (x[0, :, head].double() for x in (call.query, call.key, call.value))
    visible, runs = _visible(call.blocks, head, rows)
    means = ([x[run.to(x.device)].mean(0, keepdim=True) for run in runs] for x in (key, value))
    number = torch.tensor([1] * len(key) + [len(run) for run in runs])
    key, value = (torch.cat([x, *own]) for x, own in zip((key, value), means, strict=True))
    logits = call.scale * query[rows.to(query.device)] @ key.T + number.log().to(query)
    logits = logits.masked_fill(~visible.to(query.device), -torch.inf)
    return logits.softmax(-1) @ value, logits.logsumexp(-1)


def verify_mass(call: AttentionCall, lse: Tensor, rows: int | None, mass: Tensor) -> float:
    """The largest error of a block mass on some blocks of queries of each head, relative to the
    largest mass there.

    Raises:
        ValueError: the error is larger than rounding can explain.
    """
    blocks, errors = call.blocks, []
    count = min(_MASS_BLOCKS, blocks.query_blocks)
    looked_at = torch.linspace(0, blocks.query_blocks - 1, count).long().tolist()
    places = None if rows is None else sampled_rows(blocks.query_offsets, rows)
    for head in range(blocks.heads):
        query, key = (x[0, :, head].cpu().double() for x in (call.query, call.key))
        level = lse[0, head].cpu().double()
        for block in looked_at:
            tokens = blocks.query_tokens(block)
            if places is not None:
                tokens = blocks.permutation[places[block][places[block] >= 0]]
            share = (call.scale * query[tokens] @ key.T - level[tokens, None]).exp().sum(0)
            parts = share[blocks.key_permutation].tensor_split(blocks.key_offsets[1:-1])
            true = torch.stack([part.sum() for part in parts])
            errors.append((mass[0, head, block].cpu() - true).abs().max() / true.max())
    limit = max(_MASS_ERROR, LARGEST_ERROR[call.query.dtype])
    return _held(errors, limit, "the block mass", call)


def _held(errors: Sequence[Tensor], limit: float, what: str, call: AttentionCall) -> float:
    worst = float(torch.stack(list(errors)).max())
    if not worst <= limit:  # true of NaN as well
        raise ValueError(
            f"{what} is wrong on this machine: its largest error against float64 is {worst:.1e}, "
            f"at most {limit:.0e} was expected for {call.query.dtype} at "
            f"{call.query.shape[1]} tokens, head_dim {call.query.shape[3]}; nothing was timed"
        )
    return worst


def _visible(blocks: BlockIndices, head: int, rows: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Which tokens, and after them which runs of pooled keys, each of `rows` sees, by the pattern
    or, without one, by the lists; and the tokens of each run."""
    if blocks.patterns is not None:
        return blocks.patterns[head].rows(blocks.grid, rows), []
    place = blocks.permutation.argsort()[rows]
    row_blocks = (torch.searchsorted(blocks.query_offsets, place, right=True) - 1).tolist()
    seen = {block: list(blocks.entries(head, block)) for block in dict.fromkeys(row_blocks)}
    runs, first, count = [], {}, blocks.grid.tokens
    for entry in sorted({entry for entries in seen.values() for entry in entries}):
        key_block, tag = entry
        own = blocks.key_tokens(key_block).split(2**tag) if tag > WHOLE else ()
        first[entry] = slice(count + len(runs), count + len(runs) + len(own))
        runs += own
    visible = torch.zeros(len(rows), count + len(runs), dtype=torch.bool)
    for row, block in enumerate(row_blocks):
        for key_block, tag in seen[block]:
            pooled = tag > WHOLE
            visible[row, first[key_block, tag] if pooled else blocks.key_tokens(key_block)] = True
    return visible, runs


def _sample(blocks: BlockIndices) -> Tensor:
    """Raster tokens from all over the sequence, at changing places in their blocks."""
    tokens = blocks.grid.tokens
    rows = min(tokens, max(_LEAST_ROWS, _ROWS // blocks.heads))
    return blocks.permutation[torch.linspace(0, tokens - 1, rows).long()]


def interleaved(
    jobs: Mapping[Name, Callable[[], object]],
    repeats: int,
    device: torch.device,
    on_round: Callable[[int, int], None] | None = None,
) -> dict[Name, float]:
    """Median seconds of every job."""
    calls = _CALLS.get(device.type, _CALLS_ELSEWHERE)
    seconds: dict[Name, list[float]] = {name: [] for name in jobs}
    for turn in range(repeats + 1):
        for name, job in jobs.items():
            _finish(device)
            start = time.perf_counter()
            for _ in range(calls):
                job()
            _finish(device)
            seconds[name].append((time.perf_counter() - start) / calls)
        if on_round is not None:
            on_round(turn + 1, repeats + 1)
    # The first round, in which things are compiled and prepared, does not count.
    return {name: median(values[1:]) for name, values in seconds.items()}


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
