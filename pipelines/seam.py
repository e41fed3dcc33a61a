"""Seam: the call inside an attention processor where query, key and value are ready to attend.

diffusers has two. Newer models call `dispatch_attention_fn` with `[batch, tokens, heads, dim]`,
older ones `F.scaled_dot_product_attention` with `[batch, heads, tokens, dim]`; both after the
rotary embedding. A processor is *rebound* by copying it and giving the copy a subclass whose
`__call__` runs the same bytecode over a copy of the module's globals in which those two names
(and helpers of the module that reach them) lead here. Nothing of diffusers is rewritten or
changed for other objects, so fused projections, LoRA and attention backends go on working.

Everything below also runs under `torch.compile` without graph breaks: a traced seam emits one
opaque operator, which looks its site up by a 0-dim CPU tensor, so that layers do not
differ for the tracer, and decides at run time, so that steps do not either.
"""

import copy
import functools
import threading
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol, TypeGuard

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from dit_sparse.pipelines.family import Shape

SEAMS = frozenset({"dispatch_attention_fn", "scaled_dot_product_attention"})


@dataclass(frozen=True, slots=True)
class SeamCall:
    """One attention call at a seam.

    Args:
        query (`Tensor`), key (`Tensor`), value (`Tensor`): `[batch, tokens, heads, head_dim]`,
            any strides, after the rotary embedding.
        scale (`float`, *optional*): of the logits; `None` for `head_dim ** -0.5`.
        shape (`tuple[int, int, int]`): frames, height and width of the video tokens.
        dense (`Callable`): the original call with its original arguments; heads last as well.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None
    shape: Shape
    dense: Callable[[], Tensor]


class SeamOwner(Protocol):
    """Whoever answers the calls of one rebound processor."""

    handle: Tensor

    @property
    def active(self) -> bool:
        """False once the processor was taken off; it then computes what the original does."""
        ...

    @property
    def shape(self) -> Shape:
        """Frames, height and width of the video tokens of the running forward."""
        ...

    def attend(self, call: SeamCall) -> Tensor:
        """The output of a call, `[batch, tokens, heads, head_dim]`."""
        ...

    @property
    def backend(self) -> Any:
        """The diffusers attention backend that the user chose for the processor, if any."""
        ...

    def refusal(self, reason: str) -> Exception:
        """The error for a call that no plan can serve."""
        ...


class _Running(threading.local):
    """The site whose processor runs in this thread."""

    site: SeamOwner | None = None


_RUNNING = _Running()
_HANDLES = count()
_SITES: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def new_handle(site: SeamOwner) -> Tensor:
    """A 0-dim CPU tensor by which the compiled operator finds `site`, as long as that lives."""
    handle = next(_HANDLES)
    _SITES[handle] = site
    return torch.tensor(handle)


def rebindable(processor: object) -> bool:
    """Whether a processor's `__call__` reaches a seam."""
    return _rebound_class(type(processor)) is not None


def rebind(processor: Any, site: SeamOwner) -> Any:
    """A copy of `processor` whose attention calls are answered by `site`."""
    rebound_class = _rebound_class(type(processor))
    if rebound_class is None:
        raise ValueError(
            f"expected an attention processor that calls {' or '.join(sorted(SEAMS))}, came "
            f"{type(processor).__name__}; its layer cannot run sparse"
        )
    rebound = copy.copy(processor)
    rebound.__class__ = rebound_class
    vars(rebound).update(_sparse_site=site, _sparse_original=processor)
    return rebound


def original_of(processor: Any) -> Any:
    """The processor of which `processor` is a rebound copy; itself if it is none."""
    return vars(processor).get("_sparse_original", processor)


def restore(rebound: Any) -> Any:
    """The original of a rebound copy, with what the user set on the copy in the meantime (the
    attention backend, the parallel configuration)."""
    original = original_of(rebound)
    own = ("_sparse_site", "_sparse_original")
    vars(original).update({name: v for name, v in vars(rebound).items() if name not in own})
    return original


