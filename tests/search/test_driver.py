import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_sparse.kernels.pattern import Band, Columns, Full, Skip
from dit_sparse.kernels.remainder import Drop, Pooled
from dit_sparse.kernels.scored import Scored
from dit_sparse.pipelines.hook import disable_sparse_attention, enable_sparse_attention
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.schedule import Schedule
from dit_sparse.search import fidelity, trials
from dit_sparse.search.budget import Budget
from dit_sparse.search.driver import search_plan
from dit_sparse.search.evidence import Evidence
from dit_sparse.search.solution import resolve
from dit_sparse.search.timing import StepTimes, Timing
from tests import tiny

PROMPTS = ("a cat", "a dog", "a bird")
SMALL: dict[str, Any] = {
    "steps": 4,
    "height": 64,
    "width": 64,
    "frames": 9,
    "guidance": 5.0,
    "block": 16,
    "rows": 24,
    "anchors": 2,
}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.wan()


@pytest.fixture(scope="module")
def plan(pipe: Any) -> Plan:
    return search_plan(pipe, PROMPTS, Budget(flops=0.6), **SMALL)


def test_the_plan_keeps_its_budget_and_runs(pipe: Any, plan: Plan) -> None:
    assert plan.predicted["flops"] <= 0.6
    with enable_sparse_attention(pipe, plan) as hook:
        tiny.generate(pipe)
        report = hook.report()
    assert report.flops == pytest.approx(plan.predicted["flops"], rel=1e-6)
    assert report.cache_bytes == plan.predicted["cache_bytes"]


def test_same_arguments_same_plan_bit_for_bit(pipe: Any, plan: Plan) -> None:
    torch.manual_seed(123)
    again = search_plan(pipe, PROMPTS, Budget(flops=0.6), **SMALL)
    assert again.digest == plan.digest


def test_another_seed_gives_other_evidence(pipe: Any, plan: Plan) -> None:
    other = search_plan(pipe, PROMPTS, Budget(density=0.6), seed=7, **SMALL)
    assert not torch.equal(other.evidence["error"], plan.evidence["error"])


