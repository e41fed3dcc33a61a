"""Record: what a search has seen of each prompt, on disk, so that a killed one goes on.

<folder>/search.json                 the settings, by which another search is told apart
<folder>/0000/<layer>.safetensors    sums of one layer over one prompt's generation
<folder>/0000/run.json               written last: without it the prompt is seen again
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from dit_sparse.search.observer import Sums

VIDEO = "video"


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What one generation has shown.

    Args:
        sums: by layer.
        run: JSON values: `Scoring.described`, `seconds_per_call` of dense attention and `timing`;
            the last two `None` if they were not taken.
        video: float `[frames, height, width, 3]`, if it is needed later.
    """

    sums: dict[str, Sums]
    run: dict[str, Any]
    video: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """The folder of one search.

    Args:
        folder: made if need be; `None` keeps nothing.
        settings: JSON values on which everything seen depends.

    Raises:
        ValueError: if the folder holds another search.
    """

    folder: Path | None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.folder is None:
            return
        path = self.folder / "search.json"
        text = json.dumps(self.settings, sort_keys=True)
        own = {"settings_sha256": hashlib.sha256(text.encode()).hexdigest()}
        if path.exists() and json.loads(path.read_text()) != own:
            raise ValueError(
                f"{self.folder} holds what another search has seen (other model, prompts or "
                "settings); remove the folder, or name another"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(path, json.dumps(own))

    def load(self, number: int) -> Seen | None:
        """What is known of prompt `number`; `None` if its generation did not end."""
        if self.folder is None or not (self.folder / _name(number) / "run.json").exists():
            return None
        folder = self.folder / _name(number)
        sums, video = {}, None
        for path in sorted(folder.glob("*.safetensors")):
            arrays = load_file(path)
            if path.stem == VIDEO:
                video = arrays[VIDEO]
            else:
                sums[path.stem] = Sums(**arrays)
        return Seen(sums, json.loads((folder / "run.json").read_text()), video)

    def save(self, number: int, seen: Seen) -> None:
        """Keep what was seen of prompt `number`."""
        if self.folder is None:
            return
        folder = self.folder / _name(number)
        folder.mkdir(exist_ok=True)
        for layer, sums in seen.sums.items():
            arrays = {"error": sums.error, "count": sums.count, "column_mass": sums.column_mass}
            save_file(
                {name: array.contiguous() for name, array in arrays.items()},
                folder / f"{layer}.safetensors",
            )
        if seen.video is not None:
            save_file({VIDEO: seen.video.contiguous()}, folder / f"{VIDEO}.safetensors")
        _write(folder / "run.json", json.dumps(seen.run))


def _name(number: int) -> str:
    return f"{number:04d}"


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)
