"""Measurement: right backends pass, wrong ones do not, and jobs take turns."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dit_sparse import measurement
from dit_sparse.kernels import reference
from dit_sparse.kernels.backend import BACKENDS, Backend
from dit_sparse.kernels.call import AttentionCall
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.mass import block_mass
from dit_sparse.measurement import (
    accepting,
    candidates,
    exact,
    interleaved,
    verify,
    verify_mass,
)
from dit_sparse.workload import PATTERNS, Workload

CPU = torch.device("cpu")
GRID = TokenGrid(3, 5, 7, text_after=6)
Change = Callable[[Tensor, Tensor], object]


def backend(change: Change = lambda output, lse: None) -> Backend:
    """The reference, with something done to what it returns."""

    def run(call: AttentionCall) -> tuple[Tensor, Tensor]:
        output, lse = reference.run(call)
        change(output, lse)
        return output, lse

    return Backend("changed", lambda call: None, run)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_right_backend_passes_with_its_error(pattern: str, dtype: str) -> None:
    call = Workload(GRID, head_dim=16, block=8, pattern=pattern, dtype=dtype).call()
    error = verify(backend(), call)
    assert 0 < error < measurement.LARGEST_ERROR[call.query.dtype] / 2


@pytest.mark.parametrize("pattern", PATTERNS)
def test_exact_attention_is_that_of_the_reference(pattern: str) -> None:
    call = Workload(GRID, head_dim=16, block=8, pattern=pattern).call()
    query, key, value = (x.double() for x in (call.query, call.key, call.value))
    output, lse = reference.run(AttentionCall(query, key, value, call.blocks, call.scale))
    rows = torch.tensor([0, 50, 110])
    for head in range(2):
        came, sums = exact(call, head, rows)
        torch.testing.assert_close(came, output[0, rows, head])
        torch.testing.assert_close(sums, lse[0, head, rows])


@pytest.mark.parametrize("rows", [None, 5])
def test_a_mass_is_held_to_its_definition(rows: int | None) -> None:
    call = Workload(GRID, head_dim=16, block=8, density=1.0).call()
    _, lse = reference.run(call)
    mass = block_mass(call.query, call.key, lse, call.blocks, scale=call.scale, rows=rows)
    assert 0 < verify_mass(call, lse, rows, mass) < 1e-4
    for head, column in ((1, 3), (0, -1)):
        wrong = mass.clone()
        wrong[0, head, -1, column] *= 1.01
        with pytest.raises(ValueError, match=r"block mass is wrong .* nothing was timed"):
            verify_mass(call, lse, rows, wrong)
    with pytest.raises(ValueError, match="block mass is wrong"):
        verify_mass(call, lse, rows, mass * torch.nan)


def scale(output: Tensor, lse: Tensor) -> None:
    output.mul_(1.001)


def shift(output: Tensor, lse: Tensor) -> None:
    lse.add_(0.01)


def lose_a_block(output: Tensor, lse: Tensor) -> None:
    output[:, 40:48, 1] = 0


def break_down(output: Tensor, lse: Tensor) -> None:
    output[:, 3] = torch.nan


@pytest.mark.parametrize("change", [scale, shift, lose_a_block, break_down])
def test_a_wrong_backend_is_named_with_its_error(change: Change) -> None:
    call = Workload(GRID, head_dim=16, block=8).call()
    with pytest.raises(ValueError, match="backend 'changed' is wrong on this machine") as raised:
        verify(backend(change), call)
    assert "at most 2e-05 was expected for torch.float32 at 111 tokens" in str(raised.value)
    assert "nothing was timed" in str(raised.value)


def test_many_tokens_are_looked_at_all_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "_ROWS", 40)
    blocks = Workload(replace(GRID, text_after=0), block=8).blocks()
    rows = measurement._sample(blocks)
    assert len(rows) == len(set(rows.tolist())) == 20
    assert (rows.min(), rows.max()) == (0, 104)


def test_candidates_are_those_named_or_all_worth_timing() -> None:
    names = [backend.name for backend in BACKENDS]
    assert [found.name for found in candidates()] == [n for n in names if n != "reference"]
    assert [found.name for found in candidates(["reference", "gather"])] == ["reference", "gather"]
    with pytest.raises(ValueError, match=r"unknown backend 'magic'; use one of .*reference"):
        candidates(["magic"])


def test_refusals_are_kept_with_their_reasons() -> None:
    refusing = Backend("busy", lambda call: "is busy", reference.run)
    accepted, reasons = accepting([refusing, backend()], Workload(GRID, block=8).call())
    assert [found.name for found in accepted] == ["changed"]
    assert reasons == {"busy": "is busy"}


def test_jobs_take_turns_and_the_first_turn_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, order, rounds = [0.0], [], []
    costs = {"a": [100.0, 1.0, 5.0, 3.0], "b": [50.0, 2.0, 2.0, 2.0]}
    monkeypatch.setattr(measurement.time, "perf_counter", lambda: clock[0])

    def job(name: str) -> Callable[[], None]:
        def run() -> None:
            clock[0] += costs[name][order.count(name)]
            order.append(name)

        return run

    jobs = {name: job(name) for name in costs}
    found = interleaved(jobs, 3, CPU, lambda done, total: rounds.append((done, total)))
    assert order == ["a", "b"] * 4
    assert found == {"a": 3.0, "b": 2.0}
    assert rounds == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_an_accelerator_gets_calls_in_a_row() -> None:
    calls: list[str] = []
    jobs = {name: lambda name=name: calls.append(name) for name in ("one", "other")}
    interleaved(jobs, 1, torch.device("meta"))
    assert calls == (["one"] * 10 + ["other"] * 10) * 2
