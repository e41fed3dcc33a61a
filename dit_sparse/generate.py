"""Generation: prompts × one plan → run folders; finished runs are skipped."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch

from dit_sparse.environment import environment
from dit_sparse.kernels.backend import BACKENDS
from dit_sparse.pipelines.hook import SparseAttentionHook, enable_sparse_attention
from dit_sparse.pipelines.plan import Plan
from dit_sparse.prompts import Prompt
from dit_sparse.runs import Request, Run, claimed, model_digest, prepare_folder, write_run
from dit_sparse.settings import Settings, refusal
from dit_sparse.video import Frames, to_uint8

OnStep = Callable[[int, int], None]  # denoising steps done, of how many


@dataclass(frozen=True, slots=True)
class Sample:
    """One generated video: its frames, the seconds of the whole call and of each step."""

    frames: Frames
    seconds: float
    step_seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one prompt: `made`, `skipped` (it was there), `busy` (another process is
    making it) or `failed`, with the reason."""

    prompt: str
    folder: Path
    state: Literal["made", "skipped", "busy", "failed"]
    seconds: float | None = None
    reason: str | None = None


def sample(
    pipe: Any, prompt: Prompt, seed: int, settings: Settings, on_step: OnStep | None = None
) -> Sample:
    """Generate one video. The noise is drawn on the CPU, so that every machine starts alike.

    Raises:
        ValueError: the frames hold NaN, or are not of the size that was asked for.
    """
    marks: list[float] = []

    def mark(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        _synchronize(settings.device)
        marks.append(time.perf_counter())
        if on_step is not None:
            on_step(step + 1, settings.steps)
        return tensors

    start = time.perf_counter()
    output = pipe(
        prompt=prompt.text,
        negative_prompt=prompt.negative_text,
        height=settings.height,
        width=settings.width,
        num_frames=settings.frames,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="np",
        callback_on_step_end=mark,
    )
    seconds = time.perf_counter() - start
    frames = to_uint8(output.frames[0])
    asked = (settings.frames, settings.height, settings.width, 3)
    if frames.shape != asked:
        raise ValueError(f"asked for frames of shape {asked}, the model made {frames.shape}")
    # The first step is timed from the start of the call: it holds the text encoding as well.
    steps = (after - before for before, after in zip([start, *marks], marks, strict=False))
    return Sample(frames, seconds, tuple(steps))


def check(pipe: Any, settings: Settings, plan: Plan | None) -> None:
    """Raise ValueError unless the pipeline can make what is asked, and run the plan at it."""
    names = ("auto", *(backend.name for backend in BACKENDS))
    if settings.backend not in names:
        raise ValueError(f"unknown backend {settings.backend!r}; use one of {', '.join(names)}")
    reason = refusal(pipe, settings)
    if reason is not None:
        raise ValueError(reason)
    if plan is None:
        return
    plan.check(pipe)
    if plan.schedule.dense_first + plan.schedule.dense_last >= settings.steps:
        raise ValueError(
            f"the plan keeps {plan.schedule.dense_first} first and {plan.schedule.dense_last} "
            f"last steps dense, so nothing of {settings.steps} steps would run sparse; "
            "use more --steps"
        )


def generate(
    pipe: Any,
    model: str | Path,
    prompts: Sequence[Prompt],
    settings: Settings,
    out: str | Path,
    *,
    plan: Plan | None = None,
    plan_source: str | Path | None = None,
    on_step: OnStep | None = None,
) -> Iterator[Outcome]:
    """Make a run folder in `out` for every prompt, one after the other.

    Nothing is written before model, plan, sizes and folder have been checked. A prompt that
    fails is reported and the next one follows. Several processes may share one folder.

    Args:
        pipe: the loaded pipeline.
        model: where it came from.
        plan: to run sparse; None runs dense.
        plan_source: where the plan came from.
        on_step: is told of every denoising step.
    """
    check(pipe, settings, plan)
    out = prepare_folder(out)
    digest = model_digest(model)
    machine = environment()
    plan_digest = None if plan is None else plan.digest
    source = None if plan_source is None else str(plan_source)
    # One hook for the whole batch: what it computed for one prompt serves the next.
    hooked = (
        nullcontext()
        if plan is None
        else enable_sparse_attention(pipe, plan, backend=settings.backend)
    )
    with hooked as hook:
        for prompt in prompts:
            request = Request(str(model), digest, prompt, settings, source, plan_digest)
            folder = out / request.name
            with claimed(out, request.name) as mine:
                if folder.exists():
                    yield Outcome(prompt.id, folder, "skipped")
                elif not mine:
                    yield Outcome(prompt.id, folder, "busy")
                else:
                    yield _make(pipe, request, hook, machine, out, on_step)


def _make(
    pipe: Any,
    request: Request,
    hook: SparseAttentionHook | None,
    machine: dict[str, Any],
    out: Path,
    on_step: OnStep | None,
) -> Outcome:
    try:
        made = sample(pipe, request.prompt, request.seed, request.settings, on_step)
    except (ValueError, RuntimeError) as error:
        return Outcome(request.prompt.id, out / request.name, "failed", reason=str(error))
    attention = None if hook is None else attention_summary(hook)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    run = Run(request, made.seconds, made.step_seconds, attention, machine, created)
    return Outcome(request.prompt.id, write_run(out, run, made.frames), "made", made.seconds)


def attention_summary(hook: SparseAttentionHook) -> dict[str, Any]:
    """What the hook reports of the last generation, as JSON-ready values."""
    report = hook.report()
    densities = {"density": report.density, "density_sparse": report.density_sparse}
    return {
        **{name: None if value is None else asdict(value) for name, value in densities.items()},
        "flops": report.flops,
        "cache_bytes": report.cache_bytes,
        "dropped_caches": report.dropped_caches,
        "seconds": report.seconds,
        "stages": report.stages,
        "sparse_calls": report.sparse_calls,
        "dense_calls": report.dense_calls,
    }


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
