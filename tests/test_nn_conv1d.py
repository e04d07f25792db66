"""`Conv1d`: torch.nn.Conv1d and an activation as oracle, lengths, checkpoints, capture, bad arguments."""


import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convfast
from convfast.nn import Conv1d
from tests.modules import (
    assert_close,
    assert_compiles_whole,
    assert_copies_are_equal_and_apart,
    assert_same,
    check_against,
    flat,
    scripted,
)
from tests.oracle import assert_close_to_oracle

OPS = ("conv1d",)
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

BATCH, TIME, INPUT, CHANNELS = 3, 9, 4, 6
LENGTHS = (6, 9, 4)
OPTIONS = {
    "plain": {},
    "stride": {"stride": 2, "padding": 1},
    "valid": {"padding": "valid"},
    "same": {"padding": "same"},
    "same_even": {"padding": "same", "kernel_size": 4},
    "full": {"padding": "full", "dilation": 2},
    "causal": {"padding": "causal", "dilation": 2, "stride": 2},
    "causal_replicate": {"padding": "causal", "padding_mode": "replicate"},
    "tuples": {"kernel_size": (2,), "stride": (3,), "padding": (2,), "dilation": (2,)},
    "kernel_1": {"kernel_size": 1},
    "groups": {"groups": 2},
    "no_bias": {"bias": False},
    "reflect": {"padding": "same", "padding_mode": "reflect"},
    "replicate": {"padding": 2, "padding_mode": "replicate"},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "channels_first": {"channels_first": True, "padding": "same"},
    **{name: {"activation": name} for name in ("relu", "tanh", "sigmoid", "gelu", "silu", "leaky_relu")},
}
ACTIVATIONS = {"none": lambda y: y, "leaky_relu": F.leaky_relu, "gelu": F.gelu, "silu": F.silu}


def build(*, dtype: torch.dtype = torch.float32, **options) -> Conv1d:
    return Conv1d(INPUT, CHANNELS, **({"kernel_size": 3} | options), dtype=dtype)


