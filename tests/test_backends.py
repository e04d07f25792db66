"""Which backend takes a call on a GPU, and what is said of the others. There need be no GPU."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import convfast
from convfast import backends, native

OPS = ("lstm_gates", "conv_lstm", "conv1d", "lstm")


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Why each backend cannot be had, for the test to change: all can."""
    reasons: dict[str, str | None] = {"triton": None, "cuda": None}
    for name in reasons:
        backend = backends.BACKENDS[name]
        given = backends.Backend(("cuda",), backend.dtypes, lambda n=name: reasons[n])
        monkeypatch.setitem(backends.BACKENDS, name, given)
    return reasons


@pytest.mark.parametrize("op", OPS)
def test_order_on_a_gpu(op: str, on_gpu: dict[str, str | None]) -> None:
    def chosen(dtype: torch.dtype) -> str:
        return backends.select(op, None, "cuda", dtype)

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        on_gpu["triton"] = None
        assert chosen(dtype) == "triton"
        on_gpu["triton"] = "not there"
        assert chosen(dtype) == "cuda"
    on_gpu["cuda"] = "no nvcc"
    assert chosen(torch.float32) == chosen(torch.float64) == "reference"
    with pytest.raises(RuntimeError, match=f"^{op}: backend 'cuda' is not available: no nvcc$"):
        backends.select(op, "cuda", "cuda", torch.float32)
    with pytest.raises(RuntimeError, match=r"backend 'cuda' .*: tensors are torch.float64, expected torch.float32 or"):
        backends.select(op, "cuda", "cuda", torch.float64)


def test_load_ops_names_what_it_takes(on_gpu: dict[str, str | None]) -> None:
    with pytest.raises(ValueError, match=r"^load_ops: device is 'meta', expected cpu or cuda$"):
        convfast.load_ops("meta")
    on_gpu |= {"triton": None, "cuda": "no nvcc"}
    convfast.load_ops("cuda:0")
    on_gpu["triton"] = "not there"
    with pytest.raises(RuntimeError, match=r"^load_ops: triton: not there; cuda: no nvcc$"):
        convfast.load_ops("cuda")


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA")
@pytest.mark.skipif(native.emulated(), reason="the backend is emulated")
def test_cuda_without_cuda_in_torch_says_so() -> None:
    assert convfast.available("lstm")["cuda"] == "torch is built without CUDA"


def test_what_is_kept_has_the_dtype_of_the_activations() -> None:
    if why := native.reason():
        pytest.skip(f"native library: {why}")
    backends.why_not("lstm_gates", "cpu")  # registers the fakes
    with FakeTensorMode():
        for device in ("cpu", "cuda"):
            gates = torch.empty(2, 8, 3, 3, dtype=torch.bfloat16, device=device)
            h, c, activated = torch.ops.convfast.lstm_gates_forward(gates, None, None, True)
            assert (h.dtype, c.dtype, activated.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)


def test_explain_says_what_is_not_measured(
    on_gpu: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in (convfast.LSTM, convfast.Conv1d):
        monkeypatch.setattr(kind, "reset_parameters", lambda module: None)  # draws numbers, which takes a device
    with FakeTensorMode():
        lstm = convfast.LSTM(8, 16, 2, bidirectional=True, device="cuda")
        lines = convfast.explain(lstm, torch.empty(3, 2, 8, device="cuda")).splitlines()
        assert [line.split(",")[0].split(" (")[0] for line in lines] == [
            f"layer {layer}{direction}: backend triton" for layer in (0, 1) for direction in ("", "_reverse")
        ]
        assert all("cuda: not measured against it" in line for line in lines)
        on_gpu["triton"] = "triton cannot be imported"
        line = convfast.explain(convfast.Conv1d(8, 4, 3, device="cuda"), torch.empty(1, 9, 8, device="cuda"))
        assert line.startswith("conv: backend cuda (cpu: ") and "(triton: triton cannot be imported)" in line


def test_explain_of_layers_on_the_cpu() -> None:
    module = convfast.Conv1dLSTM(4, [8, 8], 16, backend="reference")
    assert convfast.explain(module, torch.empty(1, 9, 4)).splitlines() == [
        "conv 0: backend reference", "conv 1: backend reference", "layer 0: backend reference",
    ]  # fmt: skip
    module = convfast.CNN_LSTM(4, 2, lstm_num_layers=1, backend="reference")
    assert convfast.explain(module, torch.empty(1, 9, 4)).splitlines() == [
        "conv 0: backend reference", "conv 1: backend reference", "layer 0: backend reference",
    ]  # fmt: skip
    module = convfast.RegLSTM(4, 8, backend="reference")
    assert convfast.explain(module, torch.empty(9, 1, 4)) == "layer 0: backend reference"


def test_explain_of_what_it_does_not_know() -> None:
    module, x = convfast.CNN_LSTM(4, 2), torch.empty(1, 9, 4)
    with pytest.raises(TypeError, match=r"^explain: state is a tuple, expected None with a CNN_LSTM$"):
        convfast.explain(module, x, (x, x))
    module.lstm = torch.nn.LSTM(128, 128)
    with pytest.raises(TypeError, match=r"^explain: in the place of an LSTM is a torch.nn.modules.rnn.LSTM, expected"):
        convfast.explain(module, x)


def test_explain_of_frames_that_do_not_fit() -> None:
    module = convfast.ConvLSTM(3, 4, 3, padding="valid")
    with pytest.raises(ValueError, match=r"^ConvLSTM: input with frames of \[2, 2\] gives layer 0 a state of size \[0"):
        convfast.explain(module, torch.empty(1, 2, 3, 2, 2))


@pytest.mark.parametrize(
    "hip, found, usable",
    [(None, [(8, 0)], True), (None, [(7, 5), (9, 0)], True), (None, [(7, 5)], False), ("6.2", [(7, 5)], True)],
)
def test_which_gpus_are_new_enough(
    hip: str | None, found: list[tuple[int, int]], usable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: found[i])
    reason = backends.gpu_reason.__wrapped__()
    assert reason is None if usable else "compute capability 7.5, expected at least 8.0" in reason
