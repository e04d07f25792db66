"""`python -m convfast.info`: what works here, what does not, and why."""

import os
import platform
import sys

import torch

from . import __version__, backends, native, toolchain
from .environment import ENVIRONMENT
from .triton import runtime as triton_runtime


def versions() -> list[str]:
    """Versions of what is installed, and names of the GPUs."""
    lines = [
        f"convfast     {__version__} ({toolchain.PACKAGE})",
        f"torch        {torch.__version__}, {torch.get_num_threads()} threads, CUDA {torch.version.cuda or 'none'}",
        f"triton       {triton_runtime.version()}",
        f"python       {platform.python_version()} ({sys.executable})",
    ]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return lines + [f"GPU          {torch.cuda.get_device_name(i)}" for i in range(count)]


def report() -> str:
    """Versions, the compiled libraries, and the backends of each op. Builds the libraries where they are not yet."""
    why, why_cuda = native.reason(), native.reason("cuda")
    try:
        compiler = toolchain.describe("cpu" if torch.version.cuda is None else "cuda")
    except toolchain.NativeUnavailable as error:
        compiler = str(error)
    lines = [
        *versions(),
        f"machine      {platform.machine()}, {os.cpu_count()} processors",
        f"compiler     {compiler}",
        f"cache        {native.cache_dir()}",
        f"library      {native.origin() or 'not available: ' + str(why)}",
        f"for CUDA     {native.origin('cuda') or 'not available: ' + str(why_cuda)}",
    ]
    if why is None:
        lines.append(f"instructions {torch.ops.convfast.cpu_capability()}")
    for op in backends.OPS:
        for name, usable in backends.available(op).items():
            lines.append(f"{op:<12} {name}: {'yes' if usable is True else usable}")
    lines += [f"{name}={os.environ.get(name, '')}  ({meaning})" for name, meaning in ENVIRONMENT.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
