"""`convfast.conv1d` against nn.Conv1d in float64, and everything that a caller may do with it."""

import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, library

from convfast import conv1d
from convfast.backends import NAMESPACES
from convfast.ops import conv1d_lengths
from convfast.reference.conv1d import ACTIVATIONS
from tests.cases import (
    CONV1D,
    CONV1D_CASES,
    DTYPES,
    EMPTY_CONV1D,
    SEQUENCE_LAYOUTS,
    Conv1dCase,
    arrange,
    exactly,
    name_of,
    normal,
    threads,
)
from tests.graphs import Graphs
from tests.kept import kept_for_backward
from tests.oracle import assert_close_where_drawn, assert_matches, leaves_of, results, summed, with_gradients
from tests.oracle import conv1d as oracle

pytestmark = pytest.mark.usefixtures("poisoned_memory")
OPS = ("conv1d",)
ROOT = Path(__file__).parent.parent
TENSORS = ("input", "weight", "bias")
each_case = pytest.mark.parametrize("case", CONV1D_CASES, ids=lambda case: case.id)
check = functools.partial(assert_matches, oracle, conv1d)


@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_results_and_gradients_match_oracle(case: Conv1dCase, dtype: torch.dtype, backend: str) -> None:
    check(case, dtype, backend)


@pytest.mark.parametrize("time_major", [False, True], ids=["batch_major", "time_major"])
@pytest.mark.parametrize("layout", SEQUENCE_LAYOUTS)
@pytest.mark.parametrize("name", ["same_even_kernel", "gelu", "lengths", "channels_32", "channels_first", "everything"])
def test_layouts_match_oracle(name: str, layout: str, time_major: bool, backend: str) -> None:
    check(CONV1D[name], torch.float32, backend, layout, time_major=time_major)


@st.composite
def cases(draw: st.DrawFn) -> Conv1dCase:
    mode = draw(st.sampled_from(("zeros", "reflect", "replicate", "circular")))
    kernel, dilation = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    span = dilation * (kernel - 1)
    padding = draw(st.sampled_from(("valid", "same", "full")) | st.integers(0, 4))
    before, behind = {"valid": (0, 0), "same": (span // 2, span - span // 2), "full": (span, span)}.get(
        padding, (padding, padding)
    )
    shortest = {"reflect": max(before, behind) + 1, "circular": max(before, behind)}.get(mode, 1)
    least = max(shortest, span + 1 - before - behind, 1)
    time = draw(st.integers(least, least + 8))
    batch, groups = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    length = st.just(0) | st.integers(max(shortest, 1), time)
    return Conv1dCase(
        "drawn",
        batch=batch,
        time=time,
        features=groups * draw(st.integers(1, 4) | st.sampled_from((16, 24))),
        channels=groups * draw(st.integers(1, 5) | st.sampled_from((16, 32))),
        kernel=kernel,
        bias=draw(st.booleans()),
        lengths=draw(st.none() | st.tuples(*[length] * batch)),
        options={
            "stride": 1 if padding == "same" else draw(st.integers(1, 4)),
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "padding_mode": mode,
            "activation": draw(st.sampled_from(ACTIVATIONS)),
            "channels_first": draw(st.booleans()),
        },
    )


@pytest.mark.parametrize("layout", SEQUENCE_LAYOUTS)
def test_any_options_match_oracle(layout: str, backend: str, widest: torch.dtype) -> None:
    @given(cases(), st.booleans())
    def check_drawn(case: Conv1dCase, time_major: bool) -> None:
        found = results(case, conv1d, case.arguments(widest, layout), time_major=time_major, backend=backend)
        for name, value in results(case, oracle, case.arguments(widest, layout)).items():
            assert_close_where_drawn(found[name], value, name)

    check_drawn()


@pytest.mark.parametrize("time_major", [False, True], ids=["batch_major", "time_major"])
@pytest.mark.parametrize("name", ["plain", "lengths", "channels_first", "time_1"])
def test_output_has_the_memory_asked_for(name: str, time_major: bool, backend: str, dtypes: tuple) -> None:
    case = CONV1D[name]
    for dtype in dtypes:
        output = case.call(conv1d, case.arguments(dtype), time_major=time_major, backend=backend)
        assert (output.transpose(0, 1) if time_major else output).is_contiguous()
        assert output.dtype == dtype


@pytest.mark.parametrize("layout", SEQUENCE_LAYOUTS)
@pytest.mark.parametrize("name", ["plain", "lengths", "silu"])
def test_gradient_of_output_may_have_any_layout_and_is_not_written_to(name: str, layout: str, backend: str) -> None:
    case = CONV1D[name]
    arguments = case.arguments(torch.float32)
    leaves = list(leaves_of(arguments).values())
    output = case.call(conv1d, arguments, backend=backend)
    grad = arrange(torch.randn_like(output), layout)
    before = grad.clone(memory_format=torch.contiguous_format)
    found = torch.autograd.grad(output, leaves, grad, retain_graph=True)
    assert torch.equal(grad, before)
    for a, b in zip(found, torch.autograd.grad(output, leaves, before)):
        torch.testing.assert_close(a, b)


def test_empty_batch(backend: str, dtypes: tuple) -> None:
    for dtype in dtypes:
        values = results(EMPTY_CONV1D, conv1d, EMPTY_CONV1D.arguments(dtype), backend=backend)
        assert values["output"].shape == (0, 9, 6)
        assert values["gradient of weight"].shape == (6, 4, 3)
        assert not any(value.any() for value in values.values())


@pytest.mark.parametrize("only", TENSORS)
@pytest.mark.parametrize("name", ["lengths", "gelu"])
def test_gradient_of_one_tensor_alone(name: str, only: str, backend: str, widest: torch.dtype) -> None:
    case = CONV1D[name]
    arguments = case.arguments(widest)
    all_grads = results(case, conv1d, arguments, backend=backend)
    some = {n: t if n == only or t is None else t.detach() for n, t in arguments.items()}
    found = with_gradients({"output": case.call(conv1d, some, backend=backend)}, {only: some[only]})
    torch.testing.assert_close(found[f"gradient of {only}"], all_grads[f"gradient of {only}"])


DERIVED = [*ACTIVATIONS[1:], "no_bias", "groups_2", "circular", "lengths", "lengths_reflect", "everything"]


@pytest.mark.parametrize("name", DERIVED)
def test_first_and_second_derivatives_by_finite_differences(name: str, float64_backend: str) -> None:
    case = CONV1D[name]
    arguments = case.arguments(torch.float64)
    leaves = leaves_of(arguments)

    def function(*tensors: Tensor) -> Tensor:
        return case.call(conv1d, arguments | dict(zip(leaves, tensors)), backend=float64_backend)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tuple(leaves.values()), fast_mode=True)