def twin(module: Conv1d, dtype: torch.dtype) -> nn.Conv1d:
    """torch.nn.Conv1d with the same weights."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    options = {name: getattr(module, name) for name in names}
    if module.padding == "full":
        options["padding"] = module.dilation * (module.kernel_size - 1)
    if module.padding == "causal":
        options["padding"] = 0
    plain = nn.Conv1d(**options, bias=module.bias is not None, dtype=module.weight.dtype)
    plain.load_state_dict(module.state_dict(), strict=True)
    return plain.to(dtype)


def sequence(module: Conv1d, dtype: torch.dtype = torch.float32, batch: int = BATCH, time: int = TIME) -> Tensor:
    return torch.randn(*((batch, INPUT, time) if module.channels_first else (batch, time, INPUT)), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_option_matches_torch(name: str, dtype: torch.dtype, backend: str) -> None:
    module = build(dtype=dtype, backend=backend, **OPTIONS[name])
    activation = ACTIVATIONS.get(module.activation) or getattr(torch, module.activation)

    def plain(conv: nn.Conv1d, x: Tensor) -> Tensor:
        x = x if module.channels_first else x.transpose(1, 2)
        if module.padding == "causal":
            mode = {"zeros": "constant"}.get(module.padding_mode, module.padding_mode)
            x = F.pad(x, (module.dilation * (module.kernel_size - 1), 0), mode)
        return activation(conv(x)).transpose(1, 2)

    inputs = [sequence(module, dtype)]
    check_against(
        module, lambda dtype: twin(module, dtype), inputs, lambda conv, x: conv(x), plain, terms=BATCH * TIME
    )
    assert module(*inputs).is_contiguous()


@pytest.mark.parametrize("name", OPTIONS)
def test_samples_of_any_length_in_one_batch_equal_each_alone(name: str, backend: str) -> None:
    module = build(backend=backend, **OPTIONS[name])
    x, lengths = sequence(module), torch.tensor(LENGTHS, dtype=torch.int32)
    steps = x.transpose(1, 2) if module.channels_first else x
    for sample, length in enumerate(LENGTHS):
        steps[sample, length:] = float("nan")
    output, output_lengths = module(x, lengths), module.output_lengths(lengths)
    for sample, length in enumerate(LENGTHS):
        alone = x[sample : sample + 1]
        alone = module(alone[:, :, :length] if module.channels_first else alone[:, :length])
        steps = alone.shape[1]
        assert output_lengths[sample] == steps
        torch.testing.assert_close(output[sample : sample + 1, :steps], alone)
        assert not output[sample, steps:].any()


def test_output_length_of_nothing_is_nothing() -> None:
    module = build(padding=1)
    assert module.output_lengths(torch.tensor([0, 1, 2, 3])).tolist() == [0, 1, 2, 3]
    assert build(kernel_size=4).output_lengths(torch.tensor([0, 3, 4])).tolist() == [0, 0, 1]


# Parameters, and what users do to modules.


@pytest.mark.parametrize("name", OPTIONS)
def test_same_seed_gives_the_parameters_of_torch_and_checkpoints_go_both_ways(name: str) -> None:
    torch.manual_seed(7)
    ours = build(**OPTIONS[name])
    plain = twin(ours, torch.float32)
    torch.manual_seed(7)
    plain.reset_parameters()
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert_same(ours.state_dict().values(), plain.state_dict().values())
    ours.reset_parameters()
    assert not torch.equal(ours.weight, plain.weight)
    ours.load_state_dict(plain.state_dict(), strict=True)
    assert_same(ours.weight, plain.weight)


def test_repr_shows_what_is_not_default() -> None:
    assert repr(Conv1d(3, 4, 3, padding="same", bias=False, activation="relu")) == (
        "Conv1d(in_channels=3, out_channels=4, kernel_size=3, padding='same', bias=False, activation='relu')"
    )


def test_copies_are_equal_and_apart() -> None:
    module = build(activation="gelu", padding="full")
    assert_copies_are_equal_and_apart(module, sequence(module))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, backend: str) -> None:
    module = build(activation="relu", backend=backend).to(dtype)
    x = sequence(module, dtype)
    exact, eager = (twin(module, d)(x.to(d).transpose(1, 2)).relu().transpose(1, 2) for d in (torch.float64, dtype))
    output = module(x)
    assert output.dtype == dtype
    assert_close_to_oracle(output, exact, eager)


@pytest.mark.parametrize("channels_first", [False, True])
def test_single_sequence(channels_first: bool, backend: str) -> None:
    module = build(padding=1, stride=2, channels_first=channels_first, backend=backend)
    x = sequence(module)
    assert_close(module(x[1]), module(x[1:2])[0])
    if backend == "cpu":
        with torch.no_grad():
            assert_same(scripted(module)(x[1]), module(x[1]))


def test_empty_batch(backend: str) -> None:
    module = build(padding="same", backend=backend)
    assert module(sequence(module, batch=0)).shape == (0, TIME, CHANNELS)


# Capture.


def test_compiles_whole(backend: str) -> None:
    module = build(activation="silu", stride=2, padding=1, backend=backend)
    x = sequence(module)
    assert_compiles_whole(module, (x,), (x, torch.tensor(LENGTHS)))


def test_exports_for_any_time_and_batch(backend: str) -> None:
    module = build(padding="same", activation="relu", backend=backend).eval()
    dims = {"input": {0: torch.export.Dim("batch"), 1: torch.export.Dim("time", min=3)}}
    program = torch.export.export(module, (sequence(module),), dynamic_shapes=dims)
    x = sequence(module, batch=5, time=17)
    with torch.no_grad():
        assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("name", OPTIONS)
def test_scripts_saves_and_loads(name: str, native_ops) -> None:
    module = build(**OPTIONS[name])
    script, x, lengths = scripted(module), sequence(module), torch.tensor(LENGTHS, dtype=torch.int32)
    with torch.no_grad():
        assert_same(flat([script(x), script(x, lengths)]), flat([module(x), module(x, lengths)]))
    assert_same(script.output_lengths(lengths), module.output_lengths(lengths))


# Bad arguments: what was wrong, what was expected, what came.

BAD_CONSTRUCTION = {
    "backend": ({"backend": "cudnn"}, "backend is 'cudnn', expected one of cpu, triton, cuda, reference"),
    "in_channels": ({"in_channels": 0}, "in_channels is 0, expected an int >= 1"),
    "out_channels": ({"out_channels": "4"}, "out_channels is '4', expected an int >= 1"),
    "kernel_size": ({"kernel_size": (3, 3)}, r"kernel_size is \(3, 3\), expected an int >= 1 or a tuple of 1"),
    "kernel_list": ({"kernel_size": [3, 3]}, r"kernel_size is \(3, 3\), expected an int >= 1 or a tuple of 1"),
    "stride": ({"stride": 0}, "stride is 0, expected an int >= 1 or a tuple of 1"),
    "dilation": ({"dilation": 0}, "dilation is 0, expected an int >= 1 or a tuple of 1"),
    "padding": ({"padding": -1}, "padding is -1, expected an int >= 0 or a tuple of 1"),
    "padding_name": ({"padding": "half"}, "padding is 'half', expected an int or one of valid, same, full, causal"),
    "padding_stride": ({"padding": "same", "stride": 2}, "padding is 'same' with stride=2, expected stride=1"),
    "groups": ({"groups": 2}, "groups is 2, expected a divisor of in_channels=3 and out_channels=4"),
    "padding_mode": ({"padding_mode": "zero"}, "padding_mode is 'zero', expected one of zeros, reflect, .*"),
    "activation": ({"activation": "elu"}, "activation is 'elu', expected one of none, relu, .*"),
}


@pytest.mark.parametrize("name", BAD_CONSTRUCTION)
def test_bad_constructor_argument(name: str) -> None:
    options, message = BAD_CONSTRUCTION[name]
    with pytest.raises(ValueError, match=f"^Conv1d: {message}$"):
        Conv1d(**({"in_channels": 3, "out_channels": 4, "kernel_size": 3} | options))
    with pytest.raises(TypeError, match=r"^Conv1d: dtype is torch.int64, expected a floating point type$"):
        Conv1d(3, 4, 3, dtype=torch.int64)


X = torch.zeros(BATCH, TIME, INPUT)
BAD_CALLS = {
    "type": (([1.0],), TypeError, "conv1d: input is a list, expected a Tensor"),
    "rank": ((X[None],), ValueError, "conv1d: input has 4 dims, expected 3"),
    "single_lengths": ((X[0], torch.tensor([1])), ValueError, "conv1d: input has 2 dims, expected 3"),
    "features": ((X[..., 1:],), ValueError, "conv1d: input has 3 features, expected 4"),
    "no_time": ((X[:, :0],), ValueError, "conv1d: input has 0 time steps, expected at least 1"),
    "too_short": ((X[:, :2],), ValueError, "conv1d: input has size 2 in time, expected at least 3"),
    "dtype": ((X.double(),), TypeError, "conv1d: input has dtype torch.float64, expected torch.float32"),
    "lengths_shape": ((X, torch.tensor([1])), ValueError, r"conv1d: lengths has shape \[1\], expected \[3\]"),
    "lengths_long": ((X, torch.tensor([1, 10, 2])), ValueError, "conv1d: lengths has 10, expected 0 to 9"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call_is_named_with_what_was_expected(name: str) -> None:
    arguments, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        build()(*arguments)


def test_options_may_be_lists_of_one() -> None:
    module = Conv1d(3, 4, [3], [2], [1], [5])
    assert (module.kernel_size, module.stride, module.padding, module.dilation) == (3, 2, 1, 5)


def test_lengths_that_are_a_list_are_refused_by_the_module() -> None:
    with pytest.raises(TypeError, match=r"^Conv1d: lengths has type list, expected a Tensor of integers"):
        build().output_lengths([1, 2])


def test_exported_from_the_package() -> None:
    assert convfast.Conv1d is Conv1d
