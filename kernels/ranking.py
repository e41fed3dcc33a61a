"""Ranking: the share of its attention that each block of queries is expected to give each block of
keys, and the pairs of blocks that are visited whatever their share.

    Mass     sum over rows, keys of exp(s - lse); Oracle the same of all rows
    Sampled  max over rows i of exp(r[i, j] - max over j of r[i, j]),  r[i, j] = max over keys of s
    Random   a number from a generator of its own
    Checked  a cheap score, and for heads where one row of each block says otherwise, Mass
    Means    softmax over j of  scale * mean(q) . mean(k) + ln(keys),  k less the mean of all keys
    Clustered  as Means, of clusters in place of blocks, k as it is

each divided by its sum over the blocks of keys. Shares are averaged over the batch, so that both
passes of classifier-free guidance visit the same blocks. Padded text is neither key nor query.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor

from dit_sparse.kernels import native
from dit_sparse.kernels.blocks import BlockIndices
from dit_sparse.kernels.call import AttentionCall
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.kmeans import Clusters
from dit_sparse.kernels.mass import block_mass
from dit_sparse.kernels.sample import sampled
from dit_sparse.kernels.score import BlockScore, Checked, Mass, Means, Oracle, Random, Sampled
from dit_sparse.kernels.tiling import Tiling, real_tokens

_AT_ONCE = 1 << 24  # logits held in one step


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """How much the pairs of blocks matter.

    Attributes:
        share: float32 `[heads, query_blocks, key_blocks]`; rows sum to 1, or to 0 where no query
            or no key counts.
        forced: bool of the same shape, pairs that are visited whatever their share; `None` for
            none.
    """

    share: Tensor
    forced: Tensor | None = None


def score_blocks(
    score: BlockScore,
    query: Tensor,
    key: Tensor,
    blocks: BlockIndices,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
) -> Ranking:
    """Rank all pairs of blocks, listed in `blocks` or not.

    Args:
        score: what is computed.
        query, key: `[batch, tokens, heads, head_dim]` in raster order, any strides, one floating
            dtype.
        blocks: where the tokens are cut into blocks, and which text is padded.
        scale: factor of the logits, defaults to `head_dim ** -0.5`.
        lse: of dense attention over the real keys, float32 `[batch, heads, tokens]`; of the
            same step for an oracle. Scores that need none do not look at it.
    """
    if query.ndim != 4 or query.shape != key.shape or query.shape[1] != blocks.grid.tokens:
        raise ValueError(
            f"query and key must be [batch, {blocks.grid.tokens}, heads, head_dim] for grid "
            f"{blocks.grid}, got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if blocks.sharded:
        raise ValueError(
            "scores rank all tokens of a grid, got blocks of a shard; rank before the tokens are "
            "shared out"
        )
    valid = blocks.grid.valid_text
    if valid is not None and len(valid) != len(query):
        raise ValueError(
            f"grid.valid_text is for a batch of {len(valid)}, got {len(query)}; give one count "
            "per sample"
        )
    if score.needs_lse and lse is None:
        raise ValueError(
            f"score {score} needs the LSE of dense attention, got lse=None; give that of a dense "
            "step, or take a score without one: sampled or means"
        )
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    match score:
        case Mass():
            assert lse is not None
            return Ranking(_of_mass(score, query, key, lse, blocks, factor))
        case Oracle():
            assert lse is not None
            return Ranking(_of_mass(Mass(rows=None), query, key, lse, blocks, factor))
        case Checked():
            assert lse is not None
            return _checked(score, query, key, lse, blocks, factor)
        case Sampled():
            return Ranking(_shares(_largest(score, query, key, blocks, factor)))
        case Random():
            generator = torch.Generator().manual_seed(score.seed)
            shape = 1, query.shape[2], blocks.query_blocks, blocks.key_blocks
            return Ranking(_shares(torch.rand(shape, generator=generator).to(query.device)))
        case Means():
            return _of_means(score, query, key, blocks, factor)


def rank_clusters(queries: Clusters, keys: Clusters, scale: float) -> Ranking:
    """Rank all pairs of clusters of the heads: shares `[heads, query clusters, key clusters]`, 0
    for clusters without members."""
    logits = scale * queries.centroid @ keys.centroid.mT
    logits = logits + rearrange(keys.size.to(logits.dtype).log(), "h j -> 1 h 1 j")
    absent = rearrange(queries.size == 0, "h i -> 1 h i 1")
    return Ranking(_shares(logits.softmax(-1).masked_fill(absent, 0).float()))


def _of_mass(
    score: Mass, query: Tensor, key: Tensor, lse: Tensor, blocks: BlockIndices, scale: float
) -> Tensor:
    mass = block_mass(query, key, lse, blocks, scale=scale, rows=score.rows)
    # An LSE of other scores makes infinite masses: equal ones then, never NaN.
    return _shares(mass.clamp_max(torch.finfo(mass.dtype).max / mass.shape[-1]))


def _checked(
    score: Checked, query: Tensor, key: Tensor, lse: Tensor, blocks: BlockIndices, scale: float
) -> Ranking:
    cheap = score_blocks(score.cheap, query, key, blocks, scale=scale)
    seen = _of_mass(Mass(rows=1), query, key, lse, blocks, scale)
    far = (divergence(cheap.share, seen).sqrt().mean(-1) > score.bound).nonzero()[:, 0]
    if not len(far):
        return cheap
    own = query[:, :, far], key[:, :, far], lse[:, far].contiguous()
    share = cheap.share.index_copy(0, far, _of_mass(Mass(), *own, blocks, scale))
    forced = None if cheap.forced is None else cheap.forced.index_fill(0, far, False)
    return Ranking(share, forced)


def divergence(left: Tensor, right: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats between distributions over the last axis."""
    middle = (left + right) / 2
    halves = (torch.xlogy(x, x) - torch.xlogy(x, middle) for x in (left, right))
    return torch.stack([half.sum(-1) for half in halves]).mean(0).clamp_min(0)


