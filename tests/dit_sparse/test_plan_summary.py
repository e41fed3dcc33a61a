"""PlanSummary and its picture: densities head by head, at one grid or another."""

import io
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Band, Columns, Full, Neighborhood, Pattern, Skip
from dit_sparse.kernels.remainder import Drop
from dit_sparse.pipelines.fingerprint import ModelFingerprint
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.schedule import Schedule
from dit_sparse.plan_summary import plan_summary
from dit_sparse.plots import plot_plan
from dit_sparse.search.budget import Budget
from dit_sparse.search.course import Sightings
from dit_sparse.search.evidence import Evidence
from dit_sparse.search.solution import resolve
from dit_sparse.search.space import Space
from dit_sparse.search.timing import Timing
from dit_sparse.tables import choices_table, plan_table

GRID = (3, 4, 4)
COLUMNS = Columns((0, 2), block=8, grid=GRID)
HEADS: dict[str, tuple[Pattern, ...]] = {
    "transformer.blocks.0.attn1": (Full(), Skip()),
    "transformer.blocks.1.attn1": (Band(6), Neighborhood((1, 3, 3))),
    "transformer.blocks.2.attn1": (Full(), COLUMNS),
}
PLAN = Plan(
    {"transformer": ModelFingerprint("WanTransformer3DModel", 3, 2, 12, "0" * 64)},
    HEADS,
    Schedule(2, 1),
    grid=GRID,
    block=8,
    provenance={"predicted": {"error": 0.25}},
)


def test_shares_and_densities() -> None:
    summary = plan_summary(PLAN)
    assert summary.patterns["full"] == pytest.approx(2 / 6)
    assert sum(summary.patterns.values()) == pytest.approx(1)
    first, second, third = summary.layers.values()
    assert [head.density for head in first] == [1.0, 0.0]
    assert third[1].density == pytest.approx(2 / 6)
    assert [head.kind for head in second] == ["band", "neighborhood"]

    # The definition of each pattern counts its pairs.
    every = [pattern for heads in HEADS.values() for pattern in heads]
    kept = [pattern.mask(TokenGrid(*GRID)).double().mean().item() for pattern in every]
    assert summary.density is not None
    assert summary.density["element"] == pytest.approx(sum(kept) / 6)
    blocks = [head.density or 0.0 for row in summary.layers.values() for head in row]
    assert summary.density["block"] == pytest.approx(sum(blocks) / 6)


def test_dictionary_has_the_names_of_the_contract() -> None:
    content = plan_summary(PLAN).to_dict()
    assert {"model", "heads", "patterns", "density", "predicted"} <= set(content)
    assert content["predicted"] == {"error": 0.25}
    assert content["schedule"] == asdict(Schedule(2, 1))


def test_another_grid_gives_other_densities() -> None:
    analytic = {path: (Band(6), Full()) for path in HEADS}
    here, there = (plan_summary(replace(PLAN, assignment=analytic), g) for g in (None, (6, 8, 8)))
    assert here.density is not None
    assert there.density is not None
    assert there.density["element"] < here.density["element"]


def test_grid_that_a_pattern_refuses_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"columns 2/6 refuses the grid"):
        plan_summary(PLAN, (3, 4, 5))


def test_without_a_grid_there_is_no_density() -> None:
    uniform = replace(PLAN, grid=None, assignment=dict.fromkeys(HEADS, (Full(), Full())))
    summary = plan_summary(uniform)
    assert summary.density is None
    assert summary.layers["transformer.blocks.0.attn1"][0].density is None


def test_heat_map_shows_density_as_color(tmp_path: Path) -> None:
    path = tmp_path / "new" / "plan.png"
    plot_plan(plan_summary(PLAN), path)
    with Image.open(path) as image:
        colors = image.convert("RGB").getcolors(1 << 20)
    assert colors is not None
    seen = {color for _, color in colors}
    # The ends of the color map: a full head and a skipped one.
    assert {(253, 231, 36), (68, 1, 84)} <= seen
    assert [entry.name for entry in path.parent.iterdir()] == ["plan.png"]


def searched() -> Plan:
    """A plan with evidence: full, skip and a band for every head, after three dense steps."""
    evidence = Evidence(
        layers=tuple(HEADS),
        space=Space((Full(), Skip(), Band(6)), (), (Drop(),)),
        sightings=Sightings(20, (3,), (0,)),
        schedules=(Schedule(2, 1),),
        grid=TokenGrid(*GRID),
        block=8,
        head_dim=(12, 12, 12),
        copies=2,
        error=torch.tensor([0.0, 1.0, 0.1]).expand(3, 2, 3)[..., None, None]
        * torch.arange(1, 7).reshape(3, 2, 1, 1, 1),
        density=torch.tensor([1.0, 0.0, 0.5]).expand(3, 2, 3).clone(),
        column_mass=torch.ones(3, 2, 6) / 6,
    )
    timing = Timing("a device", 20, 1.0, 0.52, 0.0)
    base = replace(
        PLAN,
        assignment=dict.fromkeys(HEADS, (Full(), Full())),
        provenance={"search": evidence.description()},
        timing={"dense": timing.to_dict()},
    )
    return resolve(replace(base, evidence=evidence.arrays()), Budget(density=0.4))


def test_searched_plan_is_explained_and_its_curve_drawn(tmp_path: Path) -> None:
    summary = plan_summary(searched())
    assert summary.choices is not None
    content = summary.to_dict()["choices"]
    assert set(content["layers"]) == set(HEADS)
    assert content["curve"][-1] == pytest.approx((1.0, 0.0))
    assert content["cost"] == "flops"
    # Two skips and four bands, besides three of 20 steps.
    assert content["point"][0] == pytest.approx(3 / 20 + 17 / 20 * 4 * 0.5 / 6)
    path = tmp_path / "plan.png"
    plot_plan(summary, path)
    with Image.open(path) as image:
        colors = image.convert("RGB").getcolors(1 << 20)
    assert colors is not None
    seen = {color: count for count, color in colors}
    # The line of the curve and the point of the plan.
    assert seen.get((31, 90, 140), 0) > 100
    assert seen.get((228, 87, 46), 0) > 50


def test_tables_say_why_and_how_fast(tmp_path: Path) -> None:
    summary = plan_summary(searched())
    assert summary.choices is not None
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(plan_table(summary))
    console.print(choices_table(summary.choices))
    text = console.export_text()
    assert "attention is 52% of this run; at 0.43 of its FLOPs expect at most" in text
    assert text.count("transformer.blocks.2.attn1 1") == 1
    assert "runner-up: of the others, the least error + " in text


def test_table_says_how_fast_the_plans_were_that_a_search_tried() -> None:
    plan = searched()
    runs = [{"cost": 0.5, "seconds": seconds, "dense_seconds": 12.0} for seconds in (8.0, 10.0)]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(plan_table(plan_summary(replace(plan, timing=plan.timing | {"runs": runs}))))
    assert "each beside a dense run: 1.50x, 1.20x" in console.export_text()


def test_plan_without_evidence_has_no_choices() -> None:
    assert plan_summary(PLAN).to_dict()["choices"] is None


def test_heat_map_needs_a_grid(tmp_path: Path) -> None:
    uniform = replace(PLAN, grid=None, assignment=dict.fromkeys(HEADS, (Full(), Full())))
    with pytest.raises(ValueError, match="give one: --grid"):
        plot_plan(plan_summary(uniform), tmp_path / "plan.png")
