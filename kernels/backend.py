"""Backend: one way to compute an attention call, and the table of all of them."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dit_sparse.kernels import gather, gpu, reference
from dit_sparse.kernels.call import AttentionCall as AttentionCall


@dataclass(frozen=True, slots=True)
class Backend:
    """A name, the reason for refusing a call (`None` if it does not), and the computation."""

    name: str
    supports: Callable[[AttentionCall], str | None]
    run: Callable[[AttentionCall], tuple[Tensor, Tensor]]


# Fastest first: "auto" takes the first one that accepts.
BACKENDS = (
    Backend("triton", gpu.supports, gpu.run),
    Backend("gather", gather.supports, gather.run),
    Backend("reference", reference.supports, reference.run),
)


def choose(call: AttentionCall, name: str = "auto") -> Backend:
    """The backend called `name` or, for `"auto"`, the first that accepts `call`.

    Raises:
        ValueError: no backend has that name, the named one refuses, or all do; with the reasons.
    """
    named = [backend for backend in BACKENDS if name in ("auto", backend.name)]
    if not named:
        known = ", ".join(["auto", *(backend.name for backend in BACKENDS)])
        raise ValueError(f"unknown backend {name!r}; use one of {known}")
    refusals = {}
    for backend in named:
        reason = backend.supports(call)
        if reason is None:
            return backend
        refusals[backend.name] = reason
    if name != "auto":
        raise ValueError(f"backend {name!r} refuses this call: {refusals[name]}")
    table = "".join(f"\n  {refusing}: {reason}" for refusing, reason in refusals.items())
    raise ValueError(f"no backend accepts this call:{table}")
