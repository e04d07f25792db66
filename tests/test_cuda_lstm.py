"""`lstm` of the CUDA backend on every path that its rule knows: hidden sizes and devices that lead there."""

import pytest
import torch

from tests.cases import LSTM_EVERYTHING, LSTMCase
from tests.test_lstm import check

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), pytest.mark.usefixtures("cuda_ops")]
OPS = ("lstm",)

# What a GPU, or the emulator's, is taken for.
SM_80 = {"CAPABILITY": 80, "SHARED": 163 * 1024}
ONE_BUFFER = {"SHARED": 6000}  # for what threads of float32 exchange in the backward
CLUSTERS = {size: {"SM_COUNT": size} for size in (2, 4, 8)}


@pytest.mark.parametrize("full", [False, True], ids=["plain", "everything"])
@pytest.mark.parametrize(
    ("hidden", "dtype", "device"),
    [
        pytest.param(64, torch.float32, {}, id="registers-float32"),
        pytest.param(50, torch.bfloat16, {}, id="half_the_registers-bfloat16"),
        pytest.param(128, torch.float16, {}, id="registers-float16"),
        pytest.param(160, torch.bfloat16, SM_80, id="shared_memory-bfloat16"),
        pytest.param(90, torch.float32, SM_80, id="loop_on_sm_80-float32"),
        pytest.param(200, torch.bfloat16, CLUSTERS[2], id="cluster_of_2-bfloat16"),
        pytest.param(130, torch.float16, CLUSTERS[4], id="cluster_of_4-float16"),
        pytest.param(362, torch.bfloat16, {}, id="cluster_of_8-bfloat16"),
        pytest.param(512, torch.float16, {}, id="cluster_of_8_one_buffer-float16"),
        pytest.param(101, torch.float32, CLUSTERS[2], id="cluster_of_2-float32"),
        pytest.param(256, torch.float32, CLUSTERS[4], id="cluster_of_4-float32"),
        pytest.param(129, torch.float32, {}, id="cluster_of_8-float32"),
        pytest.param(514, torch.bfloat16, {}, id="loop_too_large-bfloat16"),
        pytest.param(33, torch.bfloat16, {}, id="loop_odd-bfloat16"),
        pytest.param(16, torch.float16, {"SM_COUNT": 0}, id="loop_no_room-float16"),
    ],
)
def test_every_path_matches_oracle(
    hidden: int, dtype: torch.dtype, device: dict[str, int], full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in device.items():
        monkeypatch.setenv(f"CONVFAST_CUDA_{name}", str(value))
    case = LSTMCase("plain", batch=9, time=3, hidden=hidden)
    if full:
        case = LSTMCase(
            "full", batch=5, time=3, hidden=hidden, directions=2, given=LSTM_EVERYTHING, lengths=(2, 0, 3, 1, 3)
        )
    check(case, dtype, "cuda")


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    ("hidden", "dtype", "device"),
    [
        pytest.param(72, torch.bfloat16, {}, id="registers-bfloat16"),
        pytest.param(64, torch.float32, ONE_BUFFER, id="one_buffer-float32"),
        pytest.param(70, torch.float32, {}, id="cluster-float32"),
    ],
)
def test_any_order_of_threads(
    hidden: int, dtype: torch.dtype, device: dict[str, int], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVFAST_EMULATE_SEED", str(seed))
    for name, value in device.items():
        monkeypatch.setenv(f"CONVFAST_CUDA_{name}", str(value))
    check(LSTMCase("long", batch=5, time=8, hidden=hidden, directions=2), dtype, "cuda")


@pytest.mark.parametrize("time_major", [False, True], ids=["batch_major", "time_major"])
@pytest.mark.parametrize("layout", ["contiguous", "features_first", "time_first", "sliced", "expanded"])
def test_layouts_of_16_bits_match_oracle(layout: str, time_major: bool) -> None:
    case = LSTMCase("layouts", batch=4, time=5, hidden=20, directions=2, given=LSTM_EVERYTHING, lengths=(4, 1, 0, 5))
    check(case, torch.bfloat16, "cuda", layout, time_major=time_major)
