"""The environment variables that the package reads, and its one way of reading those that are flags.

Imports no torch: setup.py reads this file, too.
"""

import os

ENVIRONMENT = {
    "CONVFAST_BACKEND": "backend taken where a call names none: reference, cuda, triton or cpu",
    "CONVFAST_NO_NATIVE": "1: neither build nor load a compiled library",
    "CONVFAST_CACHE": "directory for libraries built just in time (else TORCH_EXTENSIONS_DIR, else torch's own)",
    "CONVFAST_AUTOTUNE": "1: on a GPU time a few tile sizes, once per shape, and keep the fastest in CONVFAST_CACHE",
    "CONVFAST_POISON": "1: fill fresh memory with NaN, to find values that are read before they are written",
    "ATEN_CPU_CAPABILITY": "default, avx2 or avx512: instruction set; unset: the best, and bfloat16 by tiles or dots",
    "CONVFAST_EMULATE_CUDA": "1: the cuda backend runs on CPU tensors, thread by thread, for tests",
    "CONVFAST_CUDA_SM_COUNT": "multiprocessors that a GPU is taken to have at most, for tests",
    "CONVFAST_CUDA_SHARED": "bytes of shared memory that a block is taken to have at most, for tests",
    "CONVFAST_CUDA_CAPABILITY": "compute capability that a GPU is taken to have at most, as 80, for tests",
    "CONVFAST_EMULATE_SEED": "seed of the order in which emulated threads run, for tests",
    "CONVFAST_EMULATE_TILES": "1: build the cpu backend with matrix tiles (AMX) emulated, for tests",
    "TRITON_INTERPRET": "1: the triton backend runs on CPU tensors, in Triton's interpreter, for tests",
    "CXX": "C++ compiler of a just-in-time build (else c++)",
    "CUDA_HOME": "CUDA toolkit of a just-in-time build (else that of the nvcc on PATH, else /usr/local/cuda)",
    "TORCH_CUDA_ARCH_LIST": "architectures of a CUDA build, as 8.0+PTX;9.0a (else of the GPUs here, or of all)",
}


def enabled(name: str) -> bool:
    """Whether a flag is on: set, and not to an empty string, 0, false, off or no, in any case."""
    return os.environ.get(name, "").lower() not in ("", "0", "false", "off", "no")
