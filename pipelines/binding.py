"""Binding: one transformer of a pipeline whose self-attention calls go to a receiver.

A binding rebinds the processor of every self-attention module (`seam.py`), reads the token grid
in a forward pre-hook of the transformer, which runs before the hooks of offloading, caching and
sharding, and tells the clock about every `cache_context`. Taking it off puts the same processor
objects back and leaves no trace.
"""

import copy
import inspect
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from dit_sparse.pipelines.family import Family, Shape, family_of, transformers_of
from dit_sparse.pipelines.seam import (
    SeamCall,
    new_handle,
    original_of,
    rebind,
    rebindable,
    restore,
)
from dit_sparse.pipelines.steps import Clock

ATTRIBUTE = "_dit_sparse_binding"


class Receiver(Protocol):
    """What answers the self-attention calls of a bound pipeline: a plan's hook, an observer.

    Args:
        clock (`Clock`): of the pipeline.
    """

    clock: Clock

    def attend(self, site: "Site", call: SeamCall) -> Tensor:
        """The output of one self-attention call, `[batch, tokens, heads, head_dim]`."""
        ...


class Site:
    """One self-attention module of a bound transformer; it owns the module's seam.

    Args:
        binding (`Binding`): of the transformer.
        path (`str`): of the module in the transformer.
        layer (`int`): its number among the self-attention modules of the transformer, from 0.
        module (`nn.Module`): the module.
    """

    def __init__(self, binding: "Binding", path: str, layer: int, module: nn.Module) -> None:
        self.binding = binding
        self.path = path
        self.layer = layer
        self.module: Any = module
        self.rebound: Any = None
        self.handle = new_handle(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = copy.copy(self)
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        twin.handle = new_handle(twin)
        return twin

    @property
    def name(self) -> str:
        """Component and path, as plans write it: `"transformer.blocks.0.attn1"`."""
        return f"{self.binding.component}.{self.path}"

    @property
    def active(self) -> bool:
        """False once detached; a rebound processor that is kept somewhere is then inert."""
        return self.rebound is not None

    @property
    def shape(self) -> Shape:
        """Frames, height and width of the video tokens of the running forward."""
        return self.binding.shape

    @property
    def backend(self) -> Any:
        """The diffusers attention backend that the user chose, if any."""
        return getattr(self.rebound, "_attention_backend", None)

    def attend(self, call: SeamCall) -> Tensor:
        """Let the receiver answer."""
        return self.binding.receiver.attend(self, call)

    def refusal(self, reason: str) -> ValueError:
        """The error for a call that no plan can serve."""
        return ValueError(
            f"layer {self.name} cannot follow a plan: {reason}; "
            "call disable_sparse_attention(pipe) before running it so"
        )

    def attach(self) -> None:
        """Put a rebound copy of the module's processor in its place."""
        self.rebound = rebind(original_of(self.module.processor), self)
        self.module.processor = self.rebound

    def detach(self) -> None:
        """Put the original processor back, unless the user has put another there."""
        if self.module.processor is self.rebound:
            self.module.processor = restore(self.rebound)
        self.rebound = None


class Binding:
    """One bound transformer.

    Args:
        component (`str`): its name in the pipeline.
        transformer (`nn.Module`): a diffusers transformer of a known family.
        receiver (`Receiver`): answers its self-attention calls.
    """

    def __init__(self, component: str, transformer: nn.Module, receiver: Receiver) -> None:
        self.component = component
        self.transformer = transformer
        self.receiver = receiver
        self.family: Family = family_of(transformer)
        self.shape: Shape = (0, 0, 0)
        modules = self.family.attention_modules(transformer)
        self.sites = tuple(
            Site(self, path, layer, module) for layer, (path, module) in enumerate(modules.items())
        )
        self._arguments = tuple(inspect.signature(type(transformer).forward).parameters)[1:]
        self._pre_hook: Any = None

    def attach(self) -> None:
        """Rebind all processors and watch the forward and the cache contexts."""
        vars(self.transformer)[ATTRIBUTE] = self
        for site in self.sites:
            site.attach()
        self._pre_hook = self.transformer.register_forward_pre_hook(
            self._before_forward, with_kwargs=True
        )
        if hasattr(type(self.transformer), "cache_context"):
            vars(self.transformer)["cache_context"] = types.MethodType(
                _cache_context, self.transformer
            )

    def detach(self) -> None:
        """Undo `attach`."""
        for site in self.sites:
            site.detach()
        self._pre_hook.remove()
        vars(self.transformer).pop("cache_context", None)
        vars(self.transformer).pop(ATTRIBUTE, None)

    def _before_forward(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        arguments = dict(zip(self._arguments, args, strict=False)) | kwargs
        self.shape = self.family.grid(transformer, arguments)
        replaced = [site for site in self.sites if site.module.processor is not site.rebound]
        if replaced:
            self._take_hold_again(replaced)

    def _take_hold_again(self, sites: list[Site]) -> None:
        """diffusers replaces processors (`set_attn_processor`, CogVideoX's fused projections);
        the layers would run dense without a word."""
        if torch.compiler.is_compiling():
            raise sites[0].refusal("its attention processor was replaced; enable again after that")
        warnings.warn(
            f"the attention processors of {len(sites)} layers, among them {sites[0].name}, were "
            "replaced after sparse attention was enabled; it now holds for the new ones",
            stacklevel=2,
        )
        for site in sites:
            site.attach()


@contextmanager
def _cache_context(self: Any, name: str, **fields: Any) -> Iterator[None]:
    clock: Clock = vars(self)[ATTRIBUTE].receiver.clock
    with type(self).cache_context(self, name, **fields):
        clock.enter(name, fields)
        try:
            yield
        finally:
            clock.leave()


def bind(pipe: Any, receiver: Receiver) -> tuple[Binding, ...]:
    """Bind every transformer of a pipeline, or none of them if one refuses.

    Raises:
        ValueError: if a transformer is bound already or one of its processors has no seam.
    """
    require_unbound(pipe)
    bindings = tuple(
        Binding(component, transformer, receiver)
        for component, transformer in transformers_of(pipe).items()
    )
    for site in (site for binding in bindings for site in binding.sites):
        processor = original_of(site.module.processor)
        if not rebindable(processor):
            raise site.refusal(f"its processor {type(processor).__name__} calls no attention seam")
    for binding in bindings:
        binding.attach()
    return bindings


def require_unbound(pipe: Any) -> None:
    """Raise `ValueError` if something answers the self-attention calls of `pipe` already."""
    if receiver_of(pipe) is not None:
        raise ValueError(
            "sparse attention is enabled on this pipeline, or it is being observed; call "
            "disable_sparse_attention(pipe) or leave the observer first"
        )


def receiver_of(pipe: Any) -> Receiver | None:
    """What answers the self-attention calls of `pipe`, if anything does."""
    for transformer in transformers_of(pipe).values():
        binding = vars(transformer).get(ATTRIBUTE)
        if binding is not None:
            return binding.receiver
    return None
