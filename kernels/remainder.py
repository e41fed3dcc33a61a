"""Remainder: what becomes of the pairs of tokens that a pattern does not compute.

    drop         nothing: softmax over what is kept
    pooled       every block of keys that is not listed is attended to through means of its keys
    rescale      rho * output + residual                                of an earlier dense step
    complement   merge((output, lse), attention to what is not kept)    of an earlier dense step

The last two need one dense pass beside the sparse one, (O, L) of each, and keep what follows:

    rho = exp(L_sparse - L_dense)           the share of attention that the pattern keeps
    residual = O_dense - rho * O_sparse     = (1 - rho) * O_complement
    L_complement = log(exp(L_dense) - exp(L_sparse))
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from einops import rearrange
from torch import Tensor

from dit_sparse.kernels.blocks import MOST_POOLED
from dit_sparse.kernels.merge import merge

Storage = Literal["float32", "bfloat16", "float16", "float8"]

Pair = tuple[Tensor, Tensor]
"""Output `[batch, tokens, heads, head_dim]` and its LSE `[batch, heads, tokens]`."""

_FLOAT8 = torch.float8_e4m3fn
_RUN = 64
"""Tokens that share one factor in float8."""


@dataclass(frozen=True, slots=True)
class Drop:
    """Nothing stands for the pairs that are not kept."""

    kind: ClassVar[str] = "drop"
    cached: ClassVar[bool] = False

    def __str__(self) -> str:
        return "drop"


@dataclass(frozen=True, slots=True)
class Pooled:
    """Blocks of keys that are not listed are seen through means of `2^level` keys each, with
    `ln(their number)` added to the logit.

    Pyramid Sparse Attention (arXiv 2512.04025); the global tokens of Video-BLADE (arXiv
    2508.10774) without counting kept blocks twice. Pairs that a pattern drops inside a listed
    block stay dropped.
    """

    kind: ClassVar[str] = "pooled"
    cached: ClassVar[bool] = False
    level: int = 3

    def __post_init__(self) -> None:
        if type(self.level) is not int or not 1 <= self.level <= MOST_POOLED:
            raise ValueError(
                f"level of a pooled remainder must be in 1..{MOST_POOLED}, the logarithm of the "
                f"number of keys in a mean, got {self.level!r}"
            )

    def __str__(self) -> str:
        return f"pooled by {2**self.level}"


@dataclass(frozen=True, slots=True)
class Rescale:
    """Outputs shrunk to the share that the pattern kept, plus the residual of the dense step.

    Re-ttention (arXiv 2505.22918). `ramp` is added to the share at every step after
    the dense one; the share is kept to at most 1, which the published code does not do
    (`clamp=False`).
    """

    kind: ClassVar[str] = "rescale"
    cached: ClassVar[bool] = True
    ramp: float = 0.04
    clamp: bool = True
    storage: Storage = "float16"

    def __post_init__(self) -> None:
        if not 0 <= self.ramp <= 1:
            raise ValueError(f"ramp of a rescale must be in [0, 1], got {self.ramp!r}")
        _check_storage(self.storage)

    def __str__(self) -> str:
        return f"rescale ramp {self.ramp:g}{'' if self.clamp else ' unclamped'} {self.storage}"


@dataclass(frozen=True, slots=True)
class Complement:
    """Merged with the attention that the dense step paid to what the pattern does not keep.

    As `Rescale` at the step after, but the shares follow from the current LSE, so that they sum
    to one at every step and there is nothing to tune.
    """

    kind: ClassVar[str] = "complement"
    cached: ClassVar[bool] = True
    storage: Storage = "float16"

    def __post_init__(self) -> None:
        _check_storage(self.storage)

    def __str__(self) -> str:
        return f"complement {self.storage}"


Remainder = Drop | Pooled | Rescale | Complement
Cached = Rescale | Complement
REMAINDERS: dict[str, type[Remainder]] = {kind.kind: kind for kind in get_args(Remainder)}


@dataclass(frozen=True, slots=True, eq=False)
class Cache:
    """What a dense step leaves for the sparse ones after it, for some heads of one layer.

    Attributes:
        remainder: that it belongs to.
        rows: residual, or output of the complement, `[batch, tokens, heads, head_dim]`.
        level: float32 `[batch, heads, tokens]`: rho, or the LSE of the complement.
        factor: of `rows` stored in float8, float32 `[batch, runs of tokens, heads]`.
        loss: mean share of attention that the pattern does not keep, in [0, 1]; float32 scalar.
    """

    remainder: Cached
    rows: Tensor
    level: Tensor
    factor: Tensor | None
    loss: Tensor

    @property
    def bytes(self) -> int:
        """Memory that the cache holds."""
        held = [self.rows, self.level, *([] if self.factor is None else [self.factor])]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def apply(self, sparse: Pair, steps: int) -> Tensor:
        """The output for the sparse pair, `steps` denoising steps after the dense one."""
        rows = _load(self.rows, self.factor)
        if isinstance(self.remainder, Complement):
            return merge([sparse, (rows, self.level)])[0]
        share = self.level + self.remainder.ramp * steps
        if self.remainder.clamp:
            share = share.clamp_max(1)
        output = rearrange(share, "b h n -> b n h 1") * sparse[0] + rows
        return output.to(sparse[0].dtype)


def cache_of(remainder: Cached, dense: Pair, sparse: Pair) -> Cache:
    """What `remainder` keeps of a step for which dense and sparse attention are known."""
    level = dense[1].float()
    share = (sparse[1].float() - level).exp().clamp_max(1)
    # A query without any key has no attention to share out.
    share = share.masked_fill(level.isneginf(), 1)
    residual = dense[0].float() - rearrange(share, "b h n -> b n h 1") * sparse[0].float()
    if isinstance(remainder, Complement):
        # Where next to nothing is missing, residual / (1 - rho) would be rounding noise.
        missing = (1 - share).masked_fill(share > 1 - 8 * torch.finfo(torch.float32).eps, 0)
        inverse = missing.reciprocal().masked_fill(missing == 0, 0)
        residual = residual * rearrange(inverse, "b h n -> b n h 1")
        level = level + missing.log()
    else:
        level = share
    rows, factor = _store(residual, remainder.storage)
    return Cache(remainder, rows, level, factor, (1 - share).mean())


def cache_bytes(remainder: Remainder, batch: int, tokens: int, heads: int, head_dim: int) -> int:
    """Memory of the cache of some heads of one layer in one guidance branch."""
    if not isinstance(remainder, Cached):
        return 0
    each = 1 if remainder.storage == "float8" else getattr(torch, remainder.storage).itemsize
    factors = 4 * -(-tokens // _RUN) if remainder.storage == "float8" else 0
    return batch * heads * (tokens * (head_dim * each + 4) + factors)


def _store(rows: Tensor, storage: Storage) -> tuple[Tensor, Tensor | None]:
    if storage != "float8":
        dtype: torch.dtype = getattr(torch, storage)
        return rows.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype), None
    runs = _runs(rows)
    factor = runs.abs().amax((2, 4), keepdim=True) / torch.finfo(_FLOAT8).max
    factor = factor.clamp_min(torch.finfo(torch.float32).tiny)
    stored = rearrange((runs / factor).to(_FLOAT8), "b r i h d -> b (r i) h d")
    return stored[:, : rows.shape[1]], rearrange(factor, "b r 1 h 1 -> b r h")


def _load(rows: Tensor, factor: Tensor | None) -> Tensor:
    if factor is None:
        return rows.float()
    runs = _runs(rows.float()) * rearrange(factor, "b r h -> b r 1 h 1")
    return rearrange(runs, "b r i h d -> b (r i) h d")[:, : rows.shape[1]]


def _runs(rows: Tensor) -> Tensor:
    """Rows as runs of tokens, the last filled up with zeros: `[batch, runs, _RUN, heads, d]`."""
    padded = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, -rows.shape[1] % _RUN))
    return rearrange(padded, "b (r i) h d -> b r i h d", i=_RUN)


def _check_storage(storage: object) -> None:
    if storage not in get_args(Storage):
        raise ValueError(f"storage must be one of {', '.join(get_args(Storage))}, got {storage!r}")
