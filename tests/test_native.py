"""Finding, building and loading the compiled library, and every way in which that can go wrong (with a stub)."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

import convfast
from convfast import backends, native, toolchain
from convfast.triton import runtime as triton_runtime
from tests.cases import instruction_set
from tests.test_baseline_kernels import compiles

ROOT = toolchain.PACKAGE.parent
SOURCES = toolchain.read_build(toolchain.BUILD_FILE).sources
COMPILER = shutil.which(os.environ.get("CXX") or "c++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: nothing can be built here")

STUB = """
#include <torch/csrc/stable/library.h>
#include "number.h"
static int64_t number() { return NUMBER; }
STABLE_TORCH_LIBRARY(convfast, m) {
  m.def("cpu_capability() -> str");
  m.def("number() -> int");
}
STABLE_TORCH_LIBRARY_IMPL(convfast, CompositeExplicitAutograd, m) { m.impl("number", TORCH_BOX(&number)); }
"""
# Loads the stub through convfast.native without the package's __init__: it would register fakes that the stub lacks.
PROLOGUE = """
import logging, sys, types
from pathlib import Path
logging.disable(logging.CRITICAL)
sys.modules["convfast"] = package = types.ModuleType("convfast")
package.__path__ = [sys.argv[1]]
from convfast import native, toolchain
toolchain.BUILD_FILE = Path(sys.argv[2])
toolchain.PACKAGE = Path(sys.argv[2]).parent
"""
LOAD = """
if why := native.reason():
    print(f"failed: {why}")
else:
    import torch
    print(f"{torch.ops.convfast.number()} from {native.origin()}")
"""


def write_stub(folder: Path, number: int = 42, source: str = STUB) -> Path:
    listed = json.loads(toolchain.BUILD_FILE.read_text())
    listed["cpu"]["sources"] = ["csrc/stub.cpp"]
    csrc = folder / "csrc"
    csrc.mkdir(parents=True, exist_ok=True)
    (csrc / "stub.cpp").write_text(source)
    (csrc / "number.h").write_text(f"#define NUMBER {number}\n")
    (csrc / "build.json").write_text(json.dumps(listed))
    return csrc / "build.json"


def start(code: str, build_file: Path, cache: Path, prefix: tuple[str, ...] = (), **env: str) -> subprocess.Popen[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("CONVFAST_", "TORCH_EXTENSIONS"))}
    return subprocess.Popen(
        [*prefix, sys.executable, "-W", "ignore", "-c", PROLOGUE + code, str(toolchain.PACKAGE), str(build_file)],
        env=clean | {"CONVFAST_CACHE": str(cache), "OMP_NUM_THREADS": "1"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 120) -> str:
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return out.strip()


def run(code: str, build_file: Path, cache: Path, prefix: tuple[str, ...] = (), **env: str) -> str:
    return finish(start(code, build_file, cache, prefix, **env))


def libraries(cache: Path) -> list[Path]:
    return sorted(cache.glob("convfast-*/*.so"))


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stub(tmp_path_factory.mktemp("stub"))


@pytest.fixture(scope="module")
def filled_cache(stub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    assert run(LOAD, stub, cache).startswith("42 from") and len(libraries(cache)) == 1
    return cache


def test_import_compiles_and_loads_nothing(tmp_path: Path) -> None:
    code = """
import convfast, torch
from convfast import native
print(hasattr(torch.ops.convfast, "cpu_capability"), native._origins, native._failures)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"CONVFAST_CACHE": str(tmp_path / "cache"), "CXX": "/nonexistent", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["False", "{}", "{}"], done.stderr
    assert not (tmp_path / "cache").exists()


@needs_compiler
def test_disabled_by_environment(stub: Path, tmp_path: Path, filled_cache: Path) -> None:
    code = LOAD + "print(isinstance(why, native.Failure))"
    assert run(code, stub, tmp_path, CONVFAST_NO_NATIVE="yes").splitlines() == [
        "failed: disabled by CONVFAST_NO_NATIVE", "False",
    ]  # fmt: skip
    assert run(code, stub, tmp_path, CXX="no-such-compiler").endswith("\nTrue")
    assert run(LOAD, stub, filled_cache, CONVFAST_NO_NATIVE="false").startswith("42 from")


