"""`convfast.lstm` against a loop over samples and steps and nn.LSTM, and everything that a caller may do with it."""

import functools
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, library, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from convfast import lstm
from convfast.backends import NAMESPACES
from tests.cases import (
    DTYPES,
    EMPTY_LSTM,
    LSTM,
    LSTM_CASES,
    LSTM_EVERYTHING,
    LSTM_STATE,
    LSTM_WEIGHTS,
    SEQUENCE_LAYOUTS,
    LSTMCase,
    arrange,
    exactly,
    instruction_set,
    name_of,
    normal,
    threads,
)
from tests.graphs import Graphs
from tests.kept import kept_for_backward
from tests.oracle import (
    OUTPUTS,
    assert_close_where_drawn,
    assert_matches,
    leaves_of,
    relative_errors,
    results,
    summed,
    with_gradients,
)
from tests.oracle import lstm as oracle

pytestmark = pytest.mark.usefixtures("poisoned_memory")
OPS = ("lstm",)
ROOT = Path(__file__).parent.parent
TENSORS = ("input", *LSTM_WEIGHTS, *(f"{name}_r" for name in LSTM_WEIGHTS), "h0", "c0")
each_case = pytest.mark.parametrize("case", LSTM_CASES, ids=lambda case: case.id)
check = functools.partial(assert_matches, oracle, lstm)


@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_results_and_gradients_match_oracle(case: LSTMCase, dtype: torch.dtype, backend: str) -> None:
    check(case, dtype, backend)


@pytest.mark.parametrize("time_major", [False, True], ids=["batch_major", "time_major"])
@pytest.mark.parametrize("layout", SEQUENCE_LAYOUTS)
@pytest.mark.parametrize("name", ["plain", "state", "lengths", "everything"])
def test_layouts_match_oracle(name: str, layout: str, time_major: bool, backend: str) -> None:
    check(LSTM[name], torch.float32, backend, layout, time_major=time_major)


@st.composite
def cases(draw: st.DrawFn, least_length: int = 0, optional: tuple[str, ...] = LSTM_EVERYTHING) -> LSTMCase:
    batch, time = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    hidden = draw(st.integers(1, 5) | st.sampled_from((16, 33)))
    return LSTMCase(
        "drawn",
        batch=batch,
        time=time,
        features=draw(st.integers(1, 5) | st.sampled_from((16, 32))),
        hidden=hidden,
        projected=draw(st.none() | st.integers(1, hidden - 1)) if hidden > 1 else None,
        directions=draw(st.integers(1, 2)),
        given=tuple(name for name in optional if draw(st.booleans())),
        lengths=draw(
            st.none() | st.tuples(st.integers(1, time), *[st.integers(least_length, time)] * (batch - 1))
        ),
    )


@pytest.mark.parametrize("layout", SEQUENCE_LAYOUTS)
def test_any_options_match_oracle(layout: str, backend: str, widest: torch.dtype) -> None:
    @given(cases(), st.booleans())
    def check_drawn(case: LSTMCase, time_major: bool) -> None:
        found = results(case, lstm, case.arguments(widest, layout), time_major=time_major, backend=backend)
        for name, value in results(case, oracle, case.arguments(widest, layout)).items():
            assert_close_where_drawn(found[name], value, name)

    check_drawn()


