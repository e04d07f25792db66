"""`convfast.conv_lstm` against the float64 oracle, and everything that a caller may do with it."""

import functools
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, library

import convfast
from convfast import conv_lstm
from convfast.backends import NAMESPACES
from convfast.triton import runtime as triton_runtime
from tests.cases import (
    BY_ID,
    CASES,
    DTYPES,
    EMPTY_BATCH,
    EVERYTHING,
    LAYOUTS,
    TENSORS,
    Case,
    arrange,
    exactly,
    name_of,
    normal,
)
from tests.graphs import Graphs
from tests.kept import kept_for_backward
from tests.oracle import FLOOR_OF_DRAWN, OUTPUTS, assert_matches, leaves_of, results
from tests.oracle import conv_lstm as oracle

pytestmark = pytest.mark.usefixtures("poisoned_memory")
ROOT = Path(__file__).parent.parent
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
check = functools.partial(assert_matches, oracle, conv_lstm)


@each_case
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_results_and_gradients_match_oracle(case: Case, backend: str, memory: str) -> None:
    check(case, torch.float32, backend, memory=memory)


@each_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=name_of)
def test_dtypes_match_oracle(case: Case, dtype: torch.dtype, backend: str) -> None:
    check(case, dtype, backend)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("name", ["state", "everything", "frame_1d", "frame_3d", "no_input", "input_convolved_before"])
def test_layouts_match_oracle(name: str, layout: str, memory: str, backend: str) -> None:
    check(BY_ID[name], torch.float32, backend, layout, memory=memory)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dims = draw(st.integers(1, 3))
    mode = draw(st.sampled_from(("zeros", "zeros", "reflect", "replicate", "circular")))
    space = tuple(draw(st.integers(1, 7)) for _ in range(dims))
    kernel, kernel_hh = (tuple(draw(st.integers(1, 4)) for _ in range(dims)) for _ in range(2))
    stride, dilation = (tuple(draw(st.integers(1, 3)) for _ in range(dims)) for _ in range(2))
    most = {"reflect": lambda size: size - 1, "circular": lambda size: size}.get(mode, lambda size: 4)
    padding = tuple(draw(st.integers(0, min(4, most(size)))) for size in space)
    out_space = tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in zip(space, padding, dilation, kernel, stride)
    )
    assume(min(out_space) >= 1)
    batch, time, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    source = draw(st.sampled_from((("input", "weight_ih"),) * 3 + (("input",), ())))
    optional = draw(st.sets(st.sampled_from(("bias", "peephole", "h0", "c0"))))
    return Case(
        "drawn",
        batch=batch,
        time=time,
        channels=groups * draw(st.integers(1, 4) | st.sampled_from((8, 16, 48))),
        hidden=draw(st.integers(1, 5) | st.sampled_from((8, 16, 32))),
        space=space,
        kernel=kernel,
        kernel_hh=kernel_hh,
        given=(*source, *(sorted(optional) if source else sorted(optional | {"h0"}))),
        lengths=draw(st.none() | st.tuples(st.integers(1, time), *[st.integers(0, time)] * (batch - 1))),
        out_space=out_space if "weight_ih" in source else None,
        options={"reverse": draw(st.booleans())}
        | {"stride": stride, "padding": padding, "dilation": dilation, "padding_mode": mode, "groups": groups}
        if "weight_ih" in source
        else {"reverse": draw(st.booleans())},
    )


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_options_match_oracle(layout: str, memory: str, backend: str, widest: torch.dtype) -> None:
    @given(cases())
    def check_drawn(case: Case) -> None:
        check(case, widest, backend, layout, floor=FLOOR_OF_DRAWN, memory=memory)

    check_drawn()


@pytest.mark.parametrize("name", ["plain", "frame_1d", "frame_3d", "groups_2", "stride_2", "input_convolved_before"])
def test_one_frame_for_all_steps_equals_its_repetition(name: str, backend: str, widest: torch.dtype) -> None:
    case = BY_ID[name]
    once = case.arguments(widest)
    once["input"] = once["input"][:, :1].detach().requires_grad_()
    repeated = once["input"].expand(-1, 3, *[-1] * (once["input"].ndim - 2))
    expected = results(case, oracle, once | {"input": repeated})
    found = results(case, conv_lstm, once, steps=3, backend=backend)
    each_step = expected.pop("gradient of input")
    torch.testing.assert_close(found.pop("gradient of input"), each_step.sum(1, keepdim=True))
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_outputs_may_have_any_layout_and_are_not_written_to(layout: str, backend: str) -> None:
    case = BY_ID["lengths"]
    arguments = case.arguments(torch.float32)
    outputs = case.call(conv_lstm, arguments, backend=backend)
    leaves = [arguments[n] for n in TENSORS]
    names = ("input", "h0", "c0")
    grads = [arrange(torch.randn_like(o), layout, name) for o, name in zip(outputs, names)]
    before = [g.clone() for g in grads]
    found = torch.autograd.grad(outputs, leaves, grads)
    outputs = case.call(conv_lstm, arguments, backend=backend)
    plain = torch.autograd.grad(outputs, leaves, [g.clone(memory_format=torch.contiguous_format) for g in before])
    for g, b in zip(grads, before):
        assert torch.equal(g, b)
    for a, b in zip(found, plain):
        torch.testing.assert_close(a, b)


