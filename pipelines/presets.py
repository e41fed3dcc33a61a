"""Presets: the settings that papers publish, as values.

A preset is what a paper ran, on the token grid and number of steps that it ran on; `Plan.preset`
makes an ordinary plan of it for a model, its grid and number of steps. Windows and bands keep the
share of every axis that they had, steps their share of the generation.
"""

from dataclasses import dataclass, replace

from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import (
    AnyOf,
    Band,
    Choice,
    Neighborhood,
    Pattern,
    Radial,
    Sink,
    Skip,
    Stripes,
)
from dit_sparse.kernels.remainder import Complement, Drop, Pooled, Remainder, Rescale
from dit_sparse.kernels.scaling import at_density, at_grid
from dit_sparse.kernels.score import Clustered, Mass, Means, Oracle, Random, Sampled
from dit_sparse.kernels.scored import Scored
from dit_sparse.kernels.select import Bands, Cumulative, Grouped, Tiers, TopRow
from dit_sparse.pipelines.schedule import Schedule

COGVIDEOX = TokenGrid(13, 30, 45, text_before=226)
HUNYUAN = TokenGrid(30, 48, 80, text_after=256)
WAN = TokenGrid(21, 45, 80)


COMPARED = 12 / 50
"""Share of the steps that run dense where methods are compared at one density."""


@dataclass(frozen=True, slots=True)
class Preset:
    """A published setting.

    Args:
        source: the paper, and where in it.
        grid: the token grid of the publication.
        steps: the denoising steps of the publication.
        pattern: of all heads.
        schedule: for `steps` steps.
        remainder: of all heads.
        dense_layers: leading self-attention layers that run dense.
        block: tokens of a block of queries and of keys.
    """

    source: str
    grid: TokenGrid
    steps: int
    pattern: Pattern
    schedule: Schedule
    remainder: Remainder = Drop()
    dense_layers: int = 0
    block: int = 128

    def fitted(self, grid: TokenGrid, steps: int, density: float | None) -> "Preset":
        """The same for another grid and number of steps; at a block density, if given, with
        the dense first steps of `COMPARED` instead of the paper's own."""
        pattern = at_grid(self.pattern, self.grid, grid)
        schedule = self.schedule.scaled(steps / self.steps)
        if density is not None:
            pattern = at_density(pattern, self._listed(density), grid, self.block)
            schedule = replace(schedule, dense_first=round(COMPARED * steps))
        return replace(self, grid=grid, steps=steps, pattern=pattern, schedule=schedule)

    def _listed(self, density: float) -> float:
        """The share of listed blocks that computes `density` together with the pooled others."""
        if not isinstance(self.remainder, Pooled):
            return density
        least = 0.5**self.remainder.level
        if density <= least:
            raise ValueError(
                f"density {density:g} is out of reach, {self.remainder} alone computes {least:g}"
            )
        return (density - least) / (1 - least)


EVERY_STEP = Schedule(renew_every=1)

