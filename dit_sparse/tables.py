"""Table: what a command prints for a person."""

from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table

if TYPE_CHECKING:
    from dit_sparse.comparison import Comparison
    from dit_sparse.plan_summary import HeadSummary, PlanSummary
    from dit_sparse.search.choices import Choices, Option

HEADS_SHOWN = 6  # wider layers are counted by kind, not listed
CHOICES_SHOWN = 24  # of more heads, those of the largest errors are explained


def comparison_table(comparison: "Comparison") -> Group:
    """A line for the dense baseline and one for each plan."""
    settings = comparison.settings
    table = Table(box=SIMPLE)
    table.add_column("plan")
    density = ("element", "block", "weighted")
    figures = ("FLOPs", "cache MB", "seconds", "speed-up", "low-high", "PSNR dB", "worst", "SSIM")
    for column in (*density, *figures):
        table.add_column(column, justify="right", no_wrap=True)
    seconds = f"{comparison.dense.seconds.median:.2f}"
    table.add_row("dense", "1", "1", "1", "1", "0", seconds, "1")
    for plan in comparison.plans:
        table.add_row(
            plan.name,
            *(f"{plan.density[kind]:.3f}" for kind in density),
            f"{plan.flops:.3f}",
            f"{plan.cache_bytes / 1e6:.1f}",
            f"{plan.seconds.median:.2f}",
            f"{plan.speedup.median:.2f}",
            f"{plan.speedup.low:.2f}-{plan.speedup.high:.2f}",
            f"{plan.psnr_rgb.mean:.2f}",
            f"{plan.psnr_rgb.worst:.2f}",
            f"{plan.ssim.mean:.4f}",
        )
    prompts = len(comparison.prompts)
    return Group(
        f"{comparison.model}: {settings.frames} frames of {settings.width}x{settings.height}, "
        f"{settings.steps} steps, {settings.dtype} on {settings.device}, "
        f"{prompts} prompt{'s' * (prompts > 1)}",
        table,
        "element, block, weighted: densities over all self-attention calls, dense ones as 1",
        "FLOPs: of self-attention, searches and caches included, in those of dense",
        "PSNR and SSIM: against dense, on 8-bit RGB frames before encoding",
    )


def plan_table(summary: "PlanSummary") -> Group:
    """A line for each layer, a column for each head if there are few; below, the whole plan."""
    table = Table(box=SIMPLE)
    table.add_column("layer", no_wrap=True)
    heads = max(len(row) for row in summary.layers.values())
    if heads <= HEADS_SHOWN:
        for head in range(heads):
            table.add_column(f"head {head}")
        for layer, row in summary.layers.items():
            table.add_row(layer, *(_cell(head) for head in row))
    else:
        for kind in summary.patterns:
            table.add_column(kind, justify="right")
        for layer, row in summary.layers.items():
            counts = Counter(head.kind for head in row)
            table.add_row(layer, *(str(counts[kind]) for kind in summary.patterns))
    components = ", ".join(f"{name} ({kind})" for name, kind in summary.model.items())
    title = f"plan {summary.digest[:12]} for {components}"
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in summary.patterns.items())
    rest = ", ".join(f"{kind} {share:.0%}" for kind, share in summary.remainders.items())
    lines = [
        f"heads: {shares}",
        f"pairs that are not computed: {rest}",
        f"schedule: {summary.schedule}",
    ]
    if summary.cache_bytes:
        lines.append(f"caches: {summary.cache_bytes / 1e6:.1f} MB a guidance branch and video")
    if summary.density is None or summary.grid is None:
        lines.append(
            "density: unknown without a grid; give one: --grid 15x16x16"
            if summary.grid is None
            else "density: known only while denoising, which is when its blocks are chosen"
        )
    else:
        figures = ", ".join(f"{name} {value:.3f}" for name, value in summary.density.items())
        grid = "x".join(map(str, summary.grid))
        lines.append(
            f"density of the sparse steps: {figures} (grid {grid}, block {summary.block})"
        )
    lines += [f"predicted {name}: {value:.4g}" for name, value in summary.predicted.items()]
    if "psnr" in summary.achieved:
        lines.append(f"achieved psnr: {summary.achieved['psnr']:.2f} dB on the search's prompts")
    if "speedups" in summary.achieved:
        speedups = ", ".join(f"{speedup:.2f}x" for speedup in summary.achieved["speedups"])
        lines.append(f"tried while searching, each beside a dense run: {speedups}")
    if summary.choices is not None and summary.choices.note is not None:
        lines.append(summary.choices.note)
    return Group(title, table, *lines)


