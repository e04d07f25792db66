"""What `tests/test_conv_lstm.py` does not reach on Triton: the choices that large problems make, on small ones."""

import pytest
import torch

from convfast.triton import runtime
from tests.cases import BY_ID, Case
from tests.test_conv_lstm import check

pytestmark = pytest.mark.usefixtures("poisoned_memory", "triton_ops")


@pytest.fixture(autouse=True)
def kernels():
    return pytest.importorskip("convfast.triton.conv_lstm")


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("name", ["plain", "frame_1d", "lengths_reverse", "stride_2", "state"])
def test_hoisted_input_convolution(name: str, memory: str, kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "hoists", lambda *_: True)
    check(BY_ID[name], torch.float32, "triton", memory=memory)


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("name", ["time_1", "everything", "lengths", "reverse", "frame_3d", "no_input_lengths"])
def test_weight_gradients_of_a_sequence_in_chunks(
    name: str, frames: int, kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = BY_ID[name]
    space = torch.Size(case.out_space or case.space).numel()
    monkeypatch.setattr(kernels, "CHUNK_BYTES", frames * 4 * 4 * case.batch * case.hidden * space)
    check(case, torch.float32, "triton")


# One tap a block of the inner axis takes whole blocks of channels; large tiles take enough pixels for all processors.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("processors", [1, 132])
def test_every_tile_and_way_through_the_inner_axis(
    dtype: torch.dtype, processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chip = runtime.Chip("cuda", 90, 227 * 1024, processors)
    monkeypatch.setattr(runtime, "chip", lambda tensor: chip)
    check(Case("wide", channels=64, hidden=80, space=(5, 7), kernel=(3, 2)), dtype, "triton", "channels_last")
    check(Case("whole_blocks", channels=5, hidden=64, space=(9, 8), kernel=(2, 3)), dtype, "triton")


# A sample of whole tiles keeps its rows' places in them.
@pytest.mark.parametrize("case", [BY_ID["plain"], Case("whole_tiles", space=(8, 16))], ids=lambda case: case.id)
def test_interior_of_a_sequence_does_not_depend_on_its_length_or_batch(case: Case, kernels) -> None:
    a = {n: t if t is None else t.detach() for n, t in case.arguments(torch.float32).items()}
    operands = (a["weight_ih"], a["weight_hh"], a["bias"], None, None, None, None)
    options = ([1, 1], [1, 1, 1, 1], [1, 1], "zeros", False, "auto", "none")
    whole = kernels.conv_lstm_forward(a["input"], *operands, 3, *options)
    part = kernels.conv_lstm_forward(a["input"][1:, :2], *operands, 2, *options)
    if runtime.interpreted() and case.id == "plain":  # numpy sums in an order that depends on the row's place
        torch.testing.assert_close(part[0], whole[0][1:, :2])
    else:
        assert torch.equal(part[0], whole[0][1:, :2])
