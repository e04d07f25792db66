"""What nvcc makes of the CUDA kernels: registers, spills, shared memory, instructions. No GPU is needed.

A kernel's budget is its __launch_bounds__: so many threads a block and blocks on a processor share its registers.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

from convfast import toolchain

BUILD = toolchain.read_build(toolchain.BUILD_FILE, "cuda")
FILES = [Path(source) for source in BUILD.sources]
TARGETS = ("sm_80", "sm_90a", "sm_100")
CELLS = [(file, target) for file in FILES for target in TARGETS]
REGISTERS = 65536  # of a processor
# Kernels that move 16 bytes at a time (the others of that name are for sizes that do not allow it), and kernels that
# multiply 16-bit numbers.
MOVING = r"gates_(for|back)ward_kernelI(fLi4|N3c10(4Half|8BFloat16)ELi8)E"
WARPGROUPS = r"(for|back)ward_stepI.*4TileI(Li\d+E)+Lb1E"
MULTIPLYING = r"((for|back)ward_(step|sequence)|recurrence_(for|back)ward|conv1d_kernel)I.*(4Half|8BFloat16)E"


def find_nvcc() -> str | None:
    """On PATH, in CUDA_HOME, where toolkits are installed, or in a package of NVIDIA's."""
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))]
    if found := importlib.util.find_spec("nvidia"):
        places += [folder for place in found.submodule_search_locations or () for folder in Path(place).glob("*")]
    commands = (place / "bin" / "nvcc" for place in places)
    return shutil.which("nvcc") or next((str(command) for command in commands if command.is_file()), None)


def find_cuobjdump() -> str | None:
    if found := importlib.util.find_spec("triton"):
        tool = Path(found.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if tool.is_file():
            return str(tool)
    return shutil.which("cuobjdump")


@dataclass
class Kernel:
    name: str  # mangled
    registers: int
    stack: int
    spilled: int
    shared: int
    threads: int | None  # None: no __launch_bounds__
    blocks: int
    instructions: str | None = field(repr=False)  # None: no tool to show them


@cache
def nvcc() -> str:
    command = find_nvcc()
    if command is None:
        pytest.skip("no nvcc: neither on PATH nor in CUDA_HOME nor in a package")
    shown = subprocess.run([command, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", shown)
    if not found or (int(found[1]), int(found[2])) < (12, 8):
        pytest.skip(f"nvcc is {found[0] if found else 'broken'}, expected at least 12.8 for sm_100")
    return command


def compiled(file: Path, target: str) -> list[Kernel]:
    with TemporaryDirectory() as scratch:
        # For nvcc -O3 is about the host's part alone, of which only the compiler's yes is wanted.
        cflags = [flag for flag in BUILD.cflags if flag != "-O3"]
        flags = [*COMMON_NVCC_FLAGS, *cflags, *(f"-I{path}" for path in include_paths())]
        one = f"-gencode=arch={target.replace('sm', 'compute')},code={target}"
        # The host's part is the same for every target, and takes half of the time.
        what, result = ("-c", "host.o") if target == TARGETS[0] else ("-cubin", "device.cubin")
        command = [nvcc(), what, one, *flags, file, "-o", Path(scratch, result)]
        keeping = ["-Xptxas=-v", "-keep", "-keep-dir", scratch]
        done = subprocess.run([*command, *keeping], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        assert "serialized" not in done.stderr, "products of warpgroups wait for each other"
        assert "injected" not in done.stderr, "sums are used without a fence, which ptxas mends"
        (ptx,), (cubin,) = (list(Path(scratch).glob(f"*.{kind}")) for kind in ("ptx", "cubin"))
        bounds = dict(re.findall(r"\.entry (\w+)\([^{]*?\)([^{]*)\{", ptx.read_text()))
        code = instructions(cubin)
    found = []
    for part in done.stderr.split("Compiling entry function ")[1:]:
        name = re.match(r"'(\w+)'", part)[1]

        def number(pattern: str, text: str = part) -> int | None:
            match = re.search(pattern, text)
            return int(match[1]) if match else None

        found.append(Kernel(
            name,
            number(r"Used (\d+) registers"),
            number(r"(\d+) bytes stack frame"),
            number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
            number(r"(\d+) bytes smem") or 0,
            number(r"\.maxntid (\d+)", bounds[name]),
            number(r"\.minnctapersm (\d+)", bounds[name]) or 1,
            code.get(name) if code else None,
        ))  # fmt: skip
    return found


def instructions(cubin: Path) -> dict[str, str]:
    """The machine code of each kernel; empty where no tool shows it."""
    tool = find_cuobjdump()
    if tool is None:
        return {}
    path = os.pathsep.join((str(Path(tool).parent), os.environ.get("PATH", os.defpath)))
    done = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, env=os.environ | {"PATH": path})
    parts = re.split(r"Function : (\w+)\n", done.stdout)[1:] if done.returncode == 0 else []
    return dict(zip(parts[::2], parts[1::2]))


def written(file: Path) -> list[str]:
    """The names of the kernels in a file and the headers that it includes."""
    own = [header for header in file.parent.glob("*.h") if f'#include "{header.name}"' in file.read_text()]
    text = "".join(path.read_text() for path in (file, *own))
    names = re.findall(r"__global__ void __launch_bounds__\((?:[^()]|\([^()]*\))*\)\s+(\w+)\(", text)
    assert len(names) == text.count("__global__ void"), f"{file}: a kernel without __launch_bounds__"
    return names


# One test a file, for the compilation is what takes long.
@pytest.mark.parametrize(("file", "target"), CELLS, ids=[f"{file.stem}-{target}" for file, target in CELLS])
def test_resources_and_instructions(file: Path, target: str) -> None:
    kernels = compiled(file, target)
    assert kernels
    left_out = [name for name in written(file) if not any(f"{len(name)}{name}" in k.name for k in kernels)]
    assert not left_out, "never compiled"
    assert not [k for k in kernels if k.spilled or k.stack], "registers spilled, or arrays that are not in registers"
    assert not [k for k in kernels if k.threads is None or k.registers * k.threads * k.blocks > REGISTERS]
    assert not [k for k in kernels if k.shared], "shared memory is dynamic: its launch checks the size"

    if any(k.instructions is None for k in kernels):
        pytest.skip("no cuobjdump (it comes with triton and with the CUDA toolkit): instructions were not looked at")
    for kernel in kernels:
        if re.search(MOVING, kernel.name):
            assert "LDG.E.128" in kernel.instructions and "STG.E.128" in kernel.instructions, kernel
        if re.search(MULTIPLYING, kernel.name):
            # Those of warpgroups are empty where there are none.
            wanted = "HMMA" if not re.search(WARPGROUPS, kernel.name) else "HGMMA" if target == "sm_90a" else "EXIT"
            assert wanted in kernel.instructions, kernel
    for pattern, files in ((MOVING, ["lstm_gates"]), (MULTIPLYING, ["conv_lstm", "conv1d", "lstm"])):
        assert file.stem not in files or any(re.search(pattern, kernel.name) for kernel in kernels)
