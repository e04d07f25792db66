"""Triton's handoff from the last convolution to the LSTM: gates without the convolution's result in memory."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch.utils._pytree import tree_map

pytest.importorskip("triton")
from convfast.nn import CNN_LSTM, Conv1dLSTM, handoff
from convfast.triton import runtime
from convfast.triton.conv1d import handoff_tile
from tests.cases import CONV1D_CASES, Conv1dCase, name_of, normal
from tests.oracle import assert_close_to_oracle
from tests.oracle import conv1d as oracle

pytestmark = pytest.mark.usefixtures("poisoned_memory", "triton_ops")
OPS = ("conv1d", "lstm")
CASES = [case for case in CONV1D_CASES if case.options.get("groups", 1) == 1 and "channels_first" not in case.options]


def gate_weights(case: Conv1dCase, gates: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    w_ih = normal((gates, case.channels), generator) * case.channels**-0.5
    return w_ih.to(dtype), normal((gates,), generator).to(dtype)


def arguments_of(case: Conv1dCase, dtype: torch.dtype, layout: str = "contiguous") -> dict[str, Tensor | None]:
    return {n: None if t is None else t.detach() for n, t in case.arguments(dtype, layout).items()}


def operands(case: Conv1dCase, a: dict[str, Tensor | None], w_ih: Tensor, gate_bias: Tensor | None) -> tuple[Any, ...]:
    options, padding = case.options, case.options.get("padding", 0)
    span = options.get("dilation", 1) * (case.kernel - 1)
    pads = {"same": [span // 2, span - span // 2], "full": [span, span]}.get(padding) or [padding, padding]
    modes = options.get("padding_mode", "zeros"), options.get("activation", "none")
    sizes = options.get("stride", 1), pads, options.get("dilation", 1)
    return (a["input"], a["weight"], a["bias"], a["lengths"], *sizes, *modes, w_ih, gate_bias)


def check(case: Conv1dCase, dtype: torch.dtype, gates: int = 24, layout: str = "contiguous") -> Tensor:
    a, (w_ih, gate_bias) = arguments_of(case, dtype, layout), gate_weights(case, gates, dtype)

    def plain(wide: torch.dtype) -> Tensor:
        given = {n: t if t is None or n == "lengths" else t.to(wide) for n, t in a.items()}
        return F.linear(case.call(oracle, given), w_ih.to(wide), gate_bias.to(wide))

    if handoff_tile(dtype, case.channels, case.features, case.kernel, runtime.chip(w_ih)) is None:
        with pytest.raises(ValueError, match=f"^conv1d_gates: {case.channels} channels of {dtype}"):
            torch.ops.convfast_triton.conv1d_gates(*operands(case, a, w_ih, gate_bias))
        pytest.skip("one program cannot hold all channels in this precision")
    found = torch.ops.convfast_triton.conv1d_gates(*operands(case, a, w_ih, gate_bias))
    assert found.transpose(0, 1).is_contiguous()
    assert_close_to_oracle(found, plain(torch.float64), plain(dtype))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_gates_match_oracle(case: Conv1dCase, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("layout", ["features_first", "time_first", "sliced", "expanded"])
def test_gates_match_oracle_in_any_layout(layout: str) -> None:
    check(Conv1dCase("same", options={"padding": "same", "activation": "relu"}), torch.float32, 24, layout)


def test_many_gates_on_few_and_many_processors_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Conv1dCase("wide", batch=5, time=40, channels=30, options={"padding": 1, "activation": "sigmoid"})
    many = check(case, torch.float32, gates=200)
    monkeypatch.setattr(runtime, "chip", lambda tensor: runtime.Chip("cuda", 90, 227 * 1024, 1))
    assert torch.equal(check(case, torch.float32, gates=200), many)


def test_past_a_length_gates_are_the_bias() -> None:
    case = Conv1dCase("lengths", lengths=(9, 0, 4), options={"padding": 1, "activation": "sigmoid"})
    a, (w_ih, gate_bias) = arguments_of(case, torch.float32), gate_weights(case, 24, torch.float32)
    for sample, length in enumerate(case.lengths):
        a["input"][sample, length:] = float("nan")
    found = torch.ops.convfast_triton.conv1d_gates(*operands(case, a, w_ih, gate_bias))
    for sample, length in enumerate(case.lengths):
        assert (found[sample, length:] == gate_bias).all()
        assert (found[sample, :length] != gate_bias).all()
    without = torch.ops.convfast_triton.conv1d_gates(*operands(case, a, w_ih, None))
    torch.testing.assert_close(without + gate_bias, found)


def test_empty_batch_has_no_gates() -> None:
    case = Conv1dCase("empty", batch=0, options={"padding": 1})
    a, weights = arguments_of(case, torch.float32), gate_weights(case, 24, torch.float32)
    assert torch.ops.convfast_triton.conv1d_gates(*operands(case, a, *weights)).shape == (0, 9, 24)


@pytest.mark.parametrize("name", ["plain", "lengths", "reflect"])
def test_ops_and_their_fakes_agree(name: str, triton_ops: Any) -> None:
    case = next(case for case in CASES if case.id == name)
    a, weights = arguments_of(case, torch.float32), gate_weights(case, 24, torch.float32)
    checks, given = ["test_schema", "test_faketensor"], operands(case, a, *weights)
    library.opcheck(triton_ops.conv1d_gates.default, given, test_utils=checks)
    gates, (w_hh, _) = triton_ops.conv1d_gates(*given), gate_weights(Conv1dCase("hh"), 24, torch.float32)
    for time_major in (False, True):
        rest = (w_hh, None, None, None, None, None, None, None, a["lengths"], time_major)
        library.opcheck(triton_ops.lstm_from_gates.default, (gates, *rest), test_utils=checks)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the calls that were fused gave."""
    results, run = [], handoff._gates_into_lstm

    def kept(*arguments: Any, **options: Any) -> Any:
        results.append(run(*arguments, **options))
        return results[-1]

    monkeypatch.setattr(handoff, "_gates_into_lstm", kept)
    return results


