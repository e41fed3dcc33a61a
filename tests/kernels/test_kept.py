"""What is kept, what goes first, and that permutations are."""

from dataclasses import replace

import pytest
import torch

from dit_sparse.kernels import gilbert as curve
from dit_sparse.kernels import order, worklist
from dit_sparse.kernels.blocks import block_indices
from dit_sparse.kernels.gilbert import gilbert_walk
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.kept import Kept
from dit_sparse.kernels.order import gilbert, pixel_major, tile
from dit_sparse.kernels.pattern import Full
from dit_sparse.kernels.shard import Shard

GRID = TokenGrid(3, 5, 7, text_after=9)
BYTES = 8 * GRID.tokens


def test_the_least_recently_used_go_first():
    kept, made = Kept(100), []

    def ask(key: str, size: int = 40) -> None:
        def make() -> torch.Tensor:
            made.append(key)
            return torch.zeros(size, dtype=torch.uint8)

        assert len(kept.get(key, make)) == size
        assert kept.bytes <= 100

    for key in ("a", "b", "a", "c", "a", "b"):
        ask(key)
    assert made == ["a", "b", "c", "b"]
    assert (len(kept), kept.bytes) == (2, 80)
    ask("large", 101)
    ask("large", 101)
    assert made[-2:] == ["large", "large"]
    assert (len(kept), kept.bytes) == (2, 80), "nothing goes for what does not fit"
    ask("all", 100)
    assert (len(kept), kept.bytes) == (1, 100)


def test_permutations_are_made_once_and_bounded(monkeypatch: pytest.MonkeyPatch):
    kept = Kept(2 * BYTES)
    monkeypatch.setattr(order, "ORDERS", kept)
    first = gilbert().permutation(GRID)
    assert gilbert().permutation(replace(GRID, valid_text=(3,))) is first
    assert block_indices([Full()], GRID, gilbert()).permutation is first
    assert pixel_major().permutation(GRID) is not first
    assert kept.bytes == 2 * BYTES
    tile(1, 2, 2).permutation(GRID)
    assert kept.bytes == 2 * BYTES
    again = gilbert().permutation(GRID)
    assert again is not first
    assert torch.equal(again, first)


def test_lists_share_what_a_device_has_of_an_order(monkeypatch: pytest.MonkeyPatch):
    kept, device = Kept(1 << 20), torch.device("cpu")
    monkeypatch.setattr(order, "ORDERS", kept)
    monkeypatch.setattr(worklist, "ORDERS", kept)
    lists = [block_indices([Full()] * heads, GRID, tile(2, 3, 4), 16, 8) for heads in (1, 2)]
    tables = [worklist.worklist(blocks, 16, 8, device) for blocks in lists]
    assert tables[0].lists.permutation is tables[1].lists.permutation
    assert tables[0].key_permutation is tables[0].lists.permutation
    assert kept.bytes == BYTES + BYTES // 2
    shard = block_indices([Full()], GRID, tile(2, 3, 4), 16, 8, queries=Shard(((0, 50),)))
    table = worklist.worklist(shard, 16, 8, device)
    assert torch.equal(table.lists.permutation, shard.permutation.int())
    assert table.key_permutation is tables[0].key_permutation


def test_walks_do_not_depend_on_what_is_kept(monkeypatch: pytest.MonkeyPatch):
    whole = gilbert_walk(5, 12, 20)
    for most_bytes in (0, 500):
        kept = Kept(most_bytes)
        monkeypatch.setattr(curve, "_WALKS", kept)
        assert torch.equal(gilbert_walk(5, 12, 20), whole)
        assert kept.bytes <= most_bytes
