"""Which backend runs which call, and why another cannot.

`CONVFAST_BACKEND` in the environment names the backend of every call that does not name one itself.
"""

import functools
import importlib
import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import native, reference
from .toolchain import OLDEST_GPU
from .triton import runtime as triton_runtime

OPS = ("lstm_gates", "conv_lstm", "conv1d", "lstm")
COMPILED = ("cpu", "cuda")  # the backends of the compiled libraries
_EMULATED = native.emulated()
# Where the ops of the backends that have some are: `torch.ops.<namespace>`.
NAMESPACES = {
    "cpu": "convfast",
    "triton": "convfast_triton",
    "cuda": "convfast_emulated" if _EMULATED else "convfast",
}
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """What a backend can take: devices and dtypes (None: any); why it cannot be had at all."""

    devices: tuple[str, ...] | None
    dtypes: tuple[torch.dtype, ...] | None
    reason: Callable[[], str | None]


_fakes_lock = threading.Lock()
_with_fakes: set[str] = set()


def _native_reason(backend: str = "cpu", library: str = "cpu") -> str | None:
    """Why a compiled library cannot be had; where it can, the backend's ops are there, with their fakes."""
    reason, namespace = native.reason(library), NAMESPACES[backend]
    if reason is None and namespace not in _with_fakes:
        from . import ops

        with _fakes_lock:
            if namespace not in _with_fakes:
                ops.register_fakes(namespace)
                _with_fakes.add(namespace)
    return reason


@functools.cache
def gpu_reason() -> str | None:
    """Why there is no GPU that kernels can run on, None where there is one among those here."""
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    found = max(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if torch.version.hip is None and found < OLDEST_GPU:
        has, expected = (".".join(map(str, version)) for version in (found, OLDEST_GPU))
        return f"the GPU has compute capability {has}, expected at least {expected}"
    return None


def _cuda_reason() -> str | None:
    if _EMULATED:
        return _native_reason("cuda", "emulated")
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    return gpu_reason() or _native_reason() or native.reason("cuda")


def _triton_reason() -> str | None:
    reason = triton_runtime.reason()
    if reason is None and not triton_runtime.interpreted():
        reason = gpu_reason() or triton_runtime.driver_reason()
    if reason is None:
        importlib.import_module(".triton.ops", __package__)
    return reason


# Best first: an automatic choice takes the first that can run the call. Batch, time and frame have no say in it, so
# that a graph with dynamic shapes stays one graph.
BACKENDS = {
    "cpu": Backend(("cpu",), None, _native_reason),
    "triton": Backend(triton_runtime.devices(), GPU_DTYPES, _triton_reason),
    "cuda": Backend(("cpu",) if _EMULATED else ("cuda",), GPU_DTYPES, _cuda_reason),
    "reference": Backend(None, None, lambda: None),
}
# For `convfast.explain`.
WHY_TRITON_FIRST = "not measured against it, and triton needs no nvcc and no minutes of building"


def available(op: str) -> dict[str, bool | str]:
    """For each backend, True or the reason why it cannot run `op`. May build the native library.

    Raises:
        ValueError: there is no such op.
    """
    return {name: why_not(op, name) or True for name in reversed(BACKENDS)}


def choose(op: str, backend: str | None, device_type: str, dtype: torch.dtype | None = None) -> tuple[str, list[str]]:
    """As `select`, without its warning: the name, and why an automatic choice passed each of those before it."""
    wanted = backend or os.environ.get("CONVFAST_BACKEND") or None
    if wanted is None:
        passed: list[str] = []
        for name in BACKENDS:
            if (reason := why_not(op, name, device_type, dtype)) is None:
                return name, passed
            passed.append(reason)
    check_name(op, wanted, "backend" if backend else "CONVFAST_BACKEND")
    reason = why_not(op, wanted, device_type, dtype)
    if reason is not None:
        raise RuntimeError(f"{op}: backend {wanted!r} is not available: {reason}")
    return wanted, []


_warned = False


def select(op: str, backend: str | None, device_type: str, dtype: torch.dtype | None = None) -> str:
    """The name of the backend that runs `op` on tensors of `device_type` and `dtype`; may build the native library.

    Captured graphs keep the choice made when they were traced. Warns, once per process, where the choice falls on plain
    torch because a library could not be built or loaded.

    Raises:
        ValueError: there is no such op or backend.
        RuntimeError: the backend asked for cannot run the call; the message gives the reason.
    """
    global _warned
    name, passed = choose(op, backend, device_type, dtype)
    if name == "reference" and not _warned and (failures := [r for r in passed if isinstance(r, native.Failure)]):
        message = f"convfast: {failures[0]}; plain torch is used instead (CONVFAST_NO_NATIVE=1 asks for that)"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
        _warned = True  # not before: where warnings are errors, every call raises it
    return name


# What torch.compiler.assume_constant_result does, without the seconds that importing torch._dynamo takes.
select._dynamo_marked_constant = True  # type: ignore[attr-defined]


def function(backend: str, name: str) -> Callable[..., Any]:
    """`<op>_forward` or `<op>_backward` of a backend that `select` returned."""
    return getattr(reference if backend == "reference" else getattr(torch.ops, NAMESPACES[backend]), name)


def load_ops(device: str | torch.device = "cpu") -> None:
    """Make the ops for tensors of a device type exist; may build the native library.

    The first call of a layer does it by itself. A process that has not made one needs it before `torch.jit.load`,
    `torch.export.load` or `torch._inductor.aoti_load_package` of a model with layers of convfast.

    Raises:
        ValueError: no backend has ops for `device`.
        RuntimeError: none that has can be had; the message gives the reasons.
    """
    kind = torch.device(device).type
    reasons = {n: b.reason() for n, b in BACKENDS.items() if b.devices is not None and kind in b.devices}
    if not reasons:
        devices = sorted({d for b in BACKENDS.values() for d in b.devices or ()})
        raise ValueError(f"load_ops: device is {str(device)!r}, expected {' or '.join(devices)}")
    if all(reasons.values()):
        raise RuntimeError("load_ops: " + "; ".join(f"{name}: {reason}" for name, reason in reasons.items()))


def load_native(tensor: Tensor) -> None:
    """Load the compiled ops for the device of `tensor`, with their fakes; may build them.

    Raises:
        NativeUnavailable: with the reason.
    """
    native.load("cuda" if tensor.device.type == "cuda" else "cpu")
    _native_reason()


def release_workspace() -> None:
    """Free the memory that the native library keeps between calls; the next call takes it anew."""
    if native.origin() is not None:
        torch.ops.convfast.release_workspace()


def check_name(owner: str, backend: str | None, source: str = "backend") -> None:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{owner}: {source} is {backend!r}, expected one of {', '.join(BACKENDS)}")


def why_not(op: str, name: str, device_type: str | None = None, dtype: torch.dtype | None = None) -> str | None:
    """The reason why a backend cannot run `op` (on tensors of `device_type` and `dtype`), None where it can."""
    if op not in OPS:
        raise ValueError(f"convfast: op is {op!r}, expected one of {', '.join(OPS)}")
    backend = BACKENDS[name]
    if device_type is not None and backend.devices is not None and device_type not in backend.devices:
        return f"tensors are on {device_type}, expected {' or '.join(backend.devices)}"
    if dtype is not None and backend.dtypes is not None and dtype not in backend.dtypes:
        return f"tensors are {dtype}, expected {' or '.join(map(str, backend.dtypes))}"
    return backend.reason()
