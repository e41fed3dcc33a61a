"""A search that is killed goes on where it was, to the same plan."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.schedule import Schedule
from dit_sparse.search import fidelity
from dit_sparse.search.budget import Budget
from dit_sparse.search.driver import search_plan
from dit_sparse.search.observer import Sums
from dit_sparse.search.record import Record, Seen
from tests import tiny

PROMPTS = ("a cat", "a dog", "a bird")
SMALL: dict[str, Any] = {
    "steps": 5,
    "height": 64,
    "width": 64,
    "frames": 9,
    "guidance": 5.0,
    "candidates": ("skip", "columns", "scored", "pooled", "complement"),
    "schedules": (Schedule(1, 1), Schedule(1, 1, renew_every=2)),
    "block": 16,
    "rows": 24,
    "anchors": 2,
}
LAST = 4
"""Steps of each prompt's run: the last is not looked at."""


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.wan(layers=1)


Search = Callable[..., Plan]


@pytest.fixture
def search(pipe: Any) -> Search:
    def run(**changes: Any) -> Plan:
        asked: dict[str, Any] = {"prompts": PROMPTS, "budget": Budget(flops=0.5)}
        return search_plan(pipe, **(asked | SMALL | changes))

    return run


@pytest.fixture
def ran(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that the pipeline generates from now on, but for the one of the grid."""
    prompts: list[str] = []
    call = type(pipe).__call__

    def watched(self: Any, *, prompt: str, **arguments: Any) -> Any:
        prompts.extend([prompt] if prompt else [])
        return call(self, prompt=prompt, **arguments)

    monkeypatch.setattr(type(pipe), "__call__", watched)
    return prompts


def killed_at(step: int) -> Callable[[int, int], None]:
    def progress(done: int, _total: int) -> None:
        if done == step:
            raise KeyboardInterrupt

    return progress


def test_a_killed_search_goes_on_to_the_same_plan(
    search: Search, ran: list[str], tmp_path: Path
) -> None:
    unbroken = search()
    ran.clear()
    with pytest.raises(KeyboardInterrupt):
        search(work=tmp_path, progress=killed_at(LAST + 2))
    assert ran == ["a cat", "a dog"]
    ran.clear()
    told: list[tuple[int, int]] = []
    resumed = search(work=tmp_path, progress=lambda *now: told.append(now))
    assert ran == ["a dog", "a bird"]
    assert resumed.digest == unbroken.digest
    assert all(torch.equal(resumed.evidence[k], v) for k, v in unbroken.evidence.items())
    # The times are those of the first prompt, which did not run again.
    assert resumed.timing.keys() == unbroken.timing.keys() == {"dense", "predicted"}
    total = 3 * LAST
    assert told == [(done, total) for done in range(LAST, total + 1)]

    ran.clear()
    finished = search(work=tmp_path)
    assert ran == []
    assert finished.digest == unbroken.digest
    assert finished.timing == resumed.timing
    # Another budget needs nothing more either.
    assert (
        search(work=tmp_path, budget=Budget(flops=0.7)).digest
        == search(budget=Budget(flops=0.7)).digest
    )
    assert ran == list(PROMPTS)


def test_a_prompt_that_was_not_finished_is_seen_again(
    search: Search, ran: list[str], tmp_path: Path
) -> None:
    whole = search(work=tmp_path)
    ran.clear()
    (tmp_path / "0001" / "run.json").unlink()
    (tmp_path / "0001" / "transformer.blocks.0.attn1.safetensors").write_bytes(b"half")
    assert search(work=tmp_path).digest == whole.digest
    assert ran == ["a dog"]
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"rows": 23},
        {"anchors": 1},
        {"metric": "mse"},
        {"through_wo": False},
        {"block": 8},
        {"guidance": 4.0},
        {"candidates": ("skip", "band")},
        {"steps": 6},
        {"prompts": ("a cat", "a dog", "a fish")},
        {"prompts": ("a cat", "a dog")},
        {"budget": Budget(psnr=30)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_search_is_refused(
    search: Search, ran: list[str], changes: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        search(work=tmp_path, progress=killed_at(1))
    ran.clear()
    with pytest.raises(ValueError, match=r"holds what another search has seen .* name another"):
        search(work=tmp_path, **changes)
    assert ran == []


def test_other_sightings_are_refused_though_runs_are_as_long(
    search: Search, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"budget": Budget(psnr=30), "work": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        search(progress=killed_at(1), **asked)
    with pytest.raises(ValueError, match="holds what another search has seen"):
        search(anchors=1, **asked)


def test_another_model_is_refused(search: Search, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        search(work=tmp_path, progress=killed_at(1))
    with pytest.raises(ValueError, match="holds what another search has seen"):
        search_plan(tiny.wan(layers=2), PROMPTS, Budget(flops=0.5), work=tmp_path, **SMALL)


def test_videos_are_kept_for_a_psnr(
    search: Search, ran: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fidelity, "CHECKS", 1)
    asked: dict[str, Any] = {"budget": Budget(psnr=45), "prompts": PROMPTS[:2], "work": tmp_path}
    # The first prompt runs to its end.
    with pytest.raises(KeyboardInterrupt):
        search(progress=killed_at(SMALL["steps"] + 1), **asked)
    ran.clear()
    resumed = search(**asked)
    assert ran == ["a dog", "a cat", "a dog"]
    unbroken = search(**asked | {"work": None})
    assert resumed.provenance["achieved"] == unbroken.provenance["achieved"]
    assert resumed.digest == unbroken.digest


def test_a_search_without_videos_is_not_one_for_a_psnr(
    search: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if both run every prompt to its end."""
    monkeypatch.setattr(fidelity, "CHECKS", 1)
    small: dict[str, Any] = {"schedules": (Schedule(1),), "prompts": PROMPTS[:2], "work": tmp_path}
    search(**small)
    with pytest.raises(ValueError, match="holds what another search has seen"):
        search(budget=Budget(psnr=45), **small)


def sums(layer: int) -> Sums:
    generator = torch.Generator().manual_seed(layer)
    error = torch.rand(2, 5, 3, 2, 2, generator=generator, dtype=torch.double)
    error[0, 1] = torch.inf
    return Sums(error, torch.tensor([[1.0, 0.0], [2.0, 2.0]]), torch.rand(2, 4))


def test_what_is_kept_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    record = Record(tmp_path / "new" / "work", {"steps": 4})
    assert record.load(0) is None
    kept = {f"transformer.blocks.{layer}.attn1": sums(layer) for layer in range(2)}
    video = torch.rand(3, 4, 4, 3)
    record.save(0, Seen(kept, {"branches": 2, "timing": None}, video))
    record.save(1, Seen(kept, {"branches": 1}))
    seen = Record(tmp_path / "new" / "work", {"steps": 4}).load(0)
    assert seen is not None
    assert seen.run == {"branches": 2, "timing": None}
    assert seen.video is not None
    assert torch.equal(seen.video, video)
    assert seen.sums.keys() == kept.keys()
    for layer, own in kept.items():
        for name in ("error", "count", "column_mass"):
            came, expected = getattr(seen.sums[layer], name), getattr(own, name)
            assert came.dtype == expected.dtype
            assert torch.equal(came, expected)
    second = record.load(1)
    assert second is not None
    assert second.video is None
    assert record.load(2) is None


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    record = Record(None, {"steps": 4})
    record.save(0, Seen({"transformer.blocks.0.attn1": sums(0)}, {}))
    assert record.load(0) is None
    assert list(tmp_path.iterdir()) == []


def test_the_folder_tells_the_search_apart_by_a_digest(tmp_path: Path) -> None:
    Record(tmp_path, {"steps": 4, "prompts_sha256": "0" * 64})
    (told,) = json.loads((tmp_path / "search.json").read_text()).items()
    assert told[0] == "settings_sha256"
    assert len(told[1]) == 64
    Record(tmp_path, {"prompts_sha256": "0" * 64, "steps": 4})
    with pytest.raises(ValueError, match=f"{tmp_path} holds what another search has seen"):
        Record(tmp_path, {"steps": 5, "prompts_sha256": "0" * 64})
