"""What the Triton kernels become on GPUs that are not there: shared memory, registers, spills, instructions, and how
often they are compiled. The launchers run on the meta device. CONVFAST_ALL_TARGETS=1: every call, target,
dtype and tile."""

import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")
import triton

from convfast.environment import enabled
from convfast.triton import conv1d, conv_lstm, lstm, lstm_gates, runtime, tune
from tests.triton_target import CHIPS, Kernel, compiling_for

if runtime.interpreted():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def run_conv_lstm(
    dtype: torch.dtype, batch: int, cin: int, hidden: int, size: int, kernel: int = 3, time: int = 3,
    train: bool = True, given: bool = False, memory: str = "fast",
) -> None:  # fmt: skip
    """`given`: peepholes, lengths and a state."""
    make = partial(empty, dtype=dtype)
    x, frame = make(batch, time, cin, size, size), (batch, hidden, size, size)
    weights = make(4 * hidden, cin, kernel, kernel), make(4 * hidden, hidden, kernel, kernel), make(4 * hidden)
    peephole = make(3, *frame[1:]) if given else None
    h0, c0 = (make(*frame), empty(*frame, dtype=torch.float32)) if given else (None, None)
    lengths = empty(batch, dtype=torch.int64) if given else None
    before = (kernel - 1) // 2
    options = ([1, 1], 2 * [before, kernel - 1 - before], [1, 1], "zeros", False, "auto")
    operands = (x, *weights, peephole, h0, c0, lengths)
    save = memory if train else "none"
    h, h_n, c_n, c, gates = conv_lstm.conv_lstm_forward(*operands, time, *options, save)
    if train:
        needs = [1, 1, 1, 1, *3 * [int(given)]]
        conv_lstm.conv_lstm_backward(torch.empty_like(h), h_n, c_n, *operands, h, c, gates, time, *options, needs)


def run_lstm(
    dtype: torch.dtype, hidden: int, directions: int = 1, batch: int = 32, time: int = 128, features: int = 128,
    train: bool = True, given: bool = False, projected: int | None = None,
) -> None:  # fmt: skip
    """`given`: peepholes, lengths and a state, where `projected` is None."""
    make = partial(empty, dtype=dtype)
    weights = [make(4 * hidden, features), make(4 * hidden, projected or hidden), make(4 * hidden)]
    weights += [make(3, hidden) if given else None, make(projected, hidden) if projected else None]
    reverse = weights if directions == 2 else [None] * 5
    state = [make(directions, batch, hidden)] * 2 if given else [None, None]
    lengths = empty(batch, dtype=torch.int64) if given else None
    operands = (make(batch, time, features), *weights, *reverse, *state, lengths)
    y, h_n, c_n, c, gates = lstm.lstm_forward(*operands, False, train)
    if train:
        needs = [int(t is not None) for t in operands[:-1]]
        lstm.lstm_backward(torch.empty_like(y), h_n, c_n, *operands, y, c, gates, needs)