@functools.cache
def _rebound_class(processor_class: type) -> type | None:
    call = processor_class.__call__
    if not isinstance(call, types.FunctionType) or not _reaches(call, set()):
        return None
    names = dict(call.__globals__)
    # Dynamo resolves a function's globals through the module called __name__, and would trace
    # the original names; relative imports inside the function need only __package__.
    names.pop("__name__", None)
    if "dispatch_attention_fn" in names:
        names["dispatch_attention_fn"] = _dispatch_seam(names["dispatch_attention_fn"])
    if names.get("F") is F:
        functional = types.ModuleType("torch.nn.functional")
        functional.__dict__.update(F.__dict__)
        functional.scaled_dot_product_attention = _sdpa_seam  # type: ignore[attr-defined]
        names["F"] = functional
    for name, helper in call.__globals__.items():
        if _is_helper(helper, call) and _reaches(helper, {call}):
            names[name] = _with_globals(helper, names)
    original_call = _with_globals(call, names)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        previous, _RUNNING.site = _RUNNING.site, self._sparse_site
        try:
            return original_call(self, *args, **kwargs)
        finally:
            _RUNNING.site = previous

    # diffusers filters the keyword arguments of a processor by the signature of its __call__.
    __call__.__wrapped__ = call  # type: ignore[attr-defined]
    members = {"__call__": __call__, "__module__": processor_class.__module__}
    return type(processor_class.__name__, (processor_class,), members)


def _reaches(function: types.FunctionType, passed: set[types.FunctionType]) -> bool:
    """Whether a function calls a seam, itself or through helpers of its own module."""
    passed = passed | {function}
    names = _names(function.__code__)
    helpers = (function.__globals__.get(name) for name in names)
    return bool(names & SEAMS) or any(
        _is_helper(helper, function) and helper not in passed and _reaches(helper, passed)
        for helper in helpers
    )


def _names(code: types.CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _is_helper(candidate: Any, function: types.FunctionType) -> TypeGuard[types.FunctionType]:
    """Whether `candidate` is a function of the same module as `function`."""
    return (
        isinstance(candidate, types.FunctionType) and candidate.__globals__ is function.__globals__
    )


def _with_globals(function: types.FunctionType, names: dict[str, Any]) -> types.FunctionType:
    copied = types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _dispatch_seam(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def dispatch_attention_fn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        *args: Any,
        parallel_config: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        def dense() -> Tensor:
            return original(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, *args,
                parallel_config=parallel_config, **kwargs,
            )  # fmt: skip

        site = _RUNNING.site
        if site is None or not site.active:
            return dense()
        _require_plain(site, query, key, attn_mask, dropout_p, is_causal, enable_gqa)
        if parallel_config is not None:
            raise site.refusal("context parallelism is enabled")
        if torch.compiler.is_compiling():
            return _compiled(query, key, value, scale, site.handle, *site.shape, False)
        return site.attend(SeamCall(query, key, value, scale, site.shape, dense))

    return dispatch_attention_fn


def _sdpa_seam(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    def dense() -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    site = _RUNNING.site
    if site is None or not site.active:
        return dense()
    heads_last = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    _require_plain(site, *heads_last[:2], attn_mask, dropout_p, is_causal, enable_gqa)
    if torch.compiler.is_compiling():
        output = _compiled(*heads_last, scale, site.handle, *site.shape, True)
    else:
        call = SeamCall(*heads_last, scale, site.shape, lambda: dense().transpose(1, 2))
        output = site.attend(call)
    return output.transpose(1, 2)


def _require_plain(
    site: SeamOwner,
    query: Tensor,
    key: Tensor,
    mask: Any,
    dropout: float,
    causal: bool,
    grouped: bool,
) -> None:
    """A plan describes bidirectional self-attention over one grid, and nothing else."""
    if mask is not None:
        raise site.refusal("it came with an attention mask")
    if causal or grouped or dropout:
        raise site.refusal("it is causal, has grouped heads, or has dropout")
    if query.shape != key.shape:
        raise site.refusal(
            f"its query {tuple(query.shape)} and key {tuple(key.shape)} differ in shape, so it "
            "is not self-attention"
        )


@torch.library.custom_op(
    "dit_sparse::attend_site", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def _compiled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    handle: Tensor,
    frames: int,
    height: int,
    width: int,
    heads_first: bool,
) -> Tensor:
    """A seam call in a compiled graph; the site decides when the graph runs."""
    site = _SITES[int(handle)]

    def dense() -> Tensor:
        if heads_first:
            q, k, v = (operand.transpose(1, 2) for operand in (query, key, value))
            return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
        return dispatch_attention_fn(query, key, value, scale=scale, backend=site.backend)

    shape = frames, height, width
    return site.attend(SeamCall(query, key, value, scale, shape, dense)).contiguous()


@_compiled.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)
