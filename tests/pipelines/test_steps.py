import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dit_sparse.pipelines.steps import Clock, Moment

SHAPE = (1, 3, 4, 4)


class Fake(SimpleNamespace):
    """A pipeline or scheduler of a few attributes; unlike its base it can be weakly referenced."""


def scheduler(steps: int = 4, **state: Any) -> Fake:
    return Fake(timesteps=torch.arange(steps), **state)


@pytest.fixture
def pipe() -> Fake:
    return Fake(scheduler=scheduler())


def tick(clock: Clock, name: str, **fields: Any) -> Moment:
    clock.enter(name, fields)
    try:
        return clock.now(SHAPE)
    finally:
        clock.leave()


def test_the_context_says_the_step(pipe: Fake) -> None:
    pipe.scheduler._step_index, pipe.scheduler._begin_index = 3, None
    clock = Clock(pipe)
    moment = tick(clock, "cond", step_index=1, num_inference_steps=9)
    assert (moment.branch, moment.step, moment.steps) == ("cond", 1, 9)


def test_the_scheduler_says_the_step(pipe: Fake) -> None:
    pipe.scheduler._step_index = pipe.scheduler._begin_index = None
    clock = Clock(pipe)
    assert clock.now(SHAPE) == Moment(1, "", 0, 4)
    pipe.scheduler._step_index = 2
    assert clock.now(SHAPE).step == 2


def test_steps_are_counted_from_where_an_image_to_image_run_begins(pipe: Fake) -> None:
    pipe._num_timesteps = 2
    pipe.scheduler._step_index, pipe.scheduler._begin_index = None, 2
    clock = Clock(pipe)
    assert clock.now(SHAPE) == Moment(1, "", 0, 2)
    pipe.scheduler._step_index = 3
    assert clock.now(SHAPE) == Moment(1, "", 1, 2)


def test_opened_contexts_say_the_step(pipe: Fake) -> None:
    clock = Clock(pipe)
    steps = [(tick(clock, "cond").step, tick(clock, "uncond").step) for _ in range(3)]
    assert steps == [(0, 0), (1, 1), (2, 2)]
    pipe.scheduler = scheduler()
    assert tick(clock, "cond") == Moment(2, "cond", 0, 4)


def test_nothing_says_the_step(pipe: Fake) -> None:
    clock = Clock(pipe)
    assert clock.now(SHAPE).step is None
    bare = Clock(torch.nn.Linear(1, 1))
    assert bare.now(SHAPE) == Moment(1, "", None, None)


def test_a_scheduler_is_looked_up_late(pipe: Fake) -> None:
    clock = Clock(pipe)
    pipe.scheduler = scheduler(7, _step_index=5, _begin_index=None)
    assert clock.now(SHAPE) == Moment(1, "", 5, 7)


def test_G10_interleaved_branches_keep_their_steps_and_one_generation(pipe: Fake) -> None:
    clock = Clock(pipe)
    moments = [
        tick(clock, branch, step_index=step)
        for step in range(3)
        for branch in ("cond", "uncond", "uncond_stg")
    ]
    assert {moment.generation for moment in moments} == {1}
    assert [moment.step for moment in moments] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_G10_a_step_going_backwards_is_a_new_generation(pipe: Fake) -> None:
    clock = Clock(pipe)
    assert tick(clock, "cond", step_index=2).generation == 1
    assert tick(clock, "cond", step_index=2).generation == 1
    assert tick(clock, "cond", step_index=0).generation == 2
    assert tick(clock, "uncond", step_index=0).generation == 2


def test_G10_new_timesteps_are_a_new_generation(pipe: Fake) -> None:
    clock = Clock(pipe)
    assert tick(clock, "cond", step_index=0).generation == 1
    pipe.scheduler.timesteps = torch.arange(4)
    assert tick(clock, "cond", step_index=0).generation == 2


def test_G10_a_changed_shape_is_a_new_generation(pipe: Fake) -> None:
    clock = Clock(pipe)
    pipe.scheduler._step_index, pipe.scheduler._begin_index = 0, None
    assert clock.now(SHAPE).generation == 1
    assert clock.now((1, 3, 4, 5)).generation == 2
    assert clock.now((1, 3, 4, 5)).generation == 2


def test_contexts_may_be_nested(pipe: Fake) -> None:
    clock = Clock(pipe)
    clock.enter("outer", {"step_index": 1})
    assert tick(clock, "inner", step_index=3).branch == "inner"
    assert clock.now(SHAPE).branch == "outer"
    clock.leave()
    assert clock.now(SHAPE).branch == ""
    with pytest.raises(IndexError):
        clock.leave()


def test_a_copied_clock_never_reads_the_scheduler_of_another_pipeline(pipe: Fake) -> None:
    pipe.scheduler._step_index, pipe.scheduler._begin_index = 2, None
    pipe.clock = Clock(pipe)
    twin = copy.deepcopy(pipe)
    twin.scheduler._step_index = 1
    assert (pipe.clock.now(SHAPE).step, twin.clock.now(SHAPE).step) == (2, 1)
    assert copy.deepcopy(pipe.clock).now(SHAPE) == Moment(1, "", None, None)
