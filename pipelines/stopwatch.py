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
    """Sums stretches of work by name.

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

    def seconds(self) -> dict[str, float]:
        """What was timed so far, by name, laps that were read excluded."""
        total = {name: sum(values) for name, values in self._seconds.items()}
        for name, events in self._events.items():
            total[name] = total.get(name, 0.0) + sum(map(_elapsed, events))
        return total

    def lap(self, name: str) -> Lap:
        """What was timed under `name` since it was last asked for."""
        seconds, events = self._seconds.pop(name, []), self._events.pop(name, [])
        seconds += map(_elapsed, events)
        return Lap(sum(seconds), len(seconds))


def _elapsed(events: tuple[torch.Event, torch.Event]) -> float:
    begin, end = events
    end.synchronize()
    return begin.elapsed_time(end) / 1000
