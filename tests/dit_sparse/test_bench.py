"""The bench: complete rows whose figures agree, and a command that says clearly what is wrong."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse import bench as module
from dit_sparse import bench_command, measurement
from dit_sparse.bench import MassRow, Row, bench, calibrate
from dit_sparse.bench_command import bench_page, page_of
from dit_sparse.cli import main
from dit_sparse.kernels import gather
from dit_sparse.kernels.backend import Backend, choose
from dit_sparse.kernels.calibration import calibration_for, path_of, read
from dit_sparse.kernels.call import AttentionCall
from dit_sparse.kernels.stage import STAGES
from dit_sparse.tables import bench_table
from dit_sparse.workload import PRESETS, Workload, grid_of_tokens

PAGES = Path(__file__).parents[2] / "kernels" / "bench"
ROW = {
    "backend", "device", "dtype", "head_dim", "tokens", "block", "density", "speedup",
    "fraction_of_ideal", "sparsity_efficiency", "gflops", "gemm_gflops", "peak_gflops",
    "max_error",
}  # fmt: skip
SMALL = ("--tokens", 96, "--head-dim", 16, "--block", 16, "--repeats", 1)
Run = Callable[..., tuple[int, str, str]]


def wrong(call: AttentionCall) -> tuple[Tensor, Tensor]:
    output, lse = gather.run(call)
    return 1.01 * output, lse


def no_text(call: AttentionCall) -> str | None:
    return "takes tables of blocks" if call.blocks.patterns else None


TABLE = (
    Backend("busy", lambda call: "is busy", wrong),
    Backend("choosy", no_text, gather.run),
    Backend("gather", gather.supports, gather.run),
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of our own, and a GEMM and a peak that take no time."""
    monkeypatch.setattr(module.native, "peak", lambda dtype: 6e9)
    monkeypatch.setattr(measurement, "BACKENDS", TABLE)
    monkeypatch.setattr(module, "_GEMM_SIDE", {"cpu": 32})


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call the command line; returns exit code, standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dit-sparse", "bench", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return call


def workload(**change: Any) -> Workload:
    return Workload(
        **{"grid": grid_of_tokens(96), "head_dim": 16, "block": 16, "density": 0.5} | change
    )


def test_figures_agree_by_their_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {("dense", "SDPA"): 8.0, ("dense", "GEMM"): 0.5}
    seconds |= {("gather", "sparse"): 5.0, ("gather", "full"): 9.0, ("choosy", "sparse"): 2.0}
    seconds |= {("choosy", "full"): 6.0, ("dense", "peak"): 1.5}
    seconds |= {("mass", 16): 0.25, ("mass", None): 4.0}

    def timed(jobs: dict[tuple[str, Any], Callable[[], object]], *_: object) -> dict:
        for job in jobs.values():
            job()
        return {name: seconds[name] for name in jobs}

    monkeypatch.setattr(module, "interleaved", timed)
    choosy, plain = bench([workload()]).rows
    assert (choosy.backend, plain.backend) == ("choosy", "gather")
    assert (plain.seconds, plain.dense_seconds, plain.density) == (5.0, 8.0, 0.5)
    assert plain.speedup == pytest.approx(8 / 5)
    assert plain.fraction_of_ideal == pytest.approx(8 / 5 * 0.5)
    assert plain.sparsity_efficiency == pytest.approx(9 / 5 * 0.5)
    assert plain.gflops == pytest.approx(4 * 16 * 0.5 * 96**2 * 2 / 5 / 1e9)
    assert plain.gemm_gflops == pytest.approx(2 * 32**3 / 0.5 / 1e9)
    assert plain.peak_gflops == pytest.approx(4)
    assert choosy.speedup == 4
    assert 0 < plain.max_error < 2e-5


def test_masses_are_weighed_once_for_all_that_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {("mass", 16): 0.25, ("mass", None): 4.0}

    def timed(jobs: dict[tuple[str, Any], Callable[[], object]], *_: object) -> dict:
        return {name: seconds.get(name, 8.0) for name in jobs}

    monkeypatch.setattr(module, "interleaved", timed)
    patterns = ({"density": 0.5}, {"density": 1.0}, {"pattern": "band"}, {"block": 32})
    found = bench([workload(**change) for change in patterns]).masses
    assert [(mass.block, mass.rows) for mass in found] == [
        (16, 16), (16, None), (32, 16), (32, None)
    ]  # fmt: skip
    sample, every = found[2:]
    assert (sample.share_of_dense, every.share_of_dense) == (0.25 / 8, 0.5)
    # Of two heads, blocks of 32 queries and, of each, 16 or all.
    assert sample.gflops == pytest.approx(2 * 16 * 3 * 16 * 96 * 2 / 0.25 / 1e9)
    assert every.gflops == pytest.approx(2 * 16 * 96 * 96 * 2 / 4 / 1e9)
    assert all(0 < mass.max_error < 1e-4 for mass in found)


def test_without_a_library_there_is_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.native, "peak", lambda dtype: None)
    assert all(row.peak_gflops is None for row in bench([workload()], repeats=1).rows)


