"""What plans cost in quality: searched plans beside the best uniform pattern, on held-out prompts.

    python samples/quality.py search      # once: samples/plans/moving-shapes-d50, -d30, -d20
    python samples/quality.py compare     # samples/quality/comparison.json and table.md
    python samples/quality.py presets     # the same in samples/quality/presets/
    python samples/quality.py caches      # the same in samples/quality/caches/
    python samples/quality.py flops       # the same in samples/quality/flops/, at equal FLOPs
    python samples/quality.py rank        # predicted errors of random plans beside their PSNR
    python samples/quality.py psnr        # budgets of a PSNR, kept on unseen prompts
    python samples/quality.py speedup     # the same of a speed-up
    python samples/quality.py transfer    # a plan at other sizes and numbers of steps
    python samples/quality.py shares      # samples/quality/shares: searches beside attention

One search serves all densities. A uniform plan runs one pattern on every head at every step; of
all candidates and schedules of the search within the FLOPs, those of least total error are taken.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import search_study
from quality_tables import caches_table, presets_table, rank_note, table

import cache_study
import share_study
from dit_sparse.comparison import Comparison, compare, read_comparison, write_comparison
from dit_sparse.environment import environment
from dit_sparse.generate import sample
from dit_sparse.kernels.pattern import Columns
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.transfer import transferred
from dit_sparse.preset_plans import preset_plans
from dit_sparse.prompts import read_prompts
from dit_sparse.runs import model_digest
from dit_sparse.search.budget import Budget
from dit_sparse.search.driver import search_plan
from dit_sparse.search.elasticity import growths
from dit_sparse.search.solution import resolve
from dit_sparse.search.space import KINDS
from dit_sparse.search.timing import Timing, runs_of
from dit_sparse.session import Session, open_session
from dit_sparse.video import replacing

SAMPLES = Path(__file__).parent
MODEL = SAMPLES / "models" / "moving-shapes"
PLANS = SAMPLES / "plans"
RESULTS = SAMPLES / "quality"
DENSITIES = (0.5, 0.3, 0.2)
PRESET_DENSITIES = (0.5, 0.3, 0.2, 0.1)
PRESET_PROMPTS = 1
CACHE_PROMPTS = 1
SPEEDUP_PROMPTS = 4
SPEEDUP = 1.5
FLOPS_PROMPTS = 2
TRANSFER_PROMPTS = 1
TRANSFERRED = 0.3
ELSEWHERE: dict[str, dict[str, int]] = {
    "13x12x20": {"frames": 25, "height": 48, "width": 80},
    "11x20x20": {"frames": 21, "height": 80, "width": 80},
    "30-steps": {"steps": 30},
}
"""Other sizes than the default 15x16x16 tokens and 20 steps."""

BESIDE = {"frames": 21, "height": 48, "width": 48}
"""11x12x12 tokens, of a second search that tells how patterns grow."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    works = {
        "search": search,
        "compare": measure,
        "presets": presets,
        "caches": caches,
        "flops": flops,
        "rank": rank,
        "psnr": psnr,
        "speedup": speedup,
        "transfer": transfer,
        "shares": lambda: shares(given.steps),
    }
    parser.add_argument("what", choices=works)
    parser.add_argument("--steps", type=int, default=20, help="of the generations of shares")
    given = parser.parse_args()
    works[given.what]()


def search() -> None:
    """Search once, write a plan for every density, and what the search cost."""
    session = open_session(MODEL)
    held_out = read_prompts(SAMPLES / "prompts" / "held-out.txt")
    sample(session.pipe, held_out[0], session.settings.seed, session.settings, None)
    dense_peak = _peak()
    start = perf_counter()
    plan = _searched(session, Budget(density=DENSITIES[0]))
    seconds, timing = perf_counter() - start, Timing.of_plan(plan)
    for density in DENSITIES:
        resolve(plan, Budget(density=density)).save_pretrained(PLANS / plan_name(density))
    assert timing is not None
    cost = {
        "prompts": len(_texts("search.txt")),
        "seconds": seconds,
        "dense_seconds": timing.dense_seconds,
        "generations": seconds / timing.dense_seconds,
        "peak_bytes": _peak(),
        "dense_peak_bytes": dense_peak,
        "environment": environment(),
    }
    _write(RESULTS / "search" / "cost.json", cost)