WITH_LENGTHS = [case.id for case in CONV1D_CASES if case.lengths is not None]


@pytest.mark.parametrize("name", WITH_LENGTHS)
def test_past_its_length_a_sample_reads_nothing_and_gives_zero(name: str, backend: str) -> None:
    case = CONV1D[name]
    a = case.arguments(torch.float32)
    clean = results(case, conv1d, a, backend=backend)
    options = {n: case.options[n] for n in ("stride", "padding", "dilation") if n in case.options}
    ends = conv1d_lengths(a["lengths"], case.kernel, **options)
    spoiled = a["input"].detach().clone()
    for sample, (length, end) in enumerate(zip(case.lengths, ends)):
        spoiled[sample, length:] = float("nan")
        assert (clean["output"][sample, end:] == 0).all()
        assert (clean["output"][sample, :end] != 0).any() == (end > 0)
        assert (clean["gradient of input"][sample, length:] == 0).all()
    found = results(case, conv1d, a | {"input": spoiled.requires_grad_()}, backend=backend)
    for key, value in clean.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", ["plain", "stride_2", "tiles_of_4", "tiles_of_2", "lengths", "everything"])
def test_same_bits_again_and_a_sample_does_not_depend_on_its_batch(name: str, backend: str) -> None:
    case = CONV1D[name]
    a = case.arguments(torch.float32)
    whole = results(case, conv1d, a, backend=backend)
    again = results(case, conv1d, a, backend=backend)
    assert all(torch.equal(again[key], value) for key, value in whole.items())
    generator = torch.Generator().manual_seed(1)
    grad = normal(whole["output"].shape, generator).float()
    for b in range(case.batch):
        length = case.time if case.lengths is None else case.lengths[b]
        lengths = None if case.lengths is None else a["lengths"][b : b + 1]
        alone = a | {"input": a["input"][b : b + 1].detach().requires_grad_(), "lengths": lengths}
        output = case.call(conv1d, alone, backend=backend)
        (found,) = torch.autograd.grad(output, alone["input"], grad[b : b + 1])
        torch.testing.assert_close(output[0], whole["output"][b], **exactly(backend))
        torch.testing.assert_close(found[0], whole["gradient of input"][b], **exactly(backend))
        assert length == 0 or output.any()


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("name", ["features_33_channels_70", "tiles_of_4", "everything"])
def test_any_number_of_threads(name: str, count: int, backend: str) -> None:
    case = CONV1D[name]
    found = []
    for number in (1, count):
        with threads(number):
            found.append(results(case, conv1d, case.arguments(torch.float32), backend=backend))
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, **({} if summed(key) else exactly(backend)))


