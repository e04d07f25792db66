"""The interpreter that the tests of Triton run in, as interpreter.py makes it."""

import pytest
import torch

from convfast.triton.runtime import interpreted

triton = pytest.importorskip("triton", reason="needs triton")
tl = triton.language

pytestmark = [
    pytest.mark.usefixtures("triton_ops"),
    pytest.mark.skipif(not interpreted(), reason="without TRITON_INTERPRET=1 no kernel is interpreted"),
]


@triton.jit
def _combined(to, a, b, operation: tl.constexpr):
    x, y = tl.load(a + tl.arange(0, 2)), tl.load(b + tl.arange(0, 2))
    if operation == "add":
        result = x + y
    elif operation == "sub":
        result = x - y
    else:
        result = x * y
    tl.store(to + tl.arange(0, 2), result)


@pytest.mark.parametrize("number", [torch.int32, torch.int16], ids=["int32", "int16"])
@pytest.mark.parametrize("operation", ["add", "sub", "mul"])
def test_overflow_is_an_error(operation: str, number: torch.dtype) -> None:
    most = torch.iinfo(number).max
    a = torch.tensor([5, {"add": most, "sub": -most, "mul": most // 2}[operation]], dtype=number)
    fits, overflows = torch.tensor([3, {"add": 0, "sub": 1, "mul": 2}[operation]]), torch.tensor([3, 3])
    found = torch.empty_like(a)
    _combined[(1,)](found, a, fits.to(number), operation)
    assert torch.equal(found.long(), getattr(torch, operation)(a.long(), fits))
    with pytest.raises(Exception, match="overflow"):
        _combined[(1,)](found, a, overflows.to(number), operation)


@pytest.mark.parametrize("number", [torch.int64, torch.int32, torch.uint8, torch.float16, torch.float32, torch.float64])
def test_numbers_keep_their_type(number: torch.dtype) -> None:
    a, b = torch.tensor([7, 2]).to(number), torch.tensor([3, 5]).to(number)
    found = torch.empty_like(a)
    _combined[(1,)](found, a, b, "mul")
    assert torch.equal(found, a * b)
