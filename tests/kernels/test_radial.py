import math

import pytest
import torch

from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import AnyOf, Radial, Sink


def paper(frames: int, size: int) -> torch.Tensor:
    """The mask of Radial Attention, equation by equation, pair by pair, without its sink."""
    mask = torch.zeros(frames, size, frames, size, dtype=torch.bool)
    for i in range(frames):
        for j in range(frames):
            distance = abs(i - j)
            power = 2 ** math.floor(math.log2(max(distance, 1)))
            for k in range(size):
                for l in range(size):
                    near = power <= size and abs(k - l) + 1 <= size / power
                    thin = distance % math.ceil(power / size) == 0 and k == l
                    mask[i, k, j, l] = near or thin
    return mask.reshape(frames * size, frames * size)


def repo(frames: int, size: int, decay: float) -> torch.Tensor:
    """The blocks of the authors' code: a mask for each pair of frames, its blocks put together."""
    tokens, block = frames * size, 128
    kept = torch.zeros(-(-tokens // block), -(-tokens // block), dtype=torch.bool)
    place = torch.arange(size)
    for i in range(frames):
        for j in range(frames):
            distance = abs(i - j)
            full = 2 ** size.bit_length() / 2 ** distance.bit_length()
            width = size if distance <= 1 else max(full * decay, block)
            local = (place[:, None] - place).abs() <= width
            if full < block and distance % int(block / full):
                local &= False
            # The pair of frames alone, where it stands among all tokens.
            whole = torch.zeros(tokens, tokens, dtype=torch.bool)
            whole[i * size : (i + 1) * size, j * size : (j + 1) * size] = local
            for row, part in enumerate(whole.split(block)):
                for column, piece in enumerate(part.split(block, 1)):
                    share = piece.double().mean(0)
                    if (share > 0).any():
                        dense = int((share > 1 / 3).sum()) / int((share > 0).sum())
                        kept[row, column] |= dense > 0.6
    return kept


@pytest.mark.parametrize(
    ("frames", "height", "width", "alone", "with_sink"),
    [(4, 2, 2, 220, 232), (8, 4, 4, 11_680, 12_448), (16, 2, 2, 1_772, 1_944)],
)
def test_RA1_goldens(frames: int, height: int, width: int, alone: int, with_sink: int):
    grid = TokenGrid(frames, height, width)
    mask = Radial().mask(grid)
    assert torch.equal(mask, paper(frames, height * width))
    assert torch.equal(mask, mask.T)
    assert int(mask.sum()) == alone
    assert int(AnyOf((Radial(), Sink())).mask(grid).sum()) == with_sink


@pytest.mark.parametrize("grid", [TokenGrid(5, 3, 5), TokenGrid(9, 1, 3), TokenGrid(11, 1, 1)])
def test_RA1_ragged_frames_and_text(grid: TokenGrid):
    expected = paper(grid.frames, grid.height * grid.width)
    assert torch.equal(Radial().mask(grid), expected)
    around = TokenGrid(*grid.shape, text_before=3, text_after=2)
    mask = Radial().mask(around)
    assert torch.equal(mask[3:-2, 3:-2], expected)
    assert mask[:3].all()
    assert mask[:, -2:].all()


def test_RA2_density_halves_with_each_band_of_distance():
    size, frames = 1024, 16
    grid = TokenGrid(frames, 32, 32)
    row = Radial().rows(grid, torch.tensor([size // 2])).view(frames, size).sum(1)
    # Far from the ends of a frame, a band of width w keeps 2 w - 1 keys.
    assert row.tolist()[2:] == [1023] * 2 + [511] * 4 + [255] * 8


@pytest.mark.parametrize("frames", [4, 8])
@pytest.mark.parametrize("size", [(8, 16), (16, 16)], ids=str)
@pytest.mark.parametrize("decay", [0.2, 1.0])
def test_RA3_repo_is_the_authors_blocks(frames: int, size: tuple[int, int], decay: float):
    grid = TokenGrid(frames, *size)
    blocks = repo(frames, size[0] * size[1], decay)
    mask = Radial("repo", decay).mask(grid)
    assert torch.equal(mask, blocks.repeat_interleave(128, 0).repeat_interleave(128, 1))
    assert 0 < blocks.double().mean() < 1 or frames == 4


@pytest.mark.parametrize("grid", [TokenGrid(6, 7, 11), TokenGrid(3, 15, 20), TokenGrid(7, 5, 6)])
def test_RA3_ragged_frames_and_last_block(grid: TokenGrid):
    blocks = repo(grid.frames, grid.height * grid.width, 0.5)
    expected = blocks.repeat_interleave(128, 0).repeat_interleave(128, 1)
    expected = expected[: grid.video, : grid.video]
    assert torch.equal(Radial("repo", 0.5).mask(grid), expected)
    around = Radial("repo", 0.5).mask(TokenGrid(*grid.shape, text_before=5, text_after=1))
    assert torch.equal(around[5:-1, 5:-1], expected)
