"""Comparison: sparse runs beside their dense runs, in speed, density and quality."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from dit_sparse.environment import environment
from dit_sparse.generate import OnStep, Sample, attention_summary, check, sample
from dit_sparse.metrics import CONVENTIONS, Summary, quality, summarize
from dit_sparse.pipelines.hook import enable_sparse_attention
from dit_sparse.pipelines.plan import Plan
from dit_sparse.prompts import Prompt
from dit_sparse.runs import model_digest
from dit_sparse.settings import FRAMES_PER_SECOND, Settings
from dit_sparse.video import replacing, side_by_side, write_preview

FORMAT = "dit_sparse.comparison"
VERSION = 1
DENSE = "dense"
JOINED = "side-by-side"

PROTOCOL = {
    "seconds": "wall clock of the whole pipeline call: text encoding, denoising, decoding",
    "order": "for every prompt dense and each plan in turn, the order reversed every other time",
    "warm_up": "a short first run of each, timed apart and counted nowhere else",
    "speedup": "dense seconds / sparse seconds of the same prompt; median, lowest, highest",
    "density": "mean over all self-attention calls of all steps, those that ran dense as 1",
    "density_sparse": "the same over the calls that ran sparse",
    "flops": "of all self-attention calls, searches and caches included, 1 if all run dense",
    **CONVENTIONS,
}

OnVideos = Callable[[Prompt, dict[str, Sample]], object]


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure that was measured several times."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt, dense and sparse."""

    prompt: str
    seed: int
    dense_seconds: float
    seconds: float
    speedup: float
    psnr_rgb: float
    ssim: float


@dataclass(frozen=True, slots=True)
class PlanResult:
    """Everything measured of one plan.

    Args:
        density: {element, block, weighted} over all self-attention calls.
        density_sparse: over the sparse calls; None if every call ran dense.
        flops: of all self-attention calls with their searches and caches, in those of dense ones.
        cache_bytes: most memory that caches held at once.
        stages: of a run's attention seconds, those in `attention`, `search` and `remainder`.
        attention_seconds: of a run's `seconds`, those spent in self-attention.
        dense_calls: of one run, how many self-attention calls ran dense, by reason.
    """

    name: str
    digest: str
    density: dict[str, float]
    density_sparse: dict[str, float] | None
    flops: float
    cache_bytes: int
    stages: dict[str, float]
    attention_seconds: Spread
    dense_calls: dict[str, int]
    speedup: Spread
    seconds: Spread
    warm_up_seconds: float
    psnr_rgb: Summary
    ssim: Summary
    runs: tuple[Pair, ...]


@dataclass(frozen=True, slots=True)
class DenseResult:
    """The baseline's times."""

    seconds: Spread
    warm_up_seconds: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """The content of comparison.json."""

    model: str
    model_digest: str
    settings: Settings
    prompts: tuple[Prompt, ...]
    dense: DenseResult
    plans: tuple[PlanResult, ...]
    environment: dict[str, Any]
    protocol: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, with the file's format and version."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}


