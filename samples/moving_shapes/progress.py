"""Progress: the state of one training stage on disk, and its log as text.

A stage that is killed takes up again from its last checkpoint; the log is appended to, never
rewritten, so that it shows every interruption.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

CHECKPOINT_SECONDS = 120.0


@dataclass(slots=True)
class Progress:
    """Checkpoints of `stage` under `work`, log lines under `logs`."""

    stage: str
    work: Path
    logs: Path
    began: float = field(default_factory=time.monotonic)
    saved: float = field(default_factory=time.monotonic)

    @property
    def checkpoint(self) -> Path:
        return self.work / f"{self.stage}.pt"

    def load(self) -> dict[str, Any] | None:
        """The last checkpoint of this stage, or None at its beginning."""
        if not self.checkpoint.exists():
            return None
        return torch.load(self.checkpoint, weights_only=True)

    def save(self, state: dict[str, Any], *, now: bool = False) -> None:
        """Write a checkpoint, whole or not at all; every two minutes unless `now`."""
        if not now and time.monotonic() - self.saved < CHECKPOINT_SECONDS:
            return
        self.work.mkdir(parents=True, exist_ok=True)
        part = self.checkpoint.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self.checkpoint)
        self.saved = time.monotonic()

    def log(self, text: str) -> None:
        line = f"{self.stage} {time.monotonic() - self.began:7.0f} s  {text}"
        print(line, file=sys.stderr, flush=True)
        self.logs.mkdir(parents=True, exist_ok=True)
        with (self.logs / f"{self.stage}.log").open("a") as file:
            file.write(line + "\n")
