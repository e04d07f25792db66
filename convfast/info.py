"""`python -m convfast.info`: what works here, what does not, and why."""

from __future__ import annotations

import os
import platform
import sys

import torch

from . import backends, native


def report() -> str:
    """Versions, the compiled libraries, and the backends of each op. Builds the libraries where they are not yet."""
    why, why_cuda = native.reason(), native.reason("cuda")
    try:
        compiler = native.toolchain("cpu" if torch.version.cuda is None else "cuda")
    except native.NativeUnavailable as error:
        compiler = str(error)
    cuda = torch.version.cuda or "none"
    lines = [
        f"python       {platform.python_version()} ({sys.executable})",
        f"torch        {torch.__version__}, {torch.get_num_threads()} threads, CUDA {cuda}",
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
    lines += [f"{name}={os.environ.get(name, '')}  ({meaning})" for name, meaning in native.ENVIRONMENT.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
