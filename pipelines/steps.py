"""Clock: which denoising step of which branch of which generation is running.

The step is asked for when it is needed and never counted by forwards: guidance, caches and
skipped layers change how many forwards a step has. In order of preference it comes from

1. the `cache_context` that the pipeline opens around each forward, if it says the step;
2. the scheduler's own index, looked up late, since users replace `pipe.scheduler`;
3. how often this context was opened since the scheduler got new timesteps.

The branch of classifier-free guidance is the name of that context: `"cond"`, `"uncond"`,
`"cond_uncond"` for both in one batch, and `""` where a pipeline opens none.
"""

import weakref
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Moment:
    """Where a run of denoising is.

    Args:
        generation (`int`): counts the generations that the clock has seen, from 1.
        branch (`str`): the guidance branch.
        step (`int`, *optional*): the denoising step, from 0; `None` if nothing tells it.
        steps (`int`, *optional*): how many steps the generation has; `None` if nothing tells it.
        sigma (`float`, *optional*): the noise level of the step, where the scheduler has `sigmas`.
    """

    generation: int
    branch: str
    step: int | None
    steps: int | None
    sigma: float | None = None


class _NoPipe:
    """Gone as soon as it is weakly referenced."""


class Clock:
    """The clock of one pipeline, shared by its transformers.

    A new generation begins when the scheduler gets new timesteps, when the step of a branch goes
    backwards, and when the shape of a branch's call changes. An exception in the middle of a
    generation therefore leaves nothing behind for the next one.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = weakref.ref(pipe)
        self._contexts: list[tuple[str, dict[str, Any]]] = []
        self._opened: dict[str, int] = {}
        self._seen: dict[str, tuple[int | None, tuple[int, ...]]] = {}
        self._timesteps: Tensor | None = None
        self._generation = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The clock of the copied pipeline; it has none if only its transformer was copied."""
        twin = type(self)(memo.get(id(self._pipe()), _NoPipe()))
        memo[id(self)] = twin
        return twin

    def enter(self, name: str, fields: dict[str, Any]) -> None:
        """A pipeline opens the `cache_context` called `name`."""
        self._notice_timesteps()
        self._contexts.append((name, fields))
        self._opened[name] = self._opened.get(name, 0) + 1

    def leave(self) -> None:
        """The pipeline closes the context opened last."""
        self._contexts.pop()

    def now(self, shape: tuple[int, ...]) -> Moment:
        """The moment of an attention call whose tensors have this `shape`."""
        self._notice_timesteps()
        branch = self._contexts[-1][0] if self._contexts else ""
        step = self._step(branch)
        if self._generation == 0 or self._restarted(branch, step, shape):
            self._begin()
        self._seen[branch] = (step, shape)
        return Moment(self._generation, branch, step, self._steps(), self._sigma(step))

    def _begin(self) -> None:
        self._generation += 1
        self._seen.clear()

    def _restarted(self, branch: str, step: int | None, shape: tuple[int, ...]) -> bool:
        """Whether this call cannot belong to the generation of the branch's call before it."""
        if branch not in self._seen:
            return False
        last_step, last_shape = self._seen[branch]
        backwards = step is not None and last_step is not None and step < last_step
        return backwards or shape != last_shape

    def _notice_timesteps(self) -> None:
        timesteps = getattr(self._scheduler(), "timesteps", None)
        if timesteps is not self._timesteps:
            self._timesteps = timesteps
            self._opened.clear()
            self._begin()

    def _scheduler(self) -> Any:
        return getattr(self._pipe(), "scheduler", None)

    def _fields(self) -> dict[str, Any]:
        return self._contexts[-1][1] if self._contexts else {}

    def _step(self, branch: str) -> int | None:
        stated = self._fields().get("step_index")
        if stated is not None:
            return int(stated)
        scheduler = self._scheduler()
        if hasattr(scheduler, "_step_index"):
            index, begin = scheduler._step_index, scheduler._begin_index or 0
            return 0 if index is None else int(index) - begin
        opened = self._opened.get(branch, 0)
        return opened - 1 if scheduler is not None and opened else None

    def _steps(self) -> int | None:
        stated = self._fields().get("num_inference_steps")
        if stated is None:
            stated = getattr(self._pipe(), "_num_timesteps", None)
        if stated is None and self._timesteps is not None:
            stated = len(self._timesteps)
        return stated if stated is None else int(stated)

    def _sigma(self, step: int | None) -> float | None:
        sigmas = getattr(self._scheduler(), "sigmas", None)
        if step is None or sigmas is None or not 0 <= step < len(sigmas):
            return None
        return float(sigmas[step])
