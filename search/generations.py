"""Generations: the videos that a search makes, dense and looked at, or sparse and compared."""

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
        arguments: of its call, beside the prompt, the steps and the random numbers.
        seed: of the first prompt's noise.
        total: steps that will be run in all, if every one is.
        progress: told (steps done, `total`) after every step.
    """

    def __init__(
        self,
        pipe: Any,
        arguments: dict[str, Any],
        seed: int,
        total: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._pipe = pipe
        self._arguments = arguments
        self._seed = seed
        self._total = total
        self._progress = progress
        self._done = 0

    def dense(
        self,
        prompts: Sequence[str],
        steps: int,
        last: int,
        observer: Observer,
        *,
        times: StepTimes | None = None,
        keep: bool = False,
    ) -> list[Tensor]:
        """Generate up to step `last` and let `observer` see every attention call.

        Args:
            prompts: one generation each.
            steps: of a whole generation.
            last: the last step that is run.
            observer: see `observe_attention`.
            times: takes down how long steps and, once, decoding take.
            keep: whether to decode and return all videos.

        Returns:
            Videos as `sparse` returns them, if they are kept.
        """
        videos = []
        stopwatch = None if times is None else times.stopwatch
        with observe_attention(self._pipe, observer, stopwatch):
            for number, prompt in enumerate(prompts):
                final = number == len(prompts) - 1
                decode = keep or (times is not None and final)
                if times is not None:
                    times.begin()
                output = self._run(number, prompt, steps, last, decode, times)
                if times is not None and final:
                    times.end()
                if keep:
                    videos.append(_video(output))
        return videos

    def sparse(self, prompts: Sequence[str], steps: int) -> list[Tensor]:
        """Generate with whatever plan is in effect: float `[frames, height, width, 3]` in [0, 1]
        for each prompt."""
        return [
            _video(self._run(number, prompt, steps, steps - 1, True, None))
            for number, prompt in enumerate(prompts)
        ]

    def finish(self) -> None:
        """Tell that the steps not run will not be needed."""
        if self._progress is not None and self._done < self._total:
            self._progress(self._total, self._total)

    def _run(
        self,
        number: int,
        prompt: str,
        steps: int,
        last: int,
        decode: bool,
        times: StepTimes | None,
    ) -> Any:
        def after(pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if step <= last:
                if times is not None:
                    times.step()
                self._done += 1
                if self._progress is not None:
                    self._progress(self._done, self._total)
            # What follows the last step is not needed: diffusers' way to stop a run.
            pipe._interrupt = step >= last
            return tensors

        output = self._pipe(
            prompt=prompt,
            num_inference_steps=steps,
            generator=torch.Generator("cpu").manual_seed(self._seed + number),
            output_type="np" if decode else "latent",
            callback_on_step_end=after,
            **self._arguments,
        )
        self._pipe._interrupt = False
        return output


def _video(output: Any) -> Tensor:
    return torch.from_numpy(output.frames[0])
