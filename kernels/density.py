"""Density: which share of all pairs is computed, in three senses that are told apart."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Density:
    """The share of all query-key pairs, averaged over heads, in three senses.

    `element`: pairs kept. `block`: pairs in visited blocks, which is what a kernel computes.
    `weighted`: as `block`, with keys pooled by `2^r` counted `1 / 2^r`. Padded text counts as
    tokens, as it does in dense attention.
    """

    element: float
    block: float
    weighted: float
