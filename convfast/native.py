"""The compiled libraries: found ahead of time or built just in time, so that `torch.ops.convfast.*` exists.

- "cpu" has every schema, and the kernels for CPU tensors;
- "cuda" has those for CUDA tensors, and is loaded after it;
- "emulated" is the source of "cuda" as C++, its ops in `torch.ops.convfast_emulated`: tests run it on the CPU.

In this order: a library that setup.py built next to this file, a library in the cache, a build into the cache by
`torch.utils.cpp_extension`. Nothing is looked for, built or loaded at import.
"""

import hashlib
import logging
import os
import platform
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from . import toolchain
from .environment import enabled
from .toolchain import Build, NativeUnavailable, first_line

OLDEST_TORCH = (2, 10)
WAIT_SECONDS = 600.0
_PRIVATE = "built just in time for this process only"

log = logging.getLogger("convfast")


class Failure(str):
    """The reason why a library could not be built or loaded; that of a disabled library is a plain str."""


class _Disabled(NativeUnavailable):
    """Nobody wanted the library."""


def emulated() -> bool:
    """Whether the cuda backend is its kernels compiled as C++, on CPU tensors."""
    return enabled("CONVFAST_EMULATE_CUDA")


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
            except _Disabled as error:
                _failures[name] = str(error)
            except NativeUnavailable as error:
                _failures[name] = Failure(error)
            except Exception as error:
                _failures[name] = Failure(f"{type(error).__name__}: {first_line(str(error))}")
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


def reason(name: str = "cpu") -> str | None:
    """None when a library is loaded or can be, else why not, in one line: a Failure, or that nobody wanted it. Loads it
    (and may build it) to find out."""
    try:
        load(name)
    except NativeUnavailable as error:
        return error.args[0]  # str(error) would be no Failure
    return None


def origin(name: str = "cpu") -> str | None:
    """Where a loaded library came from, None while it is not loaded."""
    return _origins.get(name)


def _load(name: str) -> str:
    if enabled("CONVFAST_NO_NATIVE"):
        raise _Disabled("disabled by CONVFAST_NO_NATIVE")
    if torch.__version__ < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise NativeUnavailable(f"built for torch >= {oldest}, you have {torch.__version__}")
    if name == "cuda" and torch.version.cuda is None:
        raise NativeUnavailable("torch is built without CUDA")
    if _registered(name):
        return "loaded by someone else"

    package, build_file = toolchain.PACKAGE, toolchain.BUILD_FILE
    prebuilt = sorted(package.glob(f"_{name}_*.so"))
    if not build_file.is_file():
        if not prebuilt:
            raise NativeUnavailable(f"no prebuilt library in {package} and no sources at {build_file.parent}")
        _dlopen(prebuilt[0])
        return f"{prebuilt[0]} (prebuilt)"
    build = toolchain.read_build(build_file, name)
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
    if name == "cuda":
        kernel = "convfast::lstm_gates_forward", "CUDA"
        return _registered("cpu") and torch._C._dispatch_has_kernel_for_dispatch_key(*kernel)
    return hasattr(torch.ops.convfast if name == "cpu" else torch.ops.convfast_emulated, "cpu_capability")


def _dlopen(path: Path) -> None:
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise NativeUnavailable(f"{path} does not load: {_reason_of(error)}") from error


def _reason_of(error: OSError) -> str:
    """What the system's loader says; torch's own error only names the file."""
    return first_line(str(error.__cause__ or error))


def _load_cached(build: Build) -> str:
    made_for = f"convfast-{_key(build)}"
    try:
        folder = cache_dir() / f"{made_for}-{_digest(toolchain.describe(build.name))}"
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
        cause = f"cannot use {folder} ({error.strerror or first_line(str(error))})"
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


def _key(build: Build) -> str:
    """Everything that a library depends on but its toolchain."""
    cuda = (torch.version.cuda or "cpu").split(".")[0]
    # Without nvcc its version is not known: it only matters where nothing says which GPUs to build for.
    gpus = (toolchain.architectures(toolchain.OLDEST_CUDA),) if build.name == "cuda" else ()
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
    variables = {"CXX": toolchain.cxx()}
    if cuda:
        variables["TORCH_CUDA_ARCH_LIST"] = toolchain.architectures(toolchain.nvcc()[1])
    with _ninja_on_path(), _environment(variables):
        try:
            # In a folder of its own: torch's lock file there outlives its process and would block all others for ever.
            cpp_extension.load(
                f"convfast_{build.name}",
                list(build.sources),
                with_cuda=cuda,
                **{"extra_cuda_cflags" if cuda else "extra_cflags": list(build.cflags)},
                extra_ldflags=[*build.ldflags, *(toolchain.cuda_folders() if cuda else ())],
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
    return first_line(log)
