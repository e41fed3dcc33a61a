"""A tiny random model and plans for it, as folders, made once."""

import json
from pathlib import Path

import pytest

from dit_sparse.kernels.pattern import Band, Full, Neighborhood
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.schedule import Schedule
from tests import tiny

GENERATION = {"height": 64, "width": 64, "frames": 9, "steps": 3, "guidance": 4.0}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved WanPipeline of two layers; its default grid is 3x4x4 tokens."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.wan().save_pretrained(folder)
    (folder / "generation.json").write_text(json.dumps(GENERATION))
    return folder


@pytest.fixture(scope="session")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`band`: sparse after one dense step. `full`: dense throughout. `other`: another model's."""
    folder = tmp_path_factory.mktemp("plans")
    pipe = tiny.wan()
    first = Schedule(dense_first=1)
    made = {
        "band": Plan.uniform(pipe, Band(6), first, grid=(3, 4, 4), block=8),
        "full": Plan.uniform(pipe, Full(), block=8),
        "other": Plan.uniform(tiny.wan(layers=1), Neighborhood((1, 3, 3)), block=8),
    }
    for name, plan in made.items():
        plan.save_pretrained(folder / name)
    return {name: folder / name for name in made}
