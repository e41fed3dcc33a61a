"""Static bench: the counts of the compiled GPU kernels, printed; no GPU is needed."""

import json

from rich.table import Table

from dit_sparse.kernels import static_gate
from dit_sparse.terminal import output

_COLUMNS = (
    "arch", "head_dim", "kernel", "loop_ratio", "model_ratio", "instructions", "spills",
    "registers", "mma", "ex2", "async_copies",
)  # fmt: skip


def static_bench(json_output: bool) -> None:
    """Print a row for each architecture, head_dim and kernel.

    Raises:
        ValueError: Triton's compilers are missing, or a figure is worse than the stored one.
    """
    rows = static_gate.rows()
    if json_output:
        print(json.dumps({"rows": rows}))
    else:
        table = Table(*_COLUMNS)
        for row in rows:
            table.add_row(*(str(row[name]) for name in _COLUMNS))
        output().print(table)
    worse = static_gate.worsened(rows, static_gate.stored_rows())
    if worse:
        raise ValueError("the compiled kernels got worse:\n  " + "\n  ".join(worse))
