"""Calibration: what each backend and each stage costs on one device, fitted to measurements.

    seconds = launch + query_block * query_blocks + whole * whole + partial * partial
              + pooled * pooled

The counts are of blocks of 128 x 128 tokens, batch and heads included; blocks of other sizes count
by their tokens. What they are of a stage says `stage.py`. One file holds one device; a cost is
valid for its dtype and head_dim alone.

Tokens come and go in raster order, so what a backend takes to reorder them is in its cost. Of
`native` on one core with AMX, 4096 and 8192 tokens, head_dim 64, other orders take as long as
raster within 5 % in float32 and 6 % in bfloat16. Pooling is in it too: a block pooled by 8 took
about .3 of a whole one there, not an eighth, so pooled blocks have a coefficient of their own.
"""

import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dit_sparse.kernels.blocks import PARTIAL, WHOLE, BlockIndices
from dit_sparse.kernels.call import AttentionCall
from dit_sparse.kernels.compiler import cache_folder

FORMAT = "dit_sparse.calibration"
VERSION = 2
_BLOCK = 128

Kind = tuple[str, str, int]
"""Backend or stage, dtype, head_dim."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a call computes, in blocks of 128 x 128 tokens; pooled keys count as the means that are
    made of them."""

    query_blocks: float
    whole: float
    partial: float
    pooled: float = 0.0


@dataclass(frozen=True, slots=True)
class Cost:
    """Coefficients in seconds, and the error of a fit on every other measurement on the rest."""

    launch: float
    query_block: float
    whole: float
    partial: float
    pooled: float
    samples: int
    mean_error: float
    largest_error: float

    def seconds(self, work: Work) -> float:
        """The time that `work` takes."""
        return (
            self.launch
            + self.query_block * work.query_blocks
            + self.whole * work.whole
            + self.partial * work.partial
            + self.pooled * work.pooled
        )


@dataclass(frozen=True, slots=True)
class Calibration:
    """The costs that were measured on `device`."""

    device: str
    costs: Mapping[Kind, Cost]

    def seconds(self, backend: str, call: AttentionCall) -> float | None:
        """Predicted time of `call`; `None` where nothing was measured."""
        cost = self.costs.get((backend, dtype_name(call.query.dtype), call.query.shape[-1]))
        return None if cost is None else cost.seconds(work_of(call.blocks, call.query.shape[0]))


_single: WeakKeyDictionary[BlockIndices, Work] = WeakKeyDictionary()


def work_of(blocks: BlockIndices, batch: int = 1) -> Work:
    """What `blocks` asks for."""
    work = _single.get(blocks)
    if work is None:
        row = torch.arange(blocks.heads * blocks.query_blocks).repeat_interleave(
            blocks.row_pointer.diff()
        )
        queries = blocks.query_offsets.diff()[row % blocks.query_blocks]
        pairs = queries * blocks.key_offsets.diff()[blocks.key_block] / _BLOCK**2
        pairs = pairs / 2.0 ** blocks.tag.clamp_min(0)
        tokens = len(blocks.permutation) * blocks.heads
        tagged = (blocks.tag == WHOLE, blocks.tag == PARTIAL, blocks.tag > WHOLE)
        work = Work(tokens / _BLOCK, *(float(pairs[tag].sum()) for tag in tagged))
        _single[blocks] = work
    return Work(*(batch * count for count in astuple(work)))


def fit(samples: Sequence[tuple[Work, float]]) -> Cost:
    """The cost that explains measured `(work, seconds)` best, by relative error.

    Coefficients are never negative. The errors are those of a second fit, on every other sample
    in the order of their times, at the samples that it did not see.
    """
    if len(samples) < 4:
        raise ValueError(f"a cost needs at least 4 measurements, got {len(samples)}; measure more")
    wrong = [seconds for _, seconds in samples if not (math.isfinite(seconds) and seconds > 0)]
    if wrong:
        raise ValueError(f"measured seconds must be positive, got {wrong[0]}")
    ordered = sorted(samples, key=lambda sample: sample[1])
    seen, held_out = ordered[::2], ordered[1::2]
    half = _least_squares(seen)
    errors = [abs(float(_row(work) @ half) / seconds - 1) for work, seconds in held_out]
    return Cost(
        *_least_squares(ordered).tolist(),
        samples=len(samples),
        mean_error=sum(errors) / len(errors),
        largest_error=max(errors),
    )