def transfer() -> None:
    """A plan of the default size at other sizes and numbers of steps: as it is, carried over by
    rule and as a search at a second size tells, and searched there."""
    session = open_session(MODEL)
    budget = Budget(flops=TRANSFERRED)
    # Columns list blocks of their own grid.
    kinds = [kind for kind in KINDS if kind != Columns.kind]
    home = _searched(session, budget, candidates=kinds)
    second = replace(session, settings=replace(session.settings, **BESIDE))
    grown = growths(home, _searched(second, budget, candidates=kinds))
    for name, changes in ELSEWHERE.items():
        away = replace(session, settings=replace(session.settings, **changes))
        there = _searched(away, budget, candidates=kinds)
        steps = away.settings.steps
        plans = {
            "as it is": home,
            "carried over": transferred(home, grid=there.grid, steps=steps),
            "searched there": there,
        }
        if there.grid != home.grid:
            beside = transferred(home, grid=there.grid, steps=steps, growths=grown)
            plans["carried over, told by a second search"] = beside
        _compare(away, plans, TRANSFER_PROMPTS, RESULTS / "transfer" / name, table)


def _searched(
    session: Session,
    budget: Budget,
    work: Path | None = None,
    candidates: Collection[str] = KINDS,
    more: str | None = None,
) -> Plan:
    settings = session.settings
    return search_plan(
        session.pipe,
        _texts("search.txt") + ([] if more is None else _texts(more)),
        budget,
        steps=settings.steps,
        height=settings.height,
        width=settings.width,
        frames=settings.frames,
        guidance=settings.guidance,
        candidates=candidates,
        work=work,
        progress=lambda done, total: print(f"\r{done}/{total}", end="", file=sys.stderr),
    )


def measure() -> None:
    """Run the comparison and write its table."""
    plans: dict[str, Plan] = {}
    for density in DENSITIES:
        searched = Plan.from_pretrained(PLANS / plan_name(density))
        plans[f"searched {density:.0%}"] = searched
        uniform = search_study.uniform_plan(searched)
        plans[f"uniform {density:.0%}, {uniform.provenance['uniform']}"] = uniform
    _compare(open_session(MODEL), plans, None, RESULTS, table)


def flops() -> None:
    """Searched plans beside presets and random candidates at equal FLOPs of a whole generation."""
    session = open_session(MODEL)
    plans = search_study.rivals(session.pipe, _searched_plan(), session.settings)
    _compare(
        session,
        plans,
        FLOPS_PROMPTS,
        RESULTS / "flops",
        lambda result: presets_table([result], {}),
    )


def rank() -> None:
    """Predicted errors of random plans against the PSNR of their videos."""
    plans = search_study.random_plans(_searched_plan())
    folder = RESULTS / "rank"
    result = _compare(
        open_session(MODEL), plans, 1, folder, lambda result: rank_note(result, plans)
    )
    _, figure = search_study.rank_correlation(plans, result)
    figure.savefig(folder / "rank.png", dpi=140)


def psnr() -> None:
    """Budgets that name a quality, and what plans keep of it on unseen prompts."""
    session = open_session(MODEL)
    known = read_comparison(RESULTS / "comparison.json")
    measured = {plan.name: round(plan.psnr_rgb.mean, 1) for plan in known.plans}
    plans: dict[str, Plan] = {}
    with tempfile.TemporaryDirectory() as work:
        for name in ("searched 50%", "searched 20%"):
            asked = measured[name]
            plan = _searched(session, Budget(psnr=asked), Path(work), more="psnr.txt")
            held = plan.provenance["achieved"]["psnr"]
            plans[f"psnr={asked:g}, {held:.1f} on the search's prompts"] = plan
    _compare(session, plans, None, RESULTS / "psnr", table)


