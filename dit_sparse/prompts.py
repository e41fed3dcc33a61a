"""Prompt: one thing to be generated, and the TXT and JSONL files that list them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is asked of the model, and under which name the answer is filed.

    Args:
        id: names files and folders; letters, digits, `.`, `_` and `-`, at most 100 of them.
        text: the prompt.
        negative_text: what guidance steers away from.
        seed: of the initial noise; None takes the seed of the run's settings.
    """

    id: str
    text: str
    negative_text: str = ""
    seed: int | None = None

    def __post_init__(self) -> None:
        if not SAFE_ID.fullmatch(self.id):
            raise ValueError(
                f"id {self.id!r} cannot name a folder; use at most 100 letters, digits, "
                "'.', '_' or '-', and begin with a letter or digit"
            )
        if not self.text.strip():
            raise ValueError("the prompt is empty; write what the video should show")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} is outside 0 ... 2**63 - 1")


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str
    id: str | None = None
    negative_prompt: str = ""
    seed: int | None = None


def read_prompts(path: str | Path) -> tuple[Prompt, ...]:
    """Read a prompt file: JSONL when its name ends in `.jsonl`, otherwise plain text.

    JSONL has one object a line, `{"prompt", "id"?, "negative_prompt"?, "seed"?}`; text has one
    prompt a line. Empty lines are skipped; a prompt without an id is named by its line (`0007`).

    Raises:
        ValueError: a line that cannot be read, an id used twice, or no prompt at all; the
            message begins with `file:line`.
        OSError: the file cannot be opened.
    """
    path = Path(path)
    parse = _from_json if path.suffix == ".jsonl" else _from_text
    prompts: list[Prompt] = []
    seen: dict[str, int] = {}
    for number, line in _lines(path):
        try:
            prompt = parse(line, f"{number:04d}")
            if prompt.id in seen:
                raise ValueError(f"id {prompt.id!r} is already used on line {seen[prompt.id]}")
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        seen[prompt.id] = number
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path}: no prompt in this file; write one prompt a line")
    return tuple(prompts)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, raw in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8 text ({error.reason})") from None
        if line:
            yield number, line


def _from_text(line: str, name: str) -> Prompt:
    return Prompt(name, line)


def _from_json(line: str, name: str) -> Prompt:
    try:
        fields = _Line.model_validate_json(line)
    except ValidationError as error:
        raise ValueError(validation_message(error)) from None
    return Prompt(fields.id or name, fields.prompt, fields.negative_prompt, fields.seed)


def validation_message(error: ValidationError) -> str:
    """The first complaint of pydantic on one line: `field: what is wrong`."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"]
