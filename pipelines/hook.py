"""SparseAttentionHook: puts a plan on a pipeline and takes it off again.

The hook answers every self-attention call of the pipeline's transformers: dense where the plan's
schedule or a layer of full heads says so, sparse otherwise. Nothing else makes a call dense; one
that cannot follow the plan is an error.
"""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from dit_sparse.kernels.blocks import Density
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.pipelines.binding import Binding, Site, bind, receiver_of
from dit_sparse.pipelines.group_attention import GroupAttention, Place
from dit_sparse.pipelines.heads import HeadGroup, head_groups
from dit_sparse.pipelines.parts import Operands
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.report import (
    DENSE,
    AttentionReport,
    Call,
    Record,
    mean_density,
)
from dit_sparse.pipelines.seam import SeamCall
from dit_sparse.pipelines.steps import Clock, Moment
from dit_sparse.pipelines.stopwatch import Stopwatch


class SparseAttentionHook:
    """A plan in effect on a pipeline; `enable_sparse_attention` makes one.

    As a context manager it takes the plan off at the end.

    Args:
        pipe (`DiffusionPipeline`): whose clock the hook follows.
        plan (`Plan`): checked against the pipeline already.
        backend (`str`): `"auto"`, or the name of a backend of `dit_sparse.kernels`.
    """

    def __init__(self, pipe: Any, plan: Plan, backend: str) -> None:
        self.plan = plan
        self.backend = backend
        self._phases = tuple(
            {
                layer: head_groups(heads, phase.remainders_of(layer))
                for layer, heads in phase.assignment.items()
            }
            for phase in plan.phases
        )
        renewing = (
            layer
            for layer in plan.assignment
            if any(group.renewed for phase in self._phases for group in phase[layer])
        )
        self._numbers = {layer: number for number, layer in enumerate(renewing)}
        distinct = {g for phase in self._phases for groups in phase.values() for g in groups}
        self._attention = GroupAttention(
            distinct, plan.schedule, plan.block, backend, plan.cache_limit
        )
        self.clock = Clock(pipe)
        self._generation = self._phase = 0
        self._record, self._stopwatch = Record(), Stopwatch()
        self._bindings: tuple[Binding, ...] = bind(pipe, self)

    def attend(self, site: Site, call: SeamCall) -> Tensor:
        """Answer one self-attention call, `[batch, tokens, heads, head_dim]`."""
        batch, tokens, heads, _ = call.query.shape
        planned = len(self.plan.assignment[site.name])
        if heads != planned:
            raise site.refusal(f"it came with {heads} heads, the plan has {planned}")
        grid = site.binding.family.token_grid(call.shape, tokens)
        moment = self.clock.now((batch, *grid.shape))
        if moment.generation != self._generation:
            self._generation, self._phase = moment.generation, 0
            self._record, self._stopwatch = Record(), Stopwatch()
            self._attention.begin()
        groups = self._groups_at(site, moment)
        dense = self._dense_reason(site, groups, moment)
        with self._stopwatch.stretch("calls", call.query.device):
            if dense is None:
                output, computed = self._sparse(site, groups, grid, call, moment)
            else:
                output, computed = call.dense(), Call(DENSE, 1.0, dense)
        self._record.add(site.name, computed)
        return output

    def report(self) -> AttentionReport:
        """What the last generation computed, call by call, or the running one so far."""
        return self._record.report(
            self.plan.assignment,
            self._stopwatch.seconds().get("calls", 0.0),
            self._attention.stopwatch.seconds(),
            self._attention.memory,
        )

    def disable(self) -> None:
        """Take the plan off: the original processors are back. Twice is once."""
        for binding in self._bindings:
            binding.detach()
        self._bindings = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.disable()

    def _groups_at(self, site: Site, moment: Moment) -> tuple[HeadGroup, ...]:
        """The groups of the running phase; what was kept in the one before is forgotten."""
        schedule = self.plan.schedule
        needs_step = not schedule.always_sparse or site.name in self._numbers
        if not any(phase[site.name] for phase in self._phases):
            return ()
        if needs_step and (moment.step is None or moment.steps is None):
            raise site.refusal(
                "what it does depends on the denoising step, which neither the pipeline nor the "
                "scheduler tells; use a plan without dense steps, phases, scored patterns and "
                "caches"
            )
        phase = 0
        if schedule.phases:
            assert moment.step is not None
            assert moment.steps is not None
            phase = schedule.phase(moment.step, moment.steps)
        if phase != self._phase:
            self._phase = phase
            self._attention.memory.forget()
        return self._phases[phase][site.name]

    def _dense_reason(
        self, site: Site, groups: tuple[HeadGroup, ...], moment: Moment
    ) -> str | None:
        if not groups:
            return "all heads are full"
        if moment.step is None or moment.steps is None:
            return None
        try:
            dense = self.plan.schedule.dense(moment.step, moment.steps, moment.sigma)
        except ValueError as error:
            raise site.refusal(str(error)) from error
        return "dense steps of the schedule" if dense else None

    def _sparse(
        self,
        site: Site,
        groups: tuple[HeadGroup, ...],
        grid: TokenGrid,
        call: SeamCall,
        moment: Moment,
    ) -> tuple[Tensor, Call]:
        output = call.query.new_empty(call.query.shape)
        densities: list[tuple[Density, int]] = []
        flops, dense = 0.0, True
        for number, group in enumerate(groups):
            heads = slice(None) if len(groups) == 1 else list(group.heads)
            operands = Operands(
                call.query[:, :, heads], call.key[:, :, heads], call.value[:, :, heads], call.scale
            )
            turn = self._numbers.get(site.name, 0)
            place = Place(moment.branch, site.name, number, moment.step or 0, turn)
            try:
                computed = self._attention(group, place, operands, grid)
            except ValueError as error:
                raise site.refusal(str(error)) from error
            output[:, :, heads] = computed.output
            densities.append((computed.density, len(group.heads)))
            flops += computed.flops * len(group.heads) / call.query.shape[2]
            dense = dense and computed.dense
        return output, Call(mean_density(densities), flops, "renewal" if dense else None)


def enable_sparse_attention(
    pipe: Any, plan: Plan | str | Path, *, backend: str = "auto"
) -> SparseAttentionHook:
    """Run the self-attention of a diffusers pipeline by a plan, from now on.

    Args:
        pipe (`DiffusionPipeline`): or a bare transformer of a known family.
        plan (`Plan` or `str`): a plan, its folder, or its Hub id.
        backend (`str`, defaults to `"auto"`): an explicit backend never falls back to another.

    Returns:
        `SparseAttentionHook`: to report on the last generation; `with` takes the plan off again.

    Raises:
        ValueError: if the plan is for another model, or a plan is in effect already.

    Example:

        with enable_sparse_attention(pipe, "plans/wan-480p") as hook:
            frames = pipe("a cat surfing").frames[0]
        print(hook.report())
    """
    if not isinstance(plan, Plan):
        plan = Plan.from_pretrained(plan)
    plan.check(pipe)
    return SparseAttentionHook(pipe, plan, backend)


def disable_sparse_attention(pipe: Any) -> None:
    """Take the plan off a pipeline: the very processors it had before are back.

    Raises:
        ValueError: if no plan is in effect on it.
    """
    receiver = receiver_of(pipe)
    if not isinstance(receiver, SparseAttentionHook):
        raise ValueError("sparse attention is not enabled on this pipeline")
    receiver.disable()
