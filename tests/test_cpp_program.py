"""A C++ program, built by CMake with the library, runs a scripted ConvLSTM and gives the numbers of Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import convfast
from convfast import native, toolchain
from tests.once import built_once

ROOT = toolchain.PACKAGE.parent


def run(*command: str | Path, timeout: float = 600) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def configure(source: Path, folder: Path) -> None:
    if not shutil.which("cmake"):
        pytest.skip("no cmake: the C++ program cannot be built")
    options = (f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}", "-DCMAKE_CXX_FLAGS_RELEASE=-O0")
    try:
        run("cmake", "-S", source, "-B", folder, *options)
    except AssertionError as error:
        if torch.version.cuda and "cannot find the CUDA" in str(error):
            pytest.skip(f"no CUDA {torch.version.cuda} toolkit that the CMake files of torch would find")
        raise


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if why := native.reason():
        pytest.skip(f"no native library here, so no C++ program either: {why}")

    def build(folder: Path) -> None:
        configure(ROOT, folder)
        run("cmake", "--build", folder, "--parallel", str(os.cpu_count()))

    return built_once(tmp_path_factory, "cmake", build)


@pytest.fixture
def program(built: Path) -> Path:
    return built / "run_scripted"


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "return_all_layers": True}], ids=["plain", "all"])
def test_scripted_model_runs_in_cpp(program: Path, tmp_path: Path, options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    model = convfast.ConvLSTM(3, [8, 5], 3, **options).eval()
    input = torch.randn(2, 4, 3, 9, 7)
    torch.jit.script(model).save(tmp_path / "model.pt")
    torch.save(input, tmp_path / "input.pt")
    shown = run(program, tmp_path / "model.pt", tmp_path / "input.pt", tmp_path / "output.pt", "2")
    assert shown.startswith("input [2, 4, 3, 9, 7] -> output [2, 4, ") and shown.endswith(" ms\n")
    with torch.inference_mode():
        expected = model(input)[0]
    expected = expected[0] if isinstance(expected, list) else expected
    found = torch.load(tmp_path / "output.pt")
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_program_reports_a_missing_model(program: Path, tmp_path: Path) -> None:
    done = subprocess.run([program, tmp_path / "none.pt", "i", "o"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "none.pt" in done.stderr


def test_installed_library_loads(built: Path, tmp_path: Path) -> None:
    run("cmake", "--install", built, "--prefix", tmp_path)
    (library,) = tmp_path.rglob("libconvfast.*")
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1])"  # without torch, which would bring its own libraries
    run(sys.executable, "-c", code, library)


def test_examples_are_those_of_the_project_itself(tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.19)\nproject(parent CXX)\n"
        f"add_subdirectory({ROOT.as_posix()} convfast)\n"
        "if(TARGET run_scripted OR NOT TARGET convfast)\n  message(FATAL_ERROR)\nendif()\n"
    )
    configure(tmp_path, tmp_path / "build")
