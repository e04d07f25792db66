"""What launchers share: whether Triton can be had, on which device, and how exact a float32 product has to be."""

import functools
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

# Imports no triton: it answers why there is none.

OLDEST = (3, 4)
# As Triton reads it.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "y", "on")


def interpreted() -> bool:
    """Triton's interpreter: kernels run as numpy on the CPU. Triton reads it, once, when a kernel is decorated."""
    return _INTERPRETED


def devices() -> tuple[str, ...]:
    return ("cpu",) if interpreted() else ("cuda",)


def version() -> str:
    """Triton's; "none" where it cannot be imported."""
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__


def reason() -> str | None:
    """Why there is no Triton that compiles the kernels, None where there is."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error}); pip install triton"
    found = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if found < OLDEST:
        return f"triton is {triton.__version__}, expected at least {'.'.join(map(str, OLDEST))}"
    return None


@functools.cache
def driver_reason() -> str | None:
    """Why Triton cannot launch, None where it can: it compiles part of its driver, and launchers, with a C compiler."""
    import triton

    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:
        return f"triton cannot launch kernels ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
    return None


@dataclass(frozen=True)
class Chip:
    """What tile sizes depend on."""

    backend: str  # "cuda" or "hip"
    arch: int | str  # 90 for compute capability 9.0, "gfx942"
    shared: int  # bytes of shared memory that one program can have
    processors: int


H200 = Chip("cuda", 90, 227 * 1024, 132)


def most_registers(chip: Chip, count: int) -> dict[str, int]:
    """A launch's option, but on sm_90 and sm_100: left alone, ptxas takes a few more there, or spills to have fewer."""
    return {} if chip.backend == "hip" or 90 <= chip.arch < 120 else {"maxnreg": count}


def chip(tensor: Tensor) -> Chip:
    """The GPU of `tensor`; an H200 where there is none. Called as `runtime.chip`, so that tests can name another."""
    return _chip(tensor.device.index) if tensor.device.type == "cuda" else H200


@functools.cache
def _chip(index: int) -> Chip:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        arch = properties.gcnArchName.partition(":")[0]
        return Chip("hip", arch, properties.shared_memory_per_block, properties.multi_processor_count)
    arch = 10 * properties.major + properties.minor
    return Chip("cuda", arch, properties.shared_memory_per_block_optin, properties.multi_processor_count)


def on_device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device, not on that of its arguments."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def input_precision(dtype: torch.dtype) -> str:
    """"tf32" where torch's own convolutions take it (torch.backends.cudnn.allow_tf32), else "ieee"."""
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    settings = getattr(torch.backends.cudnn, "conv", None)
    precision = getattr(settings, "fp32_precision", None)
    if precision is None:
        precision = "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"
    # "none" is what allow_tf32 = False leaves behind.
    return "tf32" if precision == "tf32" else "ieee"


def needs_wide_offsets(*tensors: Tensor | None) -> bool:
    """Whether an offset within any of them does not fit into 32 bits."""
    def span(t: Tensor) -> int:
        return sum((size - 1) * abs(stride) for size, stride in zip(t.shape, t.stride()))

    return any(t is not None and t.numel() > 0 and span(t) >= 2**31 for t in tensors)
