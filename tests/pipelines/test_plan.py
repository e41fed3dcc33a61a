import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Band, Columns, Full, Neighborhood, Pattern, Skip
from dit_sparse.kernels.remainder import Complement, Drop, Remainder
from dit_sparse.pipelines import plan_file
from dit_sparse.pipelines.fingerprint import ModelFingerprint, fingerprints
from dit_sparse.pipelines.phase import Phase
from dit_sparse.pipelines.plan import Plan, layer_paths
from dit_sparse.pipelines.schedule import Schedule
from tests import tiny

GRID = TokenGrid(3, 4, 4)
PATTERNS: tuple[Pattern, ...] = (
    Full(),
    Skip(),
    Band(7, "pixel_major"),
    Columns((0, 2), 16, (3, 4, 4)),
    Neighborhood((3, 3, 3), stride=(1, 3, 1), dilation=(1, 1, 2)),
)
MODEL = {"transformer": ModelFingerprint("WanTransformer3DModel", 2, 5, 12, "c0ffee")}


@pytest.fixture
def plan() -> Plan:
    return Plan(
        MODEL,
        {"transformer.blocks.0.attn1": PATTERNS, "transformer.blocks.1.attn1": PATTERNS[::-1]},
        Schedule(2, 1),
        grid=GRID.shape,
        block=16,
        provenance={"prompts": ["a cat"], "error": 0.125},
        evidence={"error": torch.rand(2, 5), "cost": torch.rand(5, dtype=torch.bfloat16)},
    )


@pytest.fixture
def saved(plan: Plan, tmp_path: Path) -> Path:
    plan.save_pretrained(tmp_path / "plans" / "one")
    return tmp_path / "plans" / "one"


def edit(folder: Path, **changes: Any) -> None:
    """Change a plan file as a text editor would, keeping its digest."""
    path = folder / "plan.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def forge(folder: Path, **changes: Any) -> None:
    """Change a plan file and make its digest right again."""
    path = folder / "plan.json"
    document = json.loads(path.read_text()) | changes
    del document["digest"]
    _, evidence = plan_file.read(folder)
    path.write_text(json.dumps(document | {"digest": plan_file.digest(document, evidence)}))


def test_G12_a_loaded_plan_is_the_saved_one(plan: Plan, saved: Path) -> None:
    loaded = Plan.from_pretrained(saved)
    assert loaded.digest == plan.digest
    for field in dataclasses.fields(Plan):
        if field.name != "evidence":
            assert getattr(loaded, field.name) == getattr(plan, field.name), field.name
    assert loaded.evidence.keys() == plan.evidence.keys()
    for name, array in plan.evidence.items():
        assert loaded.evidence[name].dtype == array.dtype
        assert torch.equal(loaded.evidence[name], array)


@pytest.fixture
def phased(plan: Plan) -> Plan:
    """Other patterns from a third of the steps on, some with remainders."""
    turned = dict(zip(plan.assignment, list(plan.assignment.values())[::-1], strict=True))
    remainders: dict[str, tuple[Remainder, ...]] = {
        "transformer.blocks.1.attn1": (Complement(),) * 5
    }
    return dataclasses.replace(
        plan, later=(Phase(turned, remainders),), schedule=Schedule(2, 1, phases=(0.35,))
    )


def test_G12_phases_travel_with_the_plan(plan: Plan, phased: Plan, tmp_path: Path) -> None:
    phased.save_pretrained(tmp_path)
    loaded = Plan.from_pretrained(tmp_path)
    assert loaded.later == phased.later
    assert loaded.schedule == phased.schedule
    assert loaded.digest == phased.digest != plan.digest
    assert loaded.phases[0] == Phase(plan.assignment, plan.remainders)
    text = (tmp_path / "plan.json").read_text()
    assert text.count("\n") > 20
    assert max(map(len, text.splitlines())) < 200
    # A plan without phases is written as it was before there were any.
    plan.save_pretrained(tmp_path)
    document = json.loads((tmp_path / "plan.json").read_text())
    assert "later" not in document
    assert "phases" not in document["schedule"]


def test_a_plan_keeps_what_its_largest_phase_keeps(phased: Plan) -> None:
    caches = phased.phases[1].kept_bytes(phased.model, GRID, 1, again=False, limited=False)
    assert caches == (5 * 48 * (12 * 2 + 4), 0)
    assert phased.cache_bytes(GRID) == caches[0]
    assert dataclasses.replace(phased, cache_limit=100).cache_bytes(GRID) == 100
    assert phased.renews
    assert not Plan(MODEL, phased.assignment).renews


