"""The promises of the layout: layers, links, packaging, lazy imports, file sizes."""

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("kernels", "pipelines", "search", "dit_sparse")
LINKED = LAYERS[:3]
SOURCES = [path for layer in LAYERS for path in sorted((ROOT / layer).glob("*.py"))]
EVERYTHING = [
    *SOURCES,
    *sorted((ROOT / "tests").rglob("*.py")),
    *sorted((ROOT / "samples").rglob("*.py")),
]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[str]:
    """The modules a file imports; `from a import b` counts as `a.b`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write dit_sparse.<folder>.<module>"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(module: str) -> str | None:
    """The folder a module of ours lives in, None for everybody else's."""
    top, *rest = module.split(".")
    if top != "dit_sparse":
        return None
    return rest[0] if rest and rest[0] in LINKED else "dit_sparse"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_folder_imports_only_from_its_left(path: Path) -> None:
    allowed = LAYERS[: LAYERS.index(path.parent.name) + 1]
    wrong = [module for module in imports(path) if layer_of(module) not in (None, *allowed)]
    assert not wrong, f"{name_of(path)} may import from {allowed} only"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_folder_is_imported_by_its_bare_name(path: Path) -> None:
    assert not {module.split(".")[0] for module in imports(path)} & set(LINKED)


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if path.parent.name == "kernels"], ids=name_of
)
def test_kernels_need_torch_and_einops_alone(path: Path) -> None:
    allowed = {*sys.stdlib_module_names, "torch", "einops", "dit_sparse"}
    if path.stem.endswith("_triton"):
        allowed.add("triton")
    assert {module.split(".")[0] for module in imports(path)} <= allowed


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("diffusers", {"pipelines"}),
        (
            "typer",
            {
                f"dit_sparse/{x}.py"
                for x in ("cli", "options", "bench_command", "search_command", "simulate_command")
            },
        ),
        ("imageio", {"dit_sparse/video.py"}),
        ("matplotlib", {"dit_sparse/plots.py"}),
    ],
)
def test_library_crosses_the_boundary_once(library: str, homes: set[str]) -> None:
    users = {
        name_of(path)
        for path in SOURCES
        if any(module.split(".")[0] == library for module in imports(path))
    }
    assert users, f"nobody uses {library}"
    assert all(user in homes or user.split("/")[0] in homes for user in users), users


@pytest.mark.parametrize("folder", LINKED)
def test_link_is_relative_and_leads_to_the_folder(folder: str) -> None:
    link = ROOT / "dit_sparse" / folder
    assert link.is_symlink()
    assert os.readlink(link) == f"../{folder}"


def test_links_are_tracked_as_links() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "--stage", "dit_sparse"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    if not listed:
        pytest.skip("nothing is committed yet")
    modes = {line.split("\t")[1]: line.split()[0] for line in listed.splitlines()}
    assert {modes.get(f"dit_sparse/{folder}") for folder in LINKED} == {"120000"}


@pytest.mark.parametrize("folder", LINKED)
def test_folder_has_no_init(folder: str) -> None:
    # With one, the checkout would hide any installed package called kernels.
    assert not (ROOT / folder / "__init__.py").exists()


def test_packaging_maps_every_folder() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    expected = {"dit_sparse": "dit_sparse", **{f"dit_sparse.{x}": x for x in LINKED}}
    assert tool["package-dir"] == expected
    assert set(tool["packages"]) == set(expected)


@pytest.mark.parametrize("path", EVERYTHING, ids=name_of)
def test_file_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_file_is_a_noun_that_its_docstring_defines(path: Path) -> None:
    assert path.stem not in {"utils", "common", "helpers", "base"}
    assert ast.get_docstring(ast.parse(path.read_text()))


def fresh(code: str) -> str:
    """What a new interpreter, started in the repository, prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


HEAVY = "print(*sorted({'torch', 'diffusers', 'transformers'} & {*sys.modules}), file=out)"


@pytest.mark.parametrize(
    "code",
    [
        "import dit_sparse; dir(dit_sparse)",
        "from typer.testing import CliRunner; from dit_sparse.cli import app;"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0",
        "from typer.testing import CliRunner; from dit_sparse.cli import app;"
        "assert CliRunner().invoke(app, ['compare', '--help']).exit_code == 0",
    ],
    ids=["import", "help", "command help"],
)
def test_start_imports_neither_torch_nor_diffusers(code: str) -> None:
    assert fresh(f"import sys; out = sys.stdout; {code}; {HEAVY}").strip() == ""


def test_public_names_resolve() -> None:
    names = fresh(
        "import dit_sparse; [getattr(dit_sparse, n) for n in dit_sparse.__all__];"
        "print(set(dit_sparse.__all__) == set(dit_sparse._HOMES))"
    )
    assert names.strip() == "True"


def test_unknown_public_name_is_an_attribute_error() -> None:
    import dit_sparse

    with pytest.raises(AttributeError, match="no attribute 'serach_plan'"):
        _ = dit_sparse.serach_plan  # pyright: ignore[reportAttributeAccessIssue]
