"""Pages say nothing that is not so: commands parse, Python resolves, links lead somewhere."""

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

from dit_sparse.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"] + [
    ROOT / folder / "README.md" for folder in ("kernels", "pipelines", "search", "samples")
]
TEXT = {page: page.read_text() for page in PAGES}


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Fenced blocks of a page: language and content."""
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield match.group(1), match.group(2)


def commands() -> list[tuple[str, str]]:
    """Every `dit-sparse ...` and `make ...` line of every page, continuation lines joined."""
    found = []
    for page, text in TEXT.items():
        for line in text.replace("\\\n", " ").splitlines():
            bare = line.strip().removeprefix("$ ").split("#")[0].strip()
            if re.match(r"(\.venv/bin/)?dit-sparse \w|make \w", bare):
                found.append((str(page.relative_to(ROOT)), bare))
    return found


def test_readme_begins_with_demo_and_test() -> None:
    text = TEXT[ROOT / "README.md"]
    made = re.findall(r"make (\w+)", text)
    assert {"demo", "test"} <= set(made)


@pytest.mark.parametrize(("page", "command"), commands(), ids=lambda value: value[:60])
def test_command_exists_with_its_options(page: str, command: str) -> None:
    program, name, *arguments = shlex.split(command)
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert name in targets, page
        return
    subcommand = getattr(get_command(app), "commands")[name]  # noqa: B009  unknown to the types
    known = {option for parameter in subcommand.params for option in parameter.opts}
    asked = {argument.split("=")[0] for argument in arguments if argument.startswith("--")}
    assert asked <= known, page


@pytest.mark.parametrize(
    ("page", "code"),
    [
        (str(page.relative_to(ROOT)), code)
        for page, text in TEXT.items()
        for language, code in blocks(text)
        if language in ("python", "py")
    ],
    ids=lambda value: value[:40].replace("\n", " "),
)
def test_python_parses_and_its_names_resolve(page: str, code: str) -> None:
    for node in ast.walk(ast.parse(code, page)):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "dit_sparse":
            assert hasattr(importlib.import_module("dit_sparse"), node.attr), node.attr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", TEXT[page])
    local = [target for target in targets if not re.match(r"\w+:", target)]
    assert [target for target in local if not (page.parent / target).exists()] == []
