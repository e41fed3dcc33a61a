import pytest
import torch

from dit_sparse.kernels.bitmasks import WORD, bit_masks, mask_bytes
from dit_sparse.kernels.blocks import PARTIAL, block_indices
from dit_sparse.kernels.columns import Columns
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import TokenOrder, pixel_major, raster, tile
from dit_sparse.kernels.pattern import AnyOf, Band, Full, Neighborhood, Pattern, Radial
from dit_sparse.kernels.predicates import partial_patterns

GRID = TokenGrid(4, 9, 13, text_before=3, text_after=5)
MIXED = AnyOf((Neighborhood((1, 3, 3)), Radial(), Columns((1,), 16, (4, 9, 13))))
HEADS: list[Pattern] = [Radial(), Band(30), MIXED, Radial("repo", 0.3), Radial(), Full(), MIXED]


def bit(word: int, number: int) -> bool:
    return bool(word >> number & 1)


@pytest.mark.parametrize("order", [raster(), pixel_major(), tile(2, 3, 5)], ids=str)
@pytest.mark.parametrize(("block_q", "block_k"), [(128, 48), (64, 64), (70, 200), (7, 30)])
def test_every_bit_is_a_pair_of_the_pattern(order: TokenOrder, block_q: int, block_k: int):
    blocks = block_indices(HEADS, GRID, order, block_q, block_k)
    found = partial_patterns(blocks)
    patterns = {p: heads for p, heads in found.items() if p.windows(GRID) is None}
    assert list(patterns.values())[:2] == [[0, 4], [2, 6]]
    masks = bit_masks(blocks, patterns)
    assert masks.words.nbytes == mask_bytes(blocks, patterns)
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
