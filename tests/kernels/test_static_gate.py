"""The static gate: reading machine code, telling a worsening, and the kernels themselves."""

import itertools
from pathlib import Path

import pytest

from dit_sparse.kernels import static_gate
from dit_sparse.kernels.sass import Loop, missing_tools, parse
from dit_sparse.static_bench import static_bench

LISTING = """
        /*0000*/                   LDL R1, [R2] ;
.L_x_1:
        /*0010*/                   LDG.E R1, desc[UR4][R2.64] ;
.L_x_2:
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], RZ, !UPT ;
        /*0030*/                   MUFU.EX2 R1, R1 ;
        /*0040*/              @!P0 UTMALDG.4D [UR8], [UR4] ;
        /*0050*/               @P0 BRA `(.L_x_2) ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
.L_x_3:
        /*0080*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], RZ, !UPT ;
        /*0090*/                   BRA `(.L_x_3) ;
"""
ROW = {
    "arch": 90, "head_dim": 128, "kernel": "whole", "loop_ratio": 1.047, "instructions": 512,
    "registers": 218, "spills": 0, "mma": 16, "ex2": 66, "async_copies": 3,
}  # fmt: skip


def test_the_innermost_loop_before_the_exit_is_counted():
    sass = parse(LISTING, 99)
    assert sass.loops == (Loop(4, 1, 1, 1),)
    assert (sass.registers, sass.spills) == (99, 1)


def test_missing_tools_are_named(tmp_path: Path):
    (tmp_path / "ptxas").touch()
    assert missing_tools(tmp_path) == f"no nvdisasm, cuobjdump in {tmp_path}"


def test_what_stays_the_same_passes():
    assert static_gate.worsened([ROW], [ROW]) == []
    assert static_gate.worsened([ROW], []) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instructions": 530}, "sm_90 head_dim 128 whole: instructions 530, stored 512"),
        ({"async_copies": 1}, "sm_90 head_dim 128 whole: async_copies 1, stored 3; work was lost"),
        ({"loop_ratio": 1.051}, "sm_90 head_dim 128 whole: loop_ratio 1.051, at most 1.05 is all"),
    ],
    ids=["slower", "pipeline lost", "past the bar"],
)
def test_a_worsening_is_named(change: dict[str, object], message: str):
    lines = static_gate.worsened([ROW | change], [ROW])
    assert len(lines) == 1
    assert lines[0].startswith(message)


@pytest.mark.skipif(static_gate.unavailable() is not None, reason="no Triton with its compilers")
def test_hopper_kernels_keep_their_bars():
    found = static_gate.rows([90], [128], ["whole", "partial"])
    assert static_gate.worsened(found, static_gate.stored_rows()) == []
    assert all(row["mma"] and row["async_copies"] for row in found)


@pytest.fixture
def stored() -> list[static_gate.Row]:
    """The figures that the repository holds for the installed Triton."""
    if (reason := static_gate.unavailable()) is not None:
        pytest.skip(reason)
    found = static_gate.stored_rows()
    assert found, f"no {static_gate.stored_path().name} for this Triton; see static_gate.store"
    return found


def test_figures_of_every_kernel_are_stored(stored: list[static_gate.Row]):
    expected = itertools.product(
        static_gate.ARCHITECTURES, static_gate.HEAD_DIMS, static_gate.KERNELS
    )
    assert {static_gate._key(row) for row in stored} == set(expected)
    assert static_gate.worsened(stored, stored) == []


@pytest.mark.parametrize(
    ("figure", "change"),
    [("instructions", 1.03), ("registers", 1.06), ("loop_ratio", 1.02), ("mma", 0.5)],
)
def test_a_figure_worse_than_the_stored_one_fails(
    stored: list[static_gate.Row], figure: str, change: float, monkeypatch: pytest.MonkeyPatch
):
    for row in stored:
        worse = row | {figure: row[figure] * change}
        monkeypatch.setattr(static_gate, "rows", lambda worse=worse: [worse])
        where = f"sm_{row['arch']} head_dim {row['head_dim']} {row['kernel']}: {figure}"
        with pytest.raises(ValueError, match=f"the compiled kernels got worse:\n  {where}"):
            static_bench(json_output=True)


def test_one_more_spill_than_stored_fails(stored: list[static_gate.Row]):
    for row in stored:
        assert static_gate.worsened([row | {"spills": row["spills"] + 1}], stored)


def test_what_is_stored_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(static_gate, "STORED", tmp_path / "static")
    static_gate.store([ROW])
    path = static_gate.store([ROW | {"kernel": "mass"}, ROW | {"instructions": 500}])
    assert path == static_gate.stored_path()
    assert static_gate.stored_rows() == [ROW | {"kernel": "mass"}, ROW | {"instructions": 500}]
