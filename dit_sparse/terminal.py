"""Terminal: data on standard output, progress and remarks on standard error."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from dit_sparse.comparison import Comparison
    from dit_sparse.plan_summary import PlanSummary


def print_comparison(comparison: "Comparison", json_output: bool) -> None:
    """Print the table, or the content of comparison.json."""
    if json_output:
        print(json.dumps(comparison.to_dict()))
        return
    from dit_sparse.tables import comparison_table

    output().print(comparison_table(comparison))


def print_plan(summary: "PlanSummary", json_output: bool) -> None:
    """Print the table of layers and heads, or one JSON object."""
    if json_output:
        print(json.dumps(summary.to_dict()))
        return
    from dit_sparse.tables import plan_table

    output().print(plan_table(summary))


def print_choices(summary: "PlanSummary") -> None:
    """Print the table of winners and runners-up, where the plan carries what explains it."""
    if summary.choices is None:
        return
    from dit_sparse.tables import choices_table

    output().print(choices_table(summary.choices))


def print_bounds(found: dict[str, Any], json_output: bool) -> None:
    """Print the table of bounds, or one JSON object."""
    if json_output:
        print(json.dumps(found))
        return
    from dit_sparse.tables import bounds_table

    output().print(bounds_table(found))


def print_picture(picture: dict[str, Any], json_output: bool) -> None:
    """Print what was drawn, on one line or as one JSON object."""
    if json_output:
        print(json.dumps(picture))
        return
    density = ", ".join(f"{name} {value:.3f}" for name, value in picture["density"].items())
    grid = "x".join(map(str, picture["grid"]))
    print(f"{picture['text']} on grid {grid}: density {density}")


def output() -> Console:
    """Standard output; as wide as a table needs when it is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=120)


def say(line: str) -> None:
    """Tell the person, not the pipe that reads standard output."""
    print(line, file=sys.stderr)


@contextmanager
def progress(what: str, rounds: int = 1) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error: steps done in this round, and which of the rounds it is; the time
    that has passed and what remains of the round."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Elapsed())
    columns = (*columns, Remaining())
    finished = 0

    def advance(done: int, total: int) -> None:
        nonlocal finished
        finished += done == total
        label = what if rounds == 1 else f"{what} {min(finished + 1, rounds)}/{rounds}"
        bar.update(task, completed=done, total=total, description=label)

    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield advance
