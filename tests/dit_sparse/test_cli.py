"""The command line: what goes where, and one clear line for everything a user can mend."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dit_sparse.cli import main
from dit_sparse.pipelines.plan import Plan

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call the command line; returns exit code, standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dit-sparse", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return call


def errors(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("error: ")]


def test_generate_prints_json_and_skips_the_second_time(
    run: Run, model: Path, plans: dict[str, Path], tmp_path: Path
) -> None:
    command = ("generate", "--model", model, "--prompt", "a cat", "--plan", plans["band"])
    command += ("--out", tmp_path, "--json")
    code, out, _ = run(*command)
    (made,) = json.loads(out)["runs"]
    assert (code, made["state"]) == (0, "made")
    settings = json.loads((Path(made["folder"]) / "run.json").read_text())["request"]["settings"]
    assert (settings["height"], settings["frames"], settings["steps"]) == (64, 9, 3)
    code, out, _ = run(*command)
    assert (code, json.loads(out)["runs"][0]["state"]) == (0, "skipped")


def test_compare_prints_a_table_and_does_not_overwrite(
    run: Run, model: Path, plans: dict[str, Path], tmp_path: Path
) -> None:
    command = ("compare", "--model", model, "--prompt", "a cat", "--plan", plans["band"])
    command += ("--out", tmp_path, "--steps", 2, "--frames", 5)
    code, out, _ = run(*command)
    assert code == 0
    assert "band" in out
    assert "PSNR dB" in out
    before = (tmp_path / "comparison.json").read_bytes()
    assert sorted(path.name for path in (tmp_path / "0001").iterdir()) == [
        "band.mp4",
        "dense.mp4",
        "side-by-side.mp4",
    ]
    code, _, err = run(*command)
    assert code == 1
    assert "comparison.json is there already" in err
    assert (tmp_path / "comparison.json").read_bytes() == before


def test_search_writes_a_plan_that_show_draws_and_from_solves_again(
    run: Run, model: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    found = tmp_path / "found"
    code, out, err = run(
        "search", "--model", model, "--prompts", prompts, "--budget", "density=0.6",
        "--block", 8, "--dense-first", 1, "--out", found, "--json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["predicted"]["density"] <= 0.6
    assert Plan.from_pretrained(found).schedule.dense_first == 1
    assert not (found / "search").exists()

    picture = tmp_path / "plan.png"
    code, out, _ = run("show", found, "--figure", picture)
    assert code == 0
    assert "transformer.blocks.1.attn1" in out
    assert picture.is_file()

    assert "runner-up" in out
    assert "attention is " in out
    code, out, _ = run("show", found, "--figure", picture, "--json")
    explained = json.loads(out)["choices"]
    first = explained["layers"]["transformer.blocks.0.attn1"][0]
    assert set(first) == {"winner", "runner_up", "full"}
    assert explained["note"].startswith("attention is ")

    again = tmp_path / "again"
    code, out, err = run(
        "search", "--from", found, "--budget", "density=0.3", "--out", again, "--json"
    )
    assert code == 0, err
    assert json.loads(out)["predicted"]["density"] <= 0.3

    dense = tmp_path / "dense"
    for budget, reason in (("psnr=30", "needs the model"), ("speedup=50", "is out of reach")):
        code, _, err = run("search", "--from", found, "--budget", budget, "--out", dense)
        assert code == 1
        assert reason in errors(err)[0]
        assert not dense.exists()
    code, out, err = run("search", "--from", found, "--budget", "error=0", "--out", dense)
    assert code == 0, err
    assert "full 100%" in out


def test_search_tries_what_it_is_told_to_and_transfer_carries_it_over(
    run: Run, model: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    found, carried = tmp_path / "found", tmp_path / "carried"
    command = (
        "search", "--model", model, "--prompts", prompts, "--budget", "flops=0.6,cache_bytes=0",
        "--block", 8, "--out", found, "--json",
    )  # fmt: skip
    code, out, err = run(*command, "--candidates", "band, skip")
    assert code == 0, err
    summary = json.loads(out)
    assert set(summary["patterns"]) <= {"full", "skip", "band"}
    assert summary["remainders"] == {"drop": 1.0}
    assert summary["predicted"]["flops"] <= 0.6
    code, _, err = run(*command, "--overwrite", "--candidates", "stripes")
    assert code == 1
    assert "expected a list of names of full, skip, band" in errors(err)[0]

    code, out, err = run("transfer", found, "--grid", "3x8x8", "--out", carried, "--json")
    assert code == 0, err
    assert Plan.from_pretrained(carried).grid == (3, 8, 8)
    told = [line for line in err.splitlines() if line.endswith(" heads")]
    assert len(told) == ("band" in summary["patterns"])
    assert all(line.startswith("usual: ") for line in told)
    code, _, err = run("transfer", found, "--out", carried)
    assert code == 2
    assert "give --grid" in err


def test_transfer_tells_how_heads_grow_by_a_plan_beside(
    run: Run, model: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    found, beside, carried = tmp_path / "found", tmp_path / "beside", tmp_path / "carried"
    for out, frames, width in ((found, 5, 64), (beside, 9, 96)):
        code, _, err = run(
            "search", "--model", model, "--prompts", prompts, "--budget", "flops=0.8",
            "--block", 8, "--candidates", "band", "--frames", frames, "--width", width,
            "--out", out,
        )  # fmt: skip
        assert code == 0, err
    bands = Plan.from_pretrained(found).heads
    heads = sum(share for (pattern, _), share in bands.items() if pattern.kind == "band")
    assert heads > 0

    command = ("transfer", found, "--out", carried, "--beside")
    code, _, err = run(*command, beside, "--grid", "5x8x8")
    assert code == 0, err
    growth = Plan.from_pretrained(carried).provenance["growth"]
    assert sum(growth.values()) == pytest.approx(heads)
    assert "usual" not in growth
    for name, count in growth.items():
        assert f"{name}: {count:.4g} heads" in err.splitlines()

    code, _, err = run(*command, found, "--grid", "5x8x8", "--overwrite")
    assert code == 1
    assert "both plans were searched on grid" in errors(err)[0]
    code, _, err = run(*command, carried, "--grid", "5x8x8", "--overwrite")
    assert code == 1
    assert "the plan beside it carries no evidence" in errors(err)[0]
    code, _, err = run(*command, beside, "--steps", 9, "--overwrite")
    assert code == 2
    assert "--beside is about patterns on another grid" in err


def test_demo_leaves_its_files(
    run: Run, model: Path, plans: dict[str, Path], tmp_path: Path
) -> None:
    code, out, err = run(
        "demo", "--model", model, "--plan", plans["band"], "--out", tmp_path, "--json"
    )
    assert code == 0, err
    assert json.loads(out)["plans"][0]["name"] == "sparse"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "comparison.json",
        "dense.mp4",
        "side-by-side.mp4",
        "sparse.mp4",
    ]


def test_env_is_one_json_object(run: Run) -> None:
    code, out, _ = run("env", "--json")
    assert code == 0
    assert {"machine", "packages", "backends"} <= set(json.loads(out))


def test_env_is_a_block_to_paste(run: Run) -> None:
    code, out, _ = run("env")
    assert code == 0
    assert "torch" in out
    assert "reference" in out


def corrupted(plan: Path, folder: Path, change: Callable[[str], str]) -> Path:
    folder.mkdir()
    for path in plan.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    file = folder / "plan.json"
    file.write_text(change(file.read_text()))
    return folder


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--plan", "{other}", "the plan is for another model"),
        ("--plan", "{edited}", "plan.json"),
        ("--plan", "{torn}", "plan.json"),
        ("--plan", "{newer}", "version"),
        ("--plan", "{nowhere}", "nowhere"),
        ("--frames", "10", "10 frames: the model makes 4 k + 1 frames; use 9 or 13"),
        ("--height", "70", "height 70: the model makes multiples of 16 pixels; use 64 or 80"),
        ("--prompts", "{broken}", "broken.jsonl:2: prompt: Field required"),
        ("--prompts", "{escaping}", "escaping.jsonl:1: id '../x' cannot name a folder"),
        ("--prompts", "{nowhere}", "nowhere"),
        ("--out", "{file}/out", "cannot write to"),
        ("--model", "{nowhere}", "nowhere"),
        ("--model", "{empty}", "model_index.json"),
        ("--dtype", "int7", "dtype 'int7' is unknown"),
        ("--dtype", "float16", "float16 is unusable on a CPU"),
        ("--device", "warp", "device 'warp' is unknown"),
        ("--backend", "magic", "unknown backend 'magic'"),
    ],
    ids=lambda value: value[:20],
)
@pytest.mark.parametrize("command", ["generate", "compare"])
def test_bad_input_is_one_line_and_writes_nothing(
    run: Run,
    model: Path,
    plans: dict[str, Path],
    tmp_path: Path,
    command: str,
    option: str,
    value: str,
    message: str,
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"id": "x"}\n')
    (tmp_path / "escaping.jsonl").write_text('{"prompt": "a", "id": "../x"}\n')
    band = plans["band"]
    places = {
        "other": plans["other"],
        "edited": corrupted(band, tmp_path / "edited", lambda t: t.replace("6", "7")),
        "torn": corrupted(band, tmp_path / "torn", lambda t: t[: len(t) // 2]),
        "newer": corrupted(
            band, tmp_path / "newer", lambda t: t.replace('"version": 1', '"version": 2')
        ),
        "nowhere": tmp_path / "nowhere",
        "broken": tmp_path / "broken.jsonl",
        "escaping": tmp_path / "escaping.jsonl",
        "file": tmp_path / "file",
        "empty": empty,
    }
    options = {"--model": model, "--plan": band, "--out": tmp_path / "out", "--prompt": "a"}
    options[option] = value.format(**places)
    if "--prompts" in options:
        del options["--prompt"]
    code, out, err = run(command, *(part for pair in options.items() for part in pair))
    assert code == 1
    (line,) = errors(err)
    assert message in line
    assert out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--out", "x", "--prompt", "a"],
        ["generate", "--model", "m", "--out", "x"],
        ["generate", "--model", "m", "--out", "x", "--prompt", "a", "--prompts", "f"],
        ["generate", "--model", "m", "--out", "x", "--prompt", "a", "--steps", "0"],
        ["search", "--budget", "density=0.3", "--out", "x"],
        ["search", "--budget", "density=0.3", "--out", "x", "--from", "p", "--model", "m"],
        ["show", "{plan}", "--grid", "15x16"],
        ["show"],
        ["show", "{plan}", "--pattern", "full"],
        ["show", "--pattern", "full", "--grid", "0x8x8"],
        ["simulate", "--grid", "4x4x4"],
        ["simulate", "--window", "3x3x3"],
        ["simulate", "--grid", "4x4x4", "--window", "3x3"],
        ["simulate", "--grid", "4x4x4", "--window", "3x3x3", "--pattern", "full"],
        ["simulate", "--grid", "4x4x4", "--pattern", "full", "--stride", "1x1x1"],
        ["simulate", "--plan", "{plan}", "--q-tile", "4x4x4"],
        ["frobnicate"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_two(
    run: Run, plans: dict[str, Path], tmp_path: Path, arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*(part.format(plan=plans["band"]) for part in arguments))
    assert code == 2
    assert err
    assert out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "budget",
    ["density=0", "density=1.5", "density", "speed=3", "density=x", "speedup=0.5", "psnr=0"],
)
def test_bad_budget_is_one_line(run: Run, tmp_path: Path, budget: str) -> None:
    out = tmp_path / "out"
    code, _, err = run("search", "--model", "m", "--budget", budget, "--out", out)
    assert code == 1
    assert len(errors(err)) == 1
    assert not out.exists()


def test_demo_without_samples_says_what_to_do(run: Run, tmp_path: Path) -> None:
    code, _, err = run("demo", "--model", tmp_path / "none", "--out", tmp_path / "out")
    assert code == 1
    assert "give --model DIR" in err
    assert not (tmp_path / "out").exists()


def test_simulate_prints_the_published_bound(run: Run) -> None:
    window = ("--grid", "30x48x80", "--window", "18x24x24")
    tiles = ("--q-tile", "4x8x8", "--kv-tile", "2x8x8", "--json")
    code, out, _ = run("simulate", *window, "--stride", "16x8x8", "--dilation", "1x1x1", *tiles)
    found = json.loads(out)
    assert code == 0
    assert set(found) == {"visited", "total", "bound", "mean_bound", "perfect"}
    assert (found["visited"], found["total"], found["perfect"]) == (81, 900, True)

    code, out, _ = run("simulate", *window, *tiles)
    rows = json.loads(out)["strides"]
    assert code == 0
    assert (rows[0]["stride"], rows[0]["visited"]) == ([1, 1, 1], 275)
    assert (rows[-1]["stride"], rows[-1]["visited"]) == ([16, 8, 8], 81)


def test_simulate_takes_any_pattern_and_a_plan(run: Run, plans: dict[str, Path]) -> None:
    code, out, _ = run("simulate", "--grid", "4x8x8", "--pattern", "band:half_width=8 + sink")
    assert code == 0
    assert "bound" in out
    code, out, _ = run("simulate", "--grid", "4x8x8", "--pattern", "skip", "--json")
    assert json.loads(out)["bound"] is None

    code, out, _ = run("simulate", "--plan", plans["band"], "--json")
    found = json.loads(out)
    assert code == 0
    assert found["heads"] == sum(row["heads"] for row in found["patterns"])
    assert found["bound"] <= found["mean_bound"]
    code, out, _ = run("simulate", "--plan", plans["band"], "--grid", "6x8x8")
    assert code == 0
    assert "band 6 raster" in out
    code, _, err = run("simulate", "--plan", plans["full"])
    assert code == 1
    assert "give one: --grid" in errors(err)[0]


def test_show_draws_a_pattern(run: Run, tmp_path: Path) -> None:
    picture = tmp_path / "new" / "pattern.png"
    text = "neighborhood:window=3x3x3,stride=1x2x2 + sink"
    code, out, _ = run(
        "show", "--pattern", text, "--grid", "3x5x4", "--out", picture, "--json"
    )  # fmt: skip
    found = json.loads(out)
    assert code == 0
    assert found["figure"] == str(picture)
    assert found["pattern"]["kind"] == "any_of"
    assert found["density"]["element"] <= found["density"]["block"]
    assert picture.is_file()
    code, _, err = run("show", "--pattern", "full", "--grid", "30x48x80", "--out", picture)
    assert code == 1
    assert "at most 2500 tokens" in errors(err)[0]
    code, _, err = run("show", "--pattern", "band:half_width=x", "--out", picture)
    assert code == 1
    assert "half_width of pattern 'band' must be an integer, got 'x'" in errors(err)[0]
