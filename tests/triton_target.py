"""Compiles what the Triton launchers would launch, for GPUs that are not there, and keeps what came of it.

Within `compiling_for(target)` the launchers run unchanged, best on tensors of the "meta" device, where torch
computes nothing; every kernel[grid](...) is compiled for the target and recorded, and none is run.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from convfast.triton import runtime

CHIPS = {
    "sm_80": runtime.Chip("cuda", 80, 163 * 1024, 108),
    "sm_86": runtime.Chip("cuda", 86, 99 * 1024, 84),
    "sm_90": runtime.H200,
    "sm_100": runtime.Chip("cuda", 100, 227 * 1024, 148),
    "sm_120": runtime.Chip("cuda", 120, 99 * 1024, 170),
    "gfx942": runtime.Chip("hip", "gfx942", 64 * 1024, 304),
}
WARP = {"cuda": 32, "hip": 64}


@dataclass(repr=False)
class Kernel:
    """One compiled kernel: how it came about and what it needs."""

    name: str
    target: str
    signature: dict[str, str]
    constants: dict[str, Any]
    compiled: Any
    grids: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def shared(self) -> int:
        return self.compiled.metadata.shared

    @property
    def warps(self) -> int:
        return self.compiled.metadata.num_warps

    @property
    def asm(self) -> dict[str, Any]:
        """The stages by name: ttgir, and ptx and cubin or amdgcn."""
        return self.compiled.asm

    @cached_property
    def resources(self) -> tuple[int, int]:
        """Registers a thread, and bytes a thread that went to memory for the lack of them."""
        if CHIPS[self.target].backend == "hip":
            text = self.asm["amdgcn"]
            count = {key: int(value) for key, value in re.findall(r"\.(\w+): +(\d+)$", text, re.MULTILINE)}
            return count["vgpr_count"], 4 * count["vgpr_spill_count"] + count["private_segment_fixed_size"]
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.asm["cubin"])
            file.flush()
            shown = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        count = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", shown)}
        return count["REG"], count["STACK"] + count["LOCAL"]

    @property
    def registers(self) -> int:
        return self.resources[0]

    @property
    def spilled(self) -> int:
        return self.resources[1]

    def __repr__(self) -> str:
        sizes = " ".join(f"{name}={value}" for name, value in self.constants.items())
        return (
            f"{self.name} {self.target}: {self.registers} registers x {self.warps} warps, {self.spilled} B spilled, "
            f"{self.shared / 1024:.1f} KiB shared, launched {len(self.grids)}x, grid {self.grids[0]}; {sizes}"
        )


class _Driver:
    """What Triton asks its driver before a launch."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        chip = CHIPS[self.target]
        return GPUTarget(chip.backend, chip.arch, WARP[chip.backend])

    def get_current_device(self) -> str:
        return self.target  # kernels in memory are kept by device

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compiling_for(target: str) -> Iterator[list[Kernel]]:
    """The kernels, in order of their first launch; launches that find a kernel compiled add to its grids."""
    kernels: dict[int, Kernel] = {}
    run, active, chip = JITFunction.run, triton.runtime.driver._active, runtime.chip

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        if id(compiled) not in kernels:
            source = compiled.src
            constants = {source.fn.arg_names[path[0]]: value for path, value in source.constants.items()}
            kernels[id(compiled)] = Kernel(self.__name__, target, dict(source.signature), constants, compiled)
            recorded.append(kernels[id(compiled)])
        kernels[id(compiled)].grids.append(grid if isinstance(grid, tuple) else ())
        return compiled

    recorded: list[Kernel] = []
    JITFunction.run = record
    triton.runtime.driver.set_active(_Driver(target))
    runtime.chip = lambda tensor: CHIPS[target]
    try:
        yield recorded
    finally:
        JITFunction.run, runtime.chip = run, chip
        triton.runtime.driver._active = active
