import pytest
import torch

from dit_sparse.kernels import column_mass as module
from dit_sparse.kernels.column_mass import column_mass, largest
from dit_sparse.kernels.grid import TokenGrid


@pytest.mark.parametrize("chunk", [1, 2**28], ids=["row-by-row", "at-once"])
@pytest.mark.parametrize(
    "grid", [TokenGrid(2, 5, 5), TokenGrid(2, 5, 5, 3, 0, (1, 3))], ids=["video", "padded-text"]
)
def test_mass_is_the_attention_of_video_rows_to_each_block(
    grid: TokenGrid, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, grid.tokens, 3, 8, generator=generator)
    valid = torch.ones(2, grid.tokens, dtype=torch.bool)
    if grid.text:
        valid[0, 1:3] = False
    rows = torch.tensor([0, 2, 9, 10, 40])
    mass = column_mass(query, key, rows, grid, 16, valid=valid)
    scores = torch.einsum("bihd,bjhd->bhij", query.double(), key.double()) / 8**0.5
    attention = scores.masked_fill(~valid[:, None, None, :], -torch.inf).softmax(-1)
    video = attention[:, :, [row for row in rows.tolist() if row >= grid.text]].mean((0, 2))
    blocks = video[:, grid.text :].split(16, dim=-1)
    expected = torch.stack([block.sum(-1) for block in blocks], -1)
    assert mass.shape == (3, 4)
    torch.testing.assert_close(mass.double(), expected, atol=1e-6, rtol=0)


def test_the_blocks_of_largest_mass_are_kept_in_order() -> None:
    mass = torch.tensor([0.1, 0.4, 0.1, 0.4])
    grid = TokenGrid(2, 5, 5)
    assert [largest(mass, count, grid, 16).blocks for count in (1, 2, 3)] == [
        (1,),
        (1, 3),
        (0, 1, 3),
    ]
