"""Triton's `lstm` where it is unlike other backends: weights that do not fit on chip, gates that are there already."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.cases import LSTM, LSTM_WEIGHTS, name_of
from tests.test_lstm import check

pytest.importorskip("triton")
from convfast.triton import lstm as triton_lstm
from convfast.triton import runtime
from convfast.triton.runtime import Chip

pytestmark = pytest.mark.usefixtures("poisoned_memory")
OPS = ("lstm",)
SM_80 = Chip("cuda", 80, 163 * 1024, 108)
GFX942 = Chip("hip", "gfx942", 64 * 1024, 304)


@pytest.mark.parametrize(
    ("chip", "dtype", "precision", "most"),
    [
        (runtime.H200, torch.bfloat16, "ieee", 128),
        (runtime.H200, torch.float32, "tf32", 64),
        (runtime.H200, torch.float32, "ieee", 32),
        (SM_80, torch.float16, "ieee", 128),
        (SM_80, torch.float32, "tf32", 64),
        (GFX942, torch.bfloat16, "ieee", 64),
        (GFX942, torch.float32, "ieee", 32),
    ],
)
def test_largest_hidden_size_on_chip(chip: Chip, dtype: torch.dtype, precision: str, most: int) -> None:
    assert triton_lstm.fits(most, most, False, dtype, precision, chip)
    assert triton_lstm.fits(most - 1, most - 1, False, dtype, precision, chip)
    assert not triton_lstm.fits(most + 1, most + 1, False, dtype, precision, chip)


def test_projection_takes_its_share_of_the_chip_and_makes_hh_smaller() -> None:
    assert triton_lstm.fits(256, 64, True, torch.bfloat16, "ieee", runtime.H200)
    assert not triton_lstm.fits(512, 64, True, torch.bfloat16, "ieee", runtime.H200)
    assert not triton_lstm.fits(256, 100, True, torch.bfloat16, "ieee", runtime.H200)


@pytest.fixture(params=["loop", "cudnn"] if torch.cuda.is_available() else ["loop"])
def beyond(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing fits on the chip."""
    monkeypatch.setattr(runtime, "chip", lambda tensor: Chip("cuda", 90, 0, 132))
    if request.param == "loop":
        monkeypatch.setattr(triton_lstm, "_cudnn_takes", lambda *arguments: False)


BEYOND = ["plain", "peephole", "state_h_only", "projection", "both_directions_state", "hidden_70", "time_1"]
BEYOND += ["lengths", "lengths_without_state", "everything"]


@pytest.mark.parametrize("name", BEYOND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
@pytest.mark.usefixtures("beyond", "triton_ops")
def test_beyond_the_chip_matches_oracle(name: str, dtype: torch.dtype) -> None:
    check(LSTM[name], dtype, "triton")


@pytest.mark.parametrize("time_major", [False, True], ids=["batch_major", "time_major"])
@pytest.mark.parametrize("layout", ["contiguous", "time_first", "sliced"])
@pytest.mark.usefixtures("beyond", "triton_ops")
def test_beyond_the_chip_layouts_match_oracle(layout: str, time_major: bool) -> None:
    check(LSTM["everything"], torch.float32, "triton", layout, time_major=time_major)


@pytest.mark.parametrize("memory_time_major", [False, True], ids=["gates_batch_major", "gates_time_major"])
@pytest.mark.parametrize("name", ["plain", "state", "everything"])
def test_gates_that_are_there_already(name: str, memory_time_major: bool, triton_ops: Any) -> None:
    case = LSTM[name]
    a = {n: None if t is None else t.detach() for n, t in case.arguments(torch.float32).items()}
    weights = [a.get(f"{n}{of}") for of in ("", "_r") for n in LSTM_WEIGHTS]
    h0, c0, lengths = (a[n] for n in ("h0", "c0", "lengths"))
    expected = triton_ops.lstm_forward(a["input"], *weights, h0, c0, lengths, True, False)[:3]
    suffixes = ("", "_r")[: case.directions]
    gates_x = torch.cat([F.linear(a["input"], a[f"weight_ih{of}"], a[f"bias{of}"]) for of in suffixes], 2)
    if memory_time_major:
        gates_x = gates_x.transpose(0, 1).contiguous().transpose(0, 1)
    recurrent = [a.get(f"{n}{of}") for of in ("", "_r") for n in ("weight_hh", "peephole", "weight_hr")]
    found = triton_lstm.lstm_from_gates(gates_x, *recurrent, h0, c0, lengths, True)
    for value, wanted in zip(found, expected):
        assert value.stride() == wanted.stride()
        torch.testing.assert_close(value, wanted)
