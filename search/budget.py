"""Budget: what a plan may spend."""

from __future__ import annotations

from dataclasses import dataclass

BUDGETS = ("density",)
"""Names of the budgets that can be asked for."""


@dataclass(frozen=True, slots=True)
class Budget:
    """An upper limit on what the sparse steps of a plan cost.

    Args:
        density (`float`): block density in (0, 1], averaged over the self-attention of all
            layers and heads at the steps that are not dense by schedule. It counts the tiles a
            kernel visits, so it is at least the share of query-key pairs that is used.

    Raises:
        ValueError: if the density is out of range.

    >>> Budget(density=0.3)
    Budget(density=0.3)
    """

    density: float

    def __post_init__(self) -> None:
        if isinstance(self.density, bool) or not 0 < self.density <= 1:
            raise ValueError(
                f"density must be in (0, 1], came {self.density!r}; it is the share that is "
                "computed, so 0.3 computes 30 %"
            )

    def __str__(self) -> str:
        return f"density={self.density:g}"


def parse_budget(text: str) -> Budget:
    """The budget that a command line gives as `name=value`.

    Raises:
        ValueError: if the name is unknown or the value is no number in range.

    >>> parse_budget("density=0.3")
    Budget(density=0.3)
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
            f"budget: expected a number after {name}=, came {value!r}; for instance {name}=0.3"
        ) from error
    return Budget(**{name: number})
