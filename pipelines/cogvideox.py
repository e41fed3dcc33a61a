"""CogVideoX: where the self-attention and the token grid of a CogVideoX 1.0 or 1.5 model are.

`attn1` attends over the text tokens (T5, padding included) followed by the video. Version 1.0
has no patch in time; 1.5 groups `patch_size_t` frames, and its pipeline pads the latents so that
they divide.
"""

from collections.abc import Mapping
from typing import Any

TRANSFORMER = "CogVideoXTransformer3DModel"
ATTENTION = r"transformer_blocks\.\d+\.attn1"
TEXT = "before"


def grid(transformer: Any, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """Latents `[batch, frames, channels, height, width]`, divided by the patch."""
    frames, _, height, width = arguments["hidden_states"].shape[1:]
    patch = transformer.config.patch_size
    return frames // (transformer.config.patch_size_t or 1), height // patch, width // patch