def test_phases_count_as_their_share_of_the_steps(phased: Plan) -> None:
    # Every pattern stands in both layers of both phases; half of the later ones have caches.
    assert phased.heads[Band(7, "pixel_major"), Drop()] == pytest.approx(2 * 0.35 + 0.65)
    assert phased.heads[Band(7, "pixel_major"), Complement()] == pytest.approx(0.65)
    assert sum(phased.heads.values()) == pytest.approx(10)


def test_phases_that_do_not_fit_are_refused(plan: Plan, phased: Plan) -> None:
    def later(**changes: Any) -> Plan:
        return dataclasses.replace(phased, **changes)

    with pytest.raises(ValueError, match=r"later: .* each of 1 further phases .*, came 0"):
        later(later=())
    with pytest.raises(ValueError, match=r"later: .* each of 0 further phases .*, came 1"):
        later(schedule=plan.schedule)
    moved = {
        path.replace("blocks.1", "blocks.2"): heads for path, heads in plan.assignment.items()
    }
    with pytest.raises(ValueError, match=r"later: layer transformer.blocks.1.attn1 is not in eve"):
        later(later=(Phase(moved),))
    short = {path: heads[:4] for path, heads in plan.assignment.items()}
    with pytest.raises(ValueError, match=r"expected one pattern for each of 5 heads, came 4"):
        later(later=(Phase(short),))


def test_G12_a_loaded_plan_has_the_same_masks(plan: Plan, saved: Path) -> None:
    loaded = Plan.from_pretrained(str(saved))
    for layer, patterns in plan.assignment.items():
        for mine, theirs in zip(patterns, loaded.assignment[layer], strict=True):
            assert torch.equal(mine.mask(GRID), theirs.mask(GRID))