def test_old_torch_is_named(stub: Path, tmp_path: Path) -> None:
    code = "import torch; torch.__version__ = torch.torch_version.TorchVersion('2.9.1')" + LOAD
    assert run(code, stub, tmp_path) == "failed: built for torch >= 2.10, you have 2.9.1"


def test_no_compiler(stub: Path, tmp_path: Path) -> None:
    out = run(LOAD, stub, tmp_path, CXX="no-such-compiler")
    assert out == "failed: no C++ compiler: cannot run 'no-such-compiler' (install g++, or set CXX)"
    (tmp_path / "bin").mkdir()
    out = run(LOAD, stub, tmp_path, PATH=str(tmp_path / "bin"), CXX="c++")
    assert out.startswith("failed: no C++ compiler: cannot run 'c++'")


@needs_compiler
def test_no_ninja(stub: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "c++").symlink_to(COMPILER)
    out = run("sys.modules['ninja'] = None" + LOAD, stub, tmp_path, PATH=str(tmp_path / "bin"), CXX="c++")
    assert out == "failed: no ninja: it is neither on PATH nor a package (pip install ninja)"


@needs_compiler
def test_build_error_is_one_line_and_names_its_log(tmp_path: Path) -> None:
    broken = write_stub(tmp_path, source='#include "number.h"\nint number() { return misspelt; }\n')
    out = run(LOAD, broken, tmp_path / "cache")
    assert out.startswith("failed: the build failed:") and "misspelt" in out and "\n" not in out
    log = Path(out.partition("(log: ")[2].rstrip(")"))
    assert "misspelt" in log.read_text()
    assert [path.name for path in log.parent.iterdir() if path.name != "flock"] == ["build.log"]