def test_pipeline_and_random_state_are_left_alone(pipe: Any) -> None:
    before = tiny.generate(pipe)
    processors = [
        module.processor for module in pipe.transformer.modules() if is_attention(module)
    ]
    state = torch.get_rng_state()
    search_plan(pipe, PROMPTS[:1], Budget(flops=0.6), **SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    after = [module.processor for module in pipe.transformer.modules() if is_attention(module)]
    assert all(a is b for a, b in zip(processors, after, strict=True))
    assert torch.equal(tiny.generate(pipe), before)


def is_attention(module: Any) -> bool:
    return hasattr(module, "processor")


def test_resolve_is_what_a_search_with_that_budget_finds(pipe: Any, plan: Plan) -> None:
    for budget in (Budget(flops=0.4, cache_bytes=0), Budget(density=0.4)):
        searched = search_plan(pipe, PROMPTS, budget, **SMALL)
        assert resolve(plan, budget).digest == searched.digest
        assert searched.provenance["budget"] == str(budget)
        assert searched.digest != plan.digest


def test_resolve_works_from_a_saved_plan(plan: Plan, tmp_path: Path) -> None:
    plan.save_pretrained(tmp_path / "plan")
    loaded = Plan.from_pretrained(tmp_path / "plan")
    assert resolve(loaded, Budget(flops=0.6)).digest == plan.digest
    dense = resolve(loaded, Budget(flops=1.0))
    assert dense.assignment == {layer: (Full(), Full()) for layer in plan.assignment}
    assert dense.remainders == {}


def test_evidence_has_every_candidate_of_every_head(plan: Plan) -> None:
    evidence = Evidence.of_plan(plan)
    space, seen = evidence.space, evidence.sightings
    # No neighborhood computes less than full on so small a grid.
    assert {type(p) for p in space.patterns} == {Full, Skip, Band, Scored}
    candidates = space.slots * len(space.remainders)
    assert evidence.error.shape == (2, 2, candidates, len(seen.anchors), len(seen.ages))
    assert (seen.steps, seen.anchors, seen.ages) == (4, (1, 2), (0, 1))
    for number in range(candidates):
        own = evidence.candidate(1, 0, number)
        error, density = evidence.error[:, :, number], evidence.density[:, :, number]
        missing = own.pattern == Full() and own.remainder != Drop()
        missing |= isinstance(own.pattern, Columns) and isinstance(own.remainder, Pooled)
        assert density.isfinite().all() == (not missing), str(own)
        assert evidence.number(1, 0, own) == number
        if missing:
            continue
        assert error.isfinite().all()
        exact = own.pattern == Full()
        assert (error[..., 1] == 0).all() if exact else (error[..., 1] > 0).all(), str(own)
        fresh = exact or own.remainder.cached
        assert (error[..., 0] == 0).all() if fresh else (error[..., 0] > 0).all(), str(own)
    assert evidence.column_mass.sum(-1) == pytest.approx(torch.ones(2, 2), abs=1e-5)
    last = evidence.candidate(1, 0, candidates - 1).pattern
    assert isinstance(last, Columns)
    assert len(last.blocks) == space.column_counts[-1]
    assert evidence.copies == 2


@pytest.mark.parametrize(
    ("kinds", "patterns", "remainders"),
    [
        (("band",), {"full", "band"}, ["drop"]),
        (("skip", "pooled", "complement"), {"full", "skip"}, ["drop", "pooled", "complement"]),
        (["columns", "scored"], {"full", "scored"}, ["drop"]),
        ((), {"full"}, ["drop"]),
    ],
    ids=["bands", "skip-with-rest", "online", "none"],
)
def test_candidates_narrow_the_search(
    pipe: Any, kinds: Any, patterns: set[str], remainders: list[str]
) -> None:
    found = search_plan(pipe, PROMPTS[:1], Budget(flops=1), candidates=kinds, **SMALL)
    space = Evidence.of_plan(found).space
    assert {pattern.kind for pattern in space.patterns} == patterns
    assert [remainder.kind for remainder in space.remainders] == remainders
    assert (space.column_counts != ()) == ("columns" in kinds)


def test_two_transformers_are_searched_together() -> None:
    found = search_plan(
        tiny.wan(layers=1, two_stage=True),
        PROMPTS[:1],
        Budget(density=0.5),
        **{**SMALL, "steps": 8, "anchors": 8},
    )
    assert list(found.assignment) == ["transformer.blocks.0.attn1", "transformer_2.blocks.0.attn1"]


def test_a_transformer_that_runs_at_no_renewal_is_named() -> None:
    message = r"transformer_2\.blocks\.0\.attn1 did not run .*; raise anchors"
    with pytest.raises(ValueError, match=message):
        search_plan(
            tiny.wan(layers=1, two_stage=True),
            PROMPTS[:1],
            Budget(density=0.5),
            **{**SMALL, "steps": 17, "anchors": 1},
        )


def test_text_tokens_are_searched_with_the_video() -> None:
    pipe = tiny.cogvideox()
    found = search_plan(pipe, PROMPTS[:1], Budget(density=0.7), **SMALL)
    assert Evidence.of_plan(found).grid.text_before > 0
    assert found.predicted["density"] <= 0.7


def test_progress_counts_every_step_once(pipe: Any) -> None:
    told: list[tuple[int, int]] = []
    search_plan(
        pipe, PROMPTS, Budget(density=0.5), progress=lambda *now: told.append(now), **SMALL
    )
    # Every run ends with the last step that is looked at.
    total = 3 * 4
    assert told == [(done + 1, total) for done in range(total)]


def test_an_error_in_the_middle_leaves_the_pipeline_clean(pipe: Any) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = tiny.generate(pipe)
    with pytest.raises(KeyboardInterrupt):
        search_plan(pipe, PROMPTS, Budget(density=0.5), progress=stop, **SMALL)
    assert torch.equal(tiny.generate(pipe), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "expected a list of at least one prompt"),
        ({"prompts": "a cat"}, "expected a list of at least one prompt, came 'a cat'"),
        ({"schedules": [Schedule(dense_first=4)]}, "none of 4 runs sparse"),
        ({"schedules": [Schedule(recall=0.9)]}, "known beforehand"),
        ({"steps": 1}, "no schedule to choose from for 1 steps"),
        ({"anchors": 0}, "anchors must be at least 1, came 0"),
        ({"candidates": ["band", "bands"]}, "expected a list of names of full, .*, came 'bands'"),
        ({"candidates": "band"}, "expected a list of names of full, .*, came 'band'"),
        ({"metric": "l1"}, "metric must be one of relative"),
        ({"rows": 0}, "at least 1 sampled row"),
        ({"block": 0}, "block: expected a number of tokens >= 1"),
    ],
    ids=[
        "no-prompt",
        "text",
        "dense",
        "recall",
        "one-step",
        "anchors",
        "kind",
        "word",
        "metric",
        "rows",
        "block",
    ],
)
def test_bad_arguments_are_named(pipe: Any, changes: dict[str, Any], message: str) -> None:
    arguments = {"prompts": PROMPTS, "budget": Budget(density=0.5)} | SMALL | changes
    with pytest.raises(ValueError, match=message):
        search_plan(pipe, arguments.pop("prompts"), arguments.pop("budget"), **arguments)


def test_a_pipeline_that_runs_sparse_is_refused(pipe: Any, plan: Plan) -> None:
    enable_sparse_attention(pipe, plan)
    with sparse_off(pipe), pytest.raises(ValueError, match="sparse attention is enabled"):
        search_plan(pipe, PROMPTS, Budget(density=0.5), **SMALL)