def test_empty_batch(backend: str) -> None:
    for memory in ("fast", "lean"):
        values = results(EMPTY_BATCH, conv_lstm, EMPTY_BATCH.arguments(torch.float32), memory=memory, backend=backend)
        assert values["output"].shape == (0, 3, 4, 6, 5)
        assert values["h_n"].shape == values["c_n"].shape == (0, 4, 6, 5)
        assert values["gradient of weight_ih"].shape == (16, 3, 3, 3)
        assert not any(value.any() for value in values.values())


@pytest.mark.parametrize("used", OUTPUTS)
def test_outputs_without_gradient_count_as_zero(used: str, backend: str, widest: torch.dtype) -> None:
    case = BY_ID["state"]
    arguments = case.arguments(widest)
    leaves = list(leaves_of(arguments).values())
    which = OUTPUTS.index(used)
    found = torch.autograd.grad(case.call(conv_lstm, arguments, backend=backend)[which].sum(), leaves)
    exact = torch.autograd.grad(case.call(oracle, arguments)[which].sum(), leaves)
    for a, b in zip(found, exact):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("only", EVERYTHING)
def test_gradient_of_one_tensor_alone(only: str, backend: str, widest: torch.dtype) -> None:
    case = BY_ID["lengths_reverse"]
    arguments = case.arguments(widest)
    all_grads = results(case, conv_lstm, arguments, backend=backend)
    for name in TENSORS:
        if name != only:
            arguments[name] = arguments[name].detach()
    outputs = case.call(conv_lstm, arguments, backend=backend)
    generator = torch.Generator().manual_seed(1)
    grads = [normal(o.shape, generator).to(widest) for o in outputs]
    (found,) = torch.autograd.grad(outputs, [arguments[only]], grads)
    torch.testing.assert_close(found, all_grads[f"gradient of {only}"])


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("name", ["plain", "lengths_reverse", "no_input", "groups_2", "circular"])
def test_first_and_second_derivatives_by_finite_differences(name: str, memory: str, float64_backend: str) -> None:
    case = BY_ID[name]
    arguments = case.arguments(torch.float64)
    names = [n for n in TENSORS if arguments[n] is not None]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return case.call(conv_lstm, arguments | dict(zip(names, tensors)), memory=memory, backend=float64_backend)

    leaves = tuple(arguments[n] for n in names)
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("name", ["plain", "peephole", "frame_1d", "channels_17_5", "channels_1_33_wide_frame"])
def test_chunked_sequence_equals_whole(name: str, reverse: bool, dtype: torch.dtype, backend: str) -> None:
    case = BY_ID[name]
    a = case.arguments(dtype)
    call = functools.partial(
        conv_lstm,
        weight_ih=a["weight_ih"],
        weight_hh=a["weight_hh"],
        bias=a["bias"],
        peephole=a["peephole"],
        reverse=reverse,
        backend=backend,
    )
    with torch.no_grad():
        whole, (h_whole, c_whole) = call(a["input"])
        parts = [a["input"][:, :1], a["input"][:, 1:]]
        state, outputs = None, []
        for part in reversed(parts) if reverse else parts:
            output, state = call(part, state=state)
            outputs.append(output)
    joined = torch.cat(outputs[::-1] if reverse else outputs, 1)
    for part, all_at_once in ((joined, whole), (state[0], h_whole), (state[1], c_whole)):
        torch.testing.assert_close(part, all_at_once, **exactly(backend, dtype))


def test_inference_equals_training_forward_bit_for_bit(backend: str) -> None:
    case = BY_ID["everything"]
    arguments = case.arguments(torch.float32)
    training = case.call(conv_lstm, arguments, backend=backend)
    with torch.no_grad():
        inference = case.call(conv_lstm, arguments, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(training, inference))
    assert not inference[0].requires_grad


def test_outputs_are_channels_last_and_c_is_wide(backend: str, dtypes: tuple) -> None:
    case = BY_ID["plain"]
    for dtype in dtypes:
        output, h_n, c_n = case.call(conv_lstm, case.arguments(dtype), backend=backend)
        assert output.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
        assert h_n.is_contiguous(memory_format=torch.channels_last)
        assert output.dtype == h_n.dtype == dtype
        assert c_n.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_past_its_length_a_sample_reads_nothing_and_gives_zero(reverse: bool, backend: str) -> None:
    case = BY_ID["lengths_reverse" if reverse else "lengths"]
    a = case.arguments(torch.float32)
    clean = results(case, conv_lstm, a, backend=backend)
    spoiled = a["input"].detach().clone()
    for sample, length in enumerate(case.lengths):
        spoiled[sample, length:] = float("nan")
        assert (clean["output"][sample, length:] == 0).all()
        assert (clean["gradient of input"][sample, length:] == 0).all()
    found = results(case, conv_lstm, a | {"input": spoiled.requires_grad_()}, backend=backend)
    for name, value in clean.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
    empty = case.lengths.index(0)
    assert torch.equal(clean["h_n"][empty], a["h0"][empty])
    assert torch.equal(clean["c_n"][empty], a["c0"][empty])


