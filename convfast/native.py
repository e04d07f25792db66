"""The compiled libraries: found ahead of time or built just in time, so that `torch.ops.convfast.*` exists.

- "cpu" has every schema, and the kernels for CPU tensors;
- "cuda" has those for CUDA tensors, and is loaded after it;
- "emulated" is the source of "cuda" as C++, its ops in `torch.ops.convfast_emulated`: tests run it on the CPU.

In this order: a library that setup.py built next to this file, a library in the cache, a build into the cache by
`torch.utils.cpp_extension`. Nothing is looked for, built or loaded at import; torch itself is imported by `load()`, so
that setup.py can read this file for the one list of sources and flags, csrc/build.json.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ENVIRONMENT = {
    "CONVFAST_BACKEND": "backend taken where a call names none: reference, cuda, triton or cpu",
    "CONVFAST_NO_NATIVE": "1: neither build nor load a compiled library",
    "CONVFAST_CACHE": "directory for libraries built just in time (else TORCH_EXTENSIONS_DIR, else torch's own)",
    "CONVFAST_AUTOTUNE": "1: on a GPU time a few tile sizes, once per shape, and keep the fastest in CONVFAST_CACHE",
    "CONVFAST_POISON": "1: fill fresh memory with NaN, to find values that are read before they are written",
    "ATEN_CPU_CAPABILITY": "default, avx2 or avx512: instruction set, where there is it; unset: and matrix tiles",
    "CONVFAST_EMULATE_CUDA": "1: the cuda backend runs on CPU tensors, thread by thread, for tests",
    "CONVFAST_CUDA_SM_COUNT": "multiprocessors that a GPU is taken to have at most, for tests",
    "CONVFAST_CUDA_SHARED": "bytes of shared memory that a block is taken to have at most, for tests",
    "CONVFAST_CUDA_CAPABILITY": "compute capability that a GPU is taken to have at most, as 80, for tests",
    "CONVFAST_EMULATE_TILES": "1: build the cpu backend with matrix tiles (AMX) emulated, for tests",
    "CXX": "C++ compiler of a just-in-time build (else c++)",
    "CUDA_HOME": "CUDA toolkit of a just-in-time build (else that of the nvcc on PATH, else /usr/local/cuda)",
    "TORCH_CUDA_ARCH_LIST": "architectures of a CUDA build, as 8.0+PTX;9.0a (else those of the GPUs here)",
}
PACKAGE = Path(__file__).resolve().parent
# The sources are in the package where it is installed, beside it in a checkout.
BUILD_FILE = (PACKAGE if (PACKAGE / "csrc").is_dir() else PACKAGE.parent) / "csrc" / "build.json"
OLDEST_TORCH = (2, 10)
OLDEST_CUDA = (12, 0)  # thread-block clusters
OLDEST_GPU = (8, 0)  # asynchronous copies, matrix products in bfloat16
WAIT_SECONDS = 600.0
DISABLED = "disabled by CONVFAST_NO_NATIVE"
_PRIVATE = "built just in time for this process only"

log = logging.getLogger("convfast")


class NativeUnavailable(RuntimeError):
    """The compiled library cannot be had; the message is the reason, in one line."""


@dataclass(frozen=True)
class Build:
    """What csrc/build.json says of one library, and a digest of the files and flags that go into it."""

    name: str
    sources: tuple[str, ...]
    files: tuple[Path, ...]
    cflags: tuple[str, ...]
    ldflags: tuple[str, ...]
    digest: str

    @property
    def prebuilt_name(self) -> str:
        return f"_{self.name}_{self.digest}.so"


def read_build(path: Path, name: str = "cpu") -> Build:
    """Read a library's part of a build file; what it lists is relative to the folder above, and comes back absolute."""
    libraries = json.loads(path.read_text())
    listed, root = libraries[name], path.parent.parent
    for key in ("sources", "headers") if "extends" in listed else ():
        listed[key] += libraries[listed["extends"]][key]
    if name == "cpu" and os.environ.get("CONVFAST_EMULATE_TILES") == "1":
        listed["cflags"].append("-DCONVFAST_EMULATE_TILES")
    sources = [root / source for source in listed["sources"]]
    headers = (file for pattern in listed["headers"] for file in root.glob(pattern))
    digest = hashlib.sha256(json.dumps(listed).encode())
    files = tuple(sorted({*sources, *headers}))
    for file in files:
        if not file.is_file():
            raise NativeUnavailable(f"source file {file} is missing")
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes() + b"\0")
    unknown = {"-Wl,--as-needed"} if sys.platform == "darwin" else set()  # to Apple's linker
    flags = tuple(listed["cflags"]), tuple(flag for flag in listed["ldflags"] if flag not in unknown)
    return Build(name, tuple(map(str, sources)), files, *flags, digest.hexdigest()[:16])


