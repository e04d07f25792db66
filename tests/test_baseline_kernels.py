"""The kernels that any processor of a kind has, and its dot products, alone in a program: here, and Arm's emulated."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from convfast.toolchain import BUILD_FILE
from tests.once import built_once

NAMES = ("testing/kernels_test", *(f"cpu/kernels/{name}" for name in ("baseline", "avx512_bf16", "neon_bf16")))
SOURCES = [BUILD_FILE.parent / f"{name}.cpp" for name in NAMES]
CHECKS = (
    "dots", "gemm_float32", "gemm_float64", "halves", "lstm_step", "outer_sum_float32",
    "outer_sum_float64", "rows_gemm_float32", "rows_gemm_float64", "sigmoid_and_tanh",
    "transpose_float32", "transpose_float64",
)  # fmt: skip


def compiles(compiler: list[str]) -> bool:
    """Whether there is a library with the compiler."""
    command = [*compiler, "-x", "c++", "-", "-o", os.devnull]
    program = "#include <vector>\nint main() { return std::vector<int>().size(); }"
    return subprocess.run(command, input=program, text=True, capture_output=True, check=False).returncode == 0


@pytest.fixture(params=["here", "aarch64"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    compiler, run = shlex.split(os.environ.get("CXX") or "c++"), []
    if request.param == "aarch64":
        compiler = [shutil.which("aarch64-linux-gnu-g++"), "-static"]
        run = [shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")]
        if not (compiler[0] and run[0] and compiles(compiler)):
            pytest.skip("no compiler and emulator for Arm (on Debian: g++-aarch64-linux-gnu, qemu-user-static)")
    elif not shutil.which(compiler[0]):
        pytest.skip("no C++ compiler")

    def build(folder: Path) -> None:
        flags = ["-std=c++17", "-O2", "-ffp-contract=fast", "-fno-math-errno"]
        subprocess.run([*compiler, *flags, *SOURCES, "-o", folder / "program"], check=True)

    return [*run, str(built_once(tmp_path_factory, f"kernels_test_{request.param}", build) / "program")]


@pytest.mark.parametrize("check", CHECKS)
def test_kernels(check: str, program: list[str]) -> None:
    found = subprocess.run([*program, check], capture_output=True, text=True, check=False)
    if found.returncode == 3:
        pytest.skip("the processor has no dot products of bfloat16")
    assert found.returncode == 0, found.stdout


def test_all_checks_are_run(program: list[str]) -> None:
    assert tuple(subprocess.run(program, capture_output=True, text=True, check=True).stdout.split()) == CHECKS