def test_any_integer_type_of_lengths(backend: str) -> None:
    case = BY_ID["lengths"]
    a = case.arguments(torch.float32)
    outputs = [
        case.call(conv_lstm, a | {"lengths": a["lengths"].to(dtype)}, backend=backend)[0]
        for dtype in (torch.int64, torch.int32, torch.uint8)
    ]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_nan_stays_within_its_receptive_field(backend: str) -> None:
    case = Case("nan", batch=3, time=3, space=(16, 15), options={"algorithm": "direct"})
    a = case.arguments(torch.float32)
    with torch.no_grad():
        a["input"][1, 1, 2, 8, 7] = float("nan")
        output, h_n, c_n = case.call(conv_lstm, a, backend=backend)
    nan = output.isnan()
    assert not nan[[0, 2]].any()
    assert not nan[1, 0].any()
    for t, reach in ((1, 1), (2, 2)):
        within = torch.zeros(16, 15, dtype=torch.bool)
        within[8 - reach : 9 + reach, 7 - reach : 8 + reach] = True
        assert (nan[1, t] == within).all()
    assert h_n[1].isnan().any()
    assert c_n[1].isnan().any()


def test_infinite_input_saturates(backend: str) -> None:
    case = BY_ID["kernel_1"]
    a = case.arguments(torch.float32)
    with torch.no_grad():
        a["input"].fill_(float("inf"))
        a["weight_ih"].fill_(1.0)
        output, _, c_n = case.call(conv_lstm, a, backend=backend)
    torch.testing.assert_close(c_n, torch.full_like(c_n, case.time))
    torch.testing.assert_close(output[:, 0], torch.full_like(output[:, 0], torch.tensor(1.0).tanh().item()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_infinite_cell_state_saturates(dtype: torch.dtype, backend: str) -> None:
    case = BY_ID["kernel_hh_1_channels_32"]
    a = case.arguments(dtype)
    with torch.no_grad():
        a["c0"].fill_(math.inf)
        output, _, c_n = case.call(conv_lstm, a, backend=backend)
    assert (c_n == math.inf).all()
    assert not output.isnan().any()


BAD = {
    "reverse": ({"reverse": "yes"}, TypeError, "reverse is 'yes', expected True or False"),
    "rank": ({"input": torch.zeros(2, 3, 6, 5)}, ValueError, "input has 4 dims, expected 5"),
    "channels": ({"input": torch.zeros(2, 3, 7, 6, 5)}, ValueError, "input has 7 channels, expected 3"),
    "no_steps": ({"input": torch.zeros(2, 0, 3, 6, 5)}, ValueError, "input has 0 time steps, expected at least 1"),
    "no_pixels": ({"input": torch.zeros(2, 3, 3, 0, 5)}, ValueError, "input has an empty frame, expected"),
    "input_dtype": ({"input": torch.zeros(2, 3, 3, 6, 5).double()}, TypeError, "input .*float64, expected .*float32"),
    "input_integer": (
        {"input": torch.zeros(2, 3, 3, 6, 5).long()},
        TypeError,
        "input .*int64, expected one of .*float",
    ),
    "input_type": ({"input": [[1.0]]}, TypeError, "input is a list, expected a Tensor"),
    "input_device": (
        {"input": torch.zeros(2, 3, 3, 6, 5, device="meta")},
        ValueError,
        "input is on meta, expected cpu",
    ),
    "input_sparse": (
        {"input": torch.zeros(2, 3, 3, 6, 5).to_sparse()},
        TypeError,
        r"input is a torch.sparse_coo tensor, expected a dense \(strided\) tensor$",
    ),
    "input_nested": (
        {"input": torch.nested.nested_tensor([torch.zeros(3, 3, 6, 5)] * 2, layout=torch.jagged)},
        TypeError,
        r"input is a nested tensor, expected a dense \(strided\) tensor$",
    ),
    "weight_hh_none": ({"weight_hh": None}, TypeError, "weight_hh is None, expected a Tensor"),
    "input_none": ({"input": None}, ValueError, "input is None, expected a Tensor with weight_ih"),
    "weight_ih_shape": ({"weight_ih": torch.zeros(12, 3, 3, 3)}, ValueError, r"weight_ih .*expected \[4C.*4C=16"),
    "weight_ih_rank": ({"weight_ih": torch.zeros(16, 3, 3)}, ValueError, "weight_ih .*expected .*2 kernel dims"),
    "weight_hh_shape": ({"weight_hh": torch.zeros(16, 5, 3, 3)}, ValueError, r"weight_hh .*expected \[4C, C, \*K\]"),
    "weight_hh_rank": ({"weight_hh": torch.zeros(16, 4)}, ValueError, "weight_hh .*expected .*1 to 3 kernel dims"),
    "bias_shape": ({"bias": torch.zeros(15)}, ValueError, r"bias has shape \[15\], expected \[16\]"),
    "bias_dtype": ({"bias": torch.zeros(16).half()}, TypeError, "bias .*float16, expected .*float32"),
    "peephole_shape": (
        {"peephole": torch.zeros(3, 4, 5, 5)},
        ValueError,
        r"peephole .*\[3, 4, 5, 5\], expected \[3, 4, 6, 5\]",
    ),
    "state_one": ({"state": (torch.zeros(2, 4, 6, 5),)}, TypeError, r"state is a tuple of 1, expected a pair \(h, c\)"),
    "state_tensor": ({"state": torch.zeros(2, 4, 6, 5)}, TypeError, "state is a Tensor, expected a pair"),
    "state_h_shape": ({"state": (torch.zeros(1, 4, 6, 5), None)}, ValueError, r"state h .*expected \[2, 4, 6, 5\]"),
    "state_c_shape": ({"state": (None, torch.zeros(2, 4, 5, 6))}, ValueError, r"state c .*expected \[2, 4, 6, 5\]"),
    "state_c_dtype": ({"state": (None, torch.zeros(2, 4, 6, 5).half())}, TypeError, "state c .*expected .*float32"),
    "lengths_float": ({"lengths": torch.tensor([1.0, 2.0])}, TypeError, "lengths .*float32, expected .*integers"),
    "lengths_list": ({"lengths": [1, 2]}, TypeError, "lengths has type list, expected a Tensor of integers"),
    "lengths_shape": ({"lengths": torch.tensor([1])}, ValueError, r"lengths has shape \[1\], expected \[2\]"),
    "lengths_negative": ({"lengths": torch.tensor([-1, 2])}, ValueError, "lengths has -1, expected 0 to 3"),
    "lengths_long": ({"lengths": torch.tensor([1, 4])}, ValueError, "lengths has 4, expected 0 to 3"),
    "lengths_device": (
        {"lengths": torch.tensor([1, 2], device="meta")},
        ValueError,
        "lengths is on meta, expected cpu",
    ),
    "steps_bool": ({"steps": True}, ValueError, "steps is True, expected an int >= 1"),
    "steps_differ": ({"steps": 4}, ValueError, "steps is 4, expected None or the 3 steps of input"),
    "steps_zero": ({"steps": 0}, ValueError, "steps is 0, expected an int >= 1"),
    "stride": ({"stride": 0}, ValueError, "stride is 0, expected an int >= 1 or a tuple of 2"),
    "stride_bool": ({"stride": True}, ValueError, "stride is True, expected an int >= 1 or a tuple of 2"),
    "stride_count": ({"stride": (1, 1, 1)}, ValueError, r"stride is \(1, 1, 1\), expected an int >= 1 or a tuple of 2"),
    "dilation": ({"dilation": -1}, ValueError, "dilation is -1, expected"),
    "padding_name": ({"padding": "full"}, ValueError, "padding is 'full', expected 'same', 'valid', an int"),
    "padding_negative": ({"padding": -1}, ValueError, "padding is -1, expected an int >= 0"),
    "padding_mode": ({"padding_mode": "mirror"}, ValueError, "padding_mode is 'mirror', expected one of zeros"),
    "padding_reflect": ({"padding": 5, "padding_mode": "reflect"}, ValueError, "padding is 5 .* expected at most 4 "),
    "padding_circular": ({"padding": 6, "padding_mode": "circular"}, ValueError, "padding is 6 .* expected at most 5 "),
    "kernel_too_large": ({"padding": 0, "dilation": 3}, ValueError, "input has size 6 .* expected at least 7 for a ke"),
    "groups": ({"groups": 3}, ValueError, "groups is 3, expected a positive divisor of 4C=16"),
    "groups_bool": ({"groups": True}, ValueError, "groups is True, expected an int >= 1"),
    "groups_channels": ({"groups": 2}, ValueError, "input has 3 channels, expected 6 from weight_ih .*groups=2"),
    "memory": ({"memory": "slow"}, ValueError, "memory is 'slow', expected one of fast, lean"),
    "backend": ({"backend": "gpu"}, ValueError, "backend is 'gpu', expected one of .*reference"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument_is_named_with_what_was_expected(name: str, host_backend: str) -> None:
    wrong, error, message = BAD[name]
    a = BY_ID["plain"].arguments(torch.float32)
    good = {n: a[n] for n in ("input", "weight_ih", "weight_hh", "bias")} | {"backend": host_backend}
    conv_lstm(**good)
    with pytest.raises(error, match=f"^conv_lstm: {message}"):
        conv_lstm(**(good | wrong))


def test_op_refuses_what_it_cannot_read(native_ops: Any) -> None:
    x, w_ih, w_hh = torch.randn(1, 2, 3, 4, 4), torch.randn(8, 3, 3, 3), torch.randn(8, 2, 3, 3)
    options = (2, [1, 1], [1, 1, 1, 1], [1, 1], "zeros", False, "direct")
    h, _, _, c, gates = native_ops.conv_lstm_forward(x, w_ih, w_hh, *[None] * 5, *options, "fast")
    with pytest.raises(RuntimeError, match="conv_lstm_backward: gates must be channels-last"):
        flat = gates[..., :1].expand_as(gates)
        native_ops.conv_lstm_backward(h, None, None, x, w_ih, w_hh, *[None] * 5, h, c, flat, *options, [1] * 7)
    with pytest.raises(RuntimeError, match="padding, dilation must be at most 2147483648, got"):
        wide = (2, [1, 1], [1, 1, 1, 1], [2**62, 1], "zeros", False, "direct")
        native_ops.conv_lstm_forward(x, w_ih, w_hh, *[None] * 5, *wide, "none")
    for empty, kernel in ((x[:, :, :0], w_ih[:, :0]), (x[..., :0, :], w_ih)):
        with pytest.raises(RuntimeError, match="conv_lstm_forward: x must be of at least one channel and pixel, got"):
            native_ops.conv_lstm_forward(empty, kernel, w_hh, *[None] * 5, *options, "none")
    with pytest.raises(RuntimeError, match="conv_lstm_forward: h0 must be of at least one pixel, got"):
        state = torch.zeros(1, 2, 0, 5)
        native_ops.conv_lstm_forward(None, None, w_hh, None, None, state, *[None] * 2, *options[:-1], "auto", "none")


def test_integers_of_numpy_are_taken(host_backend: str) -> None:
    a = BY_ID["plain"].arguments(torch.float32)
    call = functools.partial(conv_lstm, a["input"], a["weight_ih"], a["weight_hh"], backend=host_backend)
    options = {"stride": 2, "padding": 1, "dilation": 1, "groups": 1, "steps": 3}
    found, _ = call(**{name: np.int64(value) for name, value in options.items()})
    assert torch.equal(found, call(**options)[0])


def test_no_input_needs_state_and_steps(host_backend: str) -> None:
    weight, h = torch.zeros(16, 4, 3, 3), torch.zeros(2, 4, 6, 5)
    with pytest.raises(ValueError, match="state is None, expected both state and steps where input is None"):
        conv_lstm(None, None, weight, steps=2, backend=host_backend)
    with pytest.raises(ValueError, match="steps is None, expected both state and steps where input is None"):
        conv_lstm(None, None, weight, state=(h, None), backend=host_backend)
    with pytest.raises(ValueError, match=re.escape("state h has shape [2, 4, 6], expected [B, C, *S']")):
        conv_lstm(None, None, weight, state=(h[..., 0], None), steps=2, backend=host_backend)


def loss(case: Case, backend: str, *tensors: Tensor, lengths: Tensor | None = None) -> Tensor:
    arguments = dict.fromkeys((*TENSORS, "lengths")) | dict(zip(("input", "weight_ih", "weight_hh", "bias"), tensors))
    output, h_n, c_n = case.call(conv_lstm, arguments | {"lengths": lengths}, backend=backend)
    return output.square().sum() + h_n.sum() + c_n.sin().sum()


def tensors_of(case: Case, dtype: torch.dtype) -> list[Tensor]:
    arguments = case.arguments(dtype)
    return [arguments[n] for n in ("input", "weight_ih", "weight_hh", "bias")]


def test_compiled_call_is_one_op_a_direction_whatever_time_and_batch(kernel_backend: str) -> None:
    torch._dynamo.reset()
    graphs = Graphs()
    # Channels, batch and time all differ, or torch.compile guards that equal sizes stay equal.
    case = Case("dynamic", batch=5, time=7, channels=3, hidden=4, space=(9, 2))
    _, *weights = tensors_of(case, torch.float32)
    function = functools.partial(loss, case, kernel_backend)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=graphs)
    for time, batch in ((7, 5), (2, 6), (11, 2), (6, 13)):
        x = torch.randn(batch, time, 3, *case.space)
        lengths = torch.randint(0, time + 1, (batch,))
        value = compiled(x, *weights, lengths=lengths)
        found = torch.autograd.grad(value, weights)
        plain = function(x, *weights, lengths=lengths)
        assert torch.equal(value, plain)
        for a, b in zip(found, torch.autograd.grad(plain, weights)):
            torch.testing.assert_close(a, b)
    namespace = NAMESPACES[kernel_backend]
    assert len(graphs.forward) == len(graphs.backward) == 1
    assert [op for op in graphs.forward[0] if "convfast" in op] == [f"{namespace}.conv_lstm_forward.default"]
    assert [op for op in graphs.backward[0] if "convfast" in op] == [f"{namespace}.conv_lstm_backward.default"]
    assert not any("convolution" in op for op in graphs.forward[0] + graphs.backward[0])


@pytest.mark.parametrize("name", ["plain", "groups_2", "reflect", "stride_2"])
def test_compiles_without_graph_break(name: str, backend: str, widest: torch.dtype) -> None:
    torch._dynamo.reset()
    case = BY_ID[name]
    tensors = tensors_of(case, widest)
    compiled = torch.compile(functools.partial(loss, case, backend), fullgraph=True, backend="aot_eager")
    value, plain = compiled(*tensors), loss(case, backend, *tensors)
    torch.testing.assert_close(value, plain)
    for a, b in zip(torch.autograd.grad(value, tensors), torch.autograd.grad(plain, tensors)):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*tensors), plain)


def test_compiles_with_one_frame_for_all_steps(backend: str, widest: torch.dtype) -> None:
    torch._dynamo.reset()
    case = BY_ID["plain"]
    _, *weights = tensors_of(case, widest)

    def function(frame: Tensor) -> Tensor:
        repeated = loss(case, backend, frame.unsqueeze(1).expand(-1, 4, -1, -1, -1), *weights)
        return repeated + conv_lstm(frame.unsqueeze(1), *weights, steps=4, backend=backend)[0].sum()

    frame = torch.randn(2, 3, 6, 5, dtype=widest)
    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(frame), function(frame))


