"""The C++ kernels watched by AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import subprocess
from pathlib import Path

import pytest

from dit_sparse.kernels import compiler

DRIVER = Path(__file__).with_name("sanitized.cpp")
WATCHED = ("-std=c++17", "-O1", "-g1", "-pthread", "-fsanitize=address,undefined")
WATCHED += ("-fno-sanitize-recover=all",)


def build(source: Path, program: Path, *flags: str) -> None:
    """Compile; skip if there is no compiler that watches."""
    found = compiler._compiler()
    if found is None:
        pytest.skip("no C++ compiler here")
    command = [found, *WATCHED, *flags, f"-I{compiler.FOLDER}", str(source), "-o", str(program)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode and source != DRIVER:
        pytest.skip(f"{found} has no sanitizers: {made.stderr.strip()[:200]}")
    assert made.returncode == 0, made.stderr[:4000]


def run(program: Path) -> subprocess.CompletedProcess[str]:
    # What lives until the end is no fault, and looking for it asks for more than containers give.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([program], env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def sanitizers(tmp_path: Path) -> None:
    """Skip unless a fault is found where there is one."""
    source = tmp_path / "fault.cpp"
    source.write_text("int main(int n, char**) { int* x = new int[n]; return x[n]; }\n")
    build(source, tmp_path / "fault")
    if "heap-buffer-overflow" not in run(tmp_path / "fault").stderr:
        pytest.skip("programs with sanitizers do not run here")


@pytest.mark.usefixtures("sanitizers")
def test_kernels_touch_what_is_theirs(tmp_path: Path):
    build(DRIVER, tmp_path / "watched", *compiler.instruction_sets())
    done = run(tmp_path / "watched")
    assert done.returncode == 0, done.stderr[:4000]
    assert done.stdout == "42 calls\n"