@pytest.mark.parametrize("name", ["tiles_of_4", "everything"])
def test_inference_equals_training_forward_bit_for_bit(name: str, backend: str) -> None:
    case = CONV1D[name]
    arguments = case.arguments(torch.float32)
    training = case.call(conv1d, arguments, backend=backend)
    with torch.no_grad():
        inference = case.call(conv1d, arguments, backend=backend)
    assert torch.equal(training, inference)
    assert training.requires_grad
    assert not inference.requires_grad


def test_any_integer_type_of_lengths(backend: str) -> None:
    case = CONV1D["lengths"]
    a = case.arguments(torch.float32)
    outputs = [
        case.call(conv1d, a | {"lengths": a["lengths"].to(dtype)}, backend=backend)
        for dtype in (torch.int64, torch.int32, torch.uint8)
    ]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_lengths_are_not_looked_at_where_that_would_synchronize(mode: str) -> None:
    case = Conv1dCase("meta", lengths=(9, 0, 3), options={"padding": 1, "padding_mode": mode, "activation": "gelu"})
    a = {n: t.detach().to("meta").requires_grad_(n != "lengths") for n, t in case.arguments(torch.float32).items()}
    values = results_on_meta(case, a)
    assert [v.shape for v in values] == [(3, 9, 6), (3, 9, 4), (6, 4, 3), (6,)]


def results_on_meta(case: Conv1dCase, arguments: dict[str, Tensor]) -> list[Tensor]:
    output = case.call(conv1d, arguments)
    return [output, *torch.autograd.grad(output, list(leaves_of(arguments).values()), torch.empty_like(output))]


@pytest.mark.parametrize("padding", [0, 2, "valid", "same", "full"])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(1, 1, 1), (3, 1, 2), (4, 1, 1), (3, 2, 1), (2, 3, 3)])
def test_output_lengths_are_those_of_each_sample_alone(
    padding: int | str, kernel: int, stride: int, dilation: int
) -> None:
    if padding == "same":
        stride = 1
    lengths = torch.arange(9, dtype=torch.int32).view(3, 3)
    found = conv1d_lengths(lengths, kernel, stride, padding, dilation)
    assert found.dtype == torch.int64
    assert found.shape == lengths.shape
    for length, end in zip(lengths.flatten().tolist(), found.flatten().tolist()):
        expected = 0
        try:
            if length:
                options = {"stride": stride, "padding": padding, "dilation": dilation, "backend": "reference"}
                expected = conv1d(torch.zeros(1, length, 1), torch.zeros(1, 1, kernel), **options).shape[1]
        except ValueError as error:
            assert "expected at least" in str(error)
        assert end == expected
    assert conv1d_lengths(lengths.to("meta"), kernel, stride, padding, dilation).is_meta


def test_nan_stays_within_its_receptive_field(backend: str) -> None:
    case = CONV1D["same_even_kernel"]
    a = case.arguments(torch.float32)
    with torch.no_grad():
        a["input"][1, 4, 2] = float("nan")
        nan = case.call(conv1d, a, backend=backend).isnan()
    within = torch.zeros(3, 9, 6, dtype=torch.bool)
    within[1, 2:6] = True
    assert torch.equal(nan, within)


