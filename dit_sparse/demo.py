"""The demo: the sample model, dense and sparse, side by side."""

from dataclasses import dataclass
from pathlib import Path

import dit_sparse
from dit_sparse.comparison import Comparison, compare, write_comparison, write_videos
from dit_sparse.generate import OnStep, Sample
from dit_sparse.pipelines.plan import Plan
from dit_sparse.prompts import Prompt
from dit_sparse.runs import prepare_folder
from dit_sparse.session import Session

SAMPLES = Path(dit_sparse.__file__).resolve().parents[1] / "samples"
MODEL = SAMPLES / "models" / "moving-shapes"
PLAN = SAMPLES / "plans" / "moving-shapes-d30"

# None of these was seen in training.
PROMPTS = (
    Prompt("one", "a magenta square moving left and a blue circle moving right on gray", seed=1),
    Prompt("two", "a red square moving right and a green circle moving left on white", seed=2),
)


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo measured, and the files it left."""

    comparison: Comparison
    files: tuple[Path, ...]


def missing_sample(model: Path, plan: Path) -> str | None:
    """Why the demo cannot run with these folders, or None."""
    for what, folder in (("model", model), ("plan", plan)):
        if not folder.is_dir():
            return (
                f"there is no sample {what} at {folder}; run the demo in a clone of the "
                f"repository, or give --{what} DIR"
            )
    return None


def demo(session: Session, plan: Plan, out: Path, on_step: OnStep | None = None) -> DemoResult:
    """Generate the demo's prompts dense and with `plan`; write videos and comparison.json.

    Videos show the first prompt; all prompts count in the figures.
    """
    out = prepare_folder(out)
    shown: list[dict[str, Sample]] = []
    comparison = compare(
        session.pipe,
        session.model,
        PROMPTS,
        session.settings,
        {"sparse": plan},
        on_step=on_step,
        on_videos=lambda _, samples: shown.append(samples),
    )
    files = write_videos(out, shown[0])
    return DemoResult(comparison, (*files, write_comparison(out, comparison)))
