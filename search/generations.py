"""Generations: the videos that a search makes, dense and looked at, or compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dit_sparse.pipelines.capture import Observer, observe_attention
from dit_sparse.search.timing import StepTimes


class Generations:
    """Generations of one pipeline with the same arguments; prompt by prompt the next seed.

    Args:
        pipe: a diffusers pipeline.
        prompts: one generation each.
        steps: of a generation.
        arguments: of the pipeline's call, beside the prompt, the steps and the random numbers.
        seed: of the first prompt's noise.
        total: steps that will be run in all, if every one is.
        progress: told (steps done, `total`) after every step.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        steps: int,
        arguments: dict[str, Any],
        seed: int,
        total: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._pipe = pipe
        self._prompts = prompts
        self.steps = steps
        self._arguments = arguments
        self._seed = seed
        self._total = total
        self._progress = progress
        self._done = 0

    def dense(
        self, number: int, last: int, observer: Observer, times: StepTimes, *, decode: bool
    ) -> Tensor | None:
        """Generate prompt `number` up to step `last` and let `observer` see every attention call.

        Args:
            number: of the prompt.
            last: the last step that is run.
            observer: see `observe_attention`.
            times: takes down how long steps and, if it is done, decoding take.
            decode: whether to decode.

        Returns:
            The video as `video` returns it, if the generation went to its end.
        """
        with observe_attention(self._pipe, observer, times.stopwatch):
            times.begin()
            output = self._run(number, last, decode, times)
            if decode:
                times.end()
        return _video(output) if decode and last == self.steps - 1 else None

    def video(self, number: int) -> Tensor:
        """Generate prompt `number` with whatever plan is in effect, if any: float `[frames,
        height, width, 3]` in [0, 1]."""
        return _video(self._run(number, self.steps - 1, True, None))

    def skip(self, steps: int) -> None:
        """Tell that some steps need not be run."""
        self._tell(self._done + steps)

    def finish(self) -> None:
        """Tell that the steps not run will not be needed."""
        self._tell(self._total)

    def _tell(self, done: int) -> None:
        if self._progress is not None and done > self._done:
            self._progress(done, self._total)
        self._done = done

    def _run(self, number: int, last: int, decode: bool, times: StepTimes | None) -> Any:
        def after(pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if step <= last:
                if times is not None:
                    times.step()
                self._tell(self._done + 1)
            # What follows the last step is not needed: diffusers' way to stop a run.
            pipe._interrupt = step >= last
            return tensors

        output = self._pipe(
            prompt=self._prompts[number],
            num_inference_steps=self.steps,
            generator=torch.Generator("cpu").manual_seed(self._seed + number),
            output_type="np" if decode else "latent",
            callback_on_step_end=after,
            **self._arguments,
        )
        self._pipe._interrupt = False
        return output


def _video(output: Any) -> Tensor:
    return torch.from_numpy(output.frames[0])
