"""PlanFile: a plan on disk, `plan.json` and `evidence.safetensors` in one folder.

    format, version   "dit_sparse.plan", 1
    model             {component: {transformer, layers, heads, head_dim, config}}
    schedule          {dense_first, dense_last, sigma_above, renew_every, renew_at, recall,
                       share_branches, stagger where it is true, phases where there are any}
    grid              [frames, height, width] of the search, or null
    block             tokens of a query block and of a key block
    patterns          [{kind, ...}, ...]      every pattern of the plan once
    assignment        {layer: [index into patterns for each head]}
    remainders        [{kind, ...}, ...]      every remainder of the plan once
    treatment         {layer: [index into remainders for each head]}; others drop what they skip
    later             [{assignment, treatment}, ...]   of the further phases, where there are any
    cache_limit       bytes that caches may hold together, or null
    provenance        how the plan came about
    evidence          names of the arrays in evidence.safetensors
    digest            sha256 over all of the above, in canonical form, and the arrays
    timing            what clocks said of the search; never the same twice, so not in the digest

Nothing here is pickled. The model below is what is checked when a file is parsed.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = "dit_sparse.plan"
VERSION = 1
PLAN, EVIDENCE = "plan.json", "evidence.safetensors"
SPREAD = ("model", "assignment", "treatment", "patterns", "remainders", "later")
"""Tables of a plan whose entries stand on lines of their own."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelEntry(_Strict):
    """The fingerprint of one transformer."""

    transformer: str
    layers: PositiveInt
    heads: PositiveInt
    head_dim: PositiveInt
    config: str


class ScheduleEntry(_Strict):
    """The steps that run dense, and those that renew."""

    dense_first: NonNegativeInt
    dense_last: NonNegativeInt
    sigma_above: PositiveFloat | None
    renew_every: NonNegativeInt
    renew_at: tuple[NonNegativeInt, ...]
    recall: float | None
    share_branches: bool
    stagger: bool = False
    phases: tuple[PositiveFloat, ...] = ()

    @model_serializer(mode="wrap")
    def _lasting(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without_new(dump(self), "stagger", "phases")


class PhaseEntry(_Strict):
    """What heads do in a further phase of the schedule."""

    assignment: dict[str, list[NonNegativeInt]]
    treatment: dict[str, list[NonNegativeInt]]


class PlanFile(_Strict):
    """The content of `plan.json`, without the digest."""

    format: Literal["dit_sparse.plan"] = FORMAT
    version: Literal[1] = VERSION
    model: dict[str, ModelEntry]
    schedule: ScheduleEntry
    grid: tuple[PositiveInt, PositiveInt, PositiveInt] | None
    block: PositiveInt
    patterns: list[dict[str, Any]]
    assignment: dict[str, list[NonNegativeInt]]
    remainders: list[dict[str, Any]]
    treatment: dict[str, list[NonNegativeInt]]
    later: list[PhaseEntry] = []
    cache_limit: NonNegativeInt | None
    provenance: dict[str, Any]
    evidence: list[str]
    timing: dict[str, Any]

    @model_serializer(mode="wrap")
    def _lasting(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without_new(dump(self), "later")


def _without_new(document: dict[str, Any], *names: str) -> dict[str, Any]:
    """Without fields that say nothing, so that plans from before there were these keep their
    digests."""
    return {name: value for name, value in document.items() if name not in names or value}


def digest(document: dict[str, Any], evidence: dict[str, Tensor]) -> str:
    """sha256 over the canonical JSON of a plan without its timing, and its arrays; hexadecimal."""
    lasting = {name: value for name, value in document.items() if name != "timing"}
    hasher = hashlib.sha256(json.dumps(lasting, sort_keys=True, separators=(",", ":")).encode())
    for name, array in sorted(evidence.items()):
        hasher.update(f"{name} {array.dtype} {list(array.shape)}".encode())
        flat = array.detach().cpu().contiguous().reshape(-1)
        hasher.update(flat.view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def write(folder: Path, file: PlanFile, evidence: dict[str, Tensor]) -> None:
    """Write both files into `folder`. Nothing there changes before both are complete."""
    document = file.model_dump(mode="json")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as new:
        plan, arrays = Path(new, PLAN), Path(new, EVIDENCE)
        text = _readable(document | {"digest": digest(document, evidence)})
        plan.write_text(text, encoding="utf-8")
        if evidence:
            save_file({name: array.contiguous() for name, array in evidence.items()}, arrays)
        folder.mkdir(exist_ok=True)
        if evidence:
            os.replace(arrays, folder / EVIDENCE)
        os.replace(plan, folder / PLAN)
    if not evidence:
        (folder / EVIDENCE).unlink(missing_ok=True)


def read(folder: Path) -> tuple[PlanFile, dict[str, Tensor]]:
    """Read and check both files.

    Raises:
        ValueError: one line that says what is wrong and what to do.
    """
    path = folder / PLAN
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected the JSON file of a plan: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f'{path}: expected "format": "{FORMAT}"; this is not a plan')
    if isinstance(document.get("version"), int) and document["version"] > VERSION:
        raise ValueError(
            f"{path}: the plan is of version {document['version']}, this dit_sparse reads "
            f"version {VERSION}; upgrade dit_sparse"
        )
    stated = document.pop("digest", None)
    try:
        file = PlanFile.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path}: {where}: {first['msg']}; search or save it again") from error
    evidence = _read_evidence(folder / EVIDENCE, file.evidence)
    if digest(document, evidence) != stated:
        raise ValueError(
            f"{path}: the digest does not match, so the plan or its evidence was changed or "
            "damaged after it was saved; copy it again, or make the change in Python and save"
        )
    return file, evidence


def locate(folder_or_hub_id: str | Path, revision: str | None) -> Path:
    """The folder of a plan; one that is only on the Hugging Face Hub is downloaded first."""
    folder = Path(folder_or_hub_id)
    if folder.exists() or isinstance(folder_or_hub_id, Path):
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(folder_or_hub_id, revision=revision, allow_patterns=[PLAN, EVIDENCE])
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"no plan at {folder_or_hub_id!r}: there is no such folder, and the Hub has no such "
            f"plan ({reason}); give the folder of a plan, or a Hub id"
        ) from error


def _read_evidence(path: Path, names: list[str]) -> dict[str, Tensor]:
    if not names:
        return {}
    try:
        arrays = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: expected the arrays of the plan: {error}; copy it") from error
    if sorted(arrays) != sorted(names):
        raise ValueError(
            f"{path}: expected the arrays {sorted(names)}, came {sorted(arrays)}; copy it again"
        )
    return arrays


def _readable(document: dict[str, Any]) -> str:
    """JSON with one line per pattern and per layer, so that two plans can be compared."""
    return _spread(document, "") + "\n"


def _spread(value: Any, indent: str) -> str:
    """JSON of an object or a list with each entry on a line of its own, and each of its tables and
    phases so again."""
    inner = indent + "  "
    if isinstance(value, list):
        lines = [
            _spread(entry, inner) if "assignment" in entry else json.dumps(entry)
            for entry in value
        ]
        opening, closing = "[]"
    else:
        lines = [
            f"{json.dumps(key)}: "
            + (_spread(entry, inner) if key in SPREAD and entry else json.dumps(entry))
            for key, entry in value.items()
        ]
        opening, closing = "{}"
    return f"{opening}\n" + ",\n".join(inner + line for line in lines) + f"\n{indent}{closing}"