def _least_squares(samples: Sequence[tuple[Work, float]]) -> Tensor:
    """Least squares of relative errors without negative coefficients: the best of all subsets."""
    seconds = torch.tensor([time for _, time in samples], dtype=torch.float64)
    rows = torch.stack([_row(work) for work, _ in samples]) / seconds[:, None]
    scale = rows.norm(dim=0).clamp_min(1e-300)
    rows, ones = rows / scale, torch.ones_like(seconds)
    number = rows.shape[1]
    best, least = torch.zeros(number, dtype=torch.float64), math.inf
    for size in range(1, number + 1):
        for chosen in combinations(range(number), size):
            columns = rows[:, list(chosen)]
            found = torch.linalg.lstsq(columns, ones, driver="gelsd").solution
            error = float((columns @ found - 1).square().sum())
            if (found >= 0).all() and error < least:
                best = torch.zeros(number, dtype=torch.float64)
                best[list(chosen)], least = found, error
    return best / scale


def _row(work: Work) -> Tensor:
    return torch.tensor([1.0, *astuple(work)], dtype=torch.float64)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    """The name under which the costs of a device are kept; a CPU's holds its threads."""
    if device.type == "cpu":
        return f"{processor()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return device.type


@cache
def processor() -> str:
    """The name of this machine's processor."""
    import platform

    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def path_of(device: str) -> Path:
    """The file of a device's calibration, in the user's cache folder."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return cache_folder() / "calibration" / f"{name}.json"


def writable_path_of(device: str) -> Path:
    """The same file, in a folder that is there.

    Raises:
        ValueError: the folder cannot be written to, or the file that is there cannot be read.
    """
    path = path_of(device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(
            f"cannot write to {path.parent}: {error.strerror}; give another folder in "
            "XDG_CACHE_HOME"
        ) from None
    if path.exists():
        read(path)
    return path


def write(calibration: Calibration) -> Path:
    """Keep the costs of a device; those of other names, dtypes and head_dims stay.

    Raises:
        ValueError: see `writable_path_of`.
    """
    path = writable_path_of(calibration.device)
    known = read(path).costs if path.exists() else {}
    rows = [
        {"name": name, "dtype": dtype, "head_dim": head_dim, **asdict(cost)}
        for (name, dtype, head_dim), cost in sorted({**known, **calibration.costs}.items())
    ]
    data = {
        "format": FORMAT,
        "version": VERSION,
        "device": calibration.device,
        "costs": rows,
    }
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    partial.replace(path)
    _known.cache_clear()
    return path


def read(path: Path) -> Calibration:
    """The calibration in a file.

    Raises:
        ValueError: it is no calibration of this version, with the first thing that is wrong.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return _parsed(data)
    except ValueError as error:
        raise ValueError(
            f"{path} is no calibration: {error}; remove it and run dit-sparse bench --calibrate"
        ) from None


def _parsed(data: Any) -> Calibration:
    _check(isinstance(data, dict), "it holds no object")
    _check(data.get("format") == FORMAT, f"format is {data.get('format')!r}, not {FORMAT!r}")
    _check(data.get("version") == VERSION, f"version is {data.get('version')!r}, not {VERSION}")
    _check(data.keys() == {"format", "version", "device", "costs"}, f"fields are {sorted(data)}")
    _check(isinstance(data["device"], str), "device is no text")
    _check(isinstance(data["costs"], list), "costs is no list")
    costs: dict[Kind, Cost] = {}
    for number, row in enumerate(data["costs"]):
        place = f"costs[{number}]"
        _check(isinstance(row, dict), f"{place} is no object")
        names = {"name", "dtype", "head_dim", *(field.name for field in fields(Cost))}
        _check(row.keys() == names, f"the fields of {place} are {sorted(row)}")
        for name in ("name", "dtype"):
            _check(isinstance(row[name], str), f"{place}.{name} is no text")
        for name in ("head_dim", "samples"):
            _check(type(row[name]) is int and row[name] > 0, f"{place}.{name} is no count")
        for name in names - {"name", "dtype", "head_dim", "samples"}:
            number_given = type(row[name]) in (int, float)
            _check(
                number_given and math.isfinite(row[name]) and row[name] >= 0,
                f"{place}.{name} is {row[name]!r}, no number of at least 0",
            )
        kind = cast(Kind, tuple(row.pop(name) for name in ("name", "dtype", "head_dim")))
        _check(kind not in costs, f"{place} is there twice")
        costs[kind] = Cost(**row)
    return Calibration(data["device"], costs)


def _check(holds: bool, reason: str) -> None:
    if not holds:
        raise ValueError(reason)


def calibration_for(device: torch.device) -> Calibration | None:
    """What is known of `device`: `None` without a file, or, after a warning, with a bad one."""
    return _known(path_of(device_name(device)), device_name(device))


@cache
def _known(path: Path, name: str) -> Calibration | None:
    try:
        found = read(path)
    except OSError:
        return None
    except ValueError as error:
        warnings.warn(f"{error}; until then backends are taken in their own order", stacklevel=2)
        return None
    return found if found.device == name else None
