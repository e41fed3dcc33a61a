"""Budget: what a plan may spend, or what it has to keep."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Budget:
    """One limit, on one of seven scales; the search finds the best plan that keeps it.

    Args:
        flops (`float`, *optional*): most attention FLOPs of a whole generation in (0, 1], relative
            to dense: steps that run dense, searches and the taking of caches included.
        density (`float`, *optional*): most block density in (0, 1], averaged over the
            self-attention of all layers and heads at the steps that are not dense by schedule. It
            counts the tiles a kernel visits, so it is at least the share of query-key pairs that
            is used; searches and the taking of caches count as what they compute. As dense steps
            do not count, only schedules with the usual fifth of them, or nearest to it, are taken.
        error (`float`, *optional*): most predicted error, at least 0: the mean over layers and
            denoising steps of the summed errors of the heads, in the metric of the search.
        speedup (`float`, *optional*): least predicted speed-up of a whole generation over the
            dense one, at least 1.
        latency (`float`, *optional*): most predicted seconds of a whole generation.
        psnr (`float`, *optional*): least PSNR in dB of generated videos against the dense ones of
            the same seeds, mean over the prompts of the search, in (0, 100].
        price (`float`, *optional*): no limit but the rule of Sparse-vDiT (arXiv 2506.03065,
            section 4): every head takes what has the least error + price * FLOPs (its lambda),
            both of this head alone and over the whole generation; at least 0.
        gate (`float`, *optional*): beside a price, the largest such sum of a head that runs sparse
            (its epsilon); a head of which none is as small runs full. Without one none does.
        cache_bytes (`int`, *optional*): beside one of the others, most memory that may be kept
            between denoising steps, over all guidance branches.

    Raises:
        ValueError: if not exactly one of the scales is given, or a value is out of range.

    >>> Budget(flops=0.3)
    Budget(flops=0.3)
    >>> Budget(psnr=30).name, Budget(psnr=30).value
    ('psnr', 30)
    """

    flops: float | None = None
    density: float | None = None
    error: float | None = None
    speedup: float | None = None
    latency: float | None = None
    psnr: float | None = None
    price: float | None = None
    gate: float | None = None
    cache_bytes: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            came = ", ".join(f"{name}={getattr(self, name)!r}" for name in given) or "none"
            raise ValueError(
                f"budget: expected exactly one of {', '.join(BUDGETS)}, came {came}; "
                "for instance flops=0.3"
            )
        valid, expected, remedy = _RANGES[self.name]
        if isinstance(self.value, bool) or not valid(self.value):
            raise ValueError(f"{self.name} must be {expected}, came {self.value!r}; {remedy}")
        gate = self.gate
        if gate is not None and (self.price is None or not gate >= 0):
            raise ValueError(
                f"gate must be a number of at least 0 beside a price, came {gate!r} beside "
                f"{self.name}; for instance price=0.5,gate=1"
            )
        held = self.cache_bytes
        if held is not None and (type(held) is not int or held < 0):
            raise ValueError(
                f"cache_bytes must be a number of bytes of at least 0, came {held!r}; 0 keeps none"
            )

    @property
    def name(self) -> str:
        """Which of the scales."""
        return next(name for name in BUDGETS if getattr(self, name) is not None)

    @property
    def value(self) -> float:
        """The limit on it."""
        return getattr(self, self.name)

    def __str__(self) -> str:
        return ",".join([f"{self.name}={self.value:g}", *self._beside("{}={:.12g}")])

    def __repr__(self) -> str:
        return f"Budget({', '.join([f'{self.name}={self.value!r}', *self._beside('{}={!r}')])})"

    def _beside(self, form: str) -> list[str]:
        given = ((name, getattr(self, name)) for name in BESIDE)
        return [form.format(name, value) for name, value in given if value is not None]


BESIDE = ("gate", "cache_bytes")
"""What may be given beside one of the others."""

BUDGETS = tuple(field.name for field in fields(Budget) if field.name not in BESIDE)
"""Names of the budgets of which one can be asked for."""

CLOCKED = ("speedup", "latency")
"""Those of seconds."""

_RANGES = {
    "flops": (
        lambda value: 0 < value <= 1,
        "in (0, 1]",
        "it is a share of dense attention, so 0.3 computes 30 % of it",
    ),
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
    "price": (
        lambda value: 0 <= value < math.inf,
        "a finite number of at least 0",
        "it is what all of dense attention is worth in error, so less keeps more heads full",
    ),
    "psnr": (
        lambda value: 0 < value <= 100,
        "in (0, 100] dB",
        "25 to 35 are usual, 100 is the same video",
    ),
}


def parse_budget(text: str) -> Budget:
    """The budget that a command line gives as `name=value`, or with what may be beside it, as
    `name=value,cache_bytes=value`.

    Raises:
        ValueError: if a name is unknown or a value is no number in range.

    >>> parse_budget("psnr=30")
    Budget(psnr=30.0)
    >>> parse_budget("flops=0.3,cache_bytes=20e6")
    Budget(flops=0.3, cache_bytes=20000000)
    """
    given: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or name not in (*BUDGETS, *BESIDE) or name in given:
            raise ValueError(
                f"budget: expected name=value with a name of {', '.join(BUDGETS)}, "
                f"and {' or '.join(BESIDE)} beside it if need be, came {text!r}; for instance "
                "flops=0.3"
            )
        try:
            number = float(value)
            whole = name == "cache_bytes" and number.is_integer()
            given[name] = int(number) if whole else number
        except ValueError as error:
            raise ValueError(
                f"budget: expected a number after {name}=, came {value!r}; for instance {name}="
                f"{_EXAMPLES[name]}"
            ) from error
    return Budget(**given)


_EXAMPLES = {
    "flops": 0.3,
    "density": 0.3,
    "error": 0.05,
    "speedup": 1.5,
    "latency": 60,
    "psnr": 30,
    "price": 0.01,
    "gate": 1,
    "cache_bytes": 10**9,
}
