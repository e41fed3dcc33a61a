"""Heads planted with a reach that grows with the grid, or does not; which, has to be found."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch

from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import AnyOf, Band, Full, Neighborhood, Pattern, Sink, Skip
from dit_sparse.kernels.remainder import Complement, Drop
from dit_sparse.kernels.scaling import Growth
from dit_sparse.kernels.score import Mass
from dit_sparse.kernels.scored import Scored
from dit_sparse.kernels.select import TopRow
from dit_sparse.pipelines.fingerprint import ModelFingerprint
from dit_sparse.pipelines.phase import Phase
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.schedule import Schedule
from dit_sparse.pipelines.transfer import transferred
from dit_sparse.search.course import Sightings
from dit_sparse.search.elasticity import Errors, growths
from dit_sparse.search.evidence import Evidence
from dit_sparse.search.space import Space, patterns

LAYER = "transformer.blocks.0.attn1"
HERE = TokenGrid(15, 16, 16)
LARGER, SMALLER, RAGGED = TokenGrid(21, 24, 20), TokenGrid(9, 12, 10), TokenGrid(13, 23, 19)
GRIDS = pytest.mark.parametrize("there", [LARGER, SMALLER, RAGGED], ids=str)
FOUND = Scored(Mass(), TopRow(0.2))
SHARE, WINDOW = Growth(), Growth(False, False)
FRAMES, SPACE = Growth(space=False), Growth(frames=False)
candidates = cache(patterns)
KINDS = ("skip", "band", "neighborhood")
SEEN = Sightings(10, (4, 5), (0,))
Law = Callable[[Pattern, TokenGrid], float]


def law(chosen: Pattern, growth: Growth) -> Law:
    """The errors of a head that looks as far as `chosen` at `HERE` and elsewhere as it grows: they
    fall by e^4 where a pattern of the kind reaches that far."""
    grows = (growth.frames, growth.space, growth.space)

    def error(pattern: Pattern, grid: TokenGrid) -> float:
        factors = [
            new / old if each else 1.0
            for old, new, each in zip(HERE.shape, grid.shape, grows, strict=True)
        ]
        match pattern, chosen:
            case Full(), _:
                return 0.0
            case Band(), Band() if pattern.axis_order == chosen.axis_order:
                reach = chosen.half_width * math.prod(factors)
                return math.exp(-4 * pattern.half_width / reach)
            case Neighborhood(), Neighborhood():
                sizes = zip(pattern.window, chosen.window, factors, strict=True)
                return sum(math.exp(-4 * mine / (own * factor)) for mine, own, factor in sizes) / 3
            case _:
                return 1.0

    return error


def searched(grid: TokenGrid, *phases: list[Law], kinds: tuple[str, ...] = KINDS) -> Plan:
    """A plan of full heads, searched on `grid`, whose heads err by `phases[phase][head]` with what
    they drop, and by 1 with a cache."""
    tried = (*candidates(grid, 64, kinds), FOUND)
    heads = len(phases[0])
    dropped = torch.tensor(
        [
            [[own[head](each, grid) for own in (phases[0], phases[-1])] for each in tried]
            for head in range(heads)
        ]
    )
    error = torch.stack([dropped, torch.ones_like(dropped)], 2)
    error[:, tried.index(Full()), 1] = torch.inf
    evidence = Evidence(
        layers=(LAYER,),
        space=Space(tried, (), (Drop(), Complement())),
        sightings=SEEN,
        schedules=(Schedule(),),
        grid=grid,
        block=64,
        head_dim=(12,),
        copies=1,
        error=error.flatten(1, 2)[None, ..., None],
        density=torch.ones(1, heads, 2 * len(tried)),
        column_mass=torch.zeros(1, heads, -(-grid.video // 64)),
    )
    return Plan(
        {"transformer": ModelFingerprint("WanTransformer3DModel", 1, heads, 12, "0" * 64)},
        {LAYER: (Full(),) * heads},
        grid=grid.shape,
        provenance={"search": evidence.description() | {"steps": 10, "metric": "relative"}},
        evidence=evidence.arrays(),
    )


def pair(there: TokenGrid, chosen: Pattern, *laws: Law) -> tuple[Plan, Plan]:
    """A plan with a head for each of `laws` that all run `chosen`, and one beside it."""
    plan, beside = (searched(grid, list(laws)) for grid in (HERE, there))
    return replace(plan, assignment={LAYER: (chosen,) * len(laws)}), beside


def found(plan: Plan, beside: Plan) -> list[Growth | None]:
    """The growths of the heads in the first phase."""
    told = growths(plan, beside)
    return [told.get((0, LAYER, head)) for head in range(len(plan.assignment[LAYER]))]


ALL = [WINDOW, SPACE, FRAMES, SHARE]


@GRIDS
@pytest.mark.parametrize(
    "chosen",
    [Band(405), Band(450), Band(405, "pixel_major"), Neighborhood((6, 8, 8), (6, 8, 8))],
    ids=str,
)
def test_heads_get_the_growth_that_keeps_their_error(there: TokenGrid, chosen: Pattern) -> None:
    assert found(*pair(there, chosen, *(law(chosen, growth) for growth in ALL))) == ALL


def test_each_phase_has_its_own_growth() -> None:
    chosen = Band(405)
    window, share = law(chosen, WINDOW), law(chosen, SHARE)
    plan, beside = (searched(grid, [window, share], [share, window]) for grid in (HERE, LARGER))
    phase = Phase({LAYER: (chosen, chosen)})
    schedule = Schedule(dense_first=1, phases=(0.5,))
    plan = replace(plan, assignment=phase.assignment, later=(phase,), schedule=schedule)
    told = growths(plan, beside)
    expected = {(0, 0): WINDOW, (0, 1): SHARE, (1, 0): SHARE, (1, 1): WINDOW}
    assert told == {(phase, LAYER, head): each for (phase, head), each in expected.items()}

    # A phase that runs dense tells nothing.
    dense = replace(plan, schedule=Schedule(dense_first=5, phases=(0.5,)))
    assert {phase for phase, _, _ in growths(dense, beside)} == {1}

    moved = transferred(plan, grid=(21, 32, 32), growths=told)
    assert moved.assignment == {LAYER: (Band(405), Band(2268))}
    assert moved.later[0].assignment == {LAYER: (Band(2268), Band(405))}
    assert moved.provenance["growth"] == {"window": 1.0, "share": 1.0}


@pytest.mark.parametrize("growth", ALL, ids=str)
def test_a_union_grows_as_the_part_that_errs_least(growth: Growth) -> None:
    band = Band(405)
    for union in (AnyOf((Sink(), band)), AnyOf((band, Neighborhood((2, 2, 2))))):
        assert found(*pair(LARGER, union, law(band, growth))) == [growth]


def test_of_growths_that_keep_the_error_the_smallest_pattern_wins_of_none_the_least_error() -> (
    None
):
    band = Band(405)

    def careless(pattern: Pattern, grid: TokenGrid) -> float:
        return 0.0 if pattern == Full() else 0.1

    def worse(pattern: Pattern, grid: TokenGrid) -> float:
        return law(band, WINDOW)(pattern, grid) * (1 if grid == HERE else 100)

    assert found(*pair(LARGER, band, careless, worse)) == [WINDOW, SHARE]
    assert found(*pair(SMALLER, band, careless, worse)) == [SHARE, WINDOW]


def test_the_usual_growth_goes_first_where_growths_come_to_the_same() -> None:
    band, pixels = Band(405), Band(405, "pixel_major")
    wider = TokenGrid(15, 24, 20)
    assert found(*pair(wider, band, law(band, SHARE), law(band, WINDOW))) == [SPACE, FRAMES]
    assert found(*pair(wider, pixels, law(pixels, SHARE))) == [SHARE]
    # A fifteenth more of five frames is none: nothing to be told apart.
    box = Neighborhood((5, 8, 8), (4, 4, 4))
    assert found(*pair(TokenGrid(16, 16, 16), box, law(box, SHARE))) == [None]


def test_what_evidence_does_not_decide_is_left_out() -> None:
    band = Band(405)
    laws = [law(band, SHARE)] * 6
    plan, beside = pair(LARGER, band, *laws)
    chosen = (Full(), Skip(), FOUND, Band(9, "in_frame"), Neighborhood((3, 5, 5), (1, 1, 1)), band)
    plan = replace(plan, assignment={LAYER: chosen})
    assert found(plan, beside) == [None, None, None, None, WINDOW, SHARE]
    boxes = searched(LARGER, laws, kinds=("skip", "neighborhood"))
    assert found(plan, boxes) == [None, None, None, None, WINDOW, None]


def test_errors_are_those_with_the_remainder_of_the_head() -> None:
    band = Band(405)
    plan, beside = pair(LARGER, band, *[law(band, SHARE)] * 2)
    plan = replace(plan, remainders={LAYER: (Drop(), Complement())})
    # With a cache all err alike, so the smallest will do.
    assert found(plan, beside) == [SHARE, WINDOW]


def test_other_weights_of_layers_and_steps_change_nothing() -> None:
    band = Band(405)
    plan, beside = pair(LARGER, band, law(band, WINDOW))
    weights = {"propagation": torch.tensor([100.0]), "importance": torch.tensor([9.0, 1.0])}
    assert found(plan, replace(beside, evidence=beside.evidence | weights)) == [WINDOW]


def test_errors_between_candidates_lie_between_theirs() -> None:
    grid = TokenGrid(10, 10, 10)
    errors: dict[Pattern, float] = {
        Skip(): 1.0,
        Band(100): 0.1,
        Band(300): 0.001,
        Neighborhood((2, 5, 5)): 0.4,
        Neighborhood((4, 10, 5)): 0.1,
        Full(): 0.0,
    }
    tried = (Full(), *list(errors)[:-1])

    def of(pattern: Pattern, tried: tuple[Pattern, ...] = tried) -> float:
        count = len(tried)
        table = torch.tensor([errors[each] for each in tried]).reshape(1, 1, count, 1, 1)
        evidence = Evidence(
            (LAYER,), Space(tried, (), (Drop(),)), Sightings(10, (4,), (0,)), (Schedule(),),
            grid, 64, (12,), 1, table, torch.ones(1, 1, count), torch.zeros(1, 1, 16),
        )  # fmt: skip
        return Errors(evidence, Schedule(), 10).of((0, LAYER, 0), pattern, Drop())

    for pattern, error in errors.items():
        assert of(pattern) == pytest.approx(error)
    assert of(Band(200)) == pytest.approx(0.01)
    assert of(Band(50)) == pytest.approx(0.1**0.5)
    assert of(Band(650)) == pytest.approx(0.0005)
    # Half way from 0.4 of the axes to 0.63: whatever the proportions, and whatever lies across.
    assert of(Neighborhood((2, 8, 5))) == pytest.approx(0.4 * 0.25 ** (0.1 / (19 / 30 - 0.4)))
    assert of(Neighborhood((10, 10, 5))) == pytest.approx(0.1 * (1 - (25 - 19) / (30 - 19)))
    assert of(AnyOf((Neighborhood((2, 5, 5)), Band(200), Sink()))) == pytest.approx(0.01)
    assert of(Band(50), tried=(Full(), Band(100))) == math.inf
    assert of(Band(50, "pixel_major")) == of(Sink()) == math.inf


def test_plans_that_cannot_be_compared_say_why() -> None:
    band = Band(405)
    plan, beside = pair(LARGER, band, law(band, SHARE))
    with pytest.raises(ValueError, match=r"^the plan carries no evidence.*not carried over"):
        growths(transferred(plan, grid=(9, 9, 9)), beside)
    with pytest.raises(ValueError, match="plan beside it carries no evidence of a search"):
        growths(plan, replace(beside, evidence={}))
    with pytest.raises(ValueError, match=r"searched on grid 15x16x16.*one of another grid"):
        growths(plan, pair(HERE, band, law(band, SHARE))[0])
    model = {"transformer": replace(plan.model["transformer"], head_dim=16)}
    with pytest.raises(ValueError, match=r"of another model: transformer is .*head_dim=16"):
        growths(plan, replace(beside, model=model))
    search = beside.provenance["search"] | {"metric": "cosine"}
    with pytest.raises(ValueError, match="metric is relative in the plan and cosine in the one"):
        growths(plan, replace(beside, provenance={"search": search}))
    search = beside.provenance["search"] | {"layers": ["transformer.blocks.9.attn1"]}
    other = replace(
        beside,
        provenance={"search": search},
        assignment={"transformer.blocks.9.attn1": beside.assignment[LAYER]},
    )
    with pytest.raises(ValueError, match=r"has other layers: transformer\.blocks\.0\.attn1"):
        growths(plan, other)
