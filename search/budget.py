"""Budget: what a plan may spend, or what it has to keep."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Budget:
    """One limit, on one of five scales; the search finds the best plan that keeps it.

    Args:
        density (`float`, *optional*): most block density in (0, 1], averaged over the
            self-attention of all layers and heads at the steps that are not dense by schedule. It
            counts the tiles a kernel visits, so it is at least the share of query-key pairs that
            is used.
        error (`float`, *optional*): most predicted error, at least 0: the mean over layers of the
            summed errors of their heads, in the metric of the search.
        speedup (`float`, *optional*): least predicted speed-up of a whole generation over the
            dense one, at least 1.
        latency (`float`, *optional*): most predicted seconds of a whole generation.
        psnr (`float`, *optional*): least PSNR in dB of generated videos against the dense ones of
            the same seeds, mean over the prompts of the search, in (0, 100].

    Raises:
        ValueError: if not exactly one is given, or it is out of range.

    >>> Budget(density=0.3)
    Budget(density=0.3)
    >>> Budget(psnr=30).name, Budget(psnr=30).value
    ('psnr', 30)
    """

    density: float | None = None
    error: float | None = None
    speedup: float | None = None
    latency: float | None = None
    psnr: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            came = ", ".join(f"{name}={getattr(self, name)!r}" for name in given) or "none"
            raise ValueError(
                f"budget: expected exactly one of {', '.join(BUDGETS)}, came {came}; "
                "for instance density=0.3"
            )
        valid, expected, remedy = _RANGES[self.name]
        if isinstance(self.value, bool) or not valid(self.value):
            raise ValueError(f"{self.name} must be {expected}, came {self.value!r}; {remedy}")

    @property
    def name(self) -> str:
        """Which of the scales."""
        return next(name for name in BUDGETS if getattr(self, name) is not None)

    @property
    def value(self) -> float:
        """The limit on it."""
        return getattr(self, self.name)

    def __str__(self) -> str:
        return f"{self.name}={self.value:g}"

    def __repr__(self) -> str:
        return f"Budget({self.name}={self.value!r})"


BUDGETS = tuple(field.name for field in fields(Budget))
"""Names of the budgets that can be asked for."""

_RANGES = {
    "density": (
        lambda value: 0 < value <= 1,
        "in (0, 1]",
        "it is the share that is computed, so 0.3 computes 30 %",
    ),
    "error": (
        lambda value: 0 <= value < math.inf,
        "a finite number of at least 0",
        "dit-sparse show PLAN draws the errors that a search found",
    ),
    "speedup": (
        lambda value: 1 <= value < math.inf,
        "a finite number of at least 1",
        "1.5 takes two thirds of the dense time",
    ),
    "latency": (
        lambda value: 0 < value < math.inf,
        "a positive number of seconds",
        "it is the time of one generation",
    ),
    "psnr": (
        lambda value: 0 < value <= 100,
        "in (0, 100] dB",
        "25 to 35 are usual, 100 is the same video",
    ),
}


def parse_budget(text: str) -> Budget:
    """The budget that a command line gives as `name=value`.

    Raises:
        ValueError: if the name is unknown or the value is no number in range.

    >>> parse_budget("psnr=30")
    Budget(psnr=30.0)
    """
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals or name not in BUDGETS:
        raise ValueError(
            f"budget: expected name=value with a name of {', '.join(BUDGETS)}, came {text!r}; "
            "for instance density=0.3"
        )
    try:
        number = float(value)
    except ValueError as error:
        raise ValueError(
            f"budget: expected a number after {name}=, came {value!r}; for instance {name}="
            f"{_EXAMPLES[name]}"
        ) from error
    return Budget(**{name: number})


_EXAMPLES = {"density": 0.3, "error": 0.05, "speedup": 1.5, "latency": 60, "psnr": 30}