@contextmanager
def sparse_off(pipe: Any) -> Iterator[None]:
    try:
        yield
    finally:
        disable_sparse_attention(pipe)


def untouched(*_: Any) -> None:
    raise AssertionError("the pipeline was used")


def test_every_budget_is_solved_from_the_evidence(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers.WanPipeline.__call__", untouched)
    error = resolve(plan, Budget(density=0.4)).predicted["error"]
    predicted = resolve(plan, Budget(error=error)).predicted
    assert predicted["error"] <= error * (1 + 1e-6)
    # Among all schedules, not only those with the usual dense steps.
    assert predicted["flops"] <= resolve(plan, Budget(density=0.4)).predicted["flops"] + 1e-6

    timing = Timing.of_plan(plan)
    assert timing is not None
    assert 0 < timing.attention_share < 1
    assert timing.steps == 4
    asked = timing.speedup(0.5)
    faster = resolve(plan, Budget(speedup=asked)).predicted
    assert faster["speedup"] >= asked * (1 - 1e-6)
    latency = resolve(plan, Budget(latency=timing.dense_seconds / asked))
    assert latency.predicted == faster
    assert latency.provenance["budget"].startswith("latency=")
    with pytest.raises(ValueError, match="needs the model: search with"):
        resolve(plan, Budget(psnr=30))


def test_a_psnr_is_held_by_the_videos(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "CHECKS", 3)
    told: list[tuple[int, int]] = []
    # Random weights lose little: nothing but a high PSNR makes a difference.
    found = search_plan(
        pipe, PROMPTS[:1], Budget(psnr=50), progress=lambda *now: told.append(now), **SMALL
    )
    achieved = found.provenance["achieved"]
    assert found.provenance["budget"] == "psnr=50"
    assert achieved["psnr"] >= 50
    assert 1 <= len(achieved["checks"]) <= 3
    assert told[-1][0] == told[-1][1]
    assert [done for done, _ in told] == sorted({done for done, _ in told})

    call = {**tiny.CALL, "prompt": PROMPTS[0], "output_type": "np"}
    del call["negative_prompt"], call["max_sequence_length"]
    videos = []
    for heads in (found, Plan.uniform(pipe, Full(), block=16)):
        with enable_sparse_attention(pipe, heads):
            generator = torch.Generator().manual_seed(0)
            videos.append(torch.from_numpy(pipe(**call, generator=generator).frames[0]))
    assert fidelity.mean_psnr(videos[1:], videos[:1]) == pytest.approx(achieved["psnr"], abs=0.1)
    assert "achieved" not in resolve(found, Budget(density=0.5)).provenance


def test_a_speedup_is_held_by_what_runs(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Three trials of 9 s beside dense generations of 10 s.
    clock = iter((0.0, 9.0, 19.0) * 3)
    monkeypatch.setattr(trials, "perf_counter", lambda: next(clock))
    known = Timing("a device", 4, 2.0, 0.5, 2.0)
    monkeypatch.setattr(StepTimes, "dense", lambda *_: known)
    told: list[tuple[int, int]] = []
    found = search_plan(
        pipe, PROMPTS[:1], Budget(speedup=1.1), progress=lambda *now: told.append(now), **SMALL
    )
    ran = [(run["seconds"], run["dense_seconds"]) for run in found.timing["runs"]]
    assert ran == [(9, 10)] * 3
    timing = Timing.of_plan(found)
    assert timing is not None
    assert timing.dense_seconds == pytest.approx(10)
    last = found.timing["runs"][-1]["cost"]
    assert timing.speedup(last) == pytest.approx(10 / 9, rel=0.02)
    assert timing.realised < 1
    assert found.predicted["speedup"] >= 1.1 * (1 - 1e-6)
    assert told[-1][0] == told[-1][1]
    assert resolve(found, Budget(speedup=1.1)).digest == found.digest


def test_another_budget_takes_less_than_a_second(plan: Plan) -> None:
    for budget in (Budget(flops=0.5), Budget(density=0.3), Budget(flops=0.4, cache_bytes=5000)):
        start = time.process_time()
        resolve(plan, budget)
        assert time.process_time() - start < 1


def test_resolve_refuses_a_plan_without_evidence(pipe: Any, plan: Plan) -> None:
    with pytest.raises(ValueError, match="carries no evidence of a search"):
        resolve(Plan.uniform(pipe, Full()), Budget(density=0.5))
    short = plan.evidence | {"error": plan.evidence["error"][..., :-1]}
    with pytest.raises(ValueError, match="should have the shape"):
        resolve(replace(plan, evidence=short), Budget(density=0.5))
    described: dict[str, Any] = {"search": {"layers": ["transformer.blocks.0.attn1"]}}
    with pytest.raises(ValueError, match="the plan's search is incomplete"):
        resolve(replace(plan, provenance=described), Budget(density=0.5))
