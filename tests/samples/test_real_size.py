"""The times of a model of real size, on a small one."""

import json
import sys
from pathlib import Path

import pytest

import real_size


def test_plans_are_timed_beside_dense_and_refusals_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    small = {"num_attention_heads": 2, "ffn_dim": 32, "num_layers": 2, "text_dim": 32}
    monkeypatch.setattr(real_size, "WAN_1_3B", small)
    monkeypatch.setattr(real_size, "TEXT", (16, 32))
    for name, value in (("GRID", (3, 4, 4)), ("FRAMES", 9), ("HEIGHT", 64), ("WIDTH", 64)):
        monkeypatch.setattr(real_size, name, value)
    run = real_size.run

    def refusing(pipe, plan, steps):
        if plan is not None and plan.provenance["preset"] == "sta":
            raise ValueError("no backend")
        return run(pipe, plan, steps)

    monkeypatch.setattr(real_size, "run", refusing)
    out = tmp_path / "new folder" / "found.json"
    command = ["real_size.py", "--presets", "gna,sta", "--steps", "3", "--device", "cpu", "--out"]
    monkeypatch.setattr(sys, "argv", [*command, str(out)])
    real_size.main()
    data = json.loads(out.read_text())
    dense, gna = data["rows"]
    assert (dense["plan"], gna["plan"]) == ("dense", "gna")
    assert gna["speedup"] == dense["seconds"] / gna["seconds"]
    assert 0 < gna["attention_seconds"] < gna["seconds"]
    assert gna["block_density"] == 1  # one block holds all tokens
    assert data["refused"] == {"sta": "no backend"}
    table = out.with_suffix(".md").read_text()
    assert "| gna |" in table
    assert "Refused: sta: no backend." in table
