"""Plans carried over to other grids and numbers of steps."""

from dataclasses import replace

import pytest

from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import AnyOf, Band, Columns, Neighborhood, Pattern, Sink, Skip
from dit_sparse.kernels.remainder import Complement
from dit_sparse.kernels.scaling import Growth
from dit_sparse.kernels.score import Mass
from dit_sparse.kernels.scored import Scored
from dit_sparse.kernels.select import TopRow
from dit_sparse.pipelines.fingerprint import ModelFingerprint
from dit_sparse.pipelines.phase import Phase
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.schedule import Schedule
from dit_sparse.pipelines.transfer import transferred

LAYER = "transformer.blocks.0.attn1"
SOURCE, WIDER, LONGER = (15, 16, 16), (15, 32, 24), (30, 16, 16)
FOUND = Scored(Mass(), TopRow(0.2))


def plan(*patterns: Pattern, steps: int | None = 20) -> Plan:
    fingerprint = ModelFingerprint("WanTransformer3DModel", 1, len(patterns), 64, "0" * 64)
    return Plan(
        {"transformer": fingerprint},
        {LAYER: patterns},
        Schedule(dense_first=4, renew_every=5, renew_at=(10,)),
        remainders={LAYER: (Complement(),) * len(patterns)},
        grid=SOURCE,
        provenance={"uniform": "these"} | ({} if steps is None else {"steps": steps}),
    )


def heads(carried: Plan) -> tuple[Pattern, ...]:
    (patterns,) = carried.assignment.values()
    return patterns


@pytest.mark.parametrize(
    ("pattern", "wider", "longer"),
    [
        (
            Neighborhood((5, 8, 4), (1, 4, 2)),
            Neighborhood((5, 16, 6), (1, 8, 3)),
            Neighborhood((5, 8, 4), (1, 4, 2)),
        ),
        (
            Neighborhood((15, 4, 4)),
            Neighborhood((15, 8, 6), (1, 2, 2)),
            Neighborhood((30, 4, 4), (2, 1, 1)),
        ),
        # Two frames on either side stay two frames.
        (Band(512), Band(1536), Band(512)),
        # Ten pixels in all frames: an equal share of the frame, and all of the frames.
        (Band(150, "pixel_major"), Band(450, "pixel_major"), Band(300, "pixel_major")),
        (FOUND, FOUND, FOUND),
        (Skip(), Skip(), Skip()),
        (AnyOf((Band(256), Sink())), AnyOf((Band(768), Sink())), AnyOf((Band(256), Sink()))),
    ],
    ids=["box", "tube", "band", "pixels", "found", "skip", "both"],
)
def test_patterns_keep_share_of_space_and_number_of_frames(
    pattern: Pattern, wider: Pattern, longer: Pattern
) -> None:
    made = plan(pattern)
    assert heads(transferred(made, grid=WIDER)) == (wider,)
    assert heads(transferred(made, grid=LONGER)) == (longer,)
    same = transferred(made, grid=SOURCE)
    assert heads(same) == (pattern,)
    assert (same.schedule, same.remainders) == (made.schedule, made.remainders)


def test_carried_patterns_run_on_their_grid() -> None:
    carried = transferred(plan(Neighborhood((5, 8, 4), (1, 4, 2)), Band(512)), grid=WIDER)
    assert carried.grid == WIDER
    for pattern in heads(carried):
        assert pattern.refusal(TokenGrid(*WIDER)) is None


def test_heads_grow_as_they_are_told_to() -> None:
    made = plan(Band(512), Band(512), Neighborhood((5, 8, 4)), AnyOf((Band(256), Sink())), FOUND)
    schedule = replace(made.schedule, phases=(0.25,))
    made = replace(made, schedule=schedule, later=(Phase(made.assignment, made.remainders),))
    growths = {
        (0, LAYER, 0): Growth(False, False),
        (1, LAYER, 1): Growth(),
        (1, LAYER, 2): Growth(space=False),
        (1, LAYER, 3): Growth(False, False),
    }
    moved = transferred(made, grid=(30, 32, 24), growths=growths)
    box = Neighborhood((5, 16, 6), (1, 2, 2))
    assert heads(moved) == (Band(512), Band(1536), box, AnyOf((Band(768), Sink())), FOUND)
    assert moved.later[0].assignment[LAYER] == (
        Band(1536),
        Band(3072),
        Neighborhood((10, 8, 4), (2, 1, 1)),
        AnyOf((Band(256), Sink())),
        FOUND,
    )
    # Of four heads with a size, each in a quarter of the steps and in three.
    assert moved.provenance["growth"] == {
        "usual": 1.5,
        "window": 1.0,
        "share": 0.75,
        "share of frames, window of space": 0.75,
    }
    plain = transferred(made, grid=WIDER)
    assert plain.provenance["growth"] == {"usual": 4.0}
    assert "growth" not in transferred(made, steps=50).provenance


def test_steps_keep_their_share_of_the_generation() -> None:
    carried = transferred(plan(FOUND), steps=50)
    assert carried.schedule == Schedule(dense_first=10, renew_every=12, renew_at=(25,))
    # And on from there, since the plan knows what it is for.
    assert transferred(carried, steps=100).schedule.dense_first == 20


def test_what_cannot_be_carried_over_says_why() -> None:
    columns = Columns((0, 2), block=64, grid=SOURCE)
    with pytest.raises(ValueError, match=r"lists blocks of keys of grid 15x16x16.*search a plan"):
        transferred(plan(Band(9), columns), grid=WIDER)
    with pytest.raises(ValueError, match=r"head 1 of .* in phase 0, which has none"):
        transferred(plan(Band(9), FOUND), grid=WIDER, growths={(0, LAYER, 1): Growth()})
    with pytest.raises(ValueError, match="give the grid too"):
        transferred(plan(FOUND), steps=50, growths={})
    with pytest.raises(ValueError, match="does not say for how many steps"):
        transferred(plan(FOUND, steps=None), steps=50)
    with pytest.raises(ValueError, match="does not say which token grid"):
        transferred(replace(plan(FOUND), grid=None), grid=WIDER)
