import time

import pytest
import torch

from dit_sparse.pipelines.stopwatch import Lap, Stopwatch

CPU = torch.device("cpu")


def test_stretches_are_summed_by_name_until_read(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 2.0, 10.0, 13.0, 20.0, 25.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    stopwatch = Stopwatch()
    for name in ("attention", "attention", "observing"):
        with stopwatch.stretch(name, CPU):
            pass
    assert stopwatch.lap("attention") == Lap(5.0, 2)
    assert stopwatch.lap("attention") == Lap()
    assert stopwatch.lap("observing") == Lap(5.0, 1)


@pytest.mark.gpu
def test_an_accelerator_is_timed_by_its_own_clock() -> None:
    stopwatch = Stopwatch()
    device = torch.device("cuda")
    values = torch.randn(4096, 4096, device=device)
    start = stopwatch.now()
    with stopwatch.stretch("attention", device):
        for _ in range(20):
            values = values @ values
    lap = stopwatch.lap("attention")
    assert 0 < lap.seconds <= stopwatch.now() - start