def choices_table(found: "Choices") -> Group:
    """Why heads run what they run: a line for each head, or for those of the largest errors."""
    table = Table(box=SIMPLE, title="winner, runner-up and full", title_justify="left")
    table.add_column("head", no_wrap=True)
    for column in ("winner", "error", "cost", "runner-up", "error", "cost", "full", "cost"):
        figure = column in ("error", "cost", "full")
        table.add_column(column, justify="right" if figure else "left", no_wrap=figure)
    heads = [
        (f"{layer} {head}", choice)
        for layer, row in found.layers.items()
        for head, choice in enumerate(row)
    ]
    worst = sorted(heads, key=lambda each: -each[1].winner.error)[:CHOICES_SHOWN]
    for name, choice in heads if len(heads) <= CHOICES_SHOWN else worst:
        table.add_row(
            name,
            *_option(choice.winner),
            *(("-", "", "") if choice.runner_up is None else _option(choice.runner_up)),
            *_option(choice.full)[1:],
        )
    lines = [
        f"cost: {found.cost}; runner-up: of the others, the least error + {found.price:.3g} x "
        "cost, which is what cost is worth at this plan's mean"
    ]
    if len(heads) > CHOICES_SHOWN:
        lines.append(
            f"the {CHOICES_SHOWN} heads of the largest errors of {len(heads)}; --json has all"
        )
    return Group(table, *lines)


def bounds_table(found: dict[str, Any]) -> Group:
    """A line for each pattern or stride; below, the whole plan."""
    rows = found.get("strides") or found.get("patterns") or [found]
    labels = [name for name in ("stride", "pattern", "heads") if name in rows[0]]
    table = Table(box=SIMPLE)
    for column in labels:
        table.add_column(column)
    for column in ("visited", "of", "bound", "mean bound", "perfect"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            *("x".join(map(str, row[x])) if x == "stride" else str(row[x]) for x in labels),
            str(row["visited"]),
            str(row["total"]),
            _bound(row["bound"]),
            _bound(row["mean_bound"]),
            "yes" if row["perfect"] else "no",
        )
    lines = [
        "visited: tiles of keys of the slowest tile of queries; perfect: none of them needs a mask"
    ]
    if "patterns" in found:
        density = ", ".join(f"{name} {value:.3f}" for name, value in found["density"].items())
        grid = "x".join(map(str, found["grid"]))
        lines += [
            f"{found['heads']:g} heads: bound {_bound(found['bound'])}, mean bound "
            f"{_bound(found['mean_bound'])}, density {density} "
            f"(grid {grid}, block {found['block']})"
        ]
    return Group(table, *lines)