def run_conv1d(
    dtype: torch.dtype, features: int, channels: int, activation: str = "relu", groups: int = 1, batch: int = 32,
    time: int = 128, train: bool = True,
) -> None:  # fmt: skip
    make = partial(empty, dtype=dtype)
    operands = make(batch, time, features), make(channels, features // groups, 3), make(channels), None
    options = (1, [1, 1], 1, groups, "zeros", activation)
    y, pre = conv1d.conv1d_forward(*operands, *options, True, train)
    if train:
        conv1d.conv1d_backward(torch.empty_like(y), *operands, y, pre, *options, [1, 1, 1])


def run_conv1d_gates(dtype: torch.dtype, features: int, channels: int, gates: int) -> None:
    make = partial(empty, dtype=dtype)
    conv1d.conv1d_gates(
        make(32, 128, features), make(channels, features, 3), make(channels), None, 1, [1, 1], 1, "zeros", "relu",
        make(gates, channels), make(gates),
    )  # fmt: skip


def run_lstm_gates(
    dtype: torch.dtype, channels: int, size: int, last: bool, batch: int = 4, peephole: bool = False
) -> None:
    def make(channels: int, dtype: torch.dtype = dtype) -> Tensor:
        made = empty(batch, channels, size, size, dtype=dtype)
        return made.to(memory_format=torch.channels_last) if last else made

    gates, c, dh = make(4 * channels), make(channels, torch.float32), make(channels)
    peepholes = empty(3, channels, size, size, dtype=dtype) if peephole else None
    _, c_out, activated = lstm_gates.lstm_gates_forward(gates, c, peepholes, True)
    lstm_gates.lstm_gates_backward(activated, c, c_out, peepholes, dh, None, [1, 1, int(peephole)])


# The sizes of real models, whose tiles are the largest, and sizes that no tile divides.
CALLS: dict[str, Callable[[torch.dtype], None]] = {
    "conv_lstm_64": lambda dtype: run_conv_lstm(dtype, 32, 64, 64, 64),
    "conv_lstm_1_64": lambda dtype: run_conv_lstm(dtype, 8, 1, 64, 64, train=False),
    "conv_lstm_128_k5": lambda dtype: run_conv_lstm(dtype, 16, 128, 128, 16, kernel=5, memory="lean"),
    "conv_lstm_odd": lambda dtype: run_conv_lstm(dtype, 3, 5, 17, 13, kernel=2, given=True),
    "lstm_128": lambda dtype: run_lstm(dtype, 128),
    "lstm_64_given": lambda dtype: run_lstm(dtype, 64, directions=2, given=True),
    "lstm_odd": lambda dtype: run_lstm(dtype, 17, features=5, batch=3),
    "conv1d_9_64": lambda dtype: run_conv1d(dtype, 9, 64),
    "conv1d_64_128": lambda dtype: run_conv1d(dtype, 64, 128, activation="gelu"),
    "conv1d_depthwise": lambda dtype: run_conv1d(dtype, 64, 64, groups=64),
    "conv1d_gates_64_128": lambda dtype: run_conv1d_gates(dtype, 64, 128, 512),
    "conv1d_gates_9_256": lambda dtype: run_conv1d_gates(dtype, 9, 256, 512),
    "lstm_gates": lambda dtype: run_lstm_gates(dtype, 64, 64, last=False),
    "lstm_gates_channels_last": lambda dtype: run_lstm_gates(dtype, 64, 64, last=True, peephole=True),
}
LARGE = ("conv_lstm_64", "conv_lstm_128_k5", "lstm_128", "conv1d_64_128", "conv1d_gates_64_128")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OTHERS = ("sm_80", "sm_100", "sm_120", "gfx942")
GRID = [
    *((call, "sm_90", BF16) for call in CALLS),
    *((call, "sm_90", FP32) for call in ("conv_lstm_64", "lstm_64_given", "conv1d_64_128", "lstm_gates")),
    *((call, "sm_86", FP32) for call in ("conv_lstm_64", "conv1d_gates_64_128")),
    ("conv1d_gates_9_256", "sm_86", BF16),
    *((call, target, BF16) for target in OTHERS for call in ("conv_lstm_64", "lstm_128")),
]
ALL = enabled("CONVFAST_ALL_TARGETS")  # many minutes
if ALL:
    GRID = [(call, target, dtype) for call in CALLS for target in CHIPS for dtype in (BF16, FP16, FP32)]
CELLS = pytest.mark.parametrize(
    ("call", "target", "dtype"), GRID, ids=[f"{call}-{target}-{str(dtype)[6:]}" for call, target, dtype in GRID]
)


@cache
def kernels(call: str, target: str, dtype: torch.dtype) -> list[Kernel]:
    with pytest.MonkeyPatch.context() as patch, compiling_for(target) as compiled:
        if ALL:
            patch.setattr(tune, "best", run_all)
        CALLS[call](dtype)
    return compiled


# The largest that stay on chip.
@pytest.mark.parametrize(
    "target, dtype, hidden, projected",
    [("sm_86", BF16, 256, 16), ("sm_90", BF16, 256, 64), ("sm_90", BF16, 512, 16), ("sm_90", FP32, 256, 32)],
    ids=str,
)
def test_projection_that_fits_is_launched(target: str, dtype: torch.dtype, hidden: int, projected: int):
    chip = CHIPS[target]
    assert lstm.fits(hidden, projected, True, dtype, "tf32", chip)
    with compiling_for(target) as compiled:
        run_lstm(dtype, hidden, projected=projected)
    assert {kernel.name for kernel in compiled} >= {"_recurrence_forward", "_recurrence_backward"}
    assert not [kernel for kernel in compiled if kernel.shared > chip.shared]


def run_all(name: str, key: Any, like: Tensor, candidates: Sequence[Any], run: Callable[[Any], object]) -> Any:
    for candidate in candidates[1:]:
        run(candidate)
    return candidates[0]


# Registers a thread, of kernels that are not to have all that their threads can share.
REGISTERS = lstm.REGISTERS | {
    "conv_kernel": 255,
    "small_groups_kernel": 80,
    "dpre_kernel": 64,
    "fold_kernel": 176,
    "weight_kernel": 255,
    "small_groups_weight_kernel": 48,
    "gates_kernel": 255,
}


def budget(kernel: Kernel) -> int:
    return REGISTERS.get(kernel.name, min(255, 65536 // (32 * kernel.warps)))


@CELLS
def test_resources(call: str, target: str, dtype: torch.dtype):
    chip, compiled = CHIPS[target], kernels(call, target, dtype)
    assert compiled
    assert not [kernel for kernel in compiled if kernel.spilled]
    assert not [kernel for kernel in compiled if kernel.shared > chip.shared]
    assert not [kernel for kernel in compiled if chip.backend == "cuda" and kernel.registers > budget(kernel)]


@pytest.mark.parametrize("call", LARGE)
def test_16_bit_products_run_as_wgmma(call: str):
    products = [k for k in kernels(call, "sm_90", BF16) if "tt.dot" in k.asm["ttir"]]
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):  # no wgmma of 8 columns
        products = [k for k in products if not k.name.startswith("_recurrence") or k.constants["BM"] > 8]
    assert products
    for kernel in products:
        assert "wgmma.mma_async" in kernel.asm["ptx"], kernel


@pytest.mark.parametrize("call", ["lstm_gates", "lstm_gates_channels_last"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bfloat16", "float32"])
def test_lstm_gates_accesses_16_bytes(call: str, dtype: torch.dtype):
    for kernel in kernels(call, "sm_90", dtype):
        accesses = re.findall(r"\b(?:ld|st)\.global\S*", kernel.asm["ptx"])
        assert accesses
        for access in accesses:
            assert access.endswith((".v4.b32", ".v2.b64")), kernel


BATCHES_AND_TIMES = [(32 + 3 * n, 2 + n * n % 37) for n in range(50)]


@pytest.mark.parametrize(
    "run",
    [
        lambda batch, time: run_conv_lstm(BF16, batch, 64, 64, 32, time=max(time, 3)),
        lambda batch, time: run_lstm(BF16, 128, batch=batch, time=time),
        lambda batch, time: run_conv1d(BF16, 9, 64, batch=batch, time=time),
        lambda batch, _: run_lstm_gates(BF16, 64, 64, last=True, batch=batch),
        lambda batch, _: run_lstm_gates(BF16, 64, 64, last=False, batch=batch),
    ],
    ids=["conv_lstm", "lstm", "conv1d", "lstm_gates_channels_last", "lstm_gates"],
)
def test_other_batches_and_times_compile_nothing_more(run: Callable[[int, int], None]):
    with compiling_for("sm_90") as compiled:
        run(*BATCHES_AND_TIMES[0])
        first = len(compiled)
        for batch, time in BATCHES_AND_TIMES[1:]:
            run(batch, time)
    assert 0 < first == len(compiled), "\n".join(map(str, compiled[first:]))
