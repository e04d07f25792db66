"""The implicit GEMMs of the CUDA backend's `conv_lstm`: 16-bit types, channels in eights."""

from typing import Any

import pytest
import torch

from tests.cases import EVERYTHING, Case, name_of
from tests.test_conv_lstm import check

pytestmark = pytest.mark.usefixtures("poisoned_memory")
LENGTHS = {"batch": 4, "given": EVERYTHING, "lengths": (2, 0, 3, 1)}

# Every tile has cases whose pixels and channels fill it, fill a part of it and go on in a next one.
CASES = [
    Case("channels_8_kernel_1", hidden=8, kernel=(1, 1)),
    Case("channels_16_kernel_5", hidden=16, kernel=(5, 5), time=2, given=EVERYTHING),
    Case("channels_24_lengths", hidden=24, **LENGTHS),
    Case("channels_24_lengths_reverse", hidden=24, options={"reverse": True}, **LENGTHS),
    Case("channels_32", hidden=32, kernel=(3, 3), space=(9, 5), time=2, given=EVERYTHING),
    Case("channels_40_kernel_1", hidden=40, kernel=(1, 1), time=2, given=EVERYTHING),
    Case("channels_40_kernel_even", hidden=40, kernel=(2, 4), space=(9, 17), time=2),
    Case("channels_72", hidden=72, space=(7, 11), time=2, given=EVERYTHING),
    Case("frame_1d", hidden=16, space=(70,), kernel=(3,)),
    Case("frame_3d", hidden=16, space=(3, 4, 5), kernel=(3, 2, 3), time=2, given=EVERYTHING),
    Case("kernel_larger_than_frame", hidden=16, kernel=(5, 7), space=(2, 3)),
    Case("no_input", hidden=16, given=("h0", "c0", "bias", "peephole")),
    Case("input_convolved_before", hidden=16, given=("input", "bias", "h0", "c0")),
]

BY_ID = {case.id: case for case in CASES}


# Few processors get large tiles; with compute capability 9.0 those of warpgroups.
@pytest.mark.parametrize("processors, capability", [(1, 90), (2, 90), (1, 80), (4, 80), (132, 90)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_tiles_match_oracle(
    case: Case, processors: int, capability: int, cuda_ops: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVFAST_CUDA_SM_COUNT", str(processors))
    monkeypatch.setenv("CONVFAST_CUDA_CAPABILITY", str(capability))
    check(case, torch.bfloat16, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("case", CASES[2:4], ids=lambda case: case.id)
def test_dtypes_and_recomputed_gates_match_oracle(case: Case, memory: str, dtype: torch.dtype, cuda_ops: Any) -> None:
    check(case, dtype, "cuda", memory=memory)


def test_warpgroups_in_float16_match_oracle(cuda_ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVFAST_CUDA_SM_COUNT", "1")
    check(BY_ID["channels_72"], torch.float16, "cuda", memory="lean")


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("processors, name", [(132, "channels_16_kernel_5"), (1, "channels_40_kernel_even")])
def test_order_of_threads_does_not_matter(
    processors: int, name: str, seed: int, cuda_ops: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVFAST_CUDA_SM_COUNT", str(processors))
    monkeypatch.setenv("CONVFAST_EMULATE_SEED", str(seed))
    check(BY_ID[name], torch.bfloat16, "cuda")


def test_says_which_kernels_run_a_step(cuda_ops: Any) -> None:
    for dtype, hidden, size, expected in (
        (torch.bfloat16, 16, 4, "one launch for all steps"),
        (torch.bfloat16, 16, 400, "implicit GEMM and cell, one launch a step"),
        (torch.bfloat16, 64, 160, "implicit GEMM of warpgroups and cell, one launch a step"),
        (torch.float16, 12, 4, "library"),
        (torch.float32, 16, 4, "library"),
    ):
        shapes = (1, 2, 3, size, size), (4 * hidden, 3, 3, 3), (4 * hidden, hidden, 3, 3)
        x, w_ih, w_hh = (torch.zeros(shape, dtype=dtype) for shape in shapes)
        said = cuda_ops.conv_lstm_algorithm(x, w_ih, w_hh, None, None, 2, [1, 1], [1] * 4, [1, 1], "zeros", "auto")
        assert expected in said
