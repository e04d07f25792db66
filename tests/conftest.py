"""Fixtures of every test: the backends, a seed, and fresh memory that shows when it is read unwritten.

The backends triton and cuda have tests where there is a GPU. Without one a process with TRITON_INTERPRET=1 in its
environment runs those of triton, one with CONVFAST_EMULATE_CUDA=1 those of cuda, and nothing else.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Before the native library is loaded: it fills its fresh outputs and workspace with NaN.
os.environ.setdefault("CONVFAST_POISON", "1")

import hypothesis
import pytest
import torch

from convfast import backends, native
from convfast.triton.runtime import interpreted
from tests.cases import DTYPES

ON_GPU = ("triton", "cuda")
ALONE = "triton" if interpreted() else "cuda" if native.emulated() else None
PRESENT = (ALONE,) if ALONE else tuple(
    name for name in reversed(backends.BACKENDS) if name not in ON_GPU or torch.cuda.is_available()
)  # fmt: skip

# Tests that are slow where the GPU is a CPU: there those run whose id has one of these.
FEW = {
    "test_any_number_of_threads": ("everything-2",),
    "test_ops_and_their_fakes_agree": ("everything", "frame_2d", "batch_0"),
    "test_chunks_equal_the_whole_sequence": ("4, 1, 1",),
    "test_compiles_whole": ("both_pools", "everything"),
    "test_one_op_gives_the_bits_of_layers": ("float32-3", "everything-torch.float16-19", "peephole-torch.bfloat16-1"),
    "test_linear_layer_on_top_in_the_op": ("float32-3-1", "everything-torch.float16-19-33"),
}

examples = 5 if ALONE or torch.cuda.is_available() else 60
hypothesis.settings.register_profile(
    "convfast", max_examples=examples, deadline=None, derandomize=True, database=None
)
hypothesis.settings.load_profile("convfast")

if ALONE == "triton":
    from tests import interpreter

    interpreter.make_faster()

if ALONE == "cuda":
    # What the library computes on a GPU aten computes here, and oneDNN has a wrong gradient (reference/padded_conv.py).
    torch.backends.mkldnn.enabled = False

if torch.cuda.is_available():
    # float32 is compared with float32; without this, convolutions round to 10 bits.
    torch.backends.cudnn.allow_tf32 = False


def dtypes_of(backend: str) -> tuple[torch.dtype, ...]:
    """What the backend takes in this process: Triton's interpreter computes bfloat16 wrong."""
    taken = backends.BACKENDS[backend].dtypes or DTYPES
    return tuple(dtype for dtype in taken if not interpreted() or dtype != torch.bfloat16)


def can_run(item: pytest.Item) -> bool:
    """Whether the backend that a test is parametrized with, or made for, is here and takes what the test gives it."""
    params: dict[str, Any] = item.callspec.params if hasattr(item, "callspec") else {}
    only = next((name for name in ON_GPU if f"{name}_ops" in item.fixturenames), None)
    backend = next((value for name, value in params.items() if name.endswith("backend")), only)
    few = FEW.get(item.originalname, ("",))
    if ALONE and (backend != ALONE or not any(text in item.name for text in few)):
        return False
    if backend is None:
        return True
    dtypes = dtypes_of(backend)
    return (
        backend in PRESENT
        and params.get("dtype", dtypes[0]) in dtypes
        and ("float64_backend" not in item.fixturenames or torch.float64 in dtypes)
        and ("host_backend" not in item.fixturenames or backend not in ON_GPU)
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, dropped = [], []
    for item in items:
        (kept if can_run(item) else dropped).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


@contextmanager
def usable(request: pytest.FixtureRequest, backend: str) -> Iterator[str]:
    """Tensors made without a device are on the backend's. Skips where it cannot run the ops that the test's file names
    in OPS (else conv_lstm)."""
    for op in getattr(request.module, "OPS", ("conv_lstm",)):
        if reason := backends.why_not(op, backend):
            pytest.skip(f"{op} on {backend}: {reason}")
    devices = backends.BACKENDS[backend].devices
    if devices is None or "cpu" in devices:
        yield backend
        return
    torch.set_default_device(devices[0])
    try:
        yield backend
    finally:
        torch.set_default_device(None)


@pytest.fixture(params=PRESENT)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with usable(request, request.param):
        yield request.param


@pytest.fixture
def float64_backend(backend: str) -> str:
    """A backend that takes float64."""
    return backend


@pytest.fixture
def host_backend(backend: str) -> str:
    """A backend whose tensors are on the CPU."""
    return backend


@pytest.fixture
def dtypes(backend: str) -> tuple[torch.dtype, ...]:
    return dtypes_of(backend)


@pytest.fixture
def widest(dtypes: tuple[torch.dtype, ...]) -> torch.dtype:
    """float64 where the backend takes it, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


@pytest.fixture(params=[name for name in PRESENT if name in backends.NAMESPACES])
def kernel_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend with kernels, whose calls are one op each."""
    with usable(request, request.param):
        yield request.param


@pytest.fixture(params=[name for name in PRESENT if name in backends.COMPILED])
def compiled_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend of the compiled libraries."""
    with usable(request, request.param):
        yield request.param


@pytest.fixture
def kernel_ops(kernel_backend: str) -> Any:
    """The ops of a backend with kernels, with their fakes."""
    return getattr(torch.ops, backends.NAMESPACES[kernel_backend])


@pytest.fixture
def native_ops(request: pytest.FixtureRequest) -> Iterator[Any]:
    """`torch.ops.convfast` with its fakes."""
    with usable(request, "cpu"):
        yield torch.ops.convfast


@pytest.fixture
def triton_ops(request: pytest.FixtureRequest) -> Iterator[Any]:
    """`torch.ops.convfast_triton` with its fakes, for a test of Triton alone."""
    with usable(request, "triton"):
        yield torch.ops.convfast_triton


@pytest.fixture
def cuda_ops(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The ops of the backend cuda with their fakes, for a test of it alone."""
    with usable(request, "cuda"):
        yield getattr(torch.ops, backends.NAMESPACES["cuda"])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def finished_kernels() -> Iterator[None]:
    """An error of a kernel is one of the test that launched it."""
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def pytest_runtest_logfinish(nodeid: str) -> None:
    """A kernel that faults leaves its process no GPU, and every later test would fail: xdist starts another one."""
    if "PYTEST_XDIST_WORKER" not in os.environ or not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        os._exit(1)


@pytest.fixture
def poisoned_memory():
    """`torch.empty` gives NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
