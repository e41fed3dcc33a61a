"""Bounds: what `dit-sparse simulate` says of a pattern, of strides and of a plan."""

import math
from typing import Any

from dit_sparse.kernels.blocks import Density, block_indices
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Neighborhood, Pattern
from dit_sparse.kernels.simulator import Simulation, simulate, simulate_blocks, useful_strides
from dit_sparse.pipelines.phase import tally
from dit_sparse.pipelines.plan import Plan

Shape = tuple[int, int, int]


def of_pattern(pattern: Pattern, grid: Shape, q_tile: Shape, kv_tile: Shape) -> dict[str, Any]:
    """{visited, total, bound, mean_bound, perfect} of one pattern; a bound is None without any
    visited tile."""
    return _figures(simulate(pattern, TokenGrid(*grid), q_tile, kv_tile))


def of_strides(
    pattern: Neighborhood, grid: Shape, q_tile: Shape, kv_tile: Shape
) -> dict[str, Any]:
    """{strides: [{stride, visited, ...}, ...]}, those that are worth their coarseness."""
    found = useful_strides(pattern, TokenGrid(*grid), q_tile, kv_tile)
    rows = [{"stride": list(each.stride)} | _figures(simulated) for each, simulated in found]
    return {"strides": rows}


def of_plan(plan: Plan, grid: Shape | None) -> dict[str, Any]:
    """{bound, mean_bound, density, heads, patterns: [{pattern, heads, visited, ...}, ...]}, in the
    plan's own blocks. The bounds of the whole are those of all heads one after the other.

    Raises:
        ValueError: no grid is known, or a pattern refuses it.
    """
    grid = grid or plan.grid
    if grid is None:
        raise ValueError("this plan was not searched at a grid; give one: --grid 15x16x16")
    counts = tally((pattern, heads) for (pattern, _), heads in plan.heads.items())
    rows, slowest, mean = [], 0.0, 0.0
    densities: list[tuple[Density, float]] = []
    for pattern, heads in counts.items():
        blocks = block_indices(
            (pattern,), TokenGrid(*grid), block_q=plan.block, block_k=plan.block
        )
        simulated, density = simulate_blocks(blocks), blocks.density()
        densities.append((density, heads))
        slowest += heads / simulated.bound
        mean += heads / simulated.mean_bound
        rows.append(
            {"pattern": str(pattern), "heads": heads}
            | _figures(simulated)
            | {"density": density.block}
        )
    heads = sum(counts.values())
    return {
        "bound": heads / slowest if slowest else None,
        "mean_bound": heads / mean if mean else None,
        "density": {
            name: sum(getattr(density, name) * count for density, count in densities) / heads
            for name in ("element", "block", "weighted")
        },
        "grid": list(grid),
        "block": plan.block,
        "heads": heads,
        "patterns": rows,
    }


def _figures(simulated: Simulation) -> dict[str, Any]:
    return {
        "visited": simulated.visited,
        "total": simulated.total,
        "bound": None if math.isinf(simulated.bound) else simulated.bound,
        "mean_bound": None if math.isinf(simulated.mean_bound) else simulated.mean_bound,
        "perfect": simulated.perfect,
    }