def test_empty_cxx_is_no_compiler_and_the_linkers_own_word_is_shown(stub: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "bin" / "c++"
    compiler.parent.mkdir()
    compiler.write_text("""#!/bin/sh
test "$1" = --version && exec echo c++ 1.0
echo "ld: final link failed: No space left on device" >&2
echo "collect2: error: ld returned 1 exit status" >&2
exit 1
""")
    compiler.chmod(0o755)
    out = run(LOAD, stub, tmp_path / "cache", CXX="", PATH=f"{compiler.parent}:{os.environ['PATH']}")
    shown = "ld: final link failed: No space left on device; collect2: error: ld returned 1 exit status"
    assert out.startswith(f"failed: the build failed: {shown} (log: ")


@needs_compiler
def test_library_that_does_not_load_is_built_once_and_says_why(tmp_path: Path) -> None:
    lacking = STUB.replace("{ return NUMBER; }", "{ extern int64_t misspelt(); return misspelt(); }")
    out = run(LOAD, write_stub(tmp_path, source=lacking), tmp_path / "cache")
    assert out.startswith("failed: what was built does not load:") and "misspelt" in out and "\n" not in out


def test_missing_source_is_named(tmp_path: Path) -> None:
    build_file = write_stub(tmp_path)
    (tmp_path / "csrc" / "stub.cpp").unlink()
    assert run(LOAD, build_file, tmp_path / "cache") == f"failed: source file {tmp_path}/csrc/stub.cpp is missing"


@needs_compiler
def test_cache_is_used_again(stub: Path, filled_cache: Path) -> None:
    before = libraries(filled_cache)[0].stat().st_mtime_ns
    out = run(LOAD, stub, filled_cache)
    assert out == f"42 from {libraries(filled_cache)[0]} (cache)"
    assert libraries(filled_cache)[0].stat().st_mtime_ns == before


@needs_compiler
def test_cache_is_used_without_a_compiler(tmp_path: Path, filled_cache: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(filled_cache, cache)
    library = libraries(cache)[0]
    assert run(LOAD, write_stub(tmp_path), cache, CXX="no-such-compiler") == f"42 from {library} (cache)"
    refused = "failed: no C++ compiler: cannot run 'no-such-compiler'"
    assert run(LOAD, write_stub(tmp_path, number=43), cache, CXX="no-such-compiler").startswith(refused)
    library.write_bytes(library.read_bytes()[:-1])
    assert run(LOAD, write_stub(tmp_path), cache, CXX="no-such-compiler").startswith(refused)


@needs_compiler
def test_changed_header_builds_again(tmp_path: Path, filled_cache: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(filled_cache, cache)
    assert run(LOAD, write_stub(tmp_path, number=43), cache).startswith("43 from")
    assert len(libraries(cache)) == 2


@needs_compiler
def test_damaged_library_is_built_again(stub: Path, tmp_path: Path, filled_cache: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(filled_cache, cache)
    library = libraries(cache)[0]
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2])
    out = run(LOAD, stub, cache)
    assert out.startswith("42 from") and out.endswith("(built just in time)")


def without_root_powers() -> tuple[str, ...]:
    """A command prefix under which file permissions bind, for root too."""
    if os.geteuid() != 0:
        return ()
    prefix = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")
    if not shutil.which("setpriv") or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("root may write anywhere, and setpriv cannot take that away here")
    return prefix


@needs_compiler
def test_read_only_cache_builds_in_private(stub: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o555)
    warned = """
import warnings
warnings.simplefilter("error")
try:
    native.load()
except RuntimeWarning as warning:
    print(warning)
"""
    out = run(warned + LOAD, stub, cache, without_root_powers(), TMPDIR=str(tmp_path))
    warning, out = out.splitlines()
    assert warning.endswith("(Permission denied); set CONVFAST_CACHE to a writable directory")
    assert out.startswith("42 from built just in time for this process only: cannot use") and "Permission denied" in out
    assert [path.name for path in tmp_path.iterdir()] == ["cache"], "the private folder is left behind"


@needs_compiler
def test_read_only_cache_with_a_library_is_used(stub: Path, tmp_path: Path, filled_cache: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(filled_cache, cache)
    for folder in (*cache.iterdir(), cache):
        folder.chmod(0o555)
    try:
        assert run(LOAD, stub, cache, without_root_powers()).endswith("(cache)")
    finally:
        for folder in (cache, *cache.iterdir()):
            folder.chmod(0o755)


@needs_compiler
def test_locks_of_dead_processes_do_not_block(stub: Path, tmp_path: Path, filled_cache: Path) -> None:
    folder = tmp_path / "cache" / libraries(filled_cache)[0].parent.name
    (folder / "build-dead").mkdir(parents=True)
    for lock in (folder / "flock", folder / "lock", folder / "build-dead" / "lock"):
        lock.touch()
    out = run(LOAD, stub, tmp_path / "cache")
    assert out.startswith("42 from") and not (folder / "build-dead").exists()


@needs_compiler
def test_lock_of_a_live_process_times_out_with_its_path(stub: Path, tmp_path: Path, filled_cache: Path) -> None:
    fcntl = pytest.importorskip("fcntl", reason="no flock on this system")
    folder = tmp_path / "cache" / libraries(filled_cache)[0].parent.name
    folder.mkdir(parents=True)
    with (folder / "flock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        out = run("native.WAIT_SECONDS = 0.2" + LOAD, stub, tmp_path / "cache")
    assert out == f"failed: waited 0.2 s for a running process that builds the library and holds {folder / 'flock'}"


@needs_compiler
def test_eight_processes_at_once_build_once(stub: Path, tmp_path: Path) -> None:
    waiting = [start(LOAD, stub, tmp_path) for _ in range(8)]
    found = [finish(process, 240) for process in waiting]
    assert all(line.startswith("42 from") for line in found)
    assert sum(line.endswith("(built just in time)") for line in found) == 1
    assert len(libraries(tmp_path)) == 1


@needs_compiler
def test_killed_builder_leaves_nothing_in_the_way(stub: Path, tmp_path: Path) -> None:
    builder = start(LOAD, stub, tmp_path)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("convfast-*/build-*/build.ninja")):
        assert builder.poll() is None and time.monotonic() < deadline, "the build did not start"
        time.sleep(0.01)
    builder.kill()
    builder.wait()
    assert run(LOAD, stub, tmp_path).startswith("42 from")


@needs_compiler
def test_threads_load_once(stub: Path, filled_cache: Path) -> None:
    code = """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(8) as pool:
    print(set(pool.map(lambda _: native.reason(), range(32))))
"""
    assert run(code, stub, filled_cache) == "{None}"


@needs_compiler
def test_fork_while_another_thread_loads(stub: Path, filled_cache: Path) -> None:
    code = """
import os
native._lock.acquire()
child = os.fork()
if child == 0:
    os._exit(0 if native.reason() is None else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(code, stub, filled_cache) == "0"


@needs_compiler
def test_prebuilt_library_is_taken_or_refused(tmp_path: Path, filled_cache: Path) -> None:
    build_file = write_stub(tmp_path)
    prebuilt = build_file.parent / toolchain.read_build(build_file).prebuilt_name
    shutil.copy(libraries(filled_cache)[0], prebuilt)
    assert run(LOAD, build_file, tmp_path / "cache") == f"42 from {prebuilt} (prebuilt)"
    write_stub(tmp_path, number=44)
    out = run(LOAD, build_file, tmp_path / "cache")
    assert out.startswith("44 from") and f"{prebuilt} was built from other sources" in out
    out = run(LOAD, build_file, tmp_path / "other", CXX="no-such-compiler")
    assert out.startswith("failed: no C++ compiler") and "was built from other sources" in out


def test_failure_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail(name: str) -> str:
        calls.append(threading.get_ident())
        raise OSError("a surprise\nin two lines")

    monkeypatch.setattr(native, "_load", fail)
    monkeypatch.setattr(native, "_origins", {})
    monkeypatch.setattr(native, "_failures", {})
    assert native.reason() == native.reason() == "OSError: a surprise"
    with pytest.raises(toolchain.NativeUnavailable, match="a surprise"):
        native.load()
    assert len(calls) == 1


@pytest.fixture
def failures(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Why libraries cannot be had, for the test to fill; what is left is plain torch."""
    found: dict[str, str] = {}
    monkeypatch.setattr(native, "_origins", {})
    monkeypatch.setattr(native, "_failures", found)
    monkeypatch.setattr(backends, "_warned", False)
    monkeypatch.setattr(backends, "BACKENDS", {name: backends.BACKENDS[name] for name in ("cpu", "reference")})
    monkeypatch.delenv("CONVFAST_BACKEND", raising=False)
    return found


def test_fallback_to_plain_torch_is_warned_of_once(failures: dict[str, str]) -> None:
    failures["cpu"] = native.Failure("the build failed")
    module, input = convfast.LSTM(3, 4), torch.ones(2, 5, 3)
    message = "convfast: the build failed; plain torch is used instead"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert convfast.available("lstm")["cpu"] == "the build failed"
        assert backends.choose("lstm", None, "cpu") == ("reference", ["the build failed"])
        assert "the build failed" in convfast.explain(module, input)
        convfast.LSTM(3, 4, backend="reference")(input)
        with pytest.raises(RuntimeWarning, match=message):
            module(input)
    with pytest.warns(RuntimeWarning, match=message) as found:
        module(input)
        module(input)
    assert len(found) == 1


def test_fallback_that_was_asked_for_is_not_warned_of(failures: dict[str, str]) -> None:
    failures["cpu"] = "disabled by CONVFAST_NO_NATIVE"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convfast.LSTM(3, 4)(torch.ones(2, 5, 3))


@pytest.mark.parametrize(
    ("changed", "libraries"),
    [
        ("csrc/cpu/kernels/gemm.h", {"cpu"}),
        ("csrc/cuda/mma.h", {"cuda", "emulated"}),
        ("csrc/cuda/lstm.cu", {"cuda", "emulated"}),
        ("csrc/testing/simt.h", {"emulated"}),
        ("csrc/testing/bindings.cpp", set()),
        ("csrc/library.cpp", {"cpu", "emulated"}),
        ("csrc/common/cell.h", {"cpu", "cuda", "emulated"}),
    ],
)
def test_a_change_builds_again_what_it_goes_into(changed: str, libraries: set[str], tmp_path: Path) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    build_file, file = tmp_path / "csrc" / "build.json", tmp_path / changed
    before = {name: toolchain.read_build(build_file, name).digest for name in ("cpu", "cuda", "emulated")}
    file.write_text(file.read_text() + "// changed\n")
    assert {name for name in before if toolchain.read_build(build_file, name).digest != before[name]} == libraries


def test_every_include_is_in_the_digest() -> None:
    for name in ("cpu", "cuda", "emulated"):
        listed = toolchain.read_build(toolchain.BUILD_FILE, name).files
        for file in listed:
            for included in re.findall(r'^#include "(.*)"', file.read_text(), re.MULTILINE):
                path = (file.parent / included).resolve()
                emulator = name == "cuda" and path.parent.name == "testing"
                assert path in listed or emulator, f"{name}: {file}, {included}"


@pytest.fixture
def cuda_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A torch for CUDA 13.0 with its toolkit in the folder; nvcc is the caller's to make."""
    from torch.utils import cpp_extension

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    return tmp_path


def write_nvcc(home: Path, version: str) -> Path:
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(exist_ok=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
    nvcc.chmod(0o755)
    return nvcc


def test_nvcc_that_is_missing_too_old_or_of_another_version_is_named(cuda_torch: Path) -> None:
    def why() -> str:
        with pytest.raises(toolchain.NativeUnavailable) as found:
            toolchain.describe("cuda")
        return str(found.value)

    nvcc = cuda_torch / "bin" / "nvcc"
    assert why() == f"no nvcc: cannot run {nvcc} (install the CUDA toolkit 13.0, or set CUDA_HOME)"
    write_nvcc(cuda_torch, "11.8")
    assert why() == f"{nvcc} is 11.8, expected at least 12.0"
    write_nvcc(cuda_torch, "12.9")
    assert why() == f"{nvcc} is 12.9, torch is built for CUDA 13.0"


def test_cuda_runtime_is_linked_from_the_toolkit_behind_nvcc(cuda_torch: Path) -> None:
    nvcc, toolkit = write_nvcc(cuda_torch, "13.0"), cuda_torch / "toolkit"
    with nvcc.open("a") as file:
        file.write(f"echo '#$ _HERE_={toolkit}/bin' >&2; echo '#$ TOP={toolkit}/bin/..' >&2\n")
    (toolkit / "bin").mkdir(parents=True)
    assert toolchain.cuda_folders() == []
    library = toolkit / "lib" / "libcudart.so"
    library.parent.mkdir()
    library.touch()
    assert toolchain.cuda_folders() == [f"-L{library.parent}"]


@needs_compiler
def test_architectures_of_a_cuda_build(cuda_torch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = write_nvcc(cuda_torch, "13.0")
    here = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(here))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: here[index])
    assert toolchain.architectures((12, 0)) == "8.0+PTX;9.0a"
    assert toolchain.architectures((13, 0)) == "8.0;9.0a;10.0+PTX"
    here += [(9, 0)]
    assert toolchain.architectures((13, 0)) == "9.0a"
    here += [(7, 5), (8, 6), (9, 0)]
    assert toolchain.describe("cuda") == f"{toolchain.compiler()}, {nvcc}: 13.0 for 8.6+PTX;9.0a"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;10.0+PTX")
    assert toolchain.describe("cuda").endswith(" for 8.0;10.0+PTX")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "5.2 7.5+PTX Turing 8.0 Hopper 12.0+PTX")
    assert toolchain.architectures((13, 0)) == "8.0;Hopper;12.0+PTX"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0;7.5+PTX")
    message = r"'7\.0;7\.5\+PTX', expected an architecture of at least 8\.0"
    with pytest.raises(toolchain.NativeUnavailable, match=message):
        toolchain.architectures((13, 0))


BUILDS = """
from convfast import native
native.load()
assert native.build("cpu") == native.build("cpu") == native.origin("cpu")
print(native.reason())
"""


@needs_compiler
def test_library_that_is_there_is_not_built_again(tmp_path: Path) -> None:
    if why := native.reason():
        pytest.skip(f"native library: {why}")
    done = subprocess.run([sys.executable, "-c", BUILDS], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip() == "None", done.stderr


def test_key_of_a_cuda_library_has_its_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    build, keys = toolchain.read_build(toolchain.BUILD_FILE, "cuda"), set()
    for asked in ("8.0", "9.0"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
        keys.add(native._key(build))
    assert len(keys) == 2


def test_cuda_library_without_cuda_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(toolchain.NativeUnavailable, match=r"^torch is built without CUDA$"):
        native._load("cuda")


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: Path(source).stem)
@pytest.mark.parametrize("compiler", ["clang++", "aarch64-linux-gnu-g++"])
def test_other_compilers_take_the_sources(compiler: str, source: str) -> None:
    if not shutil.which(compiler) or not compiles([compiler]):
        pytest.skip(f"no {compiler}, or no library with it")
    includes = (f"-I{path}" for path in cpp_extension.include_paths())
    flags = [flag for flag in toolchain.read_build(toolchain.BUILD_FILE).cflags if flag != "-O3"]
    command = [compiler, "-O0", "-c", *flags, *includes, source, "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("asked", ["default", "avx2", "avx512"])
def test_forced_instruction_set_gives_the_same_numbers(asked: str) -> None:
    expected = instruction_set(asked)
    if why := native.reason():
        pytest.skip(f"native library: {why}")
    levels, has = ["DEFAULT", "AVX2", "AVX512"], torch.backends.cpu.get_cpu_capability()
    if has in levels and asked.upper() not in levels[: levels.index(has) + 1]:  # torch itself would not ask
        pytest.skip(f"this machine has no {asked}: torch takes {has}")
    code = """
import torch, convfast
torch.manual_seed(0)
def leaf(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)
tensors = leaf(2, 4, 3, 7, 9), 0.3 * leaf(20, 3, 3, 3), 0.3 * leaf(20, 5, 3, 3), leaf(20), leaf(3, 5, 7, 9)
def run(dtype, backend):
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    out, (h, c) = convfast.conv_lstm(*leaves, backend=backend)
    (out.sin().sum() + h.sum() + c.square().sum()).backward()
    return [t.double() for t in (out, h, c, *(leaf.grad for leaf in leaves))]
exact = run(torch.float64, "reference")
worst = [max(((a - b).norm() / b.norm()).item() for a, b in zip(run(dtype, "cpu"), exact, strict=True))
         for dtype in (torch.float32, torch.float64)]
print(torch.backends.cpu.get_cpu_capability(), torch.ops.convfast.cpu_capability(), *worst)
"""
    env = os.environ | {"ATEN_CPU_CAPABILITY": asked, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    torchs, ours, single, double = done.stdout.split()
    assert torchs == asked.upper()
    assert ours == expected
    assert float(single) < 1e-5 and float(double) < 1e-13


WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
runpy.run_path("setup.py", run_name="__main__")
"""


def test_what_is_packaged(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", "77")
    steps = ["egg_info", "--egg-base", tmp_path, "build_py", "--build-lib", tmp_path / "library"]
    env = os.environ | {"CONVFAST_NO_NATIVE": "1", "PYTHONPATH": "."}
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, steps)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    installed = tmp_path / "library" / "convfast"
    assert (installed / "py.typed").is_file()
    code = "from convfast.toolchain import *; print(*(read_build(BUILD_FILE, name).digest for name in ('cpu', 'cuda')))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=installed.parent, env=env, capture_output=True, text=True, timeout=60
    )
    here = [toolchain.read_build(toolchain.BUILD_FILE, name).digest for name in ("cpu", "cuda")]
    assert done.stdout.split() == here, done.stderr  # it takes the same libraries as a checkout does
    described = tmp_path / "convfast.egg-info"
    metadata = (described / "PKG-INFO").read_text().splitlines()
    assert {f"Version: {convfast.__version__}", "License-Expression: MIT", "License-File: LICENSE"} <= set(metadata)
    oldest = ".".join(map(str, triton_runtime.OLDEST))
    assert f"[triton]\ntriton>={oldest}\n" in (described / "requires.txt").read_text()
    packed = set((described / "SOURCES.txt").read_text().splitlines())
    folders = ("bench", "convfast", "csrc", "docs", "examples", "tests")
    kinds = {".cpp", ".cu", ".h", ".inc", ".json", ".md", ".py", ".sh", ".typed"}
    needed = [file for folder in folders for file in (ROOT / folder).rglob("*") if file.suffix in kinds]
    files = ("CMakeLists.txt", "LICENSE", "Makefile", "README.md", "pyproject.toml", "setup.py")
    needed += [ROOT / name for name in files]
    assert {file.relative_to(ROOT).as_posix() for file in needed} <= packed


def test_readme_has_what_its_generator_writes() -> None:
    from bench import readme

    text = (ROOT / "README.md").read_text()
    report = readme.shown(text)
    assert f"({report.relative_to(ROOT).with_name('conv_lstm.png').as_posix()})" in text
    assert readme.rewritten(text, report) == text
    with pytest.raises(ValueError, match="name the report"):
        readme.shown("<!-- results:begin -->\n<!-- results:end -->")


DIGITS = """
import types
import numpy as np
def load_digits():
    random = np.random.default_rng(0)
    return types.SimpleNamespace(images=random.integers(17, size=(400, 8, 8)), target=random.integers(10, size=400))
"""


def test_quick_example_leaves_the_pictures_of_readme(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "sklearn").mkdir()
    (tmp_path / "sklearn" / "datasets.py").write_text(DIGITS)
    (tmp_path / "tqdm.py").write_text("from unittest.mock import Mock as tqdm")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    before = (tmp_path / "examples" / "out" / "digit_rows.png").read_bytes()
    small = ["--quick", "--batch", "2", "--channels", "4", "--hidden", "4"]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "examples" / "digit_rows.py"), *small],
        env=os.environ | {"CONVFAST_BACKEND": "reference", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "examples" / "out" / "digit_rows.png").read_bytes() == before
    picture = tmp_path / "build" / "examples" / "digit_rows.png"
    assert picture.is_file() and f"picture: {picture} (README's is of a whole run)" in done.stdout


LEAKS = """
import ctypes, gc, torch, convfast
class Mallinfo(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]
libc = ctypes.CDLL("libc.so.6")
libc.mallinfo2.restype = Mallinfo
def used():
    gc.collect()
    found = libc.mallinfo2()
    return found.uordblks + found.hblkhd
calls = {
    "conv1d": (convfast.Conv1d(3, 4, 3, activation="relu"), torch.randn(2, 8, 3)),
    "conv1d_lstm": (convfast.Conv1dLSTM(3, [4, 4], 5), torch.randn(2, 8, 3)),
    "conv_lstm": (convfast.ConvLSTM(2, 3, 3), torch.randn(1, 2, 2, 4, 4)),
}
for name, (module, x) in calls.items():
    for learns in (False, True):
        def call():
            with torch.set_grad_enabled(learns):
                output = module(x)
                if learns:
                    (output if torch.is_tensor(output) else output[0]).sum().backward()
        growth = []
        for _ in range(4):
            before = used()
            for _ in range(1000):
                call()
            growth.append((used() - before) / 1000)
        print(name, learns, growth)
        assert min(growth) < 16, (name, learns, growth)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="counts by mallinfo2, of glibc from 2.33 on")
def test_calls_keep_no_memory(native_ops) -> None:
    done = subprocess.run([sys.executable, "-c", LEAKS], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
