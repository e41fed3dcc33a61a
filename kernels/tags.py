"""Tags: a list of blocks as the dense table that `blocks.from_tags` takes."""

import torch
from torch import Tensor

from dit_sparse.kernels.blocks import ABSENT, BlockIndices
from dit_sparse.kernels.tiling import ragged


def tags_of_head(blocks: BlockIndices, head: int) -> Tensor:
    """How each block of queries of `head` lists each block of keys: its tag, or `ABSENT`; int8
    `[query_blocks, key_blocks]`."""
    first = head * blocks.query_blocks
    pointer = blocks.row_pointer[first : first + blocks.query_blocks + 1].long()
    span = slice(int(pointer[0]), int(pointer[-1]))
    table = torch.full((blocks.query_blocks, blocks.key_blocks), ABSENT, dtype=torch.int8)
    table[ragged(pointer.diff())[0], blocks.key_block[span].long()] = blocks.tag[span]
    return table