@pytest.mark.parametrize(
    "kernel, features, options, tiles",
    [
        (3, 16, {}, True),
        (5, 40, {"padding": 2, "activation": "relu"}, True),
        (3, 15, {}, False),
        (4, 16, {}, False),
        (3, 16, {"stride": 2}, False),
        (3, 16, {"dilation": 2}, False),
        (3, 32, {"groups": 2}, False),
    ],
)
def test_winograd_where_it_can_be_had(
    kernel: int, features: int, options: dict, tiles: bool, native_ops: Any
) -> None:
    # Sums of small integers are exact, but for Winograd, whose points are irrational.
    x, weight, dy = (
        torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(0)).float().requires_grad_()
        for shape in ((3, 70, features), (16, features // options.get("groups", 1), kernel), (3, 70, 16))
    )

    def found(function: Any, dtype: torch.dtype, **backend: str) -> list[Tensor]:
        a, w = (t.detach().to(dtype).requires_grad_() for t in (x, weight))
        y = function(a, w, None, **options, **backend)
        return [y.detach(), *torch.autograd.grad(y, (a, w), dy[:, : y.shape[1]].to(dtype))]

    exact = found(oracle, torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(found(conv1d, torch.float64, backend="cpu"), exact))
    rounded = [not torch.equal(a.double(), b) for a, b in zip(found(conv1d, torch.float32, backend="cpu"), exact)]
    assert rounded == [tiles] * 3


@pytest.mark.parametrize(
    "batch, rows, channels, tiles", [(4, 8, 16, False), (1, 33, 16, True), (1, 32, 136, True), (1, 2, 296, True)]
)
def test_few_rows_transform_no_small_weights(
    batch: int, rows: int, channels: int, tiles: bool, native_ops: Any
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randint(-3, 4, shape, generator=generator).float()
        for shape in ((batch, rows + 2, channels), (channels, channels, 3))
    )
    found, exact = conv1d(x, weight, None, backend="cpu"), oracle(x.double(), weight.double(), None)
    assert torch.equal(found.double(), exact) != tiles


def test_nan_stays_within_the_tiles_that_read_it(native_ops: Any) -> None:
    for kernel, tile in ((3, 4), (5, 2)):
        x, weight = torch.randn(2, 70, 16), torch.randn(16, 16, kernel)
        with torch.no_grad():
            clean = conv1d(x, weight, None, padding=kernel // 2, backend="cpu")
            x[1, 33, 2] = float("nan")
            found = conv1d(x, weight, None, padding=kernel // 2, backend="cpu")
        first, last = (33 + reach for reach in (-(kernel // 2), kernel // 2))
        outside = torch.ones(70, dtype=torch.bool)
        outside[first // tile * tile : last // tile * tile + tile] = False
        assert torch.equal(found[0], clean[0])
        assert torch.equal(found[1, outside], clean[1, outside])
        assert found[1, first : last + 1].isnan().all()


@pytest.mark.parametrize("channels", [32, 5])
def test_relu_keeps_a_nan(backend: str, channels: int) -> None:
    x = torch.randn(2, 70, 8)
    x[1, 2, 3] = float("nan")
    with torch.no_grad():
        y = conv1d(x, torch.randn(channels, 8, 3), None, padding=1, activation="relu", backend=backend)
    within = torch.zeros(2, 70, channels, dtype=torch.bool)
    within[1, 1:4] = True
    assert torch.equal(y.isnan(), within)
    assert (y[~within] == 0).any() and (y[~within] >= 0).all()


FIRST_CALL = """
import torch, convfast
weight = (0.01 * torch.randn(1024, 1024, 3)).requires_grad_()
x, dy = torch.randn(3, 70, 1024), torch.randn(3, 68, 1024)
found, = torch.autograd.grad(convfast.conv1d(x, weight, backend="cpu"), weight, dy)
torch.set_num_threads(1)
plain = torch.nn.functional.conv1d(x.transpose(1, 2), weight)
expected, = torch.autograd.grad(plain, weight, dy.transpose(1, 2))
torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
"""


def test_threads_share_sums_in_the_first_call_of_a_process(native_ops: Any) -> None:
    # Threads that are new say that there is one of them.
    code = [sys.executable, "-c", FIRST_CALL]
    done = subprocess.run(
        code, env=os.environ | {"OMP_NUM_THREADS": "16"}, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("groups", [1, 2])
def test_threads_share_sums_of_large_weights(groups: int, native_ops: Any) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 70, 2048), (0.01 * torch.randn(2040, 2048 // groups, 3)).requires_grad_()
    bias = torch.randn(2040, requires_grad=True)
    dy = torch.randn(3, 68, 2040)
    with threads(7 * groups):  # sums of their own would take more than 256 MiB
        y = conv1d(x, weight, bias, groups=groups, backend="cpu")
        found = torch.autograd.grad(y, (weight, bias), dy)
    plain = torch.nn.functional.conv1d(x.transpose(1, 2), weight, bias, groups=groups)
    expected = torch.autograd.grad(plain, (weight, bias), dy.transpose(1, 2))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_activations_of_the_largest_numbers(activation: str, backend: str) -> None:
    values = torch.tensor([-3e38, -1e38, -200, -90, -1, 0, 1, 90, 1e38, 3e38])
    x = values.view(1, -1, 1).requires_grad_()
    y = conv1d(x, torch.ones(1, 1, 1), activation=activation, backend=backend)
    (dx,) = torch.autograd.grad(y.sum(), x)
    plain = values.double().requires_grad_()
    expected = getattr(torch.nn.functional, activation)(plain)
    (slope,) = torch.autograd.grad(expected.sum(), plain)
    torch.testing.assert_close(y.detach().flatten().double(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dx.flatten().double(), slope, rtol=1e-6, atol=1e-6)


BAD = {
    "time_major": ({"time_major": 1}, TypeError, "time_major is 1, expected True or False"),
    "channels_first_none": ({"channels_first": None}, TypeError, "channels_first is None, expected True or False"),
    "rank": ({"input": torch.zeros(9, 4)}, ValueError, "input has 2 dims, expected 3"),
    "features": ({"input": torch.zeros(3, 9, 5)}, ValueError, r"input has 5 features, expected 4 .*\[B, T, F\]"),
    "channels_first": ({"channels_first": True}, ValueError, r"input has 9 features, expected 4 .*\[B, F, T\]"),
    "no_steps": ({"input": torch.zeros(3, 0, 4)}, ValueError, "input has 0 time steps, expected at least 1"),
    "too_short": (
        {"input": torch.zeros(3, 2, 4)},
        ValueError,
        "input has size 2 in time, expected at least 3 for a ke",
    ),
    "input_dtype": ({"input": torch.zeros(3, 9, 4).double()}, TypeError, "input .*float64, expected .*float32"),
    "input_integer": ({"input": torch.zeros(3, 9, 4).long()}, TypeError, "input .*int64, expected one of .*float"),
    "input_type": ({"input": [[1.0]]}, TypeError, "input is a list, expected a Tensor"),
    "input_none": ({"input": None}, TypeError, "input is None, expected a Tensor"),
    "weight_none": ({"weight": None}, TypeError, "weight is None, expected a Tensor"),
    "input_device": ({"input": torch.zeros(3, 9, 4, device="meta")}, ValueError, "input is on meta, expected cpu"),
    "weight_rank": (
        {"weight": torch.zeros(6, 4)},
        ValueError,
        r"weight has shape \[6, 4\], expected \[C, F / groups, k",
    ),
    "weight_empty": ({"weight": torch.zeros(6, 4, 0)}, ValueError, r"weight has shape \[6, 4, 0\], expected \[C, F"),
    "bias_shape": ({"bias": torch.zeros(5)}, ValueError, r"bias has shape \[5\], expected \[6\] \(\[C\]\)"),
    "bias_dtype": ({"bias": torch.zeros(6).half()}, TypeError, "bias .*float16, expected .*float32"),
    "lengths_float": ({"lengths": torch.ones(3)}, TypeError, "lengths has dtype .*float32, expected a Tensor of integ"),
    "lengths_list": ({"lengths": [1, 2, 3]}, TypeError, "lengths has type list, expected a Tensor of integers"),
    "lengths_shape": ({"lengths": torch.tensor([1])}, ValueError, r"lengths has shape \[1\], expected \[3\]"),
    "lengths_negative": ({"lengths": torch.tensor([1, -1, 2])}, ValueError, "lengths has -1, expected 0 to 9"),
    "lengths_long": ({"lengths": torch.tensor([1, 10, 2])}, ValueError, "lengths has 10, expected 0 to 9"),
    "lengths_reflect": (
        {"lengths": torch.tensor([9, 0, 2]), "padding": 2, "padding_mode": "reflect"},
        ValueError,
        "lengths has 2, expected 0 or at least 3 with padding 2 and padding_mode='reflect'",
    ),
    "lengths_circular": (
        {"lengths": torch.tensor([9, 0, 2]), "padding": 3, "padding_mode": "circular"},
        ValueError,
        "lengths has 2, expected 0 or at least 3 with padding 3 and padding_mode='circular'",
    ),
    "stride": ({"stride": 0}, ValueError, "stride is 0, expected an int >= 1"),
    "stride_pair": ({"stride": (1, 1)}, ValueError, r"stride is \(1, 1\), expected an int >= 1"),
    "dilation": ({"dilation": -1}, ValueError, "dilation is -1, expected an int >= 1"),
    "padding_name": (
        {"padding": "half"},
        ValueError,
        "padding is 'half', expected an int >= 0 or one of valid, same, full, causal",
    ),
    "padding_negative": ({"padding": -1}, ValueError, "padding is -1, expected an int >= 0"),
    "padding_list": ({"padding": [1]}, ValueError, r"padding is \[1\], expected an int >= 0"),
    "padding_same_stride": (
        {"padding": "same", "stride": 2},
        ValueError,
        "stride is 2, expected 1 with padding='same'",
    ),
    "padding_reflect": (
        {"padding": 9, "padding_mode": "reflect"},
        ValueError,
        "padding is 9 in time, expected at most 8",
    ),
    "padding_circular": ({"padding": 10, "padding_mode": "circular"}, ValueError, "padding is 10 .*expected at most 9"),
    "padding_mode": ({"padding_mode": "mirror"}, ValueError, "padding_mode is 'mirror', expected one of zeros"),
    "activation": ({"activation": "elu"}, ValueError, "activation is 'elu', expected one of none, relu"),
    "groups": ({"groups": 4}, ValueError, "groups is 4, expected a positive divisor of C=6"),
    "groups_features": (
        {"groups": 2},
        ValueError,
        r"input has 4 features, expected 8 from weight \[6, 4, 3\], groups=2",
    ),
    "backend": ({"backend": "gpu"}, ValueError, "backend is 'gpu', expected one of .*reference"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument_is_named_with_what_was_expected(name: str, host_backend: str) -> None:
    wrong, error, message = BAD[name]
    good = CONV1D["plain"].arguments(torch.float32) | {"backend": host_backend}
    conv1d(**good)
    with pytest.raises(error, match=f"^conv1d: {message}"):
        conv1d(**(good | wrong))


def test_stride_above_all_sizes(native_ops: Any) -> None:
    x, weight = torch.randn(2, 8, 4, requires_grad=True), torch.randn(3, 4, 3, requires_grad=True)
    found = torch.autograd.grad(conv1d(x, weight, stride=2**31, backend="cpu").square().sum(), (x, weight))
    expected = torch.autograd.grad(conv1d(x, weight, stride=8, backend="reference").square().sum(), (x, weight))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("wrong", [{"stride": 2**32}, {"dilation": 2**62}, {"padding": [2**61, 2**61]}], ids=str)
def test_op_refuses_options_whose_sums_overflow(wrong: dict[str, Any], native_ops: Any) -> None:
    options = {"stride": 1, "padding": [0, 0], "dilation": 1} | wrong
    with pytest.raises(RuntimeError, match=f"conv1d_forward: .*{next(iter(wrong))}.* must be .* to 2147483648, got"):
        native_ops.conv1d_forward(
            torch.randn(1, 8, 1), torch.randn(1, 1, 3), None, None, *options.values(), 1, "zeros", "none", False, False
        )


def test_op_refuses_to_go_back_without_pre_activations(native_ops: Any) -> None:
    dy, x, weight = torch.randn(2, 7, 4), torch.randn(2, 9, 3), torch.randn(4, 3, 3)
    with pytest.raises(RuntimeError, match="conv1d_backward: pre must be of shape"):
        native_ops.conv1d_backward(
            dy, x, weight, None, None, dy, torch.empty(0), 1, [0, 0], 1, 1, "zeros", "gelu", [1, 1, 1]
        )


def test_bad_argument_of_output_lengths() -> None:
    with pytest.raises(TypeError, match=r"^conv1d_lengths: lengths has type list, expected a Tensor of integers"):
        conv1d_lengths([1, 2], 3)
    with pytest.raises(ValueError, match=r"^conv1d_lengths: kernel is 0, expected an int >= 1"):
        conv1d_lengths(torch.tensor([1]), 0)
    with pytest.raises(ValueError, match=r"^conv1d_lengths: padding is 'half', expected"):
        conv1d_lengths(torch.tensor([1]), 3, padding="half")


def loss(case: Conv1dCase, backend: str, *tensors: Tensor, lengths: Tensor | None = None) -> Tensor:
    arguments = dict(zip(TENSORS, tensors)) | {"lengths": lengths}
    return case.call(conv1d, arguments, backend=backend).sin().sum()


def tensors_of(case: Conv1dCase, dtype: torch.dtype) -> list[Tensor]:
    return list(leaves_of(case.arguments(dtype)).values())


@pytest.mark.parametrize("name", ["plain", "gelu", "relu", "reflect", "everything"])
def test_compiles_without_graph_break_whatever_time_and_batch(name: str, backend: str) -> None:
    torch._dynamo.reset()
    graphs = Graphs()
    case = CONV1D[name]
    tensors = tensors_of(case, torch.float32)
    compiled = torch.compile(functools.partial(loss, case, backend), fullgraph=True, dynamic=True, backend=graphs)
    for batch, time in ((5, 17), (7, 19), (11, 23)):
        tensors[0] = torch.randn(batch, time, case.features, requires_grad=True)
        lengths = torch.randint(3, time + 1, (batch,)) if case.lengths else None
        value, plain = (f(*tensors, lengths=lengths) for f in (compiled, functools.partial(loss, case, backend)))
        torch.testing.assert_close(value, plain)
        for a, b in zip(torch.autograd.grad(value, tensors), torch.autograd.grad(plain, tensors)):
            torch.testing.assert_close(a, b)
    assert len(graphs.forward) == len(graphs.backward) == 1
    for direction, ops in (("forward", graphs.forward[0]), ("backward", graphs.backward[0])):
        native = [op for op in ops if "convfast" in op]
        assert native == ([] if backend == "reference" else [f"{NAMESPACES[backend]}.conv1d_{direction}.default"])
        assert any("convolution" in op for op in ops) == (backend == "reference")


@pytest.mark.parametrize("name", ["gelu", "tanh", "padding_1"])
def test_function_transforms(name: str, backend: str, widest: torch.dtype) -> None:
    case = CONV1D[name]
    tensors = [t.detach() for t in tensors_of(case, widest)]
    function = functools.partial(loss, case, backend)

    def plain(*t: Tensor) -> Tensor:
        return oracle(*t, **case.options).sin().sum()

    everyone = (0, 1, 2)
    exact = torch.func.grad(plain, argnums=everyone)(*tensors)
    for a, b in zip(torch.func.grad(function, argnums=everyone)(*tensors), exact):
        torch.testing.assert_close(a, b)
    stacked = torch.stack([tensors[0], -tensors[0]])
    over = (0, None, None)
    each = torch.stack([plain(x, *tensors[1:]) for x in stacked])
    torch.testing.assert_close(torch.func.vmap(function, over)(stacked, *tensors[1:]), each)
    per_sample = torch.func.vmap(torch.func.grad(function, argnums=1), over)(stacked, *tensors[1:])
    torch.testing.assert_close(per_sample[0], exact[1])
    by_weight = torch.func.vmap(torch.func.grad(function), (None, 0, None))(
        tensors[0], torch.stack([tensors[1], -tensors[1]]), tensors[2]
    )
    torch.testing.assert_close(by_weight[0], exact[0])
    hessian = torch.func.jacrev(torch.func.grad(lambda b: plain(*tensors[:2], b)))(tensors[2])
    found = torch.func.jacrev(torch.func.grad(lambda b: function(*tensors[:2], b)))(tensors[2])
    torch.testing.assert_close(found, hessian)
    tangents = tuple(torch.randn_like(t) for t in tensors)
    _, derivative = torch.func.jvp(function, tuple(tensors), tangents)
    torch.testing.assert_close(derivative, sum((g * t).sum() for g, t in zip(exact, tangents)))


def test_vmap_over_lengths(backend: str, widest: torch.dtype) -> None:
    case = CONV1D["lengths"]
    a = case.arguments(widest)
    lengths = torch.stack([a["lengths"], a["lengths"].flip(0)])
    each = torch.stack([case.call(conv1d, a | {"lengths": row}, backend=backend) for row in lengths])
    found = torch.func.vmap(lambda row: case.call(conv1d, a | {"lengths": row}, backend=backend))(lengths)
    torch.testing.assert_close(found, each)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_autocast_equals_casting_by_hand(dtype: torch.dtype, backend: str) -> None:
    case = CONV1D["silu"]
    arguments = case.arguments(torch.float32)
    with torch.autocast(torch.get_default_device().type, dtype):
        output = case.call(conv1d, arguments, backend=backend)
    assert output.dtype == dtype
    by_hand = {n: None if t is None else t.detach().to(dtype) for n, t in arguments.items()}
    assert torch.equal(output, case.call(conv1d, by_hand, backend=backend))
    grads = torch.autograd.grad(output.float().sum(), list(leaves_of(arguments).values()))
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in grads)


def test_backward_under_autocast_keeps_float32(backend: str) -> None:
    case = CONV1D["silu"]
    arguments = case.arguments(torch.float32)
    leaves = list(leaves_of(arguments).values())
    output = case.call(conv1d, arguments, backend=backend)
    for again in (False, True):
        plain = torch.autograd.grad(output.sum(), leaves, retain_graph=True, create_graph=again)
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            found = torch.autograd.grad(output.sum(), leaves, retain_graph=True, create_graph=again)
        for a, b in zip(found, plain):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_memory_kept_for_backward(activation: str, backend: str) -> None:
    case = Conv1dCase(activation, options={"activation": activation})
    arguments = case.arguments(torch.float16)
    call = functools.partial(case.call, conv1d, arguments, backend=backend)
    output, kept = kept_for_backward(call, leaves_of(arguments).values())
    pre = 2 * output.nbytes if backend == "reference" else output.nbytes
    expected = {"none": 0, "gelu": pre, "silu": pre}.get(activation, output.nbytes)
    assert kept == expected


@pytest.mark.parametrize("activation", ["none", "gelu", "silu"])
def test_output_may_be_changed_in_place(activation: str, backend: str, widest: torch.dtype) -> None:
    case = Conv1dCase(activation, options={"activation": activation})
    arguments = case.arguments(widest)
    apart, in_place = (
        with_gradients({"output": change(case.call(conv1d, arguments, backend=backend))}, leaves_of(arguments))
        for change in (Tensor.tanh, Tensor.tanh_)
    )
    for key, value in apart.items():
        torch.testing.assert_close(in_place[key], value, rtol=0, atol=0)


OPCHECK = ["plain", "gelu", "tanh", "stride_2", "reflect", "lengths", "everything"]


@pytest.mark.parametrize("time_major", [False, True], ids=["batch_major", "time_major"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize(("name", "layout"), [*itertools.product(OPCHECK, SEQUENCE_LAYOUTS), ("batch_0", "contiguous")])
def test_ops_and_their_fakes_agree(
    name: str, layout: str, dtype: torch.dtype, time_major: bool, kernel_ops: Any
) -> None:
    case = CONV1D[name]
    # The rest of opcheck takes a second a call and does not look at layouts.
    checks = ["test_schema", "test_faketensor"]
    if name == "everything" and layout == "contiguous":
        checks += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
    arguments = {n: None if t is None else t.detach() for n, t in case.arguments(dtype, layout).items()}
    if arguments["lengths"] is not None:
        arguments["lengths"].fill_(case.time)  # past a length, what is saved is undefined, and opcheck compares it
    operands, options = (*(arguments[n] for n in TENSORS), arguments["lengths"]), case.options
    padding, activation = options.get("padding", 0), options.get("activation", "none")
    pads = [(case.kernel - 1) // 2, case.kernel // 2] if padding == "same" else [padding, padding]
    settings = (
        options.get("stride", 1), pads, options.get("dilation", 1), options.get("groups", 1),
        options.get("padding_mode", "zeros"), activation,
    )  # fmt: skip
    for save in (False, True):
        library.opcheck(kernel_ops.conv1d_forward.default, (*operands, *settings, time_major, save), test_utils=checks)
    y, pre = kernel_ops.conv1d_forward(*operands, *settings, time_major, True)
    assert (pre.numel() > 0) == (activation in ("gelu", "silu") and y.numel() > 0)
    for needs in ([1, 1, int(arguments["bias"] is not None)], [0, 0, 0]):
        backward = (arrange(torch.randn_like(y), layout), *operands, y, pre, *settings, needs)
        library.opcheck(kernel_ops.conv1d_backward.default, backward, test_utils=checks)