@pytest.mark.parametrize("pattern", ["blocks", "neighborhood", "band"])
def test_rows_are_complete(pattern: str) -> None:
    asked = workload(pattern=pattern, density=0.25)
    found = bench([asked], repeats=1)
    names = [row.backend for row in found.rows]
    assert names == (["choosy", "gather"] if pattern == "blocks" else ["gather"])
    assert {refusal["backend"] for refusal in found.refusals} == {
        backend.name for backend in TABLE
    } - set(names)
    for row in found.rows:
        assert row.density == asked.blocks().density().block
        assert row.speedup * row.density == pytest.approx(row.fraction_of_ideal)
        assert row.dense_seconds / row.seconds == pytest.approx(row.speedup)
        assert row.sparsity_efficiency is not None


def test_the_command_prints_and_writes_one_json_object(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "results" / "bench.json"
    command = (*SMALL, "--device", "cpu", "--dtype", "float32", "--dtype", "bfloat16")
    command += ("--density", 0.25, "--density", 1, "--backend", "gather", "--json", "--out", out)
    code, printed, err = run(*command)
    assert code == 0, err
    data = json.loads(printed)
    assert data == json.loads(out.read_text())
    assert [(row["dtype"], row["density"]) for row in data["rows"]] == [
        (dtype, density) for dtype in ("float32", "bfloat16") for density in (1 / 3, 1.0)
    ]
    assert all(row.keys() >= ROW for row in data["rows"])
    assert [(mass["dtype"], mass["rows"]) for mass in data["masses"]] == [
        ("float32", 16), ("float32", None), ("bfloat16", 16), ("bfloat16", None)
    ]  # fmt: skip
    assert data["environment"]["packages"]["torch"]
    assert data["protocol"]["timing"] == "interleaved in one process, median of 1 rounds"
    assert out.with_suffix(".md").read_text() == bench_page(out, bench_table(data))
    for there, gone in ((out, None), (out.with_suffix(".md"), out)):
        if gone is not None:
            gone.unlink()
        code, _, err = run(*command)
        assert code == 1
        assert f"{there.name} is there already; choose another --out or give --overwrite" in err
    assert run(*command, "--overwrite")[0] == 0


def test_a_page_says_what_was_measured_where() -> None:
    data = json.loads((PAGES / "epyc-avx2.json").read_text())
    head, *_, body = bench_page(PAGES / "epyc-avx2.json", bench_table(data)).split("| ---", 1)
    for told in ("AMD EPYC, 2 threads, AVX2", f"revision {data['environment']['revision']}"):
        assert told in head
    for row in data["rows"]:
        figures = f"{row['density']:.3f} | {1e3 * row['seconds']:.2f} | {row['speedup']:.2f}"
        assert f"| float32 | 8192 | 2 | {row['head_dim']} | {figures} |" in body


@pytest.mark.parametrize("result", sorted(PAGES.glob("*.json")), ids=lambda path: path.stem)
def test_pages_of_kept_results_are_theirs(result: Path) -> None:
    data = json.loads(result.read_text())
    assert page_of(result).read_text() == bench_page(result, bench_table(data)), (
        "write it anew: dit-sparse bench --out, or bench_page of the result"
    )


def test_the_table_names_what_refuses_once(run: Run) -> None:
    code, printed, err = run(*SMALL, "--density", 0.5, "--density", 1)
    assert code == 0, err
    assert "gather" in printed
    assert "speed-up" in printed
    assert "16 of 16 rows" in printed
    assert "…" not in printed
    assert err.count("busy refuses: is busy") == 1


def test_a_wrong_backend_stops_the_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    table = (*TABLE, Backend("crooked", lambda call: None, wrong))
    monkeypatch.setattr(measurement, "BACKENDS", table)
    monkeypatch.setattr(module, "interleaved", lambda *_: pytest.fail("was timed"))
    for extra in ((), ("--calibrate",)):
        code, printed, err = run(*SMALL, "--json", *extra)
        assert (code, printed) == (1, "")
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert "backend 'crooked' is wrong on this machine" in line


def test_a_wrong_mass_stops_the_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = module.block_mass
    monkeypatch.setattr(module, "block_mass", lambda *given, **by: 1.001 * right(*given, **by))
    monkeypatch.setattr(module, "interleaved", lambda *_: pytest.fail("was timed"))
    code, printed, err = run(*SMALL, "--json")
    assert (code, printed) == (1, "")
    assert "the block mass is wrong on this machine" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--backend", "busy"), "backend 'busy' refuses blocks of density 0.25 on 96 tokens"),
        (("--backend", "magic"), "unknown backend 'magic'; use one of busy, choosy, gather"),
        (("--density", "0"), "density must be in (0, 1], got 0"),
        (("--dtype", "int7"), "dtype 'int7' is unknown"),
        (("--device", "warp"), "device 'warp' is unknown"),
        (("--pattern", "spiral"), "pattern must be one of blocks, neighborhood, band, pooled"),
        (("--out", "{file}/bench.json"), "cannot write to"),
        (("--calibrate", "--backend", "busy"), "nothing to calibrate:"),
        (("--calibrate", "--density", "1", "--pattern", "blocks"), "at least 4 measurements"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "file").write_text("")
    arguments = tuple(part.format(file=tmp_path / "file") for part in arguments)
    code, printed, err = run(*SMALL, *arguments)
    assert (code, printed) == (1, "")
    assert message in err
    assert sum(line.startswith("error: ") for line in err.splitlines()) == 1


def test_an_unknown_preset_lists_the_known_ones(run: Run) -> None:
    code, _, err = run("--preset", "sora")
    assert code == 1
    assert f"unknown preset 'sora'; use one of {', '.join(PRESETS)}" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("--tokens", "0"),
        ("--repeats", "0"),
        ("--tokens", "96", "--preset", "cogvideox"),
        ("--threads", "2"),
        ("--out", "bench.md"),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_two(run: Run, arguments: tuple[str, ...]) -> None:
    code, printed, err = run(*arguments)
    assert (code, printed) == (2, "")
    assert err


def test_presets_are_named_in_the_help(run: Run) -> None:
    _, printed, _ = run("--help")
    words = "".join(printed.replace("│", " ").split())
    assert all(name in words for name in PRESETS)


def test_presets_bring_their_own_sizes() -> None:
    (flux,) = bench_command._grids([], ["flux-4k"], None, None)
    assert flux == {"grid": PRESETS["flux-4k"].grid, "heads": 24, "head_dim": 128}
    (smaller,) = bench_command._grids([], ["flux-4k"], [64], 1)
    assert (smaller["heads"], smaller["head_dim"]) == (1, 64)


def test_calibration_is_written_read_and_used(
    run: Run, monkeypatch: pytest.MonkeyPatch, calibrations: Path
) -> None:
    monkeypatch.setattr(measurement, "BACKENDS", TABLE[2:])
    code, printed, err = run(
        "--calibrate", "--tokens", 64, "--tokens", 96, "--head-dim", 16, "--block", 16,
        "--repeats", 1, "--device", "cpu", "--json",
    )  # fmt: skip
    assert code == 0, err
    data = json.loads(printed)
    cost, *stages = data["costs"]
    assert (cost["name"], cost["dtype"], cost["head_dim"]) == ("gather", "float32", 16)
    # It takes pooled workloads only where nothing is left to pool.
    assert cost["samples"] == 2 * (3 * 5 + 1)
    assert cost["mean_error"] <= cost["largest_error"]
    # Two numbers of tokens, of heads, and two sides of blocks.
    names = {str(stage) for stage in STAGES}
    assert {(each["name"], each["head_dim"], each["samples"]) for each in stages} == {
        (name, 16, 8) for name in names
    }
    (file,) = data["files"]
    assert set(read(Path(file)).costs) == {(name, "float32", 16) for name in ("gather", *names)}
    assert f"wrote {file}" in err
    known = calibration_for(torch.device("cpu"))
    assert known is not None
    call = workload().call()
    assert known.seconds("gather", call) is not None
    assert choose(call).name != "reference"


def test_a_calibration_shows_its_held_out_error(run: Run) -> None:
    code, printed, err = run(
        "--calibrate", "--tokens", 64, "--head-dim", 16, "--block", 16, "--repeats", 1,
        "--pattern", "blocks", "--backend", "gather",
    )  # fmt: skip
    assert code == 0, err
    assert "held-out" in printed
    rows = [line.split(" float32 ") for line in printed.splitlines() if " float32 " in line]
    assert [name.strip() for name, _ in rows] == ["gather", *map(str, STAGES)]
    # head_dim, five costs, two errors: none is cut off.
    assert [len(figures.split()) for _, figures in rows] == [8] * 9
    assert "…" not in printed


def test_a_cache_that_cannot_be_written_to_is_one_line(
    run: Run, calibrations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrations.write_text("a file")
    monkeypatch.setattr(module, "interleaved", lambda *_: pytest.fail("was timed"))
    code, printed, err = run(
        "--calibrate", "--tokens", 64, "--head-dim", 16, "--block", 16, "--repeats", 1,
        "--pattern", "blocks", "--backend", "gather",
    )  # fmt: skip
    assert (code, printed) == (1, "")
    assert "give another folder in XDG_CACHE_HOME" in err


def test_calibrating_takes_every_backend_that_accepts() -> None:
    workloads = [workload(density=density) for density in (0.2, 0.4, 0.6, 1.0)]
    found = calibrate(workloads, repeats=1)
    names = {name for name, _, _ in found.costs}
    assert names - set(map(str, STAGES)) == {"choosy", "gather"}
    assert path_of(found.device).suffix == ".json"


def test_rows_have_the_promised_names() -> None:
    assert set(Row.__dataclass_fields__) >= ROW
    shared = {"device", "dtype", "head_dim", "tokens", "block", "gflops", "max_error"}
    assert set(MassRow.__dataclass_fields__) >= shared | {"rows", "share_of_dense"}