MODULES = {
    "plain": {},
    "stride_gelu": {"stride": 2, "padding": 1, "activation": "gelu"},
    "channels_first": {"channels_first": True},
    "time_first": {"batch_first": False},
    "no_bias": {"bias": False},
    "both_directions": {"bidirectional": True, "num_layers": 2, "conv_channels": [6, 9]},
    "projection": {"proj_size": 2, "bidirectional": True},
    "pool_before": {"conv_channels": [6, 9], "pool": [("max", 2), None]},
}


def build(**options: Any) -> Conv1dLSTM:
    return Conv1dLSTM(**({"input_size": 4, "conv_channels": 6, "hidden_size": 5, "backend": "triton"} | options))


def input_of(module: Conv1dLSTM, time: int = 11) -> Tensor:
    x = normal((3, time, module.input_size), torch.Generator().manual_seed(3)).float()
    return x.transpose(1, 2) if module.channels_first else x if module.batch_first else x.transpose(0, 1)


def assert_results_close(module: torch.nn.Module, *arguments: Any, **options: Any) -> None:
    """Of the fused call, and of one in which a gradient is wanted, whose parts have their own tests."""
    separate = module(*arguments, **options)
    with torch.no_grad():
        found = module(*arguments, **options)
    torch.testing.assert_close(found, separate)


@pytest.mark.parametrize("with_lengths", [False, True], ids=["whole", "lengths"])
@pytest.mark.parametrize("name", MODULES)
def test_fused_module_gives_what_its_parts_give(name: str, with_lengths: bool, fused: list[Any]) -> None:
    module = build(**MODULES[name])
    lengths = torch.tensor([11, 0, 6]) if with_lengths else None
    layers = module.num_layers * (2 if module.bidirectional else 1)
    state = torch.randn(layers, 3, module.proj_size or 5), torch.randn(layers, 3, 5)
    assert_results_close(module, input_of(module), state, lengths=lengths)
    assert len(fused) == 1


def test_fused_cnn_lstm_gives_what_its_parts_give(fused: list[Any]) -> None:
    module = CNN_LSTM(4, 2, 8, lstm_hidden_size=6, backend="triton").eval()
    x = input_of(build())
    assert_results_close(module, x)
    assert_results_close(module, x, lengths=torch.tensor([11, 3, 0]))
    assert len(fused) == 2


def test_fused_under_autocast_gives_what_its_parts_give(fused: list[Any]) -> None:
    module = build(bidirectional=True)
    x = input_of(module)
    with torch.autocast(x.device.type, torch.float16):
        assert_results_close(module, x, (torch.randn(2, 3, 5), torch.randn(2, 3, 5)))
    assert fused[0][0].dtype == torch.float16


@pytest.mark.parametrize("options", [{"groups": 2}, {"pool": ("max", 2)}, {"conv_channels": 600}, {"hidden_size": 300}])
def test_what_one_kernel_cannot_do_is_done_by_two(options: dict[str, Any], fused: list[Any]) -> None:
    module = build(**options)
    assert_results_close(module, input_of(module, time=3))
    assert not fused


@pytest.mark.parametrize(
    ("options", "arguments", "error", "message"),
    [
        ({"kernel_size": 5, "padding": 0}, {"input": torch.zeros(3, 4, 4)}, ValueError, "conv1d: input has size 4"),
        ({}, {"input": torch.zeros(3, 9, 4).half()}, TypeError, "conv1d: input .*float16, expected .*float32"),
        ({}, {"lengths": torch.tensor([1, 12, 3])}, ValueError, "conv1d: lengths has 12, expected 0 to 11"),
        ({}, {"state": (torch.zeros(1, 3, 5).half(), torch.zeros(1, 3, 5))}, TypeError, "lstm: state h .*float16, exp"),
        ({}, {"state": (torch.zeros(1, 2, 5), torch.zeros(1, 3, 5))}, ValueError, "Conv1dLSTM: h of state has shape"),
    ],
)
def test_bad_argument_of_fused_module_is_named(
    options: dict[str, Any], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    module = build(**options)
    x = input_of(module)
    arguments = tree_map(lambda t: t.to(x.device) if t.is_floating_point() else t, arguments)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(error, match=f"^{message}"):
            module(**({"input": x} | arguments))
