"""Schedule: at which denoising steps a plan runs dense, and at which it renews what it found.

    Schedule(dense_first=4, renew_every=5)

    step    0 1 2 3   4       5 6 7 8   9       10 11 ...
            dense     renew   reuse     renew   reuse

A layer renews at its first step that is not dense, and whenever the schedule says so from then
on: scored patterns choose their blocks anew, remainders take their caches anew. Staggered, the
layers take turns from then on, so that the dense passes do not all fall into one step:

    Schedule(dense_first=4, renew_every=3, stagger=True)

    step              4       5       6       7       8       9       10 ...
    layers 0, 3, 6    renew                   renew                   renew
    layers 1, 4, 7    renew   renew                   renew
    layers 2, 5, 8    renew           renew                   renew

What the heads do may change in the course of a generation, which settles early what it draws.
At the beginning of a phase nothing of the one before is known any more, so layers renew there:

    Schedule(dense_first=1, phases=(0.35,))

    step              0       1       2 ... 6       7       8 ... 19
                      dense   first phase           second phase
"""

import itertools
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Schedule:
    """At which denoising steps the layers of a plan run dense, and at which they renew.

    Steps count from 0. Patterns that are computed from the grid with a remainder that keeps
    nothing have nothing to renew.

    Args:
        dense_first (`int`, defaults to 0): leading denoising steps that run dense.
        dense_last (`int`, defaults to 0): trailing denoising steps that run dense.
        sigma_above (`float`, *optional*): steps whose noise level, as the scheduler has it in
            `sigmas`, is larger run dense; unlike a count it holds for any scheduler and number of
            steps.
        renew_every (`int`, defaults to 0): steps from one renewal to the next; 0 for none after
            the first, unless `renew_at` says so.
        renew_at (`tuple[int, ...]`): further denoising steps that renew.
        recall (`float`, *optional*): renew as soon as the blocks of a scored pattern hold less
            than this share of the attention that they held when they were found, measured on a
            few rows at every step.
        share_branches (`bool`, defaults to False): one guidance branch uses the blocks that the
            other found at the same step. Caches stay apart.
        phases (`tuple[float, ...]`): shares of the steps, ascending, at which the next phase of
            the plan begins; it has one more than there are shares.
        stagger (`bool`, defaults to False): layer l of those that renew does so `l mod
            renew_every` steps after layer 0. The turns stay where they are when something else,
            `renew_at` or `recall`, renews a layer in between.
    """

    dense_first: int = 0
    dense_last: int = 0
    sigma_above: float | None = None
    renew_every: int = 0
    renew_at: tuple[int, ...] = ()
    recall: float | None = None
    share_branches: bool = False
    stagger: bool = False
    phases: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("dense_first", "dense_last", "renew_every"):
            _check_steps(name, getattr(self, name))
        for step in self.renew_at:
            _check_steps("renew_at", step)
        if self.sigma_above is not None and not self.sigma_above > 0:
            raise ValueError(f"sigma_above: expected a noise level > 0, came {self.sigma_above!r}")
        if self.recall is not None and not 0 < self.recall <= 1:
            raise ValueError(f"recall: expected a share in (0, 1], came {self.recall!r}")
        if self.stagger and not self.renew_every:
            raise ValueError(
                "stagger: expected renew_every > 0, came 0, so no layer has a turn; set "
                "renew_every, or leave stagger out"
            )
        if not all(share > 0 for share in self.shares):
            raise ValueError(
                f"phases: expected ascending shares of the steps between 0 and 1, came "
                f"{self.phases!r}"
            )

    @property
    def always_sparse(self) -> bool:
        """Whether every step is sparse and of one phase, so that no step need be known."""
        alike = self.sigma_above is None and not self.phases
        return self.dense_first == self.dense_last == 0 and alike

    @property
    def renews_again(self) -> bool:
        """Whether anything is renewed after the first time."""
        return self.renew_every > 0 or bool(self.renew_at) or self.recall is not None

    @property
    def renews_always(self) -> bool:
        """Whether every step of every branch finds its own blocks, so that none are used again."""
        return self.renew_every == 1 and not self.share_branches

    def dense(self, step: int, steps: int, sigma: float | None = None) -> bool:
        """Whether denoising step `step` of `steps`, at noise level `sigma`, runs dense."""
        if self.sigma_above is not None and sigma is None:
            raise ValueError(
                "the schedule is dense above a noise level, which the scheduler does not tell: it "
                "has no sigmas; use dense_first"
            )
        loud = self.sigma_above is not None and sigma is not None and sigma > self.sigma_above
        return loud or step < self.dense_first or step >= steps - self.dense_last

    def spans(self, steps: int) -> tuple[range, ...]:
        """The steps of every phase in a generation of `steps`; a phase may be left without any."""
        places = [round(share * steps) for share in (0.0, *self.phases, 1.0)]
        return tuple(range(begin, end) for begin, end in itertools.pairwise(places))

    def phase(self, step: int, steps: int) -> int:
        """Which phase denoising step `step` of `steps` belongs to, from 0."""
        return sum(step >= span.start for span in self.spans(steps)[1:])

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of the steps that belongs to each phase."""
        bounds = (0.0, *self.phases, 1.0)
        return tuple(end - begin for begin, end in itertools.pairwise(bounds))

    @property
    def phase_names(self) -> tuple[str, ...]:
        """What to write behind a layer's name to tell its phases apart; nothing for one alone."""
        if not self.phases:
            return ("",)
        return tuple(f" from {share:.0%}" for share in (0.0, *self.phases))

    def renews(self, step: int, last: int | None, layer: int = 0) -> bool:
        """Whether layer number `layer` that renewed at step `last` (`None`: not yet) renews at
        `step`."""
        if last is None:
            return True
        if any(last < at <= step for at in self.renew_at):
            return True
        if not self.stagger:
            return self.renew_every > 0 and step - last >= self.renew_every
        first = self.dense_first + layer
        # A turn that fell on a skipped step lies between `last` and `step` all the same.
        return (step - first) // self.renew_every > (last - first) // self.renew_every

    def scaled(self, share: float) -> "Schedule":
        """The schedule of a generation of `share` times as many steps; a period of several steps
        does not become one of every step."""
        period = self.renew_every
        return replace(
            self,
            dense_first=round(self.dense_first * share),
            dense_last=round(self.dense_last * share),
            renew_every=max(2, round(period * share)) if period > 1 else period,
            renew_at=tuple(round(step * share) for step in self.renew_at),
        )

    def __str__(self) -> str:
        parts = [f"the first {self.dense_first} and the last {self.dense_last} steps dense"]
        if self.sigma_above is not None:
            parts.append(f"dense above noise level {self.sigma_above:g}")
        if self.renew_every:
            turns = ", layers in turn" if self.stagger else ""
            parts.append(f"renewed every {self.renew_every} steps{turns}")
        if self.renew_at:
            parts.append(f"renewed at {', '.join(map(str, self.renew_at))}")
        if self.recall is not None:
            parts.append(f"renewed below {self.recall:g} of the recall")
        if self.share_branches:
            parts.append("blocks shared by guidance branches")
        if self.phases:
            shares = ", ".join(f"{share:.0%}" for share in self.phases)
            parts.append(f"other patterns from {shares} of the steps on")
        return "; ".join(parts)


def _check_steps(name: str, value: object) -> None:
    if type(value) is not int or value < 0:
        raise ValueError(f"{name}: expected a number of denoising steps >= 0, came {value!r}")
