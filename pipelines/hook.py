"""SparseAttentionHook: puts a plan on a pipeline and takes it off again.

The hook answers every self-attention call of the pipeline's transformers: dense where the plan's
schedule or a layer of full heads says so, sparse otherwise. Nothing else makes a call dense; one
that cannot follow the plan is an error.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from dit_sparse.kernels.attention import sparse_attention
from dit_sparse.kernels.blocks import BlockIndices, Density, block_indices
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import TokenOrder
from dit_sparse.kernels.pattern import Full, Pattern
from dit_sparse.pipelines.binding import Binding, Site, bind, receiver_of
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.report import AttentionReport, Record, mean_density
from dit_sparse.pipelines.seam import SeamCall
from dit_sparse.pipelines.steps import Clock, Moment

GRIDS_KEPT = 4  # resolutions whose block lists stay in memory


@dataclass(frozen=True, slots=True)
class HeadGroup:
    """Heads of one layer that run in one call, because their patterns want one token order."""

    heads: tuple[int, ...]
    patterns: tuple[Pattern, ...]


def head_groups(patterns: tuple[Pattern, ...]) -> tuple[HeadGroup, ...]:
    """The heads of a layer by token order; full and skipped heads ride with the first group.

    None for a layer whose heads are all full: it runs the model's own attention.
    """
    if all(pattern == Full() for pattern in patterns):
        return ()
    orders: dict[TokenOrder | None, list[int]] = {}
    for head, pattern in enumerate(patterns):
        if pattern.order is not None:
            orders.setdefault(pattern.order, []).append(head)
    riders = [head for head, pattern in enumerate(patterns) if pattern.order is None]
    groups = list(orders.values()) or [[]]
    groups[0] = sorted(groups[0] + riders)
    return tuple(
        HeadGroup(tuple(heads), tuple(patterns[head] for head in heads)) for heads in groups
    )


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
        self._groups = {layer: head_groups(heads) for layer, heads in plan.assignment.items()}
        distinct = {group.patterns for groups in self._groups.values() for group in groups}
        self._blocks = lru_cache(maxsize=GRIDS_KEPT * len(distinct))(self._block_indices)
        self.clock = Clock(pipe)
        self._generation = 0
        self._record = Record()
        self._bindings: tuple[Binding, ...] = bind(pipe, self)

    def attend(self, site: Site, call: SeamCall) -> Tensor:
        """Answer one self-attention call, `[batch, tokens, heads, head_dim]`."""
        batch, tokens, heads, _ = call.query.shape
        groups = self._groups[site.name]
        planned = len(self.plan.assignment[site.name])
        if heads != planned:
            raise site.refusal(f"it came with {heads} heads, the plan has {planned}")
        grid = site.binding.family.token_grid(call.shape, tokens)
        moment = self.clock.now((batch, *grid.shape))
        if moment.generation != self._generation:
            self._generation, self._record = moment.generation, Record()
        dense = self._dense_reason(site, moment)
        with self._record.call(site.name, grid, dense, call.query.device):
            if dense is not None:
                return call.dense()
            return self._sparse(site, groups, grid, call)

    def report(self) -> AttentionReport:
        """What the last generation computed, call by call, or the running one so far."""
        return self._record.report(self.plan.assignment, self._density)

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

    def _dense_reason(self, site: Site, moment: Moment) -> str | None:
        if not self._groups[site.name]:
            return "all heads are full"
        schedule = self.plan.schedule
        if schedule.always_sparse:
            return None
        if moment.step is None or moment.steps is None:
            raise site.refusal(
                "its schedule depends on the denoising step, which neither the pipeline nor the "
                "scheduler tells; use a plan without dense steps"
            )
        if schedule.dense(moment.step, moment.steps):
            return f"dense steps: first {schedule.dense_first}, last {schedule.dense_last}"
        return None

    def _sparse(
        self, site: Site, groups: tuple[HeadGroup, ...], grid: TokenGrid, call: SeamCall
    ) -> Tensor:
        output = call.query.new_empty(call.query.shape)
        for group in groups:
            try:
                blocks = self._blocks(group.patterns, grid)
            except ValueError as error:
                raise site.refusal(str(error)) from error
            heads = slice(None) if len(groups) == 1 else list(group.heads)
            output[:, :, heads], _ = sparse_attention(
                call.query[:, :, heads],
                call.key[:, :, heads],
                call.value[:, :, heads],
                blocks,
                scale=call.scale,
                backend=self.backend,
            )
        return output

    def _block_indices(self, patterns: tuple[Pattern, ...], grid: TokenGrid) -> BlockIndices:
        return block_indices(patterns, grid, block_q=self.plan.block, block_k=self.plan.block)

    def _density(self, layer: str, grid: TokenGrid) -> Density:
        density = mean_density(
            [
                (self._blocks(group.patterns, grid).density(), len(group.heads))
                for group in self._groups[layer]
            ]
        )
        assert density is not None
        return density


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
