import re

import pytest
import torch

from dit_sparse.kernels import backend
from dit_sparse.kernels.backend import BACKENDS, AttentionCall, Backend, choose
from dit_sparse.kernels.blocks import block_indices, from_block_mask
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Full


def call_on(device: str) -> AttentionCall:
    grid = TokenGrid(1, 2, 2)
    tensor = torch.empty(1, grid.tokens, 1, 8, device=device)
    return AttentionCall(tensor, tensor, tensor, block_indices([Full()], grid), 1.0)


def test_auto_takes_the_first_backend_that_accepts():
    assert choose(call_on("cpu")).name == "gather"
    assert choose(call_on("meta")).name == "reference"


@pytest.mark.parametrize("name", [b.name for b in BACKENDS if b.supports(call_on("cpu")) is None])
def test_a_named_backend_is_the_one_that_runs(name: str):
    assert choose(call_on("cpu"), name).name == name


def test_a_named_backend_never_falls_back():
    message = "backend 'gather' refuses this call: runs on the CPU, the tensors are on meta"
    with pytest.raises(ValueError, match=re.escape(message)):
        choose(call_on("meta"), "gather")


def test_an_unknown_backend_lists_the_known_ones():
    with pytest.raises(
        ValueError, match="unknown backend 'cuda'; use one of auto, triton, gather, ref"
    ):
        choose(call_on("cpu"), "cuda")


def test_auto_prints_every_refusal(monkeypatch: pytest.MonkeyPatch):
    def run(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("refused backends must not run")

    table = tuple(Backend(n, lambda call, n=n: f"{n} is busy", run) for n in ("one", "two"))
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
