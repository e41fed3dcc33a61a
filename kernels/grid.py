"""TokenGrid: where the video and the text tokens of one attention call stand.

The tokens of a call are in *raster order*: `text_before` text tokens, the video tokens frame by
frame, row by row, then `text_after` text tokens. A grid is geometry only; it holds no tensors.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenGrid:
    """The `(frames, height, width)` latent grid of one attention call, and its text.

    `valid_text` gives, for each sample of the batch, how many of its text tokens are real; the
    rest is padding at the end of the text and receives no attention. `None` means that all are
    real. It needs text on one side only, since the padding of two texts cannot be told apart.

    >>> TokenGrid(13, 30, 45, text_before=226).tokens
    17776
    """

    frames: int
    height: int
    width: int
    text_before: int = 0
    text_after: int = 0
    valid_text: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}; "
                    "give the grid in tokens, after patching"
                )
        for name in ("text_before", "text_after"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"{name} must not be negative, got {getattr(self, name)}; use 0 for no text"
                )
        if self.valid_text is None:
            return
        if self.text_before and self.text_after:
            raise ValueError(
                "valid_text needs text on one side, got "
                f"text_before={self.text_before} and text_after={self.text_after}; "
                "leave valid_text None or give one text"
            )
        wrong = [count for count in self.valid_text if not 0 <= count <= self.text]
        if wrong or not self.valid_text:
            raise ValueError(
                f"valid_text must hold one count in 0..{self.text} for each sample, "
                f"got {self.valid_text}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(frames, height, width)`."""
        return self.frames, self.height, self.width

    @property
    def video(self) -> int:
        """Number of video tokens."""
        return self.frames * self.height * self.width

    @property
    def text(self) -> int:
        """Number of text tokens, padding included."""
        return self.text_before + self.text_after

    @property
    def tokens(self) -> int:
        """Number of all tokens."""
        return self.video + self.text

    def invalid_text(self, valid: int) -> slice:
        """The raster tokens that are padding in a sample with `valid` real text tokens."""
        start = 0 if self.text_before else self.video
        return slice(start + valid, start + self.text)

    def real(self, batch: int) -> Tensor:
        """Which tokens of each of `batch` samples are not padding, bool `[batch, tokens]`."""
        real = torch.ones(batch, self.tokens, dtype=torch.bool)
        for sample, valid in enumerate(self.valid_text or ()):
            real[sample, self.invalid_text(valid)] = False
        return real

    def coordinates(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Frame, row and column of raster `tokens` (int64, any shape); -1 for text tokens."""
        video = tokens - self.text_before
        row = torch.div(video, self.width, rounding_mode="floor")
        frame = torch.div(row, self.height, rounding_mode="floor")
        text = (video < 0) | (video >= self.video)
        return (
            frame.masked_fill(text, -1),
            (row - frame * self.height).masked_fill(text, -1),
            (video - row * self.width).masked_fill(text, -1),
        )

    def __str__(self) -> str:
        text = f"{self.text_before}+" if self.text_before else ""
        after = f"+{self.text_after}" if self.text_after else ""
        return f"{text}{self.frames}x{self.height}x{self.width}{after}"