def emulated() -> bool:
    """Whether the cuda backend is its kernels compiled as C++, on CPU tensors."""
    return os.environ.get("CONVFAST_EMULATE_CUDA") == "1"


_lock = threading.Lock()
_origins: dict[str, str] = {}
_failures: dict[str, str] = {}


def _after_fork() -> None:
    # A thread of the parent may have held the lock; it does not exist in the child.
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def load(name: str = "cpu") -> None:
    """Make the ops of a library exist. Safe to call again, from any thread and any number of processes.

    Raises:
        NativeUnavailable: with the reason. It is found once per process and then repeated.
    """
    if name == "cuda":
        load("cpu")  # it has the schemas
    if name in _origins:
        return
    with _lock:
        if name in _origins:
            return
        if name not in _failures:
            try:
                _origins[name] = _load(name)
            except NativeUnavailable as error:
                _failures[name] = str(error)
            except Exception as error:
                _failures[name] = f"{type(error).__name__}: {_first_line(str(error))}"
        if name in _failures:
            raise NativeUnavailable(_failures[name])
    # Only now: where warnings are errors, this one is no failure to build.
    if _origins[name].startswith(_PRIVATE):
        message = f"convfast: library {_origins[name]}; set CONVFAST_CACHE to a writable directory"
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def build(name: str) -> str:
    """`load` one library alone, so that two can be built side by side. → where it came from. One for CUDA is found in
    the cache where TORCH_CUDA_ARCH_LIST is the same, or the same GPUs are there.

    Raises:
        NativeUnavailable: with the reason.
    """
    with _lock:
        if name not in _origins:
            _origins[name] = _load(name)
        return _origins[name]


def load_for(tensor: Tensor) -> None:
    """Make the ops exist for tensors where `tensor` is, as `load`."""
    load("cuda" if tensor.device.type == "cuda" else "cpu")


def reason(name: str = "cpu") -> str | None:
    """None when a library is loaded or can be, else why not, in one line. Loads it (and may build it) to find out."""
    try:
        load(name)
    except NativeUnavailable as error:
        return str(error)
    return None


def failed(reason: str) -> bool:
    """Whether `reason` is why a library could not be built or loaded, other than that nobody wanted it."""
    return reason != DISABLED and reason in _failures.values()


def origin(name: str = "cpu") -> str | None:
    """Where a loaded library came from, None while it is not loaded."""
    return _origins.get(name)


def _load(name: str) -> str:
    if os.environ.get("CONVFAST_NO_NATIVE", "0").lower() not in ("", "0", "false", "off", "no"):
        raise NativeUnavailable(DISABLED)
    import torch

    if torch.__version__ < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise NativeUnavailable(f"built for torch >= {oldest}, you have {torch.__version__}")
    if name == "cuda" and torch.version.cuda is None:
        raise NativeUnavailable("torch is built without CUDA")
    if _registered(name):
        return "loaded by someone else"

    prebuilt = sorted(PACKAGE.glob(f"_{name}_*.so"))
    if not BUILD_FILE.is_file():
        if not prebuilt:
            raise NativeUnavailable(f"no prebuilt library in {PACKAGE} and no sources at {BUILD_FILE.parent}")
        _dlopen(prebuilt[0])
        return f"{prebuilt[0]} (prebuilt)"
    build = read_build(BUILD_FILE, name)
    for path in prebuilt:
        if path.name == build.prebuilt_name:
            _dlopen(path)
            return f"{path} (prebuilt)"
    if not prebuilt:
        return _load_cached(build)
    refused = f"{prebuilt[0]} was built from other sources (run setup.py build_ext --inplace, or delete it)"
    try:
        return f"{_load_cached(build)}; not taken: {refused}"
    except NativeUnavailable as error:
        raise NativeUnavailable(f"{error}; not taken: {refused}") from error


def _registered(name: str) -> bool:
    # To register ops twice ends the process, from a static initializer where nothing can be caught.
    import torch

    if name == "cuda":
        kernel = "convfast::lstm_gates_forward", "CUDA"
        return _registered("cpu") and torch._C._dispatch_has_kernel_for_dispatch_key(*kernel)
    return hasattr(torch.ops.convfast if name == "cpu" else torch.ops.convfast_emulated, "cpu_capability")


def _dlopen(path: Path) -> None:
    import torch

    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise NativeUnavailable(f"{path} does not load: {_reason_of(error)}") from error


def _reason_of(error: OSError) -> str:
    """What the system's loader says; torch's own error only names the file."""
    return _first_line(str(error.__cause__ or error))


