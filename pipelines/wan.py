"""Wan: where the self-attention and the token grid of a Wan 2.1 or 2.2 transformer are.

Each block attends to the video alone in `attn1`; the text enters through the cross-attention
`attn2`, which a plan never touches. The class serves text-to-video, image-to-video and both
experts of Wan 2.2.
"""

from collections.abc import Mapping
from typing import Any

TRANSFORMER = "WanTransformer3DModel"
ATTENTION = r"blocks\.\d+\.attn1"
TEXT = "none"


def grid(transformer: Any, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    """Latents `[batch, channels, frames, height, width]`, divided by the patch."""
    frames, height, width = arguments["hidden_states"].shape[2:]
    patch_frames, patch_height, patch_width = transformer.config.patch_size
    return frames // patch_frames, height // patch_height, width // patch_width