PRESETS: dict[str, Preset] = {
    "adaspa": Preset(
        "arXiv 2502.21079: sparsity 0.8, searches at steps 10 and 30",
        HUNYUAN,
        50,
        Scored(Mass(rows=None), Tiers(0.2)),
        Schedule(dense_first=9, renew_at=(29,)),
        block=64,
    ),
    "sparse-vdit": Preset(
        "arXiv 2506.03065: lambda 0.5, epsilon 1; every head chooses at its first "
        "sparse step; widths and the rule of stripes, which are not published, are ours",
        HUNYUAN,
        50,
        Choice(
            (
                Skip(),
                Band.of_density(0.25, HUNYUAN),
                Band.of_density(0.25, HUNYUAN, "pixel_major"),
                Stripes(0.25),
            ),
            metric="sum_d",
            price=0.5,
            limit=1.0,
        ),
        Schedule(dense_first=10),
    ),
    "svg1": Preset(
        "arXiv 2502.01776, the authors' code for Wan 2.1: density 0.3, sink, one dense layer",
        WAN,
        50,
        Choice(
            (
                AnyOf((Band.of_density(0.3, WAN), Sink())),
                AnyOf((Band.of_density(0.3, WAN, "pixel_major"), Sink())),
            )
        ),
        Schedule(dense_first=10, renew_every=1),
        dense_layers=1,
    ),
    "re-ttention": Preset(
        "arXiv 2505.22918: CogVideoX-2b, window of 1/32 of a frame, period 5",
        COGVIDEOX,
        50,
        Band.retention(0.03125, COGVIDEOX),
        Schedule(dense_first=15, renew_every=5),
        Rescale(),
    ),
    "gna": Preset(
        "arXiv 2504.16922: HunyuanVideo, 91 % sparse",
        HUNYUAN,
        50,
        Neighborhood((18, 24, 24), (16, 8, 8)),
        Schedule(dense_first=15),
    ),
    "sta": Preset(
        "arXiv 2502.04507: HunyuanVideo, windows of 3x3x3 tiles",
        HUNYUAN,
        50,
        Neighborhood.sliding_tiles((3, 3, 3)),
        Schedule(dense_first=12),
    ),
    "svg2": Preset(
        "arXiv 2505.18875, the authors' code for Wan 2.1 at 720p: one dense layer",
        WAN,
        50,
        Scored(Clustered(300, 1000), Cumulative(0.9, floor=0.1)),
        Schedule(dense_first=10, renew_every=1),
        dense_layers=1,
    ),
    "radial": Preset(
        "arXiv 2506.19852, the authors' code for Wan 2.1: decay 0.2, sink, one dense layer",
        WAN,
        50,
        AnyOf((Radial("repo", 0.2), Sink())),
        Schedule(dense_first=12),
        dense_layers=1,
    ),
    "psa": Preset(
        "arXiv 2512.04025, the authors' code for Wan 2.1 14B",
        WAN,
        50,
        Scored(Sampled(32), Bands((0.4, 0.5, 0.6, 0.8), "mass", least=0.06), "gilbert"),
        Schedule(dense_first=15, renew_every=1),
    ),
    "asa": Preset(
        "arXiv 2508.10774, the constants of the authors' code for Wan 2.1 1.3B, untrained",
        WAN,
        50,
        Scored(Sampled(32), Cumulative(0.95, 0.05, 0.17), "gilbert"),
        EVERY_STEP,
    ),
    "asa-repo": Preset(
        "arXiv 2508.10774, the authors' code for Wan 2.1 1.3B, untrained: a row stops before the "
        "block that reaches its mass",
        WAN,
        50,
        Scored(Sampled(32), Cumulative(0.95, 0.05, 0.17, crossing=False), "gilbert"),
        EVERY_STEP,
    ),
    "asa-g": Preset(
        "arXiv 2508.10774, with global tokens, over the dropped blocks alone and by 32 for 30",
        WAN,
        50,
        Scored(Sampled(32), Cumulative(0.95, 0.05, 0.17), "gilbert"),
        EVERY_STEP,
        Pooled(5),
    ),
    "sparsed": Preset(
        "arXiv 2509.24014: the first fifth dense, then one search, 0.3 of each row",
        WAN,
        50,
        Scored(Mass(rows=None), Grouped(0.3)),
        Schedule(dense_first=10),
    ),
    "sparge": Preset(
        "arXiv 2502.18137, the authors' code without calibration: half of each row",
        WAN,
        50,
        # Its pvthreshd of 50, powers of two, leaves out less than any output shows.
        Scored(Means(), TopRow(0.5)),
        EVERY_STEP,
    ),
}

COMBINATIONS: dict[str, Preset] = {
    "random": Preset(
        "a baseline: blocks drawn by lot",
        WAN,
        50,
        Scored(Random(), TopRow(0.2)),
        Schedule(dense_first=10),
    ),
    "mass-each-step": Preset(
        "a baseline: the blocks of most attention by the LSE of the first sparse step, found anew "
        "at every step",
        WAN,
        50,
        Scored(Mass(rows=None), TopRow(0.2)),
        Schedule(dense_first=10, renew_every=1),
    ),
    "oracle": Preset(
        "a baseline: the blocks of most attention of every step, told by a dense pass of its own",
        WAN,
        50,
        Scored(Oracle(), TopRow(0.2)),
        Schedule(dense_first=10, renew_every=1),
    ),
    "random+complement": Preset(
        "blocks drawn by lot, merged with what they left out at the last dense step",
        WAN,
        50,
        Scored(Random(), TopRow(0.2)),
        Schedule(dense_first=10, renew_every=12),
        Complement(),
    ),
    "adaspa+complement": Preset(
        "AdaSpa's blocks, merged with what they left out at the last dense step",
        HUNYUAN,
        50,
        Scored(Mass(rows=None), Tiers(0.2)),
        Schedule(dense_first=9, renew_every=12),
        Complement(),
        block=64,
    ),
    "adaspa+pooled": Preset(
        "AdaSpa's blocks, and means of eight keys of all others",
        HUNYUAN,
        50,
        Scored(Mass(rows=None), Tiers(0.2)),
        Schedule(dense_first=9, renew_at=(29,)),
        Pooled(3),
        block=64,
    ),
    "gna+complement": Preset(
        "GNA's windows, merged with what they left out at the last dense step",
        HUNYUAN,
        50,
        Neighborhood((18, 24, 24), (16, 8, 8)),
        Schedule(dense_first=10, renew_every=12),
        Complement(),
    ),
    "gna+pooled": Preset(
        "GNA's windows, and means of eight keys of all other blocks",
        HUNYUAN,
        50,
        Neighborhood((18, 24, 24), (16, 8, 8)),
        Schedule(dense_first=15),
        Pooled(3),
    ),
}
"""Baselines, and what no paper combines."""
