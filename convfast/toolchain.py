"""What the libraries are built from and with: csrc/build.json, the compilers, and the GPUs to build for.

setup.py reads this file, too, also where there is no torch: that is imported by what asks for CUDA.
"""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .environment import enabled

PACKAGE = Path(__file__).resolve().parent
# The sources are in the package where it is installed, beside it in a checkout.
BUILD_FILE = (PACKAGE if (PACKAGE / "csrc").is_dir() else PACKAGE.parent) / "csrc" / "build.json"
OLDEST_CUDA = (12, 0)  # thread-block clusters
OLDEST_GPU = (8, 0)  # asynchronous copies, matrix products in bfloat16


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
    if name == "cpu" and enabled("CONVFAST_EMULATE_TILES"):
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


def cxx() -> str:
    """The command of the C++ compiler."""
    return os.environ.get("CXX", "").strip() or "c++"


def compiler() -> str:
    """The C++ compiler's command and version; NativeUnavailable where there is none."""
    command = cxx()
    try:
        shown = subprocess.run([*shlex.split(command), "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
        raise NativeUnavailable(f"no C++ compiler: cannot run '{command}' (install g++, or set CXX)") from None
    return f"{command}: {first_line(shown)}"


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


def describe(name: str) -> str:
    """Everything that a library is compiled with; NativeUnavailable where something is missing."""
    if name != "cuda":
        return compiler()
    command, version = nvcc()
    return f"{compiler()}, {command}: {_dotted(version)} for {architectures(version)}"


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
