"""Stopwatch: seconds of stretches of work, on the clock of the device that does it."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Lap:
    """What was timed under one name: seconds in all, in how many stretches."""

    seconds: float = 0.0
    count: int = 0


class Stopwatch:
    """Sums stretches by name until it is read.

    An accelerator runs behind the host, so its stretches are timed by events, and reading them
    waits for it.
    """

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._events: dict[str, list[tuple[torch.Event, torch.Event]]] = defaultdict(list)

    @contextmanager
    def stretch(self, name: str, device: torch.device) -> Iterator[None]:
        """Time what is done inside, on `device`."""
        self.device = device
        if device.type == "cpu":
            start = time.perf_counter()
            yield
            self._seconds[name].append(time.perf_counter() - start)
        else:
            begin, end = (torch.Event(device, enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events[name].append((begin, end))

    def now(self) -> float:
        """Seconds of the wall clock, once the device has done what it was given."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def lap(self, name: str) -> Lap:
        """What was timed under `name` since it was last asked for."""
        seconds, events = self._seconds.pop(name, []), self._events.pop(name, [])
        for begin, end in events:
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1000)
        return Lap(sum(seconds), len(seconds))
