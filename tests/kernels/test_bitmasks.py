import pytest
import torch

from dit_sparse.kernels.bitmasks import WORD, bit_masks, mask_bytes, unwindowed_patterns
from dit_sparse.kernels.blocks import PARTIAL, BlockIndices, block_indices
from dit_sparse.kernels.columns import Columns
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import TokenOrder, pixel_major, raster, tile
from dit_sparse.kernels.pattern import AnyOf, Band, Full, Neighborhood, Pattern, Radial, Sink

GRID = TokenGrid(4, 9, 13, text_before=3, text_after=5)
MIXED = AnyOf((Neighborhood((1, 3, 3)), Radial(), Columns((1,), 16, (4, 9, 13))))
HEADS: list[Pattern] = [Radial(), Band(30), MIXED, Radial("repo", 0.3), Radial(), Full(), MIXED]


def bit(word: int, number: int) -> bool:
    return bool(word >> number & 1)


@pytest.mark.parametrize("order", [raster(), pixel_major(), tile(2, 3, 5)], ids=str)
@pytest.mark.parametrize(("block_q", "block_k"), [(128, 48), (64, 64), (70, 200), (7, 30)])
def test_every_bit_is_a_pair_of_the_pattern(order: TokenOrder, block_q: int, block_k: int):
    blocks = block_indices(HEADS, GRID, order, block_q, block_k)
    masks = bit_masks(blocks)
    assert masks is not None
    assert masks.words.nbytes == mask_bytes(blocks)
    assert list(unwindowed_patterns(blocks).values())[:2] == [[0, 4], [2, 6]]
    words, entry = masks.words.tolist(), 0
    for head, pattern in enumerate(HEADS):
        mask = pattern.mask(GRID)
        for row in range(blocks.query_blocks):
            queries = blocks.query_tokens(row)
            each = -(-len(queries) // WORD)
            for key_block, tag in blocks.entries(head, row):
                first = int(masks.first[entry])
                entry += 1
                if tag != PARTIAL or pattern.windows(GRID) is not None:
                    assert first == -1
                    continue
                keys = blocks.key_tokens(key_block)
                came = [
                    [bit(words[first + j * each + i // WORD], i % WORD) for j in range(len(keys))]
                    for i in range(len(queries))
                ]
                assert torch.equal(torch.tensor(came), mask[queries[:, None], keys])
    assert entry == len(masks.first)


def windowed() -> list[BlockIndices]:
    whole = block_indices([Sink(), Full()], TokenGrid(4, 8, 8), block_q=64, block_k=64)
    return [block_indices([Full(), Band(9)], GRID), whole]


def test_windows_need_no_masks():
    for blocks in windowed():
        assert bit_masks(blocks) is None
        assert mask_bytes(blocks) == 0