class Layer(torch.nn.Module):
    def __init__(self, case: Case, backend: str) -> None:
        super().__init__()
        _, *weights = tensors_of(case, torch.float32)
        self.weights = torch.nn.ParameterList([w.detach() for w in weights])
        self.backend = backend

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return conv_lstm(x, *list(self.weights), lengths=lengths, backend=self.backend)[0]  # for torch 2.11


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_exports(strict: bool, backend: str) -> None:
    case = BY_ID["plain"]
    layer = Layer(case, backend)
    x, lengths = case.arguments(torch.float32)["input"].detach(), torch.tensor([1, 3])
    exported = torch.export.export(layer, (x, lengths), strict=strict)
    torch.testing.assert_close(exported.module()(x, lengths), layer(x, lengths))
    ops = [str(node.target) for node in exported.graph.nodes]
    assert sum("convfast" in op for op in ops) == (backend != "reference")


def test_function_transforms(backend: str, widest: torch.dtype) -> None:
    case = BY_ID["plain"]
    tensors = tensors_of(case, widest)
    function = functools.partial(loss, case, backend)
    expected = torch.autograd.grad(function(*tensors), tensors)
    tensors = [t.detach() for t in tensors]
    for a, b in zip(torch.func.grad(function, argnums=(0, 1, 2, 3))(*tensors), expected):
        torch.testing.assert_close(a, b)

    inputs = torch.stack([tensors[0], -tensors[0]])
    over_inputs = (0, None, None, None)
    each = [function(x, *tensors[1:]) for x in inputs]
    torch.testing.assert_close(torch.func.vmap(function, over_inputs)(inputs, *tensors[1:]), torch.stack(each))

    per_sample = torch.func.vmap(torch.func.grad(function, argnums=2), over_inputs)(inputs, *tensors[1:])
    torch.testing.assert_close(per_sample[0], expected[2])

    def total(w: Tensor) -> Tensor:
        return torch.func.vmap(lambda x: function(x, tensors[1], w, tensors[3]))(inputs).sum()

    torch.testing.assert_close(torch.func.grad(total)(tensors[2]), per_sample.sum(0))
    weights = tensors[2].requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(total(weights), weights)[0], per_sample.sum(0))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_lengths_in_per_sample_gradients(backend: str, widest: torch.dtype) -> None:
    case = BY_ID["plain"]
    x, *weights = (t.detach() for t in tensors_of(case, widest))
    lengths = torch.tensor([[1, 3], [2, 0]])

    def function(x: Tensor, lengths: Tensor) -> Tensor:
        return loss(case, backend, x, *weights, lengths=lengths)

    found = torch.func.vmap(torch.func.grad(function))(torch.stack([x, -x]), lengths)
    expected = [torch.func.grad(function)(sign * x, own) for sign, own in zip((1, -1), lengths)]
    torch.testing.assert_close(found, torch.stack(expected))
    with pytest.raises(ValueError, match="lengths has 4, expected 0 to 3"):
        torch.func.grad(function)(x, (lengths[0] + 1).cpu())