def compare(
    pipe: Any,
    model: str | Path,
    prompts: Sequence[Prompt],
    settings: Settings,
    plans: dict[str, Plan],
    *,
    on_step: OnStep | None = None,
    on_videos: OnVideos | None = None,
) -> Comparison:
    """Generate every prompt dense and with every plan, from the same noise, and measure.

    Args:
        pipe: the loaded pipeline; comes back as it was.
        model: where it came from.
        plans: by the names they get in the result.
        on_step: is told of every denoising step, warm-up included.
        on_videos: gets each prompt's samples, `"dense"` first, as soon as they are complete.

    Raises:
        ValueError: a plan does not fit the model, the sizes are refused, or frames hold NaN.
    """
    for name in (DENSE, JOINED):
        if name in plans:
            raise ValueError(f"no plan may be called {name!r}; rename its folder")
    for plan in plans.values():
        check(pipe, settings, plan)
    candidates: dict[str, Plan | None] = {DENSE: None, **plans}
    warm_up = {
        name: _warm_up(pipe, plan, prompts[0], settings, on_step)
        for name, plan in candidates.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    pairs: dict[str, list[Pair]] = {name: [] for name in plans}
    attention: dict[str, list[dict[str, Any]]] = {name: [] for name in plans}
    for index, prompt in enumerate(prompts):
        seed = settings.seed if prompt.seed is None else prompt.seed
        samples: dict[str, Sample] = {}
        for name in list(candidates) if index % 2 == 0 else reversed(candidates):
            made, summary = _run(pipe, candidates[name], prompt, seed, settings, on_step)
            samples[name] = made
            seconds[name].append(made.seconds)
            if summary is not None:
                attention[name].append(summary)
        samples = {name: samples[name] for name in candidates}
        for name in plans:
            pairs[name].append(_pair(prompt, seed, samples[DENSE], samples[name]))
        if on_videos is not None:
            on_videos(prompt, samples)
    return Comparison(
        model=str(model),
        model_digest=model_digest(model),
        settings=settings,
        prompts=tuple(prompts),
        dense=DenseResult(spread(seconds[DENSE]), warm_up[DENSE]),
        plans=tuple(
            PlanResult(
                name=name,
                digest=plan.digest,
                density=_mean([summary["density"] for summary in attention[name]]),
                density_sparse=_mean([summary["density_sparse"] for summary in attention[name]]),
                flops=fmean(summary["flops"] for summary in attention[name]),
                cache_bytes=max(summary["cache_bytes"] for summary in attention[name]),
                stages=_mean([summary["stages"] for summary in attention[name]]),
                attention_seconds=spread([summary["seconds"] for summary in attention[name]]),
                dense_calls=attention[name][0]["dense_calls"],
                speedup=spread([pair.speedup for pair in pairs[name]]),
                seconds=spread(seconds[name]),
                warm_up_seconds=warm_up[name],
                psnr_rgb=summarize([pair.psnr_rgb for pair in pairs[name]]),
                ssim=summarize([pair.ssim for pair in pairs[name]]),
                runs=tuple(pairs[name]),
            )
            for name, plan in plans.items()
        ),
        environment=environment(),
        protocol=PROTOCOL,
    )


def write_comparison(folder: Path, comparison: Comparison) -> Path:
    """Write `comparison.json` into a folder, whole or not at all; returns its path."""
    path = folder / "comparison.json"
    with replacing(path) as partial:
        partial.write_text(json.dumps(comparison.to_dict(), indent=2, allow_nan=False) + "\n")
    return path


def read_comparison(path: Path) -> Comparison:
    """What `write_comparison` wrote.

    Raises:
        ValueError: the file is no comparison of this version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if (content.pop("format"), content.pop("version")) != (FORMAT, VERSION):
            raise ValueError(f"expected format {FORMAT}, version {VERSION}")
        return Comparison(
            **content
            | {
                "settings": Settings(**content["settings"]),
                "prompts": tuple(Prompt(**prompt) for prompt in content["prompts"]),
                "dense": _with_spreads(DenseResult, content["dense"]),
                "plans": tuple(_with_spreads(PlanResult, row) for row in content["plans"]),
            }
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no comparison: {error}; remove it and compare again"
        ) from error


def _with_spreads(kind: type[Any], content: dict[str, Any]) -> Any:
    """A dense or a plan's result whose spreads, summaries and runs are JSON objects."""
    inner: dict[str, Any] = {}
    for name, value in content.items():
        if name in ("seconds", "speedup", "attention_seconds"):
            inner[name] = Spread(**value)
        elif name in ("psnr_rgb", "ssim"):
            inner[name] = Summary(**value)
        elif name == "runs":
            inner[name] = tuple(Pair(**run) for run in value)
    return kind(**content | inner)


def write_videos(folder: Path, samples: dict[str, Sample]) -> tuple[Path, ...]:
    """Write each sample of one prompt as `<name>.mp4`, and all of them as `side-by-side.mp4`."""
    dense = samples[DENSE].seconds
    labels = {
        name: f"{name}  {made.seconds:.1f} s"
        + ("" if name == DENSE else f"  {dense / made.seconds:.2f}x")
        for name, made in samples.items()
    }
    videos = {name: made.frames for name, made in samples.items()}
    joined = side_by_side(list(videos.values()), list(labels.values()))
    paths = []
    for name, frames in {**videos, JOINED: joined}.items():
        paths.append(folder / f"{name}.mp4")
        write_preview(paths[-1], frames, FRAMES_PER_SECOND)
    return tuple(paths)


def spread(values: Sequence[float]) -> Spread:
    """Median, lowest and highest of a few measurements."""
    return Spread(median(values), min(values), max(values))


def _mean(tables: Sequence[Any]) -> Any:
    """The mean of tables of numbers, entry by entry; None if there are none."""
    if None in tables:
        return None
    names = dict.fromkeys(name for table in tables for name in table)
    return {name: fmean(table.get(name, 0.0) for table in tables) for name in names}


def _run(
    pipe: Any,
    plan: Plan | None,
    prompt: Prompt,
    seed: int,
    settings: Settings,
    on_step: OnStep | None,
) -> tuple[Sample, dict[str, Any] | None]:
    if plan is None:
        return sample(pipe, prompt, seed, settings, on_step), None
    with enable_sparse_attention(pipe, plan, backend=settings.backend) as hook:
        made = sample(pipe, prompt, seed, settings, on_step)
        return made, attention_summary(hook)


def _warm_up(
    pipe: Any, plan: Plan | None, prompt: Prompt, settings: Settings, on_step: OnStep | None
) -> float:
    # The fewest steps of which one runs sparse; the first of a plan that renews may not.
    dense = 0 if plan is None else plan.schedule.dense_first + plan.schedule.dense_last
    renewing = plan is not None and plan.renews
    short = replace(settings, steps=min(dense + 1 + renewing, settings.steps))
    return _run(pipe, plan, prompt, settings.seed, short, on_step)[0].seconds


def _pair(prompt: Prompt, seed: int, dense: Sample, sparse: Sample) -> Pair:
    close = quality(dense.frames, sparse.frames)
    speedup = dense.seconds / sparse.seconds
    return Pair(
        prompt.id, seed, dense.seconds, sparse.seconds, speedup, close.psnr_rgb, close.ssim
    )