def _load_cached(build: Build) -> str:
    made_for = f"convfast-{_key(build)}"
    try:
        folder = cache_dir() / f"{made_for}-{_digest(toolchain(build.name))}"
    except NativeUnavailable:
        # The compiler may be gone since, as in the second stage of a container.
        for folder in sorted(cache_dir().glob(f"{made_for}-*")):
            if found := _open_cached(folder):
                return found
        raise
    try:
        if found := _open_cached(folder):
            return found
        folder.mkdir(parents=True, exist_ok=True)
        with _exclusive(folder / "flock"):
            if found := _open_cached(folder):
                return found
            for left in folder.glob("build-*"):  # by processes that died: whoever builds holds the lock
                shutil.rmtree(left, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix="build-", dir=folder, ignore_cleanup_errors=True) as scratch:
                library = _compile(build, Path(scratch), folder / "build.log")
                # The name holds the content's digest and the move is atomic: no other process sees half of it.
                library = library.rename(folder / _library_name(library))
        return f"{library} (built just in time)"
    except OSError as error:
        cause = f"cannot use {folder} ({error.strerror or _first_line(str(error))})"
    with tempfile.TemporaryDirectory(prefix="convfast-", ignore_cleanup_errors=True) as scratch:
        _compile(build, Path(scratch), None)
    return f"{_PRIVATE}: {cause}"


def cache_dir() -> Path:
    """The folder under which just-in-time builds are kept."""
    chosen = os.environ.get("CONVFAST_CACHE") or os.environ.get("TORCH_EXTENSIONS_DIR")
    if not chosen:
        from torch.utils import cpp_extension

        chosen = cpp_extension.get_default_build_root()
    return Path(chosen).expanduser().absolute()


def _cxx() -> str:
    return os.environ.get("CXX", "").strip() or "c++"


