"""Observer: sees query, key and value of every self-attention call of a dense run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.pipelines.binding import Site, bind
from dit_sparse.pipelines.seam import SeamCall
from dit_sparse.pipelines.steps import Clock
from dit_sparse.pipelines.stopwatch import Stopwatch

OBSERVING, ATTENTION = "observing", "attention"
"""Under which names a stopwatch is told of the observer's own work and of the attention."""


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """Which self-attention module a call belongs to.

    Args:
        component (`str`): the pipeline's component, `"transformer"` or `"transformer_2"`.
        path (`str`): of the module in the component, `"blocks.0.attn1"`.
        layer (`int`): its number among the self-attention modules of the component, from 0.
    """

    component: str
    path: str
    layer: int

    @property
    def name(self) -> str:
        """The key of the module in `Plan.assignment`."""
        return f"{self.component}.{self.path}"


Observer = Callable[[AttentionSite, str, int, int, TokenGrid, Tensor, Tensor, Tensor], None]


@contextmanager
def observe_attention(
    pipe: Any, observer: Observer, stopwatch: Stopwatch | None = None
) -> Iterator[None]:
    """Call `observer` with every self-attention call of the model's own, dense attention.

    The output of the pipeline does not change by a bit. Calls come as they run, both guidance
    branches, in the order of layers and steps.

    Args:
        pipe (`DiffusionPipeline`): on which no plan is in effect.
        observer (`Callable`): takes `(site, branch, step, steps, grid, query, key, value)`. The
            tensors are `[batch, tokens, heads, head_dim]` after the rotary embedding, any
            strides, not copied: what is kept beyond the call must be cloned, and nothing may be
            written to them.
        stopwatch (`Stopwatch`, *optional*): times every call, as `ATTENTION`, and the observer,
            as `OBSERVING`.

    Raises:
        ValueError: if a plan is in effect on the pipeline, if it is observed already, or, at the
            first call, if the denoising step cannot be told.
    """
    bindings = bind(pipe, _Receiver(pipe, observer, stopwatch or Stopwatch()))
    try:
        yield
    finally:
        for binding in bindings:
            binding.detach()


class _Seen(Exception):
    """Ends a run at its first self-attention call."""

    def __init__(self, grid: TokenGrid) -> None:
        super().__init__(str(grid))
        self.grid = grid


def observed_grid(pipe: Any, **arguments: Any) -> TokenGrid:
    """The token grid of a generation with these arguments, read off its first attention call.

    Raises:
        ValueError: if the pipeline makes no self-attention call.
    """

    def stop(
        _site: AttentionSite, _branch: str, _step: int, _steps: int, grid: TokenGrid, *_: Tensor
    ) -> None:
        raise _Seen(grid)

    try:
        with observe_attention(pipe, stop):
            pipe(
                prompt="",
                num_inference_steps=1,
                generator=torch.Generator("cpu").manual_seed(0),
                output_type="latent",
                **arguments,
            )
    except _Seen as seen:
        return seen.grid
    raise ValueError("no self-attention call of the pipeline was seen; is it a known family?")


class _Receiver:
    def __init__(self, pipe: Any, observer: Observer, stopwatch: Stopwatch) -> None:
        self.clock = Clock(pipe)
        self._observer = observer
        self._stopwatch = stopwatch

    def attend(self, site: Site, call: SeamCall) -> Tensor:
        batch, tokens = call.query.shape[:2]
        grid = site.binding.family.token_grid(call.shape, tokens)
        moment = self.clock.now((batch, *grid.shape))
        if moment.step is None or moment.steps is None:
            raise site.refusal(
                "the denoising step cannot be told; observe a pipeline, not a bare transformer"
            )
        device = call.query.device
        with self._stopwatch.stretch(OBSERVING, device):
            self._observer(
                AttentionSite(site.binding.component, site.path, site.layer),
                moment.branch,
                moment.step,
                moment.steps,
                grid,
                call.query,
                call.key,
                call.value,
            )
        with self._stopwatch.stretch(ATTENTION, device):
            return call.dense()