def speedup() -> None:
    """A budget that names a speed, and what the plan keeps of it on unseen prompts."""
    session = open_session(MODEL)
    plan = _searched(session, Budget(speedup=SPEEDUP))
    tried = ", ".join(f"{run.speedup:.2f}" for run in runs_of(plan))
    plans = {f"speedup={SPEEDUP:g}, tried {tried}": plan}
    _compare(session, plans, SPEEDUP_PROMPTS, RESULTS / "speedup", table)


def presets() -> None:
    """Every published setting, the baselines and combinations, and the searched plans beside them:
    as published, and at common densities of the sparse steps with common dense steps."""
    session, folder = open_session(MODEL), RESULTS / "presets"
    plans, reasons = preset_plans("everything", PRESET_DENSITIES, session.pipe, session.settings)
    parts: dict[str, dict[str, Plan]] = {}
    for name, plan in plans.items():
        parts.setdefault(name.partition("@")[2] or "published", {})[name] = plan
    parts["searched"] = {
        f"searched@{density:g}": Plan.from_pretrained(PLANS / plan_name(density))
        for density in DENSITIES
    }
    parts["static"] = {
        f"searched static+pooled@{density:g}": search_study.static_plan(_searched_plan(), density)
        for density in DENSITIES
    }
    results = [_part(session, own, PRESET_PROMPTS, folder / part) for part, own in parts.items()]
    (folder / "table.md").write_text(presets_table(results, reasons))


def caches() -> None:
    """What caches of remainders cost in FLOPs and bytes, and what they are worth."""
    session = open_session(MODEL)
    plans = cache_study.plans(session.pipe, session.settings)
    _compare(session, plans, CACHE_PROMPTS, RESULTS / "caches", caches_table)


def shares(steps: int) -> None:
    """What searches and remainders take beside the sparse attention, with the bars."""
    session = open_session(MODEL, steps=steps)
    prompt, folder = read_prompts(SAMPLES / "prompts" / "held-out.txt")[0], RESULTS / "shares"
    measured = list(share_study.measure(session, prompt))
    made = environment()
    result = {
        "settings": asdict(replace(session.settings, backend=share_study.BACKEND)),
        "prompt": asdict(prompt),
        "shares": [asdict(share) for share in measured],
        "environment": made,
    }
    _write(folder / "shares.json", result)
    (folder / "table.md").write_text(share_study.table(measured, steps, made))


def _compare(
    session: Session,
    plans: dict[str, Plan],
    prompts: int | None,
    folder: Path,
    table: Callable[[Comparison], str],
) -> Comparison:
    """Run plans on the first held-out prompts, and write what came out and its table."""
    result = _part(session, plans, prompts, folder)
    (folder / "table.md").write_text(table(result))
    return result


def _part(
    session: Session, plans: dict[str, Plan], prompts: int | None, folder: Path
) -> Comparison:
    """What came out for plans on the first held-out prompts; kept if it is there already, of these
    very plans and weights. Remove it to measure again."""
    held_out = tuple(read_prompts(SAMPLES / "prompts" / "held-out.txt")[:prompts])
    if (folder / "comparison.json").exists():
        known = read_comparison(folder / "comparison.json")
        digests = {plan.name: plan.digest for plan in known.plans}
        asked = {name: plan.digest for name, plan in plans.items()}
        same = known.prompts == held_out and known.settings == session.settings
        if digests == asked and same and known.model_digest == model_digest(MODEL):
            return known
    result = compare(
        session.pipe, "samples/models/moving-shapes", held_out, session.settings, plans
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_comparison(folder, result)
    return result


def _searched_plan() -> Plan:
    """A plan of the search, whose evidence any budget is solved from."""
    return Plan.from_pretrained(PLANS / plan_name(DENSITIES[0]))


def _texts(file: str) -> list[str]:
    return [prompt.text for prompt in read_prompts(SAMPLES / "prompts" / file)]


def _peak() -> int:
    """Most memory that the process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _write(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n")


def plan_name(density: float) -> str:
    return f"moving-shapes-d{density * 100:.0f}"


if __name__ == "__main__":
    main()
