"""Fixtures of every test: the backends, a seed, and fresh memory that shows when it is read unwritten."""

import os

# Before the native library is loaded: it fills its fresh outputs and workspace with NaN.
os.environ.setdefault("CONVFAST_POISON", "1")

import pytest
import torch

from convfast import backends, native


@pytest.fixture(params=list(reversed(backends.BACKENDS)))
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and (reason := native.reason()) is not None:
        pytest.skip(f"native library: {reason}")
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
def native_ops():
    """`torch.ops.convfast` with its fakes."""
    reason = backends.available("conv_lstm")["cpu"]
    if reason is not True:
        pytest.skip(f"native library: {reason}")
    return torch.ops.convfast