def bench_table(data: dict[str, Any]) -> Group:
    """A line for each backend on each workload."""
    table = Table(box=SIMPLE, padding=0)
    for column in ("backend", "pattern", "dtype"):
        table.add_column(column, no_wrap=True)
    figures = ("tokens", "heads", "dim", "density", "ms", "speed-up", "of ideal", "efficiency")
    for column in (*figures, "GFLOP/s", "GEMM", "peak", "error"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in data["rows"]:
        peak, efficiency = row["peak_gflops"], row["sparsity_efficiency"]
        table.add_row(
            row["backend"],
            row["pattern"],
            row["dtype"],
            str(row["tokens"]),
            str(row["heads"]),
            str(row["head_dim"]),
            f"{row['density']:.3f}",
            f"{1e3 * row['seconds']:.2f}",
            f"{row['speedup']:.2f}",
            f"{row['fraction_of_ideal']:.2f}",
            "-" if efficiency is None else f"{efficiency:.2f}",
            f"{row['gflops']:.0f}",
            f"{row['gemm_gflops']:.0f}",
            "-" if peak is None else f"{peak:.0f}",
            f"{row['max_error']:.0e}",
        )
    masses = Table(box=SIMPLE, padding=0)
    for column in ("block mass of", "dtype"):
        masses.add_column(column, no_wrap=True)
    for column in ("tokens", "heads", "dim", "ms", "of dense", "GFLOP/s", "error"):
        masses.add_column(column, justify="right", no_wrap=True)
    for row in data["masses"]:
        masses.add_row(
            "all rows" if row["rows"] is None else f"{row['rows']} of {row['block']} rows",
            row["dtype"],
            str(row["tokens"]),
            str(row["heads"]),
            str(row["head_dim"]),
            f"{1e3 * row['seconds']:.2f}",
            f"{row['share_of_dense']:.3f}",
            f"{row['gflops']:.0f}",
            f"{row['max_error']:.0e}",
        )
    return Group(
        *_conditions(data["environment"]),
        table,
        *([masses] if data["masses"] else []),
        "speed-up: over dense SDPA; of ideal: speed-up x density; efficiency: over the same "
        "backend at density 1, x density",
        f"{data['protocol']['timing']}; error: largest against float64",
    )


def calibration_table(data: dict[str, Any]) -> Group:
    """A line for each backend or stage, dtype and head_dim that was calibrated."""
    table, kinds = Table(box=SIMPLE, padding=0), ("whole", "partial", "pooled")
    for column in ("backend or stage", "dtype"):
        table.add_column(column, no_wrap=True)
    for column in (*("dim", "launch", "query"), *kinds, "held-out", "worst"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in data["costs"]:
        parts = (row[name] for name in ("launch", "query_block", *kinds))
        table.add_row(
            row["name"],
            row["dtype"],
            str(row["head_dim"]),
            *(f"{1e6 * part:.3g}" for part in parts),
            f"{row['mean_error']:.0%}",
            f"{row['largest_error']:.0%}",
        )
    devices = ", ".join(dict.fromkeys(row["device"] for row in data["costs"]))
    return Group(
        devices,
        *_conditions(data["environment"]),
        table,
        "costs in us, fitted by relative error: of blocks of 128 x 128 tokens, pooled ones of "
        "128 x 128 means",
        "of a search: whole for 128 x 128 logits, partial for a pair of blocks",
        "held-out error: mean and worst on measurements that a second fit did not see",
    )


def environment_table(values: dict[str, Any]) -> Group:
    """A block to paste into an issue."""
    lines = []
    for name, value in values.items():
        rows = value if isinstance(value, dict) else {name: value}
        if name not in ("backends", "calibration"):
            lines += [
                f"{key:>16}: {'-' if inner in (None, []) else inner}"
                for key, inner in rows.items()
            ]
    table = Table(box=SIMPLE)
    for column in ("backend", "device", "dtype", "verdict"):
        table.add_column(column)
    for row in values["backends"]:
        verdict = "runs" if row["reason"] is None else row["reason"]
        table.add_row(row["backend"], row["device"], row["dtype"], verdict)
    states = [f"calibration of {name}: {state}" for name, state in values["calibration"].items()]
    return Group(*lines, table, *states)


def _conditions(environment: dict[str, Any]) -> tuple[str, str]:
    """What figures were measured on, and with what."""
    machine, packages = environment["machine"], environment["packages"]
    names = [machine["processor"], f"{environment['threads']} threads"]
    names += [environment["cpu_capability"], *machine["accelerators"]]
    versions = [f"{name} {packages[name]}" for name in ("torch", "triton", "dit-sparse")]
    return ", ".join(names), ", ".join((*versions, f"revision {environment['revision']}"))


def _cell(head: "HeadSummary") -> str:
    rest = "" if head.remainder == "drop" else f" with {head.remainder}"
    density = "" if head.density is None else f"  {head.density:.2f}"
    return f"{head.pattern}{rest}{density}"


def _option(option: "Option") -> tuple[str, str, str]:
    return option.pattern, f"{option.error:.2g}", f"{option.cost:.2f}"


def _bound(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"