def nn_lstm(case: LSTMCase, arguments: dict[str, Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    """The call by nn.LSTM, packed where there are lengths."""
    a, zeros = arguments, {}
    size, bias = case.projected or case.hidden, "bias" in case.given
    layer = nn.LSTM(
        case.features, case.hidden, bias=bias, batch_first=True, bidirectional=case.directions == 2,
        proj_size=case.projected or 0, dtype=a["input"].dtype,
    )  # fmt: skip
    weights = {}
    for of, to in (("", "_l0"), ("_r", "_l0_reverse"))[: case.directions]:
        weights |= {f"{name}{to}": a[f"{name}{of}"] for name in ("weight_ih", "weight_hh", "weight_hr")}
        weights |= {f"bias_ih{to}": a[f"bias{of}"], f"bias_hh{to}": None if not bias else torch.zeros_like(a["bias"])}
    for name, width in (("h0", size), ("c0", case.hidden)):
        zeros[name] = torch.zeros(case.directions, case.batch, width, dtype=a["input"].dtype)
    state = tuple(zeros[name] if a[name] is None else a[name] for name in ("h0", "c0"))
    x, lengths = a["input"], a["lengths"]
    if lengths is not None:
        x = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
    output, (h_n, c_n) = torch.func.functional_call(
        layer, {name: w for name, w in weights.items() if w is not None}, (x, state)
    )
    if lengths is not None:
        output, _ = pad_packed_sequence(output, batch_first=True, total_length=case.time)
    return output, h_n, c_n


def test_any_options_of_nn_lstm_match_it(backend: str, widest: torch.dtype) -> None:
    @given(cases(least_length=1, optional=("bias", "h0", "c0")))
    def check_drawn(case: LSTMCase) -> None:
        a = case.arguments(widest)
        exact = with_gradients(dict(zip(OUTPUTS, nn_lstm(case, a))), leaves_of(a))
        for name, value in results(case, lstm, a, backend=backend).items():
            assert_close_where_drawn(value, exact[name], name)

    check_drawn()


@pytest.mark.parametrize("time_major", [False, True], ids=["batch_major", "time_major"])
@pytest.mark.parametrize("name", ["plain", "everything", "time_1"])
def test_output_has_the_memory_asked_for_and_c_is_wide(
    name: str, time_major: bool, backend: str, dtypes: tuple
) -> None:
    case = LSTM[name]
    for dtype in dtypes:
        output, h_n, c_n = case.call(lstm, case.arguments(dtype), time_major=time_major, backend=backend)
        assert (output.transpose(0, 1) if time_major else output).is_contiguous()
        assert h_n.is_contiguous()
        assert c_n.is_contiguous()
        assert output.dtype == h_n.dtype == dtype
        assert c_n.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("layout", SEQUENCE_LAYOUTS)
def test_gradients_of_outputs_may_have_any_layout_and_are_not_written_to(layout: str, backend: str) -> None:
    case = LSTM["everything"]
    arguments = case.arguments(torch.float32)
    leaves = list(leaves_of(arguments).values())
    outputs = case.call(lstm, arguments, backend=backend)
    grads = [arrange(torch.randn_like(o), layout) for o in outputs]
    before = [g.clone(memory_format=torch.contiguous_format) for g in grads]
    found = torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
    assert all(torch.equal(g, b) for g, b in zip(grads, before))
    for a, b in zip(found, torch.autograd.grad(outputs, leaves, before)):
        torch.testing.assert_close(a, b)


def test_empty_batch(backend: str, dtypes: tuple) -> None:
    for dtype in dtypes:
        values = results(EMPTY_LSTM, lstm, EMPTY_LSTM.arguments(dtype), backend=backend)
        assert values["output"].shape == (0, 5, 6)
        assert values["h_n"].shape == (2, 0, 3)
        assert values["c_n"].shape == (2, 0, 6)
        assert values["gradient of weight_ih"].shape == (24, 4)
        assert not any(value.any() for value in values.values())


@pytest.mark.parametrize("used", OUTPUTS)
def test_outputs_without_gradient_count_as_zero(used: str, backend: str, widest: torch.dtype) -> None:
    case, which = LSTM["both_directions_state"], OUTPUTS.index(used)
    arguments = case.arguments(widest)
    leaves = list(leaves_of(arguments).values())
    found = torch.autograd.grad(case.call(lstm, arguments, backend=backend)[which].sum(), leaves)
    exact = torch.autograd.grad(case.call(oracle, arguments)[which].sum(), leaves)
    for a, b in zip(found, exact):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("only", TENSORS)
def test_gradient_of_one_tensor_alone(only: str, backend: str, widest: torch.dtype) -> None:
    case = LSTM["everything"]
    arguments = case.arguments(widest)
    all_grads = results(case, lstm, arguments, backend=backend)
    some = {n: t if n == only or t is None else t.detach() for n, t in arguments.items()}
    found = with_gradients(dict(zip(OUTPUTS, case.call(lstm, some, backend=backend))), {only: some[only]})
    torch.testing.assert_close(found[f"gradient of {only}"], all_grads[f"gradient of {only}"])


@pytest.mark.parametrize("name", ["plain", "peephole", "projection", "state_c_only", "lengths", "everything"])
def test_first_and_second_derivatives_by_finite_differences(name: str, float64_backend: str) -> None:
    case = LSTM[name]
    arguments = case.arguments(torch.float64)
    leaves = leaves_of(arguments)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return case.call(lstm, arguments | dict(zip(leaves, tensors)), backend=float64_backend)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", ["plain", "peephole", "projection", "features_5_hidden_17", "hidden_70"])
def test_chunked_sequence_equals_whole(name: str, dtype: torch.dtype, backend: str) -> None:
    case = LSTM[name]
    a = case.arguments(dtype)
    with torch.no_grad():
        whole, h_whole, c_whole = case.call(lstm, a, backend=backend)
        state, outputs = (a["h0"], a["c0"]), []
        for part in (a["input"][:, :2], a["input"][:, 2:3], a["input"][:, 3:]):
            output, *state = case.call(lstm, a | {"input": part, "h0": state[0], "c0": state[1]}, backend=backend)
            outputs.append(output)
    for part, all_at_once in ((torch.cat(outputs, 1), whole), (state[0], h_whole), (state[1], c_whole)):
        torch.testing.assert_close(part, all_at_once, **exactly(backend, dtype))


@pytest.mark.parametrize("name", ["lengths", "lengths_without_state", "lengths_none_long", "everything"])
def test_past_its_length_a_sample_reads_nothing_and_gives_zero(name: str, backend: str) -> None:
    case = LSTM[name]
    a = case.arguments(torch.float32)
    clean = results(case, lstm, a, backend=backend)
    spoiled = a["input"].detach().clone()
    for sample, length in enumerate(case.lengths):
        spoiled[sample, length:] = float("nan")
        assert (clean["output"][sample, length:] == 0).all()
        assert (clean["output"][sample, :length] != 0).any() == (length > 0)
        assert (clean["gradient of input"][sample, length:] == 0).all()
    found = results(case, lstm, a | {"input": spoiled.requires_grad_()}, backend=backend)
    for key, value in clean.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0, msg=lambda text, key=key: f"{key}: {text}")
    empty = case.lengths.index(0)
    for last, first in (("h_n", "h0"), ("c_n", "c0")):
        assert torch.equal(
            clean[last][:, empty], torch.zeros_like(clean[last][:, 0]) if a[first] is None else a[first][:, empty]
        )


@pytest.mark.parametrize("name", ["plain", "hidden_70", "time_40_batch_9", "both_directions_state", "everything"])
def test_same_bits_again_and_a_sample_does_not_depend_on_its_batch(name: str, backend: str) -> None:
    case = LSTM[name]
    a = case.arguments(torch.float32)
    whole = results(case, lstm, a, backend=backend)
    again = results(case, lstm, a, backend=backend)
    assert all(torch.equal(again[key], value) for key, value in whole.items())
    generator = torch.Generator().manual_seed(1)
    grads = [normal(whole[n].shape, generator).float() for n in OUTPUTS]
    over = {"input": 0, "lengths": 0, "h0": 1, "c0": 1}
    for b in range(case.batch):
        alone = {n: t.narrow(over[n], b, 1) if n in over and t is not None else t for n, t in a.items()}
        alone["input"] = alone["input"].detach().requires_grad_()
        outputs = case.call(lstm, alone, backend=backend)
        (dx,) = torch.autograd.grad(outputs, alone["input"], [g.narrow(d, b, 1) for g, d in zip(grads, (0, 1, 1))])
        for value, key, dim in zip((*outputs, dx), (*OUTPUTS, "gradient of input"), (0, 1, 1, 0)):
            torch.testing.assert_close(value, whole[key].narrow(dim, b, 1), **exactly(backend))


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("name", ["hidden_70", "time_40_batch_9", "everything"])
def test_any_number_of_threads(name: str, count: int, backend: str) -> None:
    check_threads(LSTM[name], count, backend)


def check_threads(case: LSTMCase, count: int, backend: str) -> None:
    found = []
    for number in (1, count):
        with threads(number):
            found.append(results(case, lstm, case.arguments(torch.float32), backend=backend))
    for key, value in found[0].items():
        # With matrix tiles the order of sums depends on how many samples a thread has.
        tiles = backend == "cpu" and "amx" in torch.ops.convfast.cpu_capability()
        torch.testing.assert_close(found[1][key], value, **({} if summed(key) or tiles else exactly(backend)))


def test_inference_equals_training_forward_bit_for_bit(backend: str) -> None:
    case = LSTM["everything"]
    arguments = case.arguments(torch.float32)
    training = case.call(lstm, arguments, backend=backend)
    with torch.no_grad():
        inference = case.call(lstm, arguments, backend=backend)
    for a, b in zip(training, inference):
        assert torch.equal(a, b)
        assert a.requires_grad
        assert not b.requires_grad


def test_any_integer_type_of_lengths(backend: str) -> None:
    case = LSTM["lengths"]
    a = case.arguments(torch.float32)
    outputs = [
        case.call(lstm, a | {"lengths": a["lengths"].to(dtype)}, backend=backend)[0]
        for dtype in (torch.int64, torch.int32, torch.uint8)
    ]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_lengths_are_not_looked_at_where_that_would_synchronize() -> None:
    case = LSTM["everything"]
    a = {n: t.detach().to("meta").requires_grad_(n != "lengths") for n, t in case.arguments(torch.float32).items()}
    outputs = case.call(lstm, a)
    assert [o.shape for o in outputs] == [(4, 5, 6), (2, 4, 3), (2, 4, 6)]
    leaves = list(leaves_of(a).values())
    found = torch.autograd.grad(outputs, leaves, [torch.empty_like(o) for o in outputs])
    assert [g.shape for g in found] == [t.shape for t in leaves]


def test_nan_stays_within_its_sample_and_goes_on_in_time(backend: str) -> None:
    case = LSTM["both_directions"]
    a = case.arguments(torch.float32)
    with torch.no_grad():
        a["input"][1, 2, 3] = float("nan")
        output, h_n, _ = case.call(lstm, a, backend=backend)
    within = torch.zeros(3, 5, 12, dtype=torch.bool)
    within[1, 2:, :6] = within[1, :3, 6:] = True
    assert torch.equal(output.isnan(), within)
    assert torch.equal(h_n.isnan().flatten(2).all(2), torch.tensor([[False, True, False]] * 2))


def weights_of(case: LSTMCase) -> tuple[Tensor | None, ...]:
    arguments = case.arguments(torch.float32)
    return tuple(arguments[f"{name}_r"] for name in LSTM_WEIGHTS)


REVERSE = weights_of(LSTM["both_directions"])
BAD = {
    "time_major": ({"time_major": 1}, TypeError, "time_major is 1, expected True or False"),
    "rank": ({"input": torch.zeros(5, 4)}, ValueError, "input has 2 dims, expected 3"),
    "features": (
        {"input": torch.zeros(3, 5, 3)},
        ValueError,
        r"input has 3 features, expected 4 from weight_ih \[24, 4\]",
    ),
    "no_steps": ({"input": torch.zeros(3, 0, 4)}, ValueError, "input has 0 time steps, expected at least 1"),
    "input_dtype": ({"input": torch.zeros(3, 5, 4).double()}, TypeError, "input .*float64, expected .*float32"),
    "input_integer": ({"input": torch.zeros(3, 5, 4).long()}, TypeError, "input .*int64, expected one of .*float"),
    "input_type": ({"input": [[1.0]]}, TypeError, "input is a list, expected a Tensor"),
    "input_none": ({"input": None}, TypeError, "input is None, expected a Tensor"),
    "weight_ih_none": ({"weight_ih": None}, TypeError, "weight_ih is None, expected a Tensor"),
    "weight_hh_none": ({"weight_hh": None}, TypeError, "weight_hh is None, expected a Tensor"),
    "input_device": ({"input": torch.zeros(3, 5, 4, device="meta")}, ValueError, "input is on meta, expected cpu"),
    "weight_ih_shape": ({"weight_ih": torch.zeros(20, 4)}, ValueError, r"weight_ih has .*\[4H, I\] with 4H=24"),
    "weight_ih_rank": ({"weight_ih": torch.zeros(24)}, ValueError, r"weight_ih has shape \[24\], expected \[4H, I\]"),
    "weight_hh_shape": (
        {"weight_hh": torch.zeros(24, 5)},
        ValueError,
        r"weight_hh .*\[24, 5\], expected \[4H, H\] where",
    ),
    "weight_hh_gates": ({"weight_hh": torch.zeros(22, 6)}, ValueError, r"weight_hh .*\[22, 6\], expected \[4H, P\]"),
    "weight_hh_empty": (
        {"weight_hh": torch.zeros(0, 0)},
        ValueError,
        r"weight_hh .*\[0, 0\], expected \[4H, P\] with H",
    ),
    "weight_hr_shape": (
        {"weight_hr": torch.zeros(5, 6)},
        ValueError,
        r"weight_hr .*\[5, 6\], expected \[6, 6\] \(\[P, H",
    ),
    "bias_shape": ({"bias": torch.zeros(6)}, ValueError, r"bias has shape \[6\], expected \[24\] \(\[4H\]\)"),
    "bias_dtype": ({"bias": torch.zeros(24).half()}, TypeError, "bias .*float16, expected .*float32"),
    "peephole_shape": ({"peephole": torch.zeros(6, 3)}, ValueError, r"peephole .*\[6, 3\], expected \[3, 6\]"),
    "reverse_count": (
        {"reverse": REVERSE[:3]},
        TypeError,
        r"reverse is a tuple of 3, expected \(weight_ih, weight_hh, bias",
    ),
    "reverse_tensor": ({"reverse": REVERSE[0]}, TypeError, "reverse is a Tensor, expected .weight_ih"),
    "reverse_without_bias": (
        {"reverse": (*REVERSE[:2], None, None, None)},
        ValueError,
        "reverse bias is None, expected a Tensor like bias",
    ),
    "reverse_with_peephole": (
        {"reverse": (*REVERSE[:3], torch.zeros(3, 6), None)},
        ValueError,
        "reverse peephole is given, expected None like peephole",
    ),
    "reverse_shape": (
        {"reverse": (torch.zeros(24, 3), *REVERSE[1:])},
        ValueError,
        r"reverse weight_ih has shape \[24, 3\], expected \[24, 4\] \(\[4H, I\]\)",
    ),
    "reverse_dtype": (
        {"reverse": (REVERSE[0].double(), *REVERSE[1:])},
        TypeError,
        "reverse weight_ih has dtype .*float64, expected .*float32",
    ),
    "state_one": ({"state": (torch.zeros(1, 3, 6),)}, TypeError, r"state is a tuple of 1, expected a pair \(h, c\)"),
    "state_tensor": ({"state": torch.zeros(2, 3, 6)}, TypeError, "state is a Tensor, expected a pair"),
    "state_h_shape": ({"state": (torch.zeros(3, 6), None)}, ValueError, r"state h .*\[3, 6\], expected \[1, 3, 6\]"),
    "state_c_shape": (
        {"state": (None, torch.zeros(2, 3, 6))},
        ValueError,
        r"state c .*expected \[1, 3, 6\] \(\[D, B, H",
    ),
    "state_directions": (
        {"state": (torch.zeros(1, 3, 6), None), "reverse": REVERSE},
        ValueError,
        r"state h has shape \[1, 3, 6\], expected \[2, 3, 6\]",
    ),
    "state_c_dtype": ({"state": (None, torch.zeros(1, 3, 6).half())}, TypeError, "state c .*expected .*float32"),
    "lengths_float": ({"lengths": torch.ones(3)}, TypeError, "lengths has dtype .*float32, expected a Tensor of integ"),
    "lengths_list": ({"lengths": [1, 2, 3]}, TypeError, "lengths has type list, expected a Tensor of integers"),
    "lengths_shape": ({"lengths": torch.tensor([1])}, ValueError, r"lengths has shape \[1\], expected \[3\]"),
    "lengths_negative": ({"lengths": torch.tensor([1, -1, 2])}, ValueError, "lengths has -1, expected 0 to 5"),
    "lengths_long": ({"lengths": torch.tensor([1, 6, 2])}, ValueError, "lengths has 6, expected 0 to 5"),
    "backend": ({"backend": "gpu"}, ValueError, "backend is 'gpu', expected one of .*reference"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument_is_named_with_what_was_expected(name: str, host_backend: str) -> None:
    wrong, error, message = BAD[name]
    a = LSTM["plain"].arguments(torch.float32)
    good = {n: a[n] for n in ("input", "weight_ih", "weight_hh", "bias")} | {"backend": host_backend}
    lstm(**good)
    lstm(**good, reverse=REVERSE)
    with pytest.raises(error, match=f"^lstm: {message}"):
        lstm(**(good | wrong))


def test_op_refuses_what_its_forward_did_not_return(native_ops: Any) -> None:
    x, w_ih, w_hh, w_hr = torch.randn(2, 3, 3), torch.randn(16, 3), torch.randn(16, 4), torch.randn(4, 4)
    plain, none = (w_ih, w_hh, None, None), (None,) * 5
    with pytest.raises(RuntimeError, match="lstm_forward: w_hr must be given for both directions or none"):
        native_ops.lstm_forward(x, *plain, None, *plain, w_hr, None, None, None, False, False)
    y, _, _, c, gates = native_ops.lstm_forward(x, *plain, None, *none, None, None, None, False, True)
    for wrong in ((c[..., :1].expand_as(c), gates), (c, gates[:, :, :1].expand_as(gates))):
        with pytest.raises(RuntimeError, match="lstm_backward: c and gates must be contiguous"):
            native_ops.lstm_backward(y, None, None, x, *plain, None, *none, None, None, None, y, *wrong, [1] * 13)


def loss_of(case: LSTMCase, function: Any, **more: Any) -> Callable[..., Tensor]:
    """A scalar function of the tensors that the case has, and of lengths."""
    names = tuple(leaves_of(case.arguments(torch.float64)))

    def loss(*tensors: Tensor, lengths: Tensor | None = None) -> Tensor:
        arguments = dict.fromkeys(TENSORS) | dict(zip(names, tensors)) | {"lengths": lengths}
        output, h_n, c_n = case.call(function, arguments, **more)
        return output.square().sum() + h_n.sum() + c_n.sin().sum()

    return loss


def tensors_of(case: LSTMCase, dtype: torch.dtype) -> list[Tensor]:
    return list(leaves_of(case.arguments(dtype)).values())


@pytest.mark.parametrize("name", ["plain", "projection", "lengths", "everything"])
def test_compiles_without_graph_break(name: str, backend: str) -> None:
    torch._dynamo.reset()
    graphs = Graphs()
    case = LSTM[name]
    tensors, lengths = tensors_of(case, torch.float32), case.arguments(torch.float32)["lengths"]
    function = functools.partial(loss_of(case, lstm, backend=backend), lengths=lengths)
    value, plain = torch.compile(function, fullgraph=True, backend=graphs)(*tensors), function(*tensors)
    torch.testing.assert_close(value, plain)
    for a, b in zip(torch.autograd.grad(value, tensors), torch.autograd.grad(plain, tensors)):
        torch.testing.assert_close(a, b)
    assert len(graphs.forward) == len(graphs.backward) == 1
    for direction, ops in (("forward", graphs.forward[0]), ("backward", graphs.backward[0])):
        native = [op for op in ops if "convfast" in op]
        assert native == ([] if backend == "reference" else [f"{NAMESPACES[backend]}.lstm_{direction}.default"])
        assert any("mm" in op for op in ops) == (backend == "reference")


def test_compiled_call_is_one_op_a_direction_whatever_time_and_batch(kernel_backend: str) -> None:
    torch._dynamo.reset()
    graphs = Graphs()
    # Features and hidden size differ from batch and time, or torch.compile guards that equal sizes stay equal.
    case = LSTMCase("dynamic", directions=2)
    _, *weights = tensors_of(case, torch.float32)
    function = loss_of(case, lstm, backend=kernel_backend)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=graphs)
    for batch, time in ((5, 7), (7, 3), (11, 13)):
        x, lengths = torch.randn(batch, time, 4), torch.randint(0, time + 1, (batch,))
        value, plain = (f(x, *weights, lengths=lengths) for f in (compiled, function))
        assert torch.equal(value, plain)
        for a, b in zip(torch.autograd.grad(value, weights), torch.autograd.grad(plain, weights)):
            torch.testing.assert_close(a, b)
    namespace = NAMESPACES[kernel_backend]
    assert len(graphs.forward) == len(graphs.backward) == 1
    assert [op for op in graphs.forward[0] if "convfast" in op] == [f"{namespace}.lstm_forward.default"]
    assert [op for op in graphs.backward[0] if "convfast" in op] == [f"{namespace}.lstm_backward.default"]


@pytest.mark.parametrize("name", ["plain", "both_directions_state"])
def test_function_transforms(name: str, backend: str, widest: torch.dtype) -> None:
    case = LSTM[name]
    tensors = [t.detach() for t in tensors_of(case, widest)]
    function, plain = loss_of(case, lstm, backend=backend), loss_of(case, oracle)
    everyone = tuple(range(len(tensors)))
    exact = torch.func.grad(plain, argnums=everyone)(*tensors)
    for a, b in zip(torch.func.grad(function, argnums=everyone)(*tensors), exact):
        torch.testing.assert_close(a, b)
    stacked = torch.stack([tensors[0], -tensors[0]])
    over = (0, *[None] * (len(tensors) - 1))
    each = torch.stack([plain(x, *tensors[1:]) for x in stacked])
    torch.testing.assert_close(torch.func.vmap(function, over)(stacked, *tensors[1:]), each)
    per_sample = torch.func.vmap(torch.func.grad(function, argnums=2), over)(stacked, *tensors[1:])
    torch.testing.assert_close(per_sample[0], exact[2])
    tangents = tuple(torch.randn_like(t) for t in tensors)
    _, derivative = torch.func.jvp(function, tuple(tensors), tangents)
    torch.testing.assert_close(derivative, sum((g * t).sum() for g, t in zip(exact, tangents)))


def test_hessian_by_two_ways(backend: str, widest: torch.dtype) -> None:
    case = LSTMCase("small", batch=1, time=3, features=1, hidden=1)
    *others, bias = (t.detach() for t in tensors_of(case, widest))
    function = functools.partial(loss_of(case, lstm, backend=backend), *others)
    exact = torch.autograd.functional.hessian(functools.partial(loss_of(case, oracle), *others), bias)
    torch.testing.assert_close(torch.autograd.functional.hessian(function, bias), exact)
    torch.testing.assert_close(torch.func.jacrev(torch.func.grad(function))(bias), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_autocast_equals_casting_by_hand(name: str, dtype: torch.dtype, backend: str) -> None:
    case = LSTM[name]
    arguments = case.arguments(torch.float32)
    with torch.autocast(torch.get_default_device().type, dtype):
        outputs = case.call(lstm, arguments, backend=backend)
    assert [o.dtype for o in outputs] == [dtype, dtype, torch.float32]
    by_hand = {n: t if n in ("c0", "lengths") or t is None else t.detach().to(dtype) for n, t in arguments.items()}
    for a, b in zip(outputs, case.call(lstm, by_hand, backend=backend)):
        assert torch.equal(a, b)
    grads = torch.autograd.grad([o.float().sum() for o in outputs], list(leaves_of(arguments).values()))
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in grads)


def test_autocast_mixes_dtypes_but_leaves_float64_alone(float64_backend: str) -> None:
    case = LSTM["state"]
    a = case.arguments(torch.float32)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        mixed = case.call(lstm, a | {"input": a["input"].bfloat16(), "c0": a["c0"].bfloat16()}, backend=float64_backend)
        assert mixed[0].dtype == torch.bfloat16
        assert case.call(lstm, case.arguments(torch.float64), backend=float64_backend)[0].dtype == torch.float64
        with pytest.raises(TypeError, match=r"input has dtype .*float64, expected .*bfloat16"):
            case.call(lstm, a | {"input": a["input"].double()}, backend=float64_backend)


def test_backward_under_autocast_keeps_float32(backend: str) -> None:
    case = LSTM["everything"]
    arguments = case.arguments(torch.float32)
    leaves = list(leaves_of(arguments).values())
    output = case.call(lstm, arguments, backend=backend)[0].sum()
    for again in (False, True):
        plain = torch.autograd.grad(output, leaves, retain_graph=True, create_graph=again)
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            found = torch.autograd.grad(output, leaves, retain_graph=True, create_graph=again)
        for a, b in zip(found, plain):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("name", ["plain", "projection", "everything"])
def test_memory_kept_for_backward(name: str, dtype: torch.dtype, backend: str) -> None:
    case = LSTM[name]
    arguments = case.arguments(dtype)
    call = functools.partial(case.call, lstm, arguments, backend=backend)
    (output, *_), kept = kept_for_backward(call, leaves_of(arguments).values(), but_integers=True)
    states = case.directions * case.batch * case.time * case.hidden
    gates = torch.float32 if backend == "reference" else dtype
    assert kept == states * (torch.float32.itemsize + 4 * gates.itemsize) + output.nbytes


OPCHECK = ["plain", "projection", "state_c_only", "both_directions_state", "everything"]


@pytest.mark.parametrize("time_major", [False, True], ids=["batch_major", "time_major"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize(("name", "layout"), [*itertools.product(OPCHECK, SEQUENCE_LAYOUTS), ("batch_0", "contiguous")])
def test_ops_and_their_fakes_agree(
    name: str, layout: str, dtype: torch.dtype, time_major: bool, kernel_ops: Any
) -> None:
    case = LSTM[name]
    # The rest of opcheck takes a second a call and does not look at layouts.
    checks = ["test_schema", "test_faketensor"]
    if name == "everything" and layout == "contiguous":
        checks += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
    arguments = dict.fromkeys(TENSORS) | case.arguments(dtype, layout)
    arguments = {n: None if t is None else t.detach() for n, t in arguments.items()}
    if arguments["lengths"] is not None:
        arguments["lengths"].fill_(case.time)  # past a length, what is saved is undefined, and opcheck compares it
    operands = tuple(arguments[n] for n in (*TENSORS, "lengths"))
    for save in (False, True):
        library.opcheck(kernel_ops.lstm_forward.default, (*operands, time_major, save), test_utils=checks)
    y, h_n, c_n, c, gates = kernel_ops.lstm_forward(*operands, time_major, True)
    grads = tuple(arrange(torch.randn_like(o), layout) for o in (y, h_n, c_n))
    for wanted in ([arguments[n] is not None for n in TENSORS], [False] * len(TENSORS)):
        backward = (*grads, *operands, y, c, gates, [int(w) for w in wanted])
        library.opcheck(kernel_ops.lstm_backward.default, backward, test_utils=checks)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets_match_oracle(capability: str, native_ops: Any) -> None:
    script = """
import torch
from tests import cases, test_conv1d, test_lstm
test_lstm.lstm(torch.zeros(1, 1, 1), torch.zeros(4, 1), torch.zeros(4, 1), backend="cpu")
print(torch.ops.convfast.cpu_capability())
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    for case in cases.LSTM_CASES:
        test_lstm.check(case, dtype, "cpu")
    for case in cases.CONV1D_CASES:
        test_conv1d.check(case, dtype, "cpu")
"""
    expected = instruction_set(capability)
    env = os.environ | {"ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [expected]


# Few samples: the threads take every step together.
TOGETHER = LSTMCase("together", batch=1, time=40, features=5, hidden=130, given=("bias", "h0", "c0"))


# Of what a projection makes, some threads have nothing; an even number of threads may take both directions at once.
@pytest.mark.parametrize("projected", [None, 70, 33, 1])
@pytest.mark.parametrize("batch, time", [(1, 40), (3, 1), (5, 4), (70, 2)])
@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_threads_share_out_hidden_units_and_directions(
    count: int, batch: int, time: int, projected: int | None, native_ops: Any
) -> None:
    lengths = None if time == 1 else tuple(b % (time + 1) for b in range(batch, 0, -1))
    given = LSTM_EVERYTHING if batch == 5 else ()
    # One step wakes others for many weights only; both directions run at once where a core's L2 holds their weights.
    features, hidden = (64, 260) if time == 1 else (5, 130)
    case = LSTMCase("shared", batch, time, features, hidden, projected, 2, given, lengths)
    check_threads(case, count, "cpu")
    with threads(count):
        check(case, torch.float32, "cpu")


def test_fewer_threads_than_asked_for_do_not_hang(native_ops: Any) -> None:
    script = """
import torch
from tests import test_lstm
torch.set_num_threads(4)
for _ in range(20):
    test_lstm.check(test_lstm.TOGETHER, torch.float32, "cpu")
"""
    env = os.environ | {"OMP_THREAD_LIMIT": "2", "OMP_NUM_THREADS": "4", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_first_call_of_a_process(native_ops: Any) -> None:
    # The pool's threads are new, and do not know yet how many they are.
    script = """
import torch
from tests.test_lstm import LSTM, lstm
case = LSTM["time_40_batch_9"]
arguments = case.arguments(torch.float32)
with torch.no_grad():
    for found, expected in zip(*(case.call(lstm, arguments, backend=name) for name in ("cpu", "reference"))):
        torch.testing.assert_close(found, expected)
"""
    env = os.environ | {"PYTHONPATH": str(ROOT), "CONVFAST_POISON": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_several_python_threads_at_once(native_ops: Any) -> None:
    def call() -> dict[str, Tensor]:
        return results(TOGETHER, lstm, TOGETHER.arguments(torch.float32), backend="cpu")

    alone = call()
    with ThreadPoolExecutor(4) as pool:
        for job in [pool.submit(call) for _ in range(16)]:
            for name, value in job.result(timeout=120).items():
                torch.testing.assert_close(value, alone[name], **exactly("cpu"))


@pytest.mark.parametrize("lengths", [False, True], ids=["", "lengths"])
def test_more_samples_than_a_thread_runs_together(lengths: bool, native_ops: Any) -> None:
    case = LSTMCase("many", batch=70, time=9, hidden=40, lengths=tuple(b % 10 for b in range(70)) if lengths else None)
    with threads(1):  # groups of 32, 32 and 6
        check(case, torch.float32, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
def test_gates_too_many_for_the_cache_are_those_of_half_the_batch(dtype: torch.dtype, native_ops: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    batch, time, hidden = 128, 1056 // dtype.itemsize, 64  # 33 MiB of gates; those of half the batch are not streamed
    x, weight_ih, weight_hh, upstream = (
        (normal(shape, generator) * scale).to(dtype)
        for shape, scale in (
            ((batch, time, 3), 1),
            ((4 * hidden, 3), 0.2),
            ((4 * hidden, hidden), 0.05),
            ((batch, time, hidden), 1),
        )
    )

    def run(samples: slice) -> tuple[Tensor, Tensor]:
        leaf = x[samples].requires_grad_()
        output, _ = lstm(leaf, weight_ih, weight_hh, backend="cpu")
        return output, *torch.autograd.grad(output, leaf, upstream[samples])

    with threads(2):  # of more, few samples each, the order of sums may change
        whole, *halves = (run(slice(*ends)) for ends in ((0, batch), (0, batch // 2), (batch // 2, batch)))
    tiles = "amx" in torch.ops.convfast.cpu_capability()  # their order of sums depends on how many samples a thread has
    for together, parts in zip(whole, zip(*halves)):
        torch.testing.assert_close(together, torch.cat(parts), **({} if tiles else exactly("cpu")))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("batch, hidden", [(1, 128), (2, 300), (7, 70), (33, 17), (64, 40), (65, 16)])
@pytest.mark.parametrize("projected", [None, 15])
def test_one_step_is_the_first_of_many(
    projected: int | None, batch: int, hidden: int, dtype: torch.dtype, native_ops: Any
) -> None:
    case = LSTMCase("steps", batch, 2, 37, hidden, projected=projected, given=LSTM_STATE, directions=2)
    size = projected or hidden
    a = case.arguments(dtype)
    for count in (1, 2, 3):
        with threads(count):
            with torch.no_grad():
                both, _, _ = case.call(lstm, a, backend="cpu")
                one, h, _ = case.call(lstm, a | {"input": a["input"][:, :1]}, backend="cpu")
            training, _, _ = case.call(lstm, a | {"input": a["input"][:, :1]}, backend="cpu")
            for found in (one, training.detach()):
                torch.testing.assert_close(found[:, 0, :size], both[:, 0, :size], **exactly("cpu"))
            torch.testing.assert_close(h, one[:, 0].unflatten(1, (2, size)).transpose(0, 1), **exactly("cpu"))


@pytest.mark.parametrize("count, time", [(2, 60), (2, 300), (1, 3)], ids=["as_they_lie", "packed", "few_as_they_lie"])
@pytest.mark.parametrize("hidden, projected", [(48, None), (64, None), (64, 32)])
def test_backward_reads_weights_two_ways(
    hidden: int, projected: int | None, count: int, time: int, native_ops: Any
) -> None:
    case = LSTMCase("long", 2, time, 32, hidden, projected=projected, given=LSTM_STATE)
    with threads(count):
        check(case, torch.float32, "cpu")


@pytest.mark.parametrize("batch, count", [(40, 3), (63, 5), (9, 5), (12, 2)])
def test_teams_of_threads_share_large_weights(batch: int, count: int, native_ops: Any) -> None:
    # 3.4 MB of weights: a team, with groups of 32 and 8 samples in training; two where L2 holds 2 MB; few samples; some
    # more, whose input part is a GEMM of its own.
    lengths = tuple(b % 4 for b in range(batch))
    case = LSTMCase("large", batch=batch, time=3, features=500, hidden=272, lengths=lengths)
    found = []
    for number in (1, count):
        with threads(number):
            found.append(results(case, lstm, case.arguments(torch.float32), backend="cpu"))
    with threads(count):
        check(case, torch.float32, "cpu")
    tiles = "amx" in torch.ops.convfast.cpu_capability()  # their order of sums depends on how many samples a thread has
    for key, value in found[0].items():
        if key in OUTPUTS and not tiles:
            torch.testing.assert_close(found[1][key], value, **exactly("cpu"))
        else:  # the backward of a team sums 4 H terms in the order in which the weights lie
            largest = relative_errors(found[1][key], value)[1]
            assert largest <= math.sqrt(4 * case.hidden) * torch.finfo(torch.float32).eps, key
