"""The emulator that runs the CUDA kernels on the CPU computes right, and shows the mistakes it is there to show."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from torch.utils import cpp_extension

SOURCE = Path(__file__).parents[1] / "csrc" / "testing" / "simt_test.cpp"
CHECKS = (
    "barrier", "barrier_left", "cluster", "cluster_left_early", "cluster_without_barrier", "copy",
    "copy_over_what_others_read", "copy_without_barrier", "copy_without_commit", "copy_without_wait", "device_math",
    "grid", "grid_without_barrier", "lanes_apart", "misaligned_copy", "missing_barrier", "mma_bfloat16", "mma_float16",
    "mma_tf32", "no_such_block", "shared_overrun", "shuffles", "wgmma_bfloat16", "wgmma_float16", "wgmma_left",
    "wgmma_over_what_is_read", "wgmma_without_wait",
)  # fmt: skip


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = tmp_path_factory.mktemp("emulator") / "simt_test"
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    flags = ["-std=c++17", "-O1", "-DCONVFAST_EMULATE", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    subprocess.run([*shlex.split(os.environ.get("CXX", "c++")), *flags, *includes, SOURCE, "-o", made], check=True)
    return str(made)


@pytest.mark.parametrize("check", CHECKS)
def test_emulator(check: str, program: str) -> None:
    found = subprocess.run([program, check], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_all_checks_are_run(program: str) -> None:
    assert tuple(subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()) == CHECKS
