"""The examples of the docstrings and of the folder's page run as they are printed."""

import doctest
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "kernels"


@pytest.mark.parametrize("module", ["grid", "pattern", "blocks", "shard"])
def test_docstring_examples(module: str):
    result = doctest.testmod(importlib.import_module(f"dit_sparse.kernels.{module}"))
    assert result.attempted > 0
    assert result.failed == 0


def test_readme_example():
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["output"].shape == (1, 736, 4, 64)


def test_readme_lists_every_file():
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [f.name for f in FOLDER.glob("*.py") if f"`{f.name}`" not in page] == []