def compiler() -> str:
    """The C++ compiler's command and version; NativeUnavailable where there is none."""
    command = _cxx()
    try:
        shown = subprocess.run([*shlex.split(command), "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
        raise NativeUnavailable(f"no C++ compiler: cannot run '{command}' (install g++, or set CXX)") from None
    return f"{command}: {_first_line(shown)}"


def nvcc() -> tuple[str, tuple[int, int]]:
    """nvcc's path and version; NativeUnavailable where there is none that can build for this torch."""
    import torch

    if torch.version.cuda is None:
        raise NativeUnavailable("torch is built without CUDA")
    from torch.utils import cpp_extension

    command = str(Path(cpp_extension.CUDA_HOME or "/usr/local/cuda", "bin", "nvcc"))
    try:
        shown = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        raise NativeUnavailable(
            f"no nvcc: cannot run {command} (install the CUDA toolkit {torch.version.cuda}, or set CUDA_HOME)"
        ) from None
    found = re.search(r"release (\d+)\.(\d+)", shown)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    if version < OLDEST_CUDA:
        raise NativeUnavailable(f"{command} is {_dotted(version)}, expected at least {_dotted(OLDEST_CUDA)}")
    if version[0] != int(torch.version.cuda.split(".")[0]):
        raise NativeUnavailable(f"{command} is {_dotted(version)}, torch is built for CUDA {torch.version.cuda}")
    return command, version


def cuda_folders() -> list[str]:
    """The linker's options for the CUDA runtime of nvcc's own toolkit: what torch takes for the toolkit may only have a
    link or a script named nvcc."""
    shown = subprocess.run([nvcc()[0], "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", shown, re.MULTILINE)
    names = ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")
    folders = [Path(top[1], name).resolve() for name in names] if top else []
    return list(dict.fromkeys(f"-L{folder}" for folder in folders if (folder / "libcudart.so").exists()))


def architectures(version: tuple[int, int]) -> str:
    """What a CUDA build is for, as torch reads it: what TORCH_CUDA_ARCH_LIST says, else the GPUs that are here, else a
    GPU of each generation that nvcc of that version knows; with PTX of the newest, if not of 9.0, for those to come.
    Without GPUs that are too old: a list may be there for other libraries."""
    import torch

    if asked := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        if taken := [name for name in re.split(r"[;\s]+", asked) if name and not _too_old(name)]:
            return ";".join(taken)
        raise NativeUnavailable(
            f"TORCH_CUDA_ARCH_LIST is {asked!r}, expected an architecture of at least {_dotted(OLDEST_GPU)}"
        )
    here = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    taken = sorted(a for a in here if a >= OLDEST_GPU) or [(8, 0), (9, 0), *[(10, 0)] * (version >= (12, 8))]
    # Only 9.0a has products of warpgroups, and its PTX runs nowhere else.
    names = {a: "9.0a" if a == (9, 0) else _dotted(a) for a in taken}
    newest = max((a for a in taken if a != (9, 0)), default=None)
    return ";".join(name + "+PTX" * (a == newest) for a, name in names.items())


def _too_old(architecture: str) -> bool:
    found = re.match(r"(\d+)\.(\d+)", architecture)
    if found:
        return (int(found[1]), int(found[2])) < OLDEST_GPU
    return architecture.partition("+")[0] in ("Kepler", "Maxwell", "Pascal", "Volta", "Turing")


def toolchain(name: str) -> str:
    """Everything that a library is compiled with; NativeUnavailable where something is missing."""
    if name != "cuda":
        return compiler()
    command, version = nvcc()
    return f"{compiler()}, {command}: {_dotted(version)} for {architectures(version)}"


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _key(build: Build) -> str:
    """Everything that a library depends on but its toolchain."""
    import torch

    cuda = (torch.version.cuda or "cpu").split(".")[0]
    # Without nvcc its version is not known: it only matters where nothing says which GPUs to build for.
    gpus = (architectures(OLDEST_CUDA),) if build.name == "cuda" else ()
    return _digest("\0".join((build.digest, torch.__version__, cuda, platform.machine(), *gpus)))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _library_name(file: Path) -> str:
    return f"convfast-{hashlib.sha256(file.read_bytes()).hexdigest()[:32]}.so"


def _cached_library(folder: Path) -> Path | None:
    # A damaged file can kill the process in dlopen, so its content is checked first.
    for path in sorted(folder.glob("convfast-*.so")) if folder.is_dir() else ():
        if path.name == _library_name(path):
            return path
    return None


def _open_cached(folder: Path) -> str | None:
    """Load the library in a folder of the cache, if there is one. → where it came from"""
    if library := _cached_library(folder):
        _dlopen(library)
        return f"{library} (cache)"
    return None


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold `path` against all other processes. The kernel lets go when the holder dies, so no lock is ever stale."""
    import fcntl

    deadline = time.monotonic() + WAIT_SECONDS
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise NativeUnavailable(
                        f"waited {WAIT_SECONDS:g} s for a running process that builds the library and holds {path}"
                    ) from None
                time.sleep(0.05)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing alone would leave it with children forked meanwhile


def _compile(build: Build, folder: Path, log_file: Path | None) -> Path:
    """Compile into the empty `folder`, load the library from there and return its path."""
    from torch.utils import cpp_extension

    cuda = build.name == "cuda"
    library = {"cpu": "CPU", "cuda": "CUDA"}.get(build.name, build.name)
    log.warning("convfast: compiling the %s library, once, for %s", library, folder.parent if log_file else "this call")
    # torch takes an empty CXX for a compiler, and is to build for what the library's key says.
    variables = {"CXX": _cxx()} | ({"TORCH_CUDA_ARCH_LIST": architectures(nvcc()[1])} if cuda else {})
    with _ninja_on_path(), _environment(variables):
        try:
            # In a folder of its own: torch's lock file there outlives its process and would block all others for ever.
            cpp_extension.load(
                f"convfast_{build.name}",
                list(build.sources),
                with_cuda=cuda,
                **{"extra_cuda_cflags" if cuda else "extra_cflags": list(build.cflags)},
                extra_ldflags=[*build.ldflags, *(cuda_folders() if cuda else ())],
                build_directory=str(folder),
                is_python_module=False,
            )
        except RuntimeError as error:
            shown, where = str(error), ""
            if log_file is not None:
                log_file.write_text(shown)
                where = f" (log: {log_file})"
            raise NativeUnavailable(f"the build failed: {_cause(shown)}{where}") from error
        except OSError as error:
            forbidden = getattr(os, "ST_NOEXEC", 0) & os.statvfs(folder).f_flag  # another folder may do
            if forbidden or not list(folder.glob("*.so")):
                raise
            raise NativeUnavailable(f"what was built does not load: {_reason_of(error)}") from error
    return next(folder.glob("*.so"))


@contextmanager
def _ninja_on_path() -> Iterator[None]:
    """Let torch find the ninja of the package of that name, also where its environment is not activated."""
    path = os.environ.get("PATH", os.defpath)
    try:
        if not shutil.which("ninja"):
            try:
                from ninja import BIN_DIR
            except ImportError:
                raise NativeUnavailable("no ninja: it is neither on PATH nor a package (pip install ninja)") from None
            os.environ["PATH"] = os.pathsep.join((path, BIN_DIR))
        yield
    finally:
        os.environ["PATH"] = path


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _cause(log: str) -> str:
    """Of what a failed build printed, the part that says why."""
    lines = [line.strip() for line in log.splitlines()]
    for before, line in zip(["", *lines], lines):
        if "error:" in line:
            # Of the linker the compiler only says that it failed; its own word is on the line above.
            return f"{before}; {line}" if "ld returned" in line or "linker command" in line else line
    return _first_line(log)


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
