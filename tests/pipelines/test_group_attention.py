"""Pattern x Remainder x Schedule at the calls of one group of heads, against the definition."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels.attention import sparse_attention
from dit_sparse.kernels.blocks import BlockIndices, block_indices
from dit_sparse.kernels.choosing import chosen_patterns
from dit_sparse.kernels.clustered_blocks import Centroids, cluster_cost, clustered_blocks
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Band, Choice, Columns, Full, Pattern, Skip, Stripes
from dit_sparse.kernels.remainder import (
    Complement,
    Drop,
    Pair,
    Pooled,
    Remainder,
    Rescale,
    cache_bytes,
    cache_of,
)
from dit_sparse.kernels.score import Clustered, Mass, Oracle, Sampled
from dit_sparse.kernels.scored import Scored
from dit_sparse.kernels.scored_blocks import geometry, scored_blocks
from dit_sparse.kernels.select import Cumulative, TopRow
from dit_sparse.pipelines.group_attention import Computed, GroupAttention, Place
from dit_sparse.pipelines.heads import HeadGroup
from dit_sparse.pipelines.parts import Operands
from dit_sparse.pipelines.schedule import Schedule

GRID = TokenGrid(2, 5, 7, text_after=5)
BLOCK, HEADS = 8, 2
MASS = Scored(Mass(rows=None), TopRow(0.5))
SAMPLED = Scored(Sampled(4), TopRow(0.5))
CHOICE = Choice((Band(30), Skip()))
CLUSTERED = Scored(Clustered(4, 6, first=3, again=1), Cumulative(0.6, 0.2))


def operands(step: int, branch: str = "cond", turn: float = 0.2) -> Operands:
    """Drifts with the step; branches differ. Sharp enough for masks to matter."""
    generator = torch.Generator().manual_seed(len(branch))
    shape = 3, 1, GRID.tokens, HEADS, 16
    first, other = (torch.randn(shape, generator=generator) for _ in range(2))
    query, key, value = first + turn * step * other
    return Operands(2 * query, key, value, None)


def attention(
    patterns: tuple[Pattern, ...],
    remainder: Remainder,
    schedule: Schedule,
    limit: int | None = None,
) -> tuple[GroupAttention, HeadGroup]:
    group = HeadGroup(tuple(range(HEADS)), patterns, remainder)
    return GroupAttention([group], schedule, BLOCK, "reference", limit), group


Run = Callable[..., Computed]


def runner(
    pattern: Pattern, remainder: Remainder, schedule: Schedule, limit: int | None = None
) -> tuple[Run, GroupAttention]:
    """A function (step, branch, operands) -> Computed."""
    group = HeadGroup(tuple(range(HEADS)), (pattern,) * HEADS, remainder)
    compute = GroupAttention([group], schedule, BLOCK, "reference", limit)

    def run(
        step: int,
        branch: str = "cond",
        of: Operands | None = None,
        layer: str = "a",
        number: int = 0,
    ) -> Computed:
        of = operands(step, branch) if of is None else of
        return compute(group, Place(branch, layer, 0, step, number), of, GRID)

    return run, compute


def attend(of: Operands, blocks: BlockIndices) -> Pair:
    return sparse_attention(of.query, of.key, of.value, blocks, backend="reference")


def listed(pattern: Pattern, pooled: int = 0) -> BlockIndices:
    return block_indices((pattern,) * HEADS, GRID, block_q=BLOCK, block_k=BLOCK, pooled=pooled)


def dense(of: Operands) -> Pair:
    return attend(of, listed(Full()))


def searched(pattern: Scored, of: Operands, lse: Tensor | None, pooled: int = 0) -> BlockIndices:
    cut = geometry(pattern.order, GRID, HEADS, BLOCK)
    return scored_blocks(pattern, of.query, of.key, cut, lse=lse, pooled=pooled)


def assert_same(came: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(came, expected, atol=1e-6, rtol=1e-5)


def apart(left: Tensor, right: Tensor) -> bool:
    return float((left - right).norm() / right.norm()) > 1e-2


def test_AD_the_first_search_is_dense_and_later_ones_use_its_lse() -> None:
    run, _ = runner(MASS, Drop(), Schedule(renew_at=(2,)))
    first = run(0)
    output, lse = dense(operands(0))
    assert first.dense
    assert first.flops == 1.5
    assert_same(first.output, output)
    found = searched(MASS, operands(0), lse)
    reused = run(1)
    assert not reused.dense
    assert reused.flops == pytest.approx(found.density().weighted)
    assert_same(reused.output, attend(operands(1), found)[0])
    renewed = run(2)
    again = searched(MASS, operands(2), lse)
    assert_same(renewed.output, attend(operands(2), again)[0])
    assert apart(renewed.output, attend(operands(2), found)[0])
    assert renewed.flops == pytest.approx(0.5 + again.density().weighted)
    assert_same(run(3).output, attend(operands(3), again)[0])


def test_an_oracle_finds_blocks_by_the_dense_pass_of_the_step_and_shows_only_them() -> None:
    oracle = Scored(Oracle(), TopRow(0.5))
    run, compute = runner(oracle, Drop(), Schedule(renew_every=2))
    for step in range(5):
        came, of, at_search = run(step), operands(step), operands(step - step % 2)
        found = searched(MASS, at_search, dense(at_search)[1])
        assert not came.dense
        assert_same(came.output, attend(of, found)[0])
        assert came.flops == pytest.approx(found.density().weighted + 1.5 * (step % 2 == 0))
        assert compute.memory.bytes == 0


def test_staggered_layers_find_blocks_and_take_caches_in_turn() -> None:
    schedule = Schedule(renew_every=3, stagger=True)
    run, _ = runner(MASS, Complement(), schedule)
    dense_at = {
        number: [step for step in range(8) if run(step, layer=str(number), number=number).dense]
        for number in range(4)
    }
    assert dense_at == {0: [0, 3, 6], 1: [0, 1, 4, 7], 2: [0, 2, 5], 3: [0, 3, 6]}


def test_SP4_a_scored_pattern_carries_its_pv_skip() -> None:
    pattern = replace(SAMPLED, pv_skip=-0.05)
    run, _ = runner(pattern, Drop(), Schedule(renew_every=1))
    of = operands(0)
    blocks = searched(pattern, of, None)
    expected, _ = sparse_attention(
        of.query, of.key, of.value, blocks, pv_skip=-0.05, backend="reference"
    )
    assert_same(run(0).output, expected)
    assert apart(expected, attend(of, blocks)[0])


def test_scores_without_an_lse_never_run_dense() -> None:
    run, _ = runner(SAMPLED, Drop(), Schedule(renew_every=1))
    for step in range(3):
        came, found = run(step), searched(SAMPLED, operands(step), None)
        assert not came.dense
        assert_same(came.output, attend(operands(step), found)[0])
        assert came.flops == pytest.approx(found.density().weighted + 0.5 * (4 / BLOCK) ** 2)


def by_clusters(of: Operands, last: Centroids | None) -> tuple[Tensor, float, Centroids]:
    """Output and weighted density of lists of clusters, and where these are."""
    lists, last = clustered_blocks(CLUSTERED, of.query, of.key, GRID, BLOCK, last=last)
    outputs = [attend(of.of((head,)), blocks)[0] for head, blocks in enumerate(lists)]
    weighted = sum(blocks.density().weighted for blocks in lists) / HEADS
    return torch.cat(outputs, 2), weighted, last


def test_S23_clusters_go_on_from_step_to_step_and_begin_anew_with_a_generation() -> None:
    run, compute = runner(CLUSTERED, Drop(), Schedule(renew_every=1))
    score = CLUSTERED.score
    assert isinstance(score, Clustered)
    for _ in range(2):
        last, afresh = None, True
        for step in range(3):
            came, before = run(step), last
            expected, weighted, last = by_clusters(operands(step), last)
            assert not came.dense
            assert_same(came.output, expected)
            cost = cluster_cost(score, GRID, again=before is not None)
            assert came.flops == pytest.approx(weighted + cost)
            assert came.density.weighted == pytest.approx(weighted)
            if step:
                afresh &= torch.equal(expected, by_clusters(operands(step), None)[0])
        assert not afresh, "the test cannot tell clusters that go on from new ones"
        compute.begin()


def test_S23_guidance_branches_have_centroids_of_their_own() -> None:
    schedule = Schedule(renew_every=1)
    together, compute = runner(CLUSTERED, Drop(), schedule)
    alone = {branch: runner(CLUSTERED, Drop(), schedule)[0] for branch in ("cond", "uncond")}
    for step in range(3):
        for branch in ("cond", "uncond"):
            assert torch.equal(together(step, branch).output, alone[branch](step, branch).output)
    kept = [found.centroids for found in compute.memory.found.values()]
    assert len(kept) == 2
    assert kept[0] is not None
    assert kept[1] is not None
    assert not torch.equal(kept[0].key, kept[1].key)
    assert compute.memory.bytes == kept[0].bytes + kept[1].bytes


def test_clusters_that_are_found_once_leave_nothing_to_go_on_from() -> None:
    run, compute = runner(CLUSTERED, Drop(), Schedule())
    run(0)
    assert compute.memory.bytes == 0
    found = compute.memory.found["cond", "a", 0]
    assert [part.heads for part in found.parts] == [(0,), (1,)]
    run(1)
    assert compute.memory.found["cond", "a", 0] is found


def test_a_second_call_at_a_step_that_kept_no_list_searches_again() -> None:
    run, _ = runner(SAMPLED, Drop(), Schedule(renew_every=1))
    run(0)
    of = operands(4)
    came = run(0, of=of)
    assert_same(came.output, attend(of, searched(SAMPLED, of, None))[0])
    assert came.flops > came.density.weighted


def test_SG_heads_that_choose_differently_run_what_they_chose() -> None:
    choice = Choice((Band(9), Band(5, "pixel_major"), Skip()), samples=GRID.tokens)
    run, compute = runner(choice, Drop(), Schedule())
    of = operands(0)
    # One head sees the next tokens, the other the same place of the other frame.
    codes = torch.randn(35, 16, generator=torch.Generator().manual_seed(3))
    for head, code in enumerate((codes[:14].repeat_interleave(5, 0), codes.repeat(2, 1))):
        of.query[:, : GRID.video, head] = of.key[:, : GRID.video, head] = 3 * code
    came = run(0, of=of)
    parts = compute.memory.found["cond", "a", 0].parts
    patterns = {head: part.blocks.patterns for part in parts for head in part.heads}
    assert [part.heads for part in parts] == [(0,), (1,)]
    assert patterns == {0: (Band(9),), 1: (Band(5, "pixel_major"),)}
    for head in range(HEADS):
        one, own = of.of((head,)), patterns[head]
        assert own is not None
        blocks = block_indices(own, GRID, block_q=BLOCK, block_k=BLOCK)
        assert_same(came.output[:, :, [head]], attend(one, blocks)[0])
    weights = [part.blocks.density().weighted for part in parts]
    assert came.flops == pytest.approx(sum(weights) / 2 + 2.5)


def test_SV3_stripes_are_run_where_each_head_has_them_and_serve_no_other() -> None:
    run, compute = runner(Choice((Skip(), Stripes(0.3))), Drop(), Schedule())
    of = operands(0)
    of.query[:] = 1
    for head, block in enumerate((4, 7)):
        of.key[:, block * BLOCK : (block + 1) * BLOCK, head] = 5
    came = run(0, of=of)
    (part,) = compute.memory.found["cond", "a", 0].parts
    columns = [c for c in part.blocks.patterns or () if isinstance(c, Columns)]
    assert [(4 in c.blocks, 7 in c.blocks) for c in columns] == [(True, False), (False, True)]
    assert_same(came.output, attend(of, block_indices(columns, GRID, None, BLOCK, BLOCK))[0])
    assert compute._lists._listed.cache_info().currsize == 0


@pytest.mark.parametrize("pattern", [Band(9), Skip(), MASS, CHOICE], ids=str)
@pytest.mark.parametrize("remainder", [Complement("float32"), Rescale(storage="float32")], ids=str)
def test_RE_caches_are_taken_at_dense_steps_and_used_until_the_next(
    pattern: Pattern, remainder: Complement | Rescale
) -> None:
    run, _ = runner(pattern, remainder, Schedule(renew_every=3))
    cache = blocks = None
    for step in range(5):
        came, of = run(step), operands(step)
        if step % 3 == 0:
            exact = dense(of)
            if isinstance(pattern, Scored):
                blocks = searched(pattern, of, exact[1])
            elif isinstance(pattern, Choice):
                chosen = chosen_patterns(pattern, of.query, of.key, of.value, GRID, BLOCK)
                blocks = block_indices(chosen, GRID, block_q=BLOCK, block_k=BLOCK)
            else:
                blocks = listed(pattern)
            cache = cache_of(remainder, exact, attend(of, blocks))
            assert came.dense
            assert_same(came.output, exact[0])
            assert came.flops >= 1 + blocks.density().weighted
        else:
            assert cache is not None
            assert blocks is not None
            sparse = attend(of, blocks)
            assert not came.dense
            assert_same(came.output, cache.apply(sparse, step % 3))
            assert apart(came.output, sparse[0])


def test_RE3_the_complement_is_exact_as_long_as_nothing_changes() -> None:
    run, _ = runner(MASS, Complement("float32"), Schedule())
    of = operands(0)
    for step in range(4):
        assert_same(run(step, of=of).output, dense(of)[0])
    dropped, _ = runner(MASS, Drop(), Schedule())
    assert apart([dropped(step, of=of).output for step in range(2)][1], dense(of)[0])


@pytest.mark.parametrize("pattern", [Band(9), SAMPLED], ids=str)
def test_PS_what_is_not_listed_is_pooled(pattern: Pattern) -> None:
    run, _ = runner(pattern, Pooled(2), Schedule(renew_every=1))
    of = operands(1)
    found = isinstance(pattern, Scored)
    blocks = searched(pattern, of, None, 2) if found else listed(pattern, 2)
    came = run(1)
    assert (blocks.tag == 2).any()
    assert_same(came.output, attend(of, blocks)[0])
    assert blocks.density().weighted < blocks.density().block == 1
    assert came.flops == pytest.approx(blocks.density().weighted, abs=0.13)


def test_G10_interleaved_branches_are_as_each_alone() -> None:
    schedule = Schedule(renew_every=2)
    together, _ = runner(MASS, Complement(), schedule)
    alone = {branch: runner(MASS, Complement(), schedule)[0] for branch in ("cond", "uncond")}
    for step in range(4):
        for branch in ("cond", "uncond"):
            assert torch.equal(together(step, branch).output, alone[branch](step, branch).output)


def test_branches_that_share_use_the_blocks_of_the_first() -> None:
    run, _ = runner(MASS, Drop(), Schedule(share_branches=True))
    assert run(0, "cond").dense
    found = searched(MASS, operands(0, "cond"), dense(operands(0, "cond"))[1])
    for step in range(2):
        other = run(step, "uncond")
        assert not other.dense
        assert_same(other.output, attend(operands(step, "uncond"), found)[0])


def test_branches_that_share_blocks_keep_caches_of_their_own() -> None:
    run, _ = runner(MASS, Complement("float32"), Schedule(renew_every=2, share_branches=True))
    for step in range(5):
        for branch in ("cond", "uncond"):
            of = operands(step - step % 2, branch)
            assert_same(run(step, branch, of).output, dense(of)[0])


def test_nothing_is_left_of_the_generation_before() -> None:
    run, compute = runner(MASS, Complement(), Schedule())
    first = [run(step).output for step in range(3)]
    compute.begin()
    assert compute.memory.bytes == 0
    assert all(torch.equal(run(step).output, output) for step, output in enumerate(first))


def test_caches_beyond_the_limit_are_those_of_least_loss() -> None:
    each = cache_bytes(Complement(), 1, GRID.tokens, HEADS, 16)
    run, compute = runner(Band(9), Complement(), Schedule(renew_every=2), 2 * each)
    # Sharper attention loses less to the band: queries grow from layer to layer.
    layers = {name: operands(0) for name in ("flat", "middle", "sharp")}
    for factor, (name, of) in zip((0.01, 1, 4), layers.items(), strict=True):
        layers[name] = replace(of, query=factor * of.query)
    for name, of in layers.items():
        assert run(0, of=of, layer=name).dense
    kept = {key[1]: value for key, value in compute.memory.kept.items()}  # type: ignore[index]
    losses = {
        name: float(cache_of(Complement(), dense(of), attend(of, listed(Band(9)))).loss)
        for name, of in layers.items()
    }
    least = min(losses, key=losses.__getitem__)
    assert [name for name, value in kept.items() if value.cache is None] == [least]
    assert compute.memory.peak == 2 * each
    assert compute.memory.dropped == 1
    # Without a cache a layer drops what it does not keep, and has nothing to renew.
    came = run(2, of=layers[least], layer=least)
    assert not came.dense
    assert_same(came.output, attend(layers[least], listed(Band(9)))[0])


@pytest.mark.parametrize(
    "pattern", [MASS, Scored(Clustered(35, 35), TopRow(0.4))], ids=["mass", "clusters"]
)
def test_SD3_a_pattern_that_moves_is_searched_again(pattern: Scored) -> None:
    run, compute = runner(pattern, Drop(), Schedule(recall=0.9))
    run(0)
    before = compute.memory.found["cond", "a", 0].parts
    run(1)
    assert compute.memory.found["cond", "a", 0].parts is before
    moved = operands(0, "another branch")
    run(2, of=moved)
    after = compute.memory.found["cond", "a", 0]
    assert after.step == 2
    assert after.parts is not before
    quiet, other = runner(pattern, Drop(), Schedule())
    quiet(0)
    quiet(2, of=moved)
    assert other.memory.found["cond", "a", 0].step == 0
