"""Plan: Pattern x Remainder x Schedule for every layer and head of one model.

A plan is a folder: `plan.json`, which a person can read and compare, and `evidence.safetensors`,
the tables of the search, if there was one. A digest over both tells a plan from an edited one.
"""

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Self, TypeVar

from huggingface_hub import HfApi
from torch import Tensor

from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Full, Pattern, pattern_from_dict, pattern_to_dict
from dit_sparse.kernels.remainder import REMAINDERS, Drop, Remainder
from dit_sparse.kernels.values import from_dict, to_dict
from dit_sparse.pipelines import plan_file
from dit_sparse.pipelines.family import Shape, family_of, transformers_of
from dit_sparse.pipelines.fingerprint import ModelFingerprint, fingerprints
from dit_sparse.pipelines.phase import Phase, tally
from dit_sparse.pipelines.plan_file import ModelEntry, PhaseEntry, PlanFile, ScheduleEntry
from dit_sparse.pipelines.presets import COMBINATIONS, PRESETS
from dit_sparse.pipelines.schedule import Schedule

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Patterns for every layer and head of the transformers of one pipeline.

    Two plans are the same plan when their digests are equal.

    Args:
        model (`dict[str, ModelFingerprint]`): the transformers it was made for, by the name of
            the pipeline's component (`"transformer"`, `"transformer_2"`).
        assignment (`dict[str, tuple[Pattern, ...]]`): one pattern per head for each
            self-attention module, by component and path: `"transformer.blocks.0.attn1"`.
        schedule (`Schedule`): the steps that run dense, and those that renew what was found.
        remainders (`dict[str, tuple[Remainder, ...]]`): what becomes of the pairs that a head does
            not compute, one for each head of the layers named; the others drop them.
        later (`tuple[Phase, ...]`): pattern and remainder of every head in the further phases of
            the schedule; what is above holds for the first.
        cache_limit (`int`, *optional*): bytes that the caches of remainders may hold together;
            beyond it the heads that lose least go without.
        grid (`tuple[int, int, int]`, *optional*): the (frames, height, width) in tokens of the
            search. Analytic patterns run at any other grid, listed columns refuse.
        block (`int`, defaults to 64): tokens of a query block and of a key block.
        provenance (`dict`): how the plan came about; any JSON object.
        evidence (`dict[str, Tensor]`): the tables of the search, from which another budget is
            solved; may be empty.
        timing (`dict`): what clocks said, and what was predicted from it; any JSON object. It is
            never the same twice and no part of the digest.

    Raises:
        ValueError: if `assignment` does not fit `model`, or `provenance` is not JSON.

    Example:

        plan = Plan.uniform(pipe, Neighborhood((5, 9, 9)), Schedule(dense_first=4))
        plan.save_pretrained("plans/neighborhood")
        plan = Plan.from_pretrained("plans/neighborhood")
    """

    model: dict[str, ModelFingerprint]
    assignment: dict[str, tuple[Pattern, ...]]
    schedule: Schedule = Schedule()
    remainders: dict[str, tuple[Remainder, ...]] = field(default_factory=dict)
    later: tuple[Phase, ...] = ()
    cache_limit: int | None = None
    grid: Shape | None = None
    block: int = 64
    provenance: dict[str, Any] = field(default_factory=dict)
    evidence: dict[str, Tensor] = field(default_factory=dict)
    timing: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if type(self.block) is not int or self.block < 1:
            raise ValueError(f"block: expected a number of tokens >= 1, came {self.block!r}")
        if self.cache_limit is not None and not self.cache_limit >= 0:
            raise ValueError(f"cache_limit: expected bytes >= 0, came {self.cache_limit!r}")
        for phase in self.phases:
            phase.check(self.model)
        if len(self.later) != len(self.schedule.phases):
            raise ValueError(
                f"later: expected what heads do in each of {len(self.schedule.phases)} further "
                f"phases of the schedule, came {len(self.later)}"
            )
        for phase in self.later:
            if set(phase.assignment) != set(self.assignment):
                differing = min(set(phase.assignment) ^ set(self.assignment))
                raise ValueError(f"later: layer {differing} is not in every phase; name it in all")
        for name in ("provenance", "timing"):
            try:
                plain = json.loads(json.dumps(getattr(self, name), allow_nan=False))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name}: expected a JSON object: {error}") from error
            object.__setattr__(self, name, plain)

    @classmethod
    def uniform(
        cls,
        pipe: Any,
        pattern: Pattern,
        schedule: Schedule = Schedule(),
        remainder: Remainder = Drop(),
        *,
        cache_limit: int | None = None,
        grid: Shape | None = None,
        block: int = 64,
    ) -> Self:
        """The plan that treats every head of every layer of `pipe` alike, in every phase."""
        model = fingerprints(pipe)
        assignment = {
            path: (pattern,) * model[path.partition(".")[0]].heads for path in layer_paths(pipe)
        }
        remainders = {}
        if remainder != Drop():
            remainders = {path: (remainder,) * len(heads) for path, heads in assignment.items()}
        return cls(
            model=model,
            assignment=assignment,
            schedule=schedule,
            remainders=remainders,
            later=(Phase(assignment, remainders),) * len(schedule.phases),
            cache_limit=cache_limit,
            grid=grid,
            block=block,
            provenance={"uniform": str(pattern)},
        )

    @classmethod
    def preset(
        cls, name: str, pipe: Any, *, grid: Shape, steps: int, density: float | None = None
    ) -> Self:
        """The plan that a paper publishes, for the model, token grid and steps of a generation.

        Windows and bands keep the share of every axis that they have on the grid of the paper,
        dense and renewing steps their share of its steps.

        Args:
            name (`str`): one of `PRESETS` or `COMBINATIONS` of `dit_sparse.pipelines.presets`.
            pipe (`DiffusionPipeline`): of a known family.
            grid (`tuple[int, int, int]`): frames, height and width in tokens.
            steps (`int`): denoising steps of a generation.
            density (`float`, *optional*): block density of the sparse steps, instead of the
                published one; the first 12 of 50 steps are then dense, for every preset alike.

        Raises:
            ValueError: if there is no such preset, or its pattern cannot have that density.

        Example:

            plan = Plan.preset("adaspa", pipe, grid=(21, 45, 80), steps=50)
        """
        known = PRESETS | COMBINATIONS
        if name not in known:
            raise ValueError(f"preset: expected one of {', '.join(known)}, came {name!r}")
        fitted = known[name].fitted(TokenGrid(*grid), steps, density)
        sparse = cls.uniform(
            pipe,
            fitted.pattern,
            fitted.schedule,
            fitted.remainder,
            grid=grid,
            block=fitted.block,
        )
        dense = list(sparse.assignment)[: fitted.dense_layers]
        full = {path: (Full(),) * len(sparse.assignment[path]) for path in dense}
        provenance = {"preset": name, "source": fitted.source, "density": density, "steps": steps}
        return replace(sparse, assignment=sparse.assignment | full, provenance=provenance)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """What heads do in each phase of the schedule, from the first step on."""
        return Phase(self.assignment, self.remainders), *self.later

    @property
    def heads(self) -> dict[tuple[Pattern, Remainder], float]:
        """How many heads run each pattern with each remainder, the most first; one that does so in
        some phases counts as their share of the steps."""
        return tally(
            ((pattern, remainder), share)
            for phase, share in zip(self.phases, self.schedule.shares, strict=True)
            for _, pattern, remainder in phase.heads
        )

    @property
    def renews(self) -> bool:
        """Whether a layer keeps anything from one step for the next: blocks that it found, caches
        of remainders."""
        return any(phase.renews for phase in self.phases)

    def cache_bytes(self, grid: TokenGrid, batch: int = 1) -> int:
        """Memory that one guidance branch keeps between the steps of a generation on `grid`: the
        caches of remainders, at most their limit, and the LSEs and centroids for further
        searches; of the phase that keeps most."""
        most = 0
        for phase in self.phases:
            limited, again = self.cache_limit is not None, self.schedule.renews_again
            caches, searches = phase.kept_bytes(
                self.model, grid, batch, again=again, limited=limited
            )
            if self.cache_limit is not None:
                caches = min(caches, self.cache_limit)
            most = max(most, caches + searches)
        return most

    def check(self, pipe: Any) -> None:
        """Raise `ValueError` unless the plan was made for the transformers of `pipe`."""
        came = fingerprints(pipe)
        if set(came) != set(self.model):
            raise ValueError(
                f"the plan is for the components {', '.join(sorted(self.model))}, the pipeline "
                f"has {', '.join(sorted(came))}; search a plan for this model"
            )
        for component, expected in self.model.items():
            difference = expected.difference(came[component])
            if difference is not None:
                raise ValueError(
                    f"the plan is for another model: {component}.{difference}; "
                    "search a plan for this model"
                )
        unknown = set(self.assignment) - set(layer_paths(pipe))
        if unknown:
            raise ValueError(
                f"the plan names {min(unknown)}, which is no self-attention layer of the model; "
                "search a plan for this model"
            )

    @property
    def predicted(self) -> dict[str, float]:
        """What the search expects of the plan: `density`, `error` and, where times are known,
        `attention`, `speedup` and `seconds`; empty without a search."""
        return self.provenance.get("predicted", {}) | self.timing.get("predicted", {})

    @property
    def digest(self) -> str:
        """sha256 over the canonical JSON and the evidence, hexadecimal."""
        return plan_file.digest(self._file().model_dump(mode="json"), self.evidence)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the plan into `folder`, which is made if need be; other files in it stay.

        A plan already there is replaced only once the new files are complete.
        """
        plan_file.write(Path(folder), self._file(), self.evidence)

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: str | Path, revision: str | None = None) -> Self:
        """Read a plan from a folder, or from the Hugging Face Hub (`"user/name"`).

        Raises:
            ValueError: one line that says what is wrong with the plan and what to do.
        """
        folder = plan_file.locate(folder_or_hub_id, revision)
        file, evidence = plan_file.read(folder)
        try:
            patterns = [pattern_from_dict(entry) for entry in file.patterns]
            remainders = [from_dict(entry, "remainder", REMAINDERS) for entry in file.remainders]
            return cls(
                model={
                    component: ModelFingerprint(**entry.model_dump())
                    for component, entry in file.model.items()
                },
                assignment=_values(file.assignment, patterns),
                schedule=Schedule(**file.schedule.model_dump()),
                remainders=_values(file.treatment, remainders),
                later=tuple(
                    Phase(
                        _values(entry.assignment, patterns), _values(entry.treatment, remainders)
                    )
                    for entry in file.later
                ),
                cache_limit=file.cache_limit,
                grid=file.grid,
                block=file.block,
                provenance=file.provenance,
                evidence=evidence,
                timing=file.timing,
            )
        except IndexError as error:
            raise ValueError(
                f"{folder}: a layer names a pattern beyond the table of {len(file.patterns)}, or "
                f"a remainder beyond that of {len(file.remainders)}; copy the plan again"
            ) from error
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error

    def push_to_hub(self, hub_id: str, *, private: bool | None = None) -> str:
        """Upload the plan to the Hub as a model repository; returns the address of the commit."""
        api = HfApi()
        repository = api.create_repo(hub_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repository, folder_path=folder))

    def _file(self) -> PlanFile:
        patterns = _table(phase.assignment for phase in self.phases)
        remainders = _table(phase.remainders for phase in self.phases)
        return PlanFile(
            model={
                component: ModelEntry(**asdict(fingerprint))
                for component, fingerprint in self.model.items()
            },
            schedule=ScheduleEntry(**asdict(self.schedule)),
            grid=self.grid,
            block=self.block,
            patterns=[pattern_to_dict(pattern) for pattern in patterns],
            assignment=_indices(self.assignment, patterns),
            remainders=[to_dict(remainder) for remainder in remainders],
            treatment=_indices(self.remainders, remainders),
            later=[
                PhaseEntry(
                    assignment=_indices(phase.assignment, patterns),
                    treatment=_indices(phase.remainders, remainders),
                )
                for phase in self.later
            ],
            cache_limit=self.cache_limit,
            provenance=self.provenance,
            evidence=sorted(self.evidence),
            timing=self.timing,
        )


def _table(phases: Iterable[dict[str, tuple[Value, ...]]]) -> dict[Value, int]:
    """Every value of the layers once, with its place among them."""
    layers = chain.from_iterable(phase.values() for phase in phases)
    distinct = dict.fromkeys(chain.from_iterable(layers))
    return {value: index for index, value in enumerate(distinct)}


def _indices(
    layers: dict[str, tuple[Value, ...]], table: dict[Value, int]
) -> dict[str, list[int]]:
    return {path: [table[value] for value in values] for path, values in layers.items()}


def _values(layers: dict[str, list[int]], table: Sequence[Value]) -> dict[str, tuple[Value, ...]]:
    return {path: tuple(table[index] for index in indices) for path, indices in layers.items()}


def layer_paths(pipe: Any) -> dict[str, Any]:
    """The self-attention modules of a pipeline by component and path, in the order they run."""
    return {
        f"{component}.{path}": module
        for component, transformer in transformers_of(pipe).items()
        for path, module in family_of(transformer).attention_modules(transformer).items()
    }
