import re

import pytest
import torch

from dit_sparse.kernels import backend
from dit_sparse.kernels.backend import BACKENDS, AttentionCall, Backend, choose
from dit_sparse.kernels.blocks import block_indices, from_block_mask
from dit_sparse.kernels.calibration import Calibration, Cost, device_name, write
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Full


def call_on(device: str) -> AttentionCall:
    grid = TokenGrid(1, 2, 2)
    tensor = torch.empty(1, grid.tokens, 1, 8, device=device)
    return AttentionCall(tensor, tensor, tensor, block_indices([Full()], grid), 1.0)


def test_auto_takes_the_first_backend_that_accepts():
    call = call_on("cpu")
    accepting = [backend.name for backend in BACKENDS if backend.supports(call) is None]
    assert choose(call).name == accepting[0]
    assert accepting[-2:] == ["gather", "reference"]
    assert choose(call_on("meta")).name == "reference"


@pytest.mark.parametrize("name", ["gather", "reference"])
def test_a_named_backend_is_the_one_that_runs(name: str):
    assert choose(call_on("cpu"), name).name == name


def no_run(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    raise AssertionError("choosing runs nothing")


def accept(call: AttentionCall) -> None:
    return None


TABLE = (
    Backend("refuses", lambda call: "is busy", no_run),
    Backend("first", accept, no_run),
    Backend("second", accept, no_run),
    Backend("refuses too", lambda call: "is busy", no_run),
    Backend("third", accept, no_run),
)


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ({}, "first"),
        ({"first": 2.0, "second": 3.0, "third": 4.0}, "first"),
        ({"first": 3.0, "second": 2.0, "third": 4.0}, "second"),
        ({"first": 3.0, "second": 2.0, "third": 1.0}, "third"),
        ({"first": 3.0, "refuses": 1.0, "refuses too": 1.0}, "first"),
        # The table puts the first before the others; where it was not measured, that stands.
        ({"second": 2.0, "third": 1.0}, "first"),
    ],
    ids=str,
)
def test_auto_takes_what_was_measured_to_be_fastest(
    measured: dict[str, float], expected: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(backend, "BACKENDS", TABLE)
    costs = {
        (name, "float32", 8): Cost(
            seconds, 0.0, 0.0, 0.0, 0.0, samples=4, mean_error=0.0, largest_error=0.0
        )
        for name, seconds in measured.items()
    }
    call = call_on("cpu")
    if costs:
        write(Calibration(device_name(torch.device("cpu")), costs))
    assert choose(call).name == expected
    assert choose(call, "third").name == "third"
    with pytest.raises(ValueError, match="backend 'refuses too' refuses this call: is busy"):
        choose(call, "refuses too")


def test_a_named_backend_never_falls_back():
    message = "backend 'gather' refuses this call: runs on the CPU, the tensors are on meta"
    with pytest.raises(ValueError, match=re.escape(message)):
        choose(call_on("meta"), "gather")


def test_an_unknown_backend_lists_the_known_ones():
    known = ", ".join(["auto", *(backend.name for backend in BACKENDS)])
    with pytest.raises(ValueError, match=f"unknown backend 'cuda'; use one of {known}"):
        choose(call_on("cpu"), "cuda")


def test_auto_prints_every_refusal(monkeypatch: pytest.MonkeyPatch):
    table = tuple(Backend(n, lambda call, n=n: f"{n} is busy", no_run) for n in ("one", "two"))
    monkeypatch.setattr(backend, "BACKENDS", table)
    message = "no backend accepts this call:\n  one: one is busy\n  two: two is busy"
    with pytest.raises(ValueError, match=message):
        choose(call_on("cpu"))


def test_the_reference_refuses_masks_that_are_too_large():
    grid = TokenGrid(1, 1, 16385)
    tensor = torch.empty(1, grid.tokens, 1, 8, device="meta")
    blocks = from_block_mask(
        torch.ones(1, 1, 1, dtype=torch.bool), grid, block_q=grid.tokens, block_k=grid.tokens
    )
    call = AttentionCall(tensor, tensor, tensor, blocks, 1.0)
    with pytest.raises(ValueError, match="16385 tokens need a dense mask; at most 16384"):
        choose(call, "reference")
