"""Fixtures of every test: the backends, a seed, and fresh memory that shows when it is read unwritten."""

import os

# Before the native library is loaded: it fills its fresh outputs and workspace with NaN.
os.environ.setdefault("CONVFAST_POISON", "1")

import pytest
import torch

from convfast import backends


def require(request: pytest.FixtureRequest, backend: str) -> None:
    """Skip where the backend cannot run the ops that the test's file names in OPS (else conv_lstm)."""
    for op in getattr(request.module, "OPS", ("conv_lstm",)):
        if (reason := backends.available(op)[backend]) is not True:
            pytest.skip(f"{op} on {backend}: {reason}")


@pytest.fixture(params=list(reversed(backends.BACKENDS)))
def backend(request: pytest.FixtureRequest) -> str:
    require(request, request.param)
    return request.param


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory():
    """`torch.empty` gives NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def native_ops(request: pytest.FixtureRequest):
    """`torch.ops.convfast` with its fakes."""
    require(request, "cpu")
    return torch.ops.convfast
