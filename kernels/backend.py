"""Backend: one way to compute an attention call, and the table of all of them.

`"auto"` takes the first of the table that accepts a call or, where this device was calibrated
(`dit-sparse bench --calibrate`), the one that is predicted to be fastest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from dit_sparse.kernels import flex, gather, gpu, native, natten_backend, reference
from dit_sparse.kernels.calibration import calibration_for
from dit_sparse.kernels.call import AttentionCall as AttentionCall


@dataclass(frozen=True, slots=True)
class Backend:
    """A name, the reason for refusing a call (`None` if it does not), and the computation."""

    name: str
    supports: Callable[[AttentionCall], str | None]
    run: Callable[[AttentionCall], tuple[Tensor, Tensor]]


# Fastest first: without a calibration, "auto" takes the first one that accepts.
BACKENDS = (
    Backend("natten", natten_backend.supports, natten_backend.run),
    Backend("triton", gpu.supports, gpu.run),
    Backend("flex", flex.supports, flex.run),
    Backend("native", native.supports, native.run),
    Backend("gather", gather.supports, gather.run),
    Backend("reference", reference.supports, reference.run),
)


def choose(call: AttentionCall, name: str = "auto") -> Backend:
    """The backend called `name` or, for `"auto"`, the best that accepts `call`.

    Raises:
        ValueError: no backend has that name, the named one refuses, or all do; with the reasons.
    """
    named = [backend for backend in BACKENDS if name in ("auto", backend.name)]
    if not named:
        known = ", ".join(["auto", *(backend.name for backend in BACKENDS)])
        raise ValueError(f"unknown backend {name!r}; use one of {known}")
    refusals = {}
    for number, backend in enumerate(named):
        reason = backend.supports(call)
        if reason is None:
            return _fastest(call, backend, named[number + 1 :])
        refusals[backend.name] = reason
    if name != "auto":
        raise ValueError(f"backend {name!r} refuses this call: {refusals[name]}")
    table = "".join(f"\n  {refusing}: {reason}" for refusing, reason in refusals.items())
    raise ValueError(f"no backend accepts this call:{table}")


def _fastest(call: AttentionCall, first: Backend, others: Sequence[Backend]) -> Backend:
    """`first`, unless it was measured and another is predicted to be faster."""
    calibration = calibration_for(call.query.device) if others else None
    least = None if calibration is None else calibration.seconds(first.name, call)
    if calibration is None or least is None:
        return first
    for backend in others:
        seconds = calibration.seconds(backend.name, call)
        if seconds is not None and seconds < least and backend.supports(call) is None:
            first, least = backend, seconds
    return first
