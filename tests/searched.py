"""What the tests of the search share: evidence of a small model that nobody searched."""

from dataclasses import replace

import torch
from torch import Tensor

from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Band, Full, Skip
from dit_sparse.kernels.remainder import Complement, Drop
from dit_sparse.kernels.score import Mass
from dit_sparse.kernels.scored import Scored
from dit_sparse.kernels.select import TopRow
from dit_sparse.pipelines.fingerprint import ModelFingerprint
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.schedule import Schedule
from dit_sparse.search.course import Sightings
from dit_sparse.search.evidence import Evidence
from dit_sparse.search.space import Space
from dit_sparse.search.timing import Timing

HEADS, BLOCK, HEAD_DIM, STEPS = 2, 8, 12, 10
GRID = TokenGrid(3, 4, 4)
MASS = Scored(Mass(), TopRow(0.4))
SPACE = Space((Full(), Skip(), Band(20), Band(6), MASS), (3,), (Drop(), Complement()))
DENSITIES = (1.0, 0.0, 0.6, 0.25, 0.4, 0.5)
SEEN = Sightings(STEPS, (2, 6), (0, 1, 3))
SCHEDULES = (
    Schedule(dense_first=2),
    Schedule(dense_first=2, renew_every=3),
    Schedule(dense_first=4, renew_every=2),
)
PHASED = Schedule(dense_first=1, phases=(0.4, 0.7))
TIMING = Timing("a device", STEPS, 1.0, 0.5, 2.0)


def evidence_of(layers: int, seed: int = 0) -> Evidence:
    """Errors drawn at random: those of blocks that were found grow with their age, those of
    caches are nothing at first and grow faster."""
    generator = torch.Generator().manual_seed(seed)
    shape = layers, HEADS, SPACE.slots, 1, 2, 3
    error = torch.rand(shape, generator=generator).expand(-1, -1, -1, 2, -1, -1).clone()
    error *= torch.tensor([0.0, 3.0, 0.3, 0.8, 0.5, 0.6])[:, None, None, None]
    age = torch.tensor(SEEN.ages)
    error[:, :, 4] *= 1 + 0.3 * age
    error[:, :, :, 1] *= 0.25 * age
    density = torch.tensor(DENSITIES).repeat_interleave(2).repeat(layers, HEADS, 1)
    density[..., 1] = torch.inf
    return Evidence(
        layers=tuple(f"transformer.blocks.{layer}.attn1" for layer in range(layers)),
        space=SPACE,
        sightings=SEEN,
        schedules=SCHEDULES,
        grid=GRID,
        block=BLOCK,
        head_dim=(HEAD_DIM,) * layers,
        copies=2,
        error=error.flatten(2, 3),
        density=density,
        column_mass=torch.rand(layers, HEADS, 6, generator=generator),
        importance=torch.ones(len(SEEN.anchors)),
    )


def calibrated(evidence: Evidence, launch: float = 0.02) -> Evidence:
    """`evidence` with times: a pass takes 1.25 of dense attention for its density, at least a
    launch, a search .1, taking a cache .03, applying it .02."""
    does = torch.ones(SPACE.slots, 2, 4)
    does[..., 1] = torch.tensor([isinstance(p, Scored) for p in (*SPACE.patterns, None)])[:, None]
    does[:, 0, 2:] = 0
    does = does.flatten(0, 1)
    return replace(
        evidence,
        time=(1.25 * evidence.density).clamp_min(launch),
        stage_time=does[:, 1:] * torch.tensor([0.1, 0.03, 0.02]),
        launch_time=does * torch.tensor([launch, 0.01, 0.004, 0.003]),
    )


def plan_of(evidence: Evidence) -> Plan:
    """A plan of full heads that carries `evidence`."""
    layers = len(evidence.layers)
    return Plan(
        {
            "transformer": ModelFingerprint(
                "WanTransformer3DModel", layers, HEADS, HEAD_DIM, "0" * 64
            )
        },
        {layer: (Full(),) * HEADS for layer in evidence.layers},
        SCHEDULES[0],
        grid=GRID.shape,
        block=BLOCK,
        provenance={"search": evidence.description()},
        evidence=evidence.arrays(),
        timing={"dense": TIMING.to_dict()},
    )


def picked(table: Tensor, chosen: Tensor) -> float:
    """The sum over heads of the entries of `table` that are chosen."""
    return table.gather(-1, chosen[..., None]).sum().item()


def hull_steps(error: Tensor, cost: Tensor) -> list[float]:
    """Falls of the error along the lower convex hull of every head, `[heads, candidates]`, by
    gift wrapping."""
    steps = []
    for errors, costs in zip(error.tolist(), cost.tolist(), strict=True):
        own = range(len(errors))
        at = min(own, key=lambda c: (costs[c], errors[c]))
        while True:
            right = [c for c in own if costs[c] > costs[at] and errors[c] < errors[at]]
            if not right:
                break
            then = max(right, key=lambda c: (errors[at] - errors[c]) / (costs[c] - costs[at]))
            steps.append(errors[at] - errors[then])
            at = then
    return steps
