"""The C++ kernels watched by AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer."""

import os
import subprocess
from pathlib import Path

import pytest

from dit_sparse.kernels import compiler

DRIVER = Path(__file__).with_name("sanitized.cpp")
WATCHED = ("-std=c++17", "-O1", "-g1", "-pthread")
MEMORY = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREADS = ("-fsanitize=thread",)
FAULTS = {
    MEMORY: (
        "int main(int n, char**) { int* x = new int[n]; return x[n]; }\n",
        "heap-buffer-overflow",
    ),
    THREADS: (
        "#include <thread>\nint x;\n"
        "int main() { std::thread other([] { x++; }); x++; other.join(); }\n",
        "data race",
    ),
}


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


@pytest.mark.parametrize("watch", [MEMORY, THREADS], ids=["memory", "threads"])
def test_kernels_touch_what_is_theirs(watch: tuple[str, ...], tmp_path: Path):
    fault, said = FAULTS[watch]
    source = tmp_path / "fault.cpp"
    source.write_text(fault)
    build(source, tmp_path / "fault", *watch)
    if said not in run(tmp_path / "fault").stderr:
        pytest.skip("programs with sanitizers do not run here")
    build(DRIVER, tmp_path / "watched", *watch, *compiler.instruction_sets())
    done = run(tmp_path / "watched")
    assert done.returncode == 0, done.stderr[:4000]
    assert done.stdout == "48 calls\n"
