"""Compiler: the C++ of this folder as a library for the machine at hand, made on first use.

The library is kept in the user's cache under a name that tells its source, its compiler and the
instruction set, so that it is made once, and two machines may share a cache. It appears there
whole: two processes that compile at once do the same work twice, and that is all.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache, lru_cache
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "cpp"
SOURCE = "attend.cpp"
_ALWAYS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread")
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")


@cache
def instruction_sets() -> tuple[str, ...]:
    """Flags for what this machine has, and PyTorch is allowed (`ATEN_CPU_CAPABILITY`)."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ()
    level = torch.backends.cpu.get_cpu_capability()
    if level not in ("AVX512", "AVX2"):
        return ()
    if level == "AVX2":
        return _AVX2
    has = torch.cpu.get_capabilities()
    flags = _AVX512
    if has.get("avx512_bf16"):
        flags += ("-mavx512bf16",)
        if has.get("amx_bf16") and platform.system() == "Linux":
            flags += ("-mamx-tile", "-mamx-bf16")
    return flags


@lru_cache
def library(flags: tuple[str, ...]) -> ctypes.CDLL | str:
    """The compiled library, or the reason why there is none."""
    compiler = _compiler()
    if compiler is None:
        return "needs a C++ compiler; install g++ or clang++, or name one in CXX"
    files = sorted(FOLDER.iterdir())
    told = hashlib.sha256("\0".join((compiler, _version(compiler), *_ALWAYS, *flags)).encode())
    for file in files:
        told.update(file.name.encode() + b"\0" + file.read_bytes())
    path = cache_folder() / f"attend-{told.hexdigest()[:20]}.so"
    try:
        if not path.exists():
            path = _writable(path)
            reason = _compile(compiler, flags, path)
            if reason is not None:
                return reason
        return ctypes.CDLL(str(path))
    except OSError as error:
        return f"the C++ library cannot be made or loaded: {error}"


def cache_folder() -> Path:
    """Where compiled libraries are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit_sparse"


def _writable(path: Path) -> Path:
    """`path` or, if nothing can be written there, one in a new temporary folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError:
        return Path(tempfile.mkdtemp(prefix="dit_sparse-")) / path.name
    return path


def _compiler() -> str | None:
    wanted = os.environ.get("CXX")
    names = [wanted] if wanted else ["g++", "c++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def _version(compiler: str) -> str:
    shown = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return shown.stdout


def _compile(compiler: str, flags: tuple[str, ...], path: Path) -> str | None:
    """Compile to `path`, whole or not at all; the reason if that fails."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder) / path.name
        command = [compiler, *_ALWAYS, *flags, str(FOLDER / SOURCE), "-o", str(part)]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode == 0:
            os.replace(part, path)
            return None
    lines = made.stderr.strip().splitlines() or ["no message"]
    return f"{compiler} failed: {lines[0]}"
