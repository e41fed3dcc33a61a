"""Family: the facts about one diffusers transformer class that a plan needs.

A family is four facts, kept in a file of its own (`wan.py`, `cogvideox.py`): the class name, the
paths of its self-attention modules, how to read the token grid off the arguments of `forward`,
and on which side of the video its text tokens stand.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.pipelines import cogvideox, wan

Shape = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Family:
    """Facts about one transformer class.

    Args:
        transformer (`str`): name of the diffusers class.
        attention (`str`): regular expression; a module whose whole path matches is self-attention.
        grid (`Callable`): the transformer and the arguments of its `forward` by name, to the
            `(frames, height, width)` of the video tokens.
        text (`str`): `"none"`, or the side of the video on which the text tokens stand in the
            joint sequence, `"before"` or `"after"`.
    """

    transformer: str
    attention: str
    grid: Callable[[Any, Mapping[str, Any]], Shape]
    text: Literal["none", "before", "after"]

    def attention_modules(self, transformer: nn.Module) -> dict[str, nn.Module]:
        """The self-attention modules by path, in the order in which they run."""
        return {
            path: module
            for path, module in transformer.named_modules()
            if re.fullmatch(self.attention, path)
        }

    def token_grid(self, shape: Shape, tokens: int) -> TokenGrid:
        """The grid of an attention call over `tokens` tokens when the video has this `shape`."""
        frames, height, width = shape
        text = tokens - frames * height * width
        if text < 0 or (text > 0 and self.text == "none"):
            raise ValueError(
                f"{self.transformer}: expected {frames}x{height}x{width} video tokens"
                f"{'' if self.text == 'none' else ' and text'}, came {tokens} tokens; "
                "inputs that lengthen or split the sequence (reference images, context "
                "parallelism) cannot run sparse: disable_sparse_attention(pipe) first"
            )
        if self.text == "before":
            return TokenGrid(frames, height, width, text_before=text)
        return TokenGrid(frames, height, width, text_after=text)


FAMILIES: dict[str, Family] = {
    facts.TRANSFORMER: Family(facts.TRANSFORMER, facts.ATTENTION, facts.grid, facts.TEXT)
    for facts in (wan, cogvideox)
}


def family_of(transformer: nn.Module) -> Family:
    """The family of a transformer, by the name of its class."""
    name = type(transformer).__name__
    if name not in FAMILIES:
        raise ValueError(
            f"expected a transformer of a known family, came {name}; known are "
            f"{', '.join(sorted(FAMILIES))}: pipelines/README.md says how to add one"
        )
    return FAMILIES[name]


def transformers_of(pipe: Any) -> dict[str, nn.Module]:
    """The denoising transformers of a pipeline by component name; Wan 2.2 has two.

    A bare transformer counts as a pipeline with that one component. A compiled transformer
    (`torch.compile`) is looked through.
    """
    if isinstance(pipe, nn.Module):
        return {"transformer": getattr(pipe, "_orig_mod", pipe)}
    components = {name: getattr(pipe, name, None) for name in ("transformer", "transformer_2")}
    found = {
        name: getattr(component, "_orig_mod", component)
        for name, component in components.items()
        if component is not None
    }
    if not found:
        raise ValueError(
            f"expected a diffusers pipeline with a transformer, came {type(pipe).__name__}; "
            "pipelines built on a UNet have no token grid to plan for"
        )
    return found