def test_hessian_by_two_ways(backend: str, widest: torch.dtype) -> None:
    case = Case("small", batch=1, time=2, channels=1, hidden=1, space=(3,), kernel=(3,))
    x, w_ih, w_hh, bias = (t.detach() for t in tensors_of(case, widest))
    function = functools.partial(loss, case, backend, x, w_ih, w_hh)
    exact = torch.autograd.functional.hessian(lambda b: loss_of_oracle(case, x, w_ih, w_hh, b), bias)
    torch.testing.assert_close(torch.autograd.functional.hessian(function, bias), exact)
    torch.testing.assert_close(torch.func.jacrev(torch.func.grad(function))(bias), exact)


def loss_of_oracle(case: Case, *tensors: Tensor) -> Tensor:
    output, (h_n, c_n) = oracle(*tensors, **case.options)
    return output.square().sum() + h_n.sum() + c_n.sin().sum()


def test_forward_mode_derivative(backend: str, widest: torch.dtype) -> None:
    case = BY_ID["plain"]
    tensors = [t.detach() for t in tensors_of(case, widest)]
    tangents = [torch.randn_like(t) for t in tensors]
    function = functools.partial(loss, case, backend)
    _, derivative = torch.func.jvp(function, tuple(tensors), tuple(tangents))
    grads = torch.func.grad(function, argnums=(0, 1, 2, 3))(*tensors)
    torch.testing.assert_close(derivative, sum((g * t).sum() for g, t in zip(grads, tangents)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("name", ["state", "groups_2", "no_input"])
def test_autocast_equals_casting_by_hand(name: str, dtype: torch.dtype, backend: str) -> None:
    case = BY_ID[name]
    arguments = case.arguments(torch.float32)
    with torch.autocast(torch.get_default_device().type, dtype):
        outputs = case.call(conv_lstm, arguments, backend=backend)
    assert [o.dtype for o in outputs] == [dtype, dtype, torch.float32]
    by_hand = {n: t if n in ("c0", "lengths") or t is None else t.detach().to(dtype) for n, t in arguments.items()}
    for a, b in zip(outputs, case.call(conv_lstm, by_hand, backend=backend)):
        assert torch.equal(a, b)
    leaves = list(leaves_of(arguments).values())
    grads = torch.autograd.grad([o.float().sum() for o in outputs], leaves)
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in grads)


def test_autocast_mixes_dtypes_but_leaves_float64_alone(float64_backend: str) -> None:
    case = BY_ID["plain"]
    a = case.arguments(torch.float32)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        mixed = case.call(conv_lstm, a | {"input": a["input"].bfloat16()}, backend=float64_backend)
        assert mixed[0].dtype == torch.bfloat16
        assert case.call(conv_lstm, case.arguments(torch.float64), backend=float64_backend)[0].dtype == torch.float64
        with pytest.raises(TypeError, match=r"input has dtype .*float64, expected .*bfloat16"):
            case.call(conv_lstm, a | {"input": a["input"].double()}, backend=float64_backend)


def test_backward_under_autocast_keeps_float32(backend: str) -> None:
    case = BY_ID["plain"]
    arguments = case.arguments(torch.float32)
    plain = results(case, conv_lstm, arguments, backend=backend)
    outputs = case.call(conv_lstm, arguments, backend=backend)
    generator = torch.Generator().manual_seed(1)
    grads = [normal(o.shape, generator).float() for o in outputs]
    leaf = arguments["weight_hh"]
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        (found,) = torch.autograd.grad(outputs, [leaf], grads)
    torch.testing.assert_close(found, plain["gradient of weight_hh"])


@pytest.mark.parametrize(("memory", "most"), [("fast", 6.0), ("lean", 2.0)])
@pytest.mark.parametrize("name", ["state", "peephole", "lengths"])
def test_memory_kept_for_backward(name: str, memory: str, most: float, backend: str) -> None:
    case = BY_ID[name]
    arguments = case.arguments(torch.float32)
    call = functools.partial(case.call, conv_lstm, arguments, memory=memory, backend=backend)
    (output, *_), kept = kept_for_backward(call, leaves_of(arguments).values(), but_integers=True)
    assert 0 < kept <= most * output.nbytes


@pytest.mark.parametrize("algorithm", ["winograd", "direct"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
def test_gates_too_many_for_the_cache_are_those_of_each_sample(
    dtype: torch.dtype, algorithm: str, native_ops: Any
) -> None:
    generator = torch.Generator().manual_seed(0)
    batch, time, inputs, channels, size = 4, 33, 3, 32, 32  # 33 MiB of gates in 16 bits; 8 a sample are not streamed
    x, weight_ih, weight_hh, upstream = (
        (normal(shape, generator) * scale).to(dtype)
        for shape, scale in (
            ((batch, time, inputs, size, size), 1),
            ((4 * channels, inputs, 3, 3), 0.2),
            ((4 * channels, channels, 3, 3), 0.05),
            ((batch, time, channels, size, size), 1),
        )
    )

    def run(samples: slice) -> tuple[Tensor, Tensor]:
        leaf = x[samples].requires_grad_()
        h, _ = conv_lstm(leaf, weight_ih, weight_hh, algorithm=algorithm, backend="cpu")
        return h, *torch.autograd.grad(h, leaf, upstream[samples])

    apart = [run(slice(sample, sample + 1)) for sample in range(batch)]
    for together, parts in zip(run(slice(None)), zip(*apart)):
        assert torch.equal(together, torch.cat(parts))


def test_explicit_backend_that_cannot_run_is_an_error() -> None:
    a = BY_ID["plain"].arguments(torch.float32)
    meta = {n: a[n].detach().to("meta") for n in ("input", "weight_ih", "weight_hh")}
    with pytest.raises(RuntimeError, match=r"^conv_lstm: backend 'cpu' .*: tensors are on meta, expected cpu"):
        conv_lstm(**meta, backend="cpu")
    assert conv_lstm(**meta)[0].shape == (2, 3, 4, 6, 5)


def test_available_gives_true_or_a_reason() -> None:
    found = convfast.available("conv_lstm")
    assert found["reference"] is True
    assert found["cpu"] is True or (isinstance(found["cpu"], str) and found["cpu"])
    with pytest.raises(ValueError, match=r"op is 'conv_gru', expected one of lstm_gates, conv_lstm"):
        convfast.available("conv_gru")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_without_a_gpu_says_so() -> None:
    assert convfast.available("conv_lstm")["triton"] == "torch finds no GPU"
    a = BY_ID["plain"].arguments(torch.float32)
    with pytest.raises(RuntimeError, match=r"^conv_lstm: backend 'triton' .*: tensors are on cpu, expected cuda"):
        conv_lstm(a["input"], a["weight_ih"], a["weight_hh"], backend="triton")


def test_triton_that_is_missing_or_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    if not torch.cuda.is_available():
        assert triton_runtime.driver_reason().startswith("triton cannot launch kernels (RuntimeError: 0 active drivers")
    monkeypatch.setattr(triton, "__version__", "3.3.1")
    assert triton_runtime.reason() == "triton is 3.3.1, expected at least 3.4"
    monkeypatch.setitem(sys.modules, "triton", None)
    assert re.fullmatch(r"triton cannot be imported \(.*\); pip install triton", triton_runtime.reason())


def test_triton_takes_tf32_where_convolutions_do() -> None:
    code = """
import torch
from convfast.triton.runtime import input_precision
for setting in ("", "torch.backends.cudnn.allow_tf32 = False", "torch.backends.cudnn.allow_tf32 = True",
                "torch.backends.cudnn.conv.fp32_precision = 'ieee'"):
    exec(setting)
    print(input_precision(torch.float32), input_precision(torch.float16))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines() == ["tf32 ieee", "ieee ieee", "tf32 ieee", "ieee ieee"]


def test_triton_refuses_float64(triton_ops: Any) -> None:
    a = BY_ID["plain"].arguments(torch.float64)
    with pytest.raises(RuntimeError, match=r"^conv_lstm: backend 'triton' .*: tensors are torch.float64, expected"):
        conv_lstm(a["input"], a["weight_ih"], a["weight_hh"], backend="triton")


def test_import_builds_and_loads_nothing() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import convfast
print({name.partition(".")[0] for name in set(sys.modules) - before} & {"triton", "ninja"})
print("torch._dynamo" in set(sys.modules) - before, hasattr(torch.ops.convfast, "conv_lstm_forward"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["set()", "False", "False"]


def test_environment_names_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    a = BY_ID["plain"].arguments(torch.float32)
    call = functools.partial(conv_lstm, a["input"], a["weight_ih"], a["weight_hh"])
    monkeypatch.setenv("CONVFAST_BACKEND", "reference")
    assert torch.equal(call()[0], call(backend="reference")[0])
    monkeypatch.setenv("CONVFAST_BACKEND", "abacus")
    with pytest.raises(ValueError, match="conv_lstm: CONVFAST_BACKEND is 'abacus', expected one of cpu, triton"):
        call()
    call(backend="reference")
    monkeypatch.setenv("CONVFAST_BACKEND", "")
    call()


OPCHECK = ["plain", "everything", "no_input", "input_convolved_before", "frame_1d", "frame_3d", "stride_2"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("save", ["none", "fast", "lean"])
@pytest.mark.parametrize(("name", "layout"), [*itertools.product(OPCHECK, LAYOUTS), ("batch_0", "contiguous")])
def test_ops_and_their_fakes_agree(
    name: str, save: str, layout: str, dtype: torch.dtype, kernel_ops: Any
) -> None:
    case = BY_ID[name]
    # The rest of opcheck takes a second a call and does not look at layouts.
    checks = ["test_schema", "test_faketensor"]
    if name == "everything" and layout == "contiguous":
        checks += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
    a = {n: None if t is None else t.detach() for n, t in case.arguments(dtype, layout).items()}
    if a["lengths"] is not None:
        a["lengths"].fill_(case.time)  # past a length, what is saved is undefined, and opcheck compares it
    dims = len(case.space)
    options, kernel = case.options, case.kernel

    def each(value: int | tuple[int, ...]) -> list[int]:
        return [value] * dims if isinstance(value, int) else list(value)

    dilation = each(options.get("dilation", 1))
    totals = [d * (k - 1) for d, k in zip(dilation, kernel)]
    padding = [p for n in totals for p in (n // 2, n - n // 2)]
    settings = (
        case.time, each(options.get("stride", 1)), padding, dilation,
        options.get("padding_mode", "zeros"), options.get("reverse", False), "auto",
    )  # fmt: skip
    operands = tuple(a[n] for n in (*TENSORS, "lengths"))
    library.opcheck(kernel_ops.conv_lstm_forward.default, (*operands, *settings, save), test_utils=checks)
    if save == "none":
        return
    h, h_n, c_n, c, gates = kernel_ops.conv_lstm_forward(*operands, *settings, save)
    for wanted in ([a[n] is not None for n in TENSORS], [False] * 7):
        grads = (torch.randn_like(h), torch.randn_like(h_n), torch.randn_like(c_n))
        arguments = (*grads, *operands, h, c, gates, *settings, [int(w) for w in wanted])
        library.opcheck(kernel_ops.conv_lstm_backward.default, arguments, test_utils=checks)