@pytest.mark.parametrize(
    "changes",
    [
        {"block": 32},
        {"schedule": dataclasses.asdict(Schedule(0, 1))},
        {"assignment": {"transformer.blocks.0.attn1": [0] * 5}},
        {"provenance": {}},
        {"digest": "0" * 64},
        {"digest": None},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_G12_the_digest_detects_an_edit(saved: Path, changes: dict[str, Any]) -> None:
    edit(saved, **changes)
    with pytest.raises(ValueError, match="the digest does not match"):
        Plan.from_pretrained(saved)


def test_G12_the_digest_detects_changed_evidence(plan: Plan, saved: Path) -> None:
    changed = {name: array + 1 for name, array in plan.evidence.items()}
    save_file(changed, saved / "evidence.safetensors")
    with pytest.raises(ValueError, match="the digest does not match"):
        Plan.from_pretrained(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 2, this dit_sparse reads version 1; upgrade dit_sparse"),
        ({"format": "another"}, "this is not a plan"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"block": 0}, "block: Input should be greater than 0"),
        ({"grid": [3, 4]}, "grid.2: Field required"),
        ({"patterns": [{"kind": "spiral"}] * 5}, "unknown pattern kind 'spiral'"),
        ({"patterns": [{"kind": "full"}]}, "a pattern beyond the table of 1"),
        (
            {"assignment": {"transformer.blocks.0.attn1": [0, 1]}},
            "expected one pattern for each of 5 heads, came 2",
        ),
        ({"assignment": {"transformer.blocks.0.attn1": [0] * 5}}, "expected 2 layers, came 1"),
        ({"assignment": {"unet.attn1": [0] * 5}}, "starts with a component of the model"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_G12_a_wrong_plan_is_refused_in_one_line(
    saved: Path, changes: dict[str, Any], message: str
) -> None:
    forge(saved, **changes)
    with pytest.raises(ValueError, match=message) as raised:
        Plan.from_pretrained(saved)
    assert "\n" not in str(raised.value)
    assert str(saved) in str(raised.value)


def test_a_plan_without_its_evidence_is_refused(saved: Path) -> None:
    (saved / "evidence.safetensors").unlink()
    with pytest.raises(ValueError, match=r"evidence\.safetensors: expected the arrays"):
        Plan.from_pretrained(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", '"plan"', "\xff"])
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"plan\.json: expected"):
        Plan.from_pretrained(tmp_path)


def test_a_missing_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected the JSON file of a plan"):
        Plan.from_pretrained(tmp_path / "nothing")
    with pytest.raises(ValueError, match="there is no such folder, and the Hub has no") as raised:
        Plan.from_pretrained("nobody/nothing")
    assert "\n" not in str(raised.value)


def test_a_plan_without_a_stagger_is_written_as_before_there_was_one(
    plan: Plan, saved: Path
) -> None:
    assert "stagger" not in (saved / "plan.json").read_text()
    again = Plan.from_pretrained(saved)
    assert not again.schedule.stagger
    assert again.digest == json.loads((saved / "plan.json").read_text())["digest"]
    in_turn = dataclasses.replace(
        plan, schedule=dataclasses.replace(plan.schedule, renew_every=2, stagger=True)
    )
    together = dataclasses.replace(
        plan, schedule=dataclasses.replace(plan.schedule, renew_every=2)
    )
    assert in_turn.digest != together.digest


def test_a_failed_save_leaves_the_old_plan(
    plan: Plan, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(plan_file, "save_file", fail)
    changed = dataclasses.replace(plan, block=32)
    with pytest.raises(OSError, match="disk full"):
        changed.save_pretrained(saved)
    with pytest.raises(OSError, match="disk full"):
        changed.save_pretrained(saved.parent / "two")
    assert Plan.from_pretrained(saved).digest == plan.digest
    assert [path.name for path in saved.parent.iterdir()] == ["one"]


def test_saving_replaces_a_plan_and_keeps_other_files(plan: Plan, saved: Path) -> None:
    (saved / "README.md").write_text("my plan")
    bare = dataclasses.replace(plan, evidence={})
    bare.save_pretrained(saved)
    assert {path.name for path in saved.iterdir()} == {"README.md", "plan.json"}
    assert Plan.from_pretrained(saved).digest == bare.digest != plan.digest


def test_a_plan_file_has_a_line_for_each_layer_and_pattern(plan: Plan, saved: Path) -> None:
    lines = (saved / "plan.json").read_text().splitlines()
    assert '    "transformer.blocks.1.attn1": [4, 3, 2, 1, 0]' in lines
    assert '    {"kind": "full"},' in lines


def test_a_plan_goes_to_the_hub_as_a_folder(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded = []

    class Hub:
        def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> Any:
            return type("Url", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, repo_id: str, folder_path: str) -> str:
            uploaded.append((repo_id, Plan.from_pretrained(folder_path).digest))
            return "https://hub/commit"

    monkeypatch.setattr("dit_sparse.pipelines.plan.HfApi", Hub)
    assert plan.push_to_hub("wan-plan") == "https://hub/commit"
    assert uploaded == [("me/wan-plan", plan.digest)]


def test_G12_a_plan_for_another_model_is_refused() -> None:
    pipe = tiny.wan(layers=2)
    plan = Plan.uniform(pipe, Full())
    plan.check(pipe)
    plan.check(pipe.transformer)
    with pytest.raises(ValueError, match=r"transformer\.layers is 2 in the plan and 3"):
        plan.check(tiny.wan_transformer(layers=3))
    with pytest.raises(ValueError, match=r"transformer\.heads is 2 in the plan and 4"):
        plan.check(tiny.wan_transformer(heads=4))
    with pytest.raises(ValueError, match=r"transformer\.transformer is WanTransformer3DModel"):
        plan.check(tiny.cogvideox_transformer())
    with pytest.raises(ValueError, match=r"the pipeline has transformer, transformer_2"):
        plan.check(tiny.wan(two_stage=True))
    renamed = dataclasses.replace(
        plan, assignment={path + "_": heads for path, heads in plan.assignment.items()}
    )
    with pytest.raises(ValueError, match="which is no self-attention layer of the model"):
        renamed.check(pipe)


def test_a_uniform_plan_covers_every_layer_and_head() -> None:
    pipe = tiny.wan(layers=3, heads=2, two_stage=True)
    plan = Plan.uniform(pipe, Band(5), Schedule(1), grid=(3, 4, 4), block=16)
    assert plan.model == fingerprints(pipe)
    assert list(plan.assignment) == list(layer_paths(pipe))
    assert len(plan.assignment) == 6
    assert set(plan.assignment.values()) == {(Band(5), Band(5))}
    assert (plan.schedule, plan.grid, plan.block) == (Schedule(1, 0), (3, 4, 4), 16)


def test_provenance_must_be_json(plan: Plan) -> None:
    with pytest.raises(ValueError, match="provenance: expected a JSON object"):
        dataclasses.replace(plan, provenance={"error": float("nan")})