def _shares(weight: Tensor) -> Tensor:
    """Rows of `[batch, heads, query_blocks, key_blocks]` as shares, averaged over the batch."""
    share = _rows_to_one(weight)
    return share[0] if len(share) == 1 else _rows_to_one(share.mean(0))


def _rows_to_one(weight: Tensor) -> Tensor:
    total = weight.sum(-1, keepdim=True)
    return weight / total.where(total > 0, 1)


def _largest(
    score: Sampled, query: Tensor, key: Tensor, blocks: BlockIndices, scale: float
) -> Tensor:
    """The `Sampled` row of the head of this file, before it is divided."""
    size, device, heads = score.samples, query.device, query.shape[2]
    rows_of_all, columns_of_all = _chosen(blocks, size, device)
    call = AttentionCall(query, key, key, blocks, scale)
    if native.supports(call) is None:
        return native.largest(call, rows_of_all, columns_of_all).exp2_()
    found = []
    for sample in range(len(query)):
        rows, columns = (x[sample % len(x)] for x in (rows_of_all, columns_of_all))
        keys = rearrange(_float(key[sample], columns), "j n h d -> h d (j n)")
        missing = rearrange(columns < 0, "j n -> (j n)")
        at_once = max(_AT_ONCE // (heads * size * missing.numel()), 1)
        for part in rows.split(at_once):
            queries = rearrange(_float(query[sample], part), "i m h d -> h (i m) d")
            logits = (scale * queries @ keys).masked_fill(missing, -torch.inf)
            best = rearrange(logits, "h (i m) (j n) -> h i m j n", i=len(part), n=size).amax(-1)
            weight = (best - best.amax(-1, keepdim=True)).exp()
            weight = weight.masked_fill(rearrange(part < 0, "i m -> 1 i m 1"), 0)
            found.append(weight.amax(2))
    return rearrange(torch.cat(found, 1).float(), "h (b i) j -> b h i j", b=len(query))


def _of_means(
    score: Means, query: Tensor, key: Tensor, blocks: BlockIndices, scale: float
) -> Ranking:
    """The `Means` row of the head of this file, and the blocks whose tokens differ."""
    call = AttentionCall(query, key, key, blocks, scale)
    if native.supports(call) is None:
        weight, forced = native.means(call, _mean(key, blocks.grid), float(score.similarity))
        return Ranking(_shares(weight), forced)
    rows, columns = _chosen(blocks, None, query.device)
    shares, forced = [], []
    for sample in range(len(query)):
        places = rows[sample % len(rows)], columns[sample % len(columns)]
        queries, query_count, query_alike = _pooled(
            query[sample], places[0], score, centered=False
        )
        keys, key_count, key_alike = _pooled(key[sample], places[1], score, centered=True)
        logits = scale * queries @ keys.mT + rearrange(key_count.log(), "j -> 1 1 j")
        logits = logits.masked_fill(~rearrange(key_alike, "h j -> h 1 j"), -torch.inf)
        top = logits.amax(-1, keepdim=True)
        weight = (logits - top.where(top.isfinite(), 0)).exp()
        shares.append(weight.masked_fill(rearrange(query_count == 0, "i -> 1 i 1"), 0))
        differs = rearrange(~query_alike & (query_count > 0), "h i -> h i 1")
        forced.append(differs | rearrange(~key_alike & (key_count > 0), "h j -> h 1 j"))
    return Ranking(_shares(torch.stack(shares).float()), torch.stack(forced).any(0))


def _mean(key: Tensor, grid: TokenGrid) -> Tensor:
    """Mean of the keys that are not padded, float32 `[batch, heads, head_dim]`."""
    if grid.valid_text is None:
        return key.mean(1, dtype=torch.float32)
    real = rearrange(grid.real(len(key)), "b n -> b n 1 1")
    return key.masked_fill(~real, 0).sum(1, dtype=torch.float32) / real.sum(1)


def _pooled(
    tokens: Tensor, places: Tensor, score: Means, centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Means of blocks `[heads, blocks, head_dim]`, their numbers of tokens `[blocks]`, and which
    are alike, bool `[heads, blocks]`; of `tokens` `[tokens, heads, head_dim]`."""
    inside = rearrange(places >= 0, "j n -> j n 1 1")
    members = _float(tokens, places).masked_fill(~inside, 0)
    if centered:
        members = (members - members.sum((0, 1)) / inside.sum()).masked_fill(~inside, 0)
    count = (places >= 0).sum(1).to(members.dtype)
    number = rearrange(count.clamp_min(1), "j -> j 1 1")
    direction = torch.nn.functional.normalize(members, dim=-1)
    # The mean of all cosines is the square of the mean direction.
    cosine = (direction.sum(1) / number).square().sum(-1)
    alike = rearrange(cosine > score.similarity, "j h -> h j")
    return rearrange(members.sum(1) / number, "j h d -> h j d"), count, alike


def _float(tokens: Tensor, places: Tensor) -> Tensor:
    """`tokens` `[tokens, ...]` at `places`, in float32 at least; anything where it is negative."""
    return tokens[places.clamp_min(0)].to(torch.promote_types(tokens.dtype, torch.float32))


@lru_cache(maxsize=16)
def _chosen(
    blocks: BlockIndices, samples: int | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The tokens that stand for every block of queries and of keys: raster tokens int64
    `[batch or 1, blocks, tokens]`, -1 for none; all that are not padded if `samples` is None."""
    sides = []
    for offsets, tokens in (
        (blocks.query_offsets, blocks.permutation),
        (blocks.key_offsets, blocks.key_permutation),
    ):
        first, sizes = offsets[:-1], offsets.diff()
        real = real_tokens(blocks.grid, tokens, Tiling(first, sizes, torch.arange(len(first))))
        most = max(int(real.max()), 1)
        places = [_places(first, count, samples, most) for count in real]
        place = torch.stack(places)
        sides.append(tokens[place.clamp_min(0)].where(place >= 0, -1).to(device))
    rows, columns = sides
    return rows, columns


def _places(first: Tensor, count: Tensor, samples: int | None, most: int) -> Tensor:
    if samples is not None:
        return sampled(first, count, samples)
    within = torch.arange(most)
    return (first[:, None] + within).where(within < count[:, None], -1)
