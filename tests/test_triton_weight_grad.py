"""`weight_grad` against the float64 convolution's own backward."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracle import assert_close_to_oracle

pytestmark = pytest.mark.usefixtures("poisoned_memory", "triton_ops")


def expected(
    grad: Tensor, source: Tensor, kernel: tuple[int, int], dtype: torch.dtype, *,
    stride: tuple[int, int] = (1, 1), padding: tuple[int, int] = (0, 0), dilation: tuple[int, int] = (1, 1),
    time_shift: int = 0,
) -> Tensor:  # fmt: skip
    """Frame by frame through autograd, every frame padded generously behind."""
    weight = torch.zeros(grad.shape[4], source.shape[4], *kernel, dtype=dtype, requires_grad=True)
    total = torch.zeros_like(weight)
    height, width = grad.shape[2:4]
    for t in range(grad.shape[1]):
        if not 0 <= t + time_shift < source.shape[1]:
            continue
        frame = source[:, t + time_shift].to(dtype).movedim(-1, 1)
        padded = torch.nn.functional.pad(frame, (padding[1], 50, padding[0], 50))
        y = torch.nn.functional.conv2d(padded, weight, None, stride, 0, dilation)[..., :height, :width]
        total = total + torch.autograd.grad(y, weight, grad[:, t].to(dtype).movedim(-1, 1))[0]
    return total.detach()


CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, int], dict[str, Any]]] = {
    "plain": ((2, 3, 6, 5, 8), (2, 3, 6, 5, 4), (3, 3), {"padding": (1, 1)}),
    "one_tap_a_block": ((1, 2, 5, 7, 20), (1, 2, 5, 7, 128), (2, 3), {"padding": (0, 1)}),
    "several_blocks": ((2, 2, 9, 8, 140), (2, 2, 9, 8, 17), (3, 3), {"padding": (1, 1)}),
    "blocks_of_256_rows": ((1, 2, 9, 11, 300), (1, 2, 9, 11, 24), (3, 3), {"padding": (1, 1)}),
    "frame_1d": ((3, 4, 1, 70, 8), (3, 4, 1, 70, 5), (1, 5), {"padding": (0, 2)}),
    "stride_and_dilation": (
        (2, 2, 3, 3, 8), (2, 2, 6, 9, 3), (3, 2), {"stride": (2, 3), "padding": (2, 0), "dilation": (2, 3)},
    ),
    "even_kernel": ((2, 2, 6, 5, 8), (2, 2, 6, 5, 4), (2, 4), {"padding": (0, 1)}),
    "kernel_larger_than_frame": ((2, 2, 2, 3, 8), (2, 2, 2, 3, 4), (5, 7), {"padding": (2, 3)}),
    "step_before": ((2, 4, 6, 5, 8), (2, 4, 6, 5, 4), (3, 3), {"padding": (1, 1), "time_shift": -1}),
    "step_after": ((2, 4, 6, 5, 8), (2, 4, 6, 5, 4), (3, 3), {"padding": (1, 1), "time_shift": 1}),
    "single_step_before": ((2, 1, 6, 5, 8), (2, 1, 6, 5, 4), (3, 3), {"padding": (1, 1), "time_shift": -1}),
    "one_pixel_long": ((2, 90, 1, 1, 24), (2, 90, 1, 1, 6), (1, 1), {"time_shift": -1}),
    "one_pixel_wide_batch": ((90, 3, 1, 1, 24), (90, 3, 1, 1, 6), (1, 1), {"time_shift": 1}),
    "empty_batch": ((0, 3, 6, 5, 8), (0, 3, 6, 5, 4), (3, 3), {"padding": (1, 1)}),
}  # fmt: skip


def made(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    values = torch.randn(shape, dtype=torch.float64).to(dtype)
    if layout == "time_first":
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "sliced":
        # NaN around it shows what is read beyond the tensor.
        larger = values.new_full([n + 3 for n in shape], float("nan"))
        larger[tuple(slice(1, 1 + n) for n in shape)] = values
        return larger[tuple(slice(1, 1 + n) for n in shape)]
    return values


@pytest.mark.parametrize("layout", ["contiguous", "time_first", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_matches_the_gradient_of_the_convolution(name: str, dtype: torch.dtype, layout: str) -> None:
    from convfast.triton.weight_grad import weight_grad

    grad_shape, source_shape, kernel, options = CASES[name]
    grad, source = made(grad_shape, dtype, layout), made(source_shape, dtype, layout)
    exact, eager = (expected(grad, source, kernel, d, **options) for d in (torch.float64, torch.float32))
    found = weight_grad(grad, source, kernel, **options)
    assert found.dtype == torch.float32
    # Narrower inputs are multiplied exactly and summed in float32.
    assert_close_to_oracle(found, exact, eager, terms=grad[..., 0].numel())


def test_sums_do_not_depend_on_luck() -> None:
    from convfast.triton.weight_grad import weight_grad

    grad, source = (made((2, 3, 6, 5, n), torch.float32, "contiguous") for n in (8, 4))
    first, second = (weight_grad(grad, source, (3, 3), padding=(1, 1)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("d", [*range(1, 70), 127, 128, 129, 1000, 4095, 65537, 2**30 - 1, 2**30, 2**31 - 1])
def test_a_product_takes_the_place_of_a_division(d: int) -> None:
    from convfast.triton.weight_grad import _reciprocal

    magic, shift = _reciprocal(d)
    assert 2**31 < magic < 2**32  # one type of argument, whatever the divisor
    largest = (2**31 - 1) // d
    multiples = {q * d for q in (1, 2, 3, largest // 3, largest // 2, largest - 1, largest) if 0 < q <= largest}
    for n in {0, 1, 2**31 - 1, *multiples, *(n - 1 for n in multiples)}:
        assert (2 * n * magic >> 32) >> shift == n // d
