"""Prompt files: what is read, and where a broken one is broken."""

from pathlib import Path

import pytest

from dit_sparse.prompts import Prompt, read_prompts


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_text_has_one_prompt_a_line_named_by_it(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "a cat\n\n  a dog, running \r\n")
    assert read_prompts(path) == (Prompt("0001", "a cat"), Prompt("0003", "a dog, running"))


def test_jsonl_has_one_object_a_line(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "p.jsonl",
        '\ufeff{"prompt": "a cat"}\n'
        '{"id": "dog", "prompt": "a dog", "negative_prompt": "blur", "seed": 7}\n',
    )
    assert read_prompts(path) == (Prompt("0001", "a cat"), Prompt("dog", "a dog", "blur", 7))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', "Invalid JSON"),
        ('{"id": "x"}', "prompt: Field required"),
        ('{"prompt": "a", "sede": 1}', "sede: Extra inputs are not permitted"),
        ('{"prompt": "a", "seed": "1"}', "seed: Input should be a valid integer"),
        ('{"prompt": "a", "seed": -1}', "seed -1 is outside"),
        ('{"prompt": "  "}', "the prompt is empty"),
        ('{"prompt": "a", "id": "../../etc"}', "cannot name a folder"),
        ('{"prompt": "a", "id": "/etc/x"}', "cannot name a folder"),
        ('{"prompt": "a", "id": ".hidden"}', "cannot name a folder"),
        ('{"prompt": "a", "id": "one"}', "id 'one' is already used on line 1"),
        ('["a"]', "Input should be an object"),
    ],
    ids=lambda value: value[:24],
)
def test_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path, "p.jsonl", f'{{"id": "one", "prompt": "a"}}\n\n{line}\n')
    with pytest.raises(ValueError, match=message) as raised:
        read_prompts(path)
    assert str(raised.value).startswith(f"{path}:3: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["", "\n  \n"], ids=["empty", "blank"])
def test_file_without_prompts_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="no prompt in this file"):
        read_prompts(write(tmp_path, "p.txt", text))


def test_bytes_that_are_not_text_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"p\.txt:2: not UTF-8"):
        read_prompts(write(tmp_path, "p.txt", b"a cat\n\xff\xfe\n"))


def test_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_prompts(tmp_path / "absent.txt")
