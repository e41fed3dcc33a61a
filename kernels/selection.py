"""Selection: the blocks that a `Select` keeps of a `Ranking`, as tags for `blocks.from_tags`.

    sort the video keys of every row by share, descending, the lowest index first among equals
    place in that row, or attention of those before -> WHOLE, pooled by 2^r, or ABSENT
    text, and what the ranking forces -> WHOLE, in addition

Nothing is read back from the device.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor

from dit_sparse.kernels.blocks import ABSENT, WHOLE, BlockIndices
from dit_sparse.kernels.ranking import Ranking
from dit_sparse.kernels.select import Bands, Cumulative, Grouped, Select, Tiers, TopHead, TopRow


def select_blocks(select: Select, ranking: Ranking, blocks: BlockIndices) -> Tensor:
    """Tags of all pairs of blocks, int8 `[heads, query_blocks, key_blocks]` on the device of the
    ranking: `ABSENT`, `WHOLE`, or r > 0 for keys pooled by `2^r`. `blocks` gives the cuts."""
    share = ranking.share
    expected = (blocks.query_blocks, blocks.key_blocks)
    if share.ndim != 3 or share.shape[1:] != expected:
        raise ValueError(
            f"a ranking must be [heads, {expected[0]}, {expected[1]}] for grid {blocks.grid} in "
            f"blocks of {blocks.block_q} x {blocks.block_k}, got {tuple(share.shape)}"
        )
    rows, columns = _video(blocks)
    tags = torch.full_like(share, WHOLE, dtype=torch.int8)
    first = key_blocks_of_frames(blocks, 1)[columns] if isinstance(select, Grouped) else None
    tags[:, rows, columns] = _video_tags(select, share[:, rows, columns], first)
    return tags if ranking.forced is None else tags.masked_fill(ranking.forced, WHOLE)


def select_clusters(select: Select, ranking: Ranking) -> Tensor:
    """The same for pairs of clusters of video tokens, `[heads, query clusters, key clusters]`.
    Clusters belong to no frame, so a selection by frames is an error."""
    return _video_tags(select, ranking.share, None)


@lru_cache(maxsize=16)
def key_blocks_of_frames(blocks: BlockIndices, frames: int) -> Tensor:
    """Which blocks of keys hold tokens of the first `frames` frames of the video, whatever the
    order, bool `[key_blocks]`."""
    frame, _, _ = blocks.grid.coordinates(blocks.key_permutation)
    early = ((frame >= 0) & (frame < frames)).cumsum(0)
    return torch.nn.functional.pad(early, (1, 0))[blocks.key_offsets].diff() > 0


def tier_densities(select: Tiers, recall: Tensor) -> Tensor:
    """Density of each head, float64 `[heads]`, given the share of its attention that it keeps at
    `select.density`, `[heads]`."""
    heads = len(recall)
    number = (recall > select.recall).sum().clamp_max(heads // 2)
    place = _places(recall)
    density = torch.full_like(recall, select.density, dtype=torch.float64)
    density = density.masked_fill(place < number, select.density / 2)
    return density.masked_fill(place >= heads - number, min(1.5 * select.density, 1.0))


def _video_tags(select: Select, share: Tensor, first: Tensor | None) -> Tensor:
    """Tags of the rows and columns of video, whose shares are `[heads, rows, columns]`; `first`,
    bool `[columns]`, are those of the first frame, if columns have frames."""
    number = share.shape[-1]
    if isinstance(select, Grouped):
        if first is None:
            raise ValueError(f"{select} asks for frames, which clusters have not; use top_row")
        tags = torch.empty_like(share, dtype=torch.int8)
        for group in (first.nonzero()[:, 0], (~first).nonzero()[:, 0]):
            if len(group):
                members = group.to(share.device)
                tags[..., members] = _video_tags(TopRow(select.density), share[..., members], None)
        return tags
    if isinstance(select, TopHead):
        return _tagged(_of_head(select.density, share))
    ordered, order = torch.sort(share, dim=-1, descending=True, stable=True)
    place = torch.arange(number, device=share.device)
    match select:
        case TopRow():
            tags = _tagged(place < _count(select.density, number)).expand_as(order)
        case Cumulative():
            least = max(math.ceil(select.floor * number - 1e-9), 1)
            most = max(math.floor(select.cap * number + 1e-9), 1)
            [reached] = _before(ordered, place, (select.mass,), select.crossing)
            tags = _tagged((reached | (place < least)) & (place < most))
        case Tiers():
            dropped = (place >= _count(select.density, number)).expand_as(order)
            attention = share.sum((1, 2))
            kept_at_density = share.masked_fill(_unsorted(dropped, order), 0)
            recall = kept_at_density.sum((1, 2)) / attention.where(attention > 0, 1)
            count = (tier_densities(select, recall) * number).round().clamp_min(1)
            tags = _tagged(place < rearrange(count, "h -> h 1 1")).expand_as(order)
        case Bands():
            tags = _levels(select, ordered, place)
    return _unsorted(tags, order)


def _levels(select: Bands, ordered: Tensor, place: Tensor) -> Tensor:
    """Finer levels overwrite coarser ones; something of every row is visited."""
    number = len(place)
    if select.by == "rank":
        inside = [place < round(bound * number) for bound in select.bounds]
    else:
        least = place < math.ceil(select.least * number - 1e-9)
        inside = [reached | least for reached in _before(ordered, place, select.bounds)]
    tags = torch.where(place == 0, 3, ABSENT).to(torch.int8).expand_as(ordered)
    for level in (3, 2, 1, 0):
        tags = tags.masked_fill(inside[level], level)
    return tags


def _of_head(density: float, share: Tensor) -> Tensor:
    _, rows, columns = share.shape
    count = max(round(density * rows * columns), rows)
    best = torch.sort(share, dim=-1, descending=True, stable=True).indices[..., :1]
    # The best of every row before all others; shares are at most 1.
    urgent = share.scatter_add(-1, best, torch.full_like(best, 2, dtype=share.dtype))
    place = _places(rearrange(urgent, "h i j -> h (i j)"))
    return rearrange(place < count, "h (i j) -> h i j", i=rows)


def _before(
    ordered: Tensor, place: Tensor, masses: Sequence[float], crossing: bool = True
) -> list[Tensor]:
    """For each of `masses`, whether the blocks sorted before this one hold less of the attention
    of the row, so that the one which reaches it is in; without `crossing` whether they do together
    with this one. All of it is reached by the last block only, and rows without attention keep
    all."""
    exact = ordered.double()
    total = exact.sum(-1, keepdim=True)
    held = exact.cumsum(-1) - (exact if crossing else 0)
    # Shares are float32: what is short of the mass by their rounding has reached it.
    return [
        (place < len(place) - (not crossing)).expand_as(held)
        if mass == 1
        else (held < (mass - 1e-7) * total) | (total == 0)
        for mass in masses
    ]


def _tagged(kept: Tensor) -> Tensor:
    return torch.where(kept, WHOLE, ABSENT).to(torch.int8)


def _unsorted(entries: Tensor, order: Tensor) -> Tensor:
    """What belongs to each place of the sorted rows, where it was before it was sorted."""
    return torch.empty_like(order, dtype=entries.dtype).scatter_(-1, order, entries)


def _places(share: Tensor) -> Tensor:
    """Place of each entry in its sorted row, int64; the lowest index first among equals."""
    return torch.sort(share, dim=-1, descending=True, stable=True).indices.argsort(-1)


def _count(density: float, number: int) -> int:
    return max(round(density * number), 1)


@lru_cache(maxsize=16)
def _video(blocks: BlockIndices) -> tuple[slice, slice]:
    """The blocks of queries and of keys of video, which stand between those of text."""
    start = blocks.grid.text_before
    edges = torch.tensor([start, start + blocks.grid.video])
    rows, columns = (
        slice(*torch.searchsorted(offsets, edges).tolist())
        for offsets in (blocks.query_offsets, blocks.key_offsets)
    )
    return rows, columns
