"""The modules: every option against a plain loop, the state, checkpoints, capture, and what users do to modules."""

import copy
import gc
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.amp.autocast_mode import _cast

from convfast.nn import (
    ConvLSTM,
    ConvLSTM1d,
    ConvLSTM3d,
    ConvLSTMCell,
    ConvLSTMCell1d,
    ConvLSTMCell3d,
    ConvLSTMState,
)
from tests.cases import normal
from tests.modules import assert_copies_are_equal_and_apart, assert_same, flat, scripted
from tests.oracle import assert_close_to_oracle
from tests.oracle import conv_lstm as oracle_layer

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

BATCH, TIME, CHANNELS, SPACE = 2, 4, 3, (6, 5)
STACK = {"hidden_channels": [4, 6], "kernel_size": 3}


def build(kind=ConvLSTM, *, dtype=torch.float32, input_channels=CHANNELS, **options) -> ConvLSTM:
    """A module whose peepholes are not zero."""
    module = kind(input_channels, **(STACK | options), dtype=dtype)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith("peephole") and not isinstance(parameter, nn.UninitializedParameter):
                parameter.uniform_(-0.5, 0.5)
    return module


def frames(batch=BATCH, time=TIME, channels=CHANNELS, space=SPACE, dtype=torch.float32) -> Tensor:
    return torch.randn(batch, time, channels, *space, dtype=dtype)


def each_layer(value, index):
    return value[index] if isinstance(value, list) else value


def plain_stack(module: ConvLSTM, parameters: dict[str, Tensor], input, states=None, lengths=None, steps=None):
    """Outputs and states of all layers by the oracle, layer by layer."""
    outputs, last = [], []
    for k in range(len(module.hidden_channels)):
        options = {
            name: each_layer(getattr(module, name), k)
            for name in ("stride", "padding", "dilation", "groups", "padding_mode")
        }
        parts, pairs = [], []
        for direction, suffix in enumerate(["", "_reverse"] if module.bidirectional else [""]):
            weight = {name: parameters.get(f"{name}_l{k}{suffix}") for name in ("weight_hh", "bias", "peephole")}
            state = None if states is None or states[k] is None else states[k]
            if state is not None and module.bidirectional:
                state = (state[0][direction], state[1][direction])
            part, pair = oracle_layer(
                input,
                None if input is None else parameters[f"weight_ih_l{k}{suffix}"],
                **weight,
                state=state,
                lengths=lengths,
                steps=steps if input is None else None,
                reverse=bool(direction),
                **options,
            )
            parts.append(part)
            pairs.append(pair)
        input = torch.cat(parts, dim=2)
        outputs.append(input)
        last.append(pairs[0] if not module.bidirectional else tuple(torch.stack(p) for p in zip(*pairs)))
    return outputs, last


def check_against_loop(module: ConvLSTM, input, states=None, lengths=None, steps=None) -> None:
    """Outputs and states of all layers, and the gradients of their weighted sum, against the float64 loop."""
    assert module.return_all_layers

    def run(compute, dtype):
        parameters = {name: p.detach().to(dtype).requires_grad_() for name, p in module.named_parameters()}
        leaves = dict(parameters)
        if input is not None:
            leaves["input"] = input.detach().to(dtype).requires_grad_()
        own = None
        if states is not None:
            own = [tuple(part.detach().to(dtype).requires_grad_() for part in pair) for pair in states]
            leaves |= {f"state {name} {k}": part for k, pair in enumerate(own) for name, part in zip("hc", pair)}
        results = flat(compute(parameters, leaves.get("input"), own))
        generator = torch.Generator().manual_seed(1)
        loss = sum((r * normal(r.shape, generator).to(dtype)).sum() for r in results)
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return results, dict(zip(leaves, grads))

    def ours(parameters, x, own):
        return torch.func.functional_call(module, parameters, (x, own, lengths), strict=True)

    def loop(parameters, x, own):
        return plain_stack(module, parameters, x, own, lengths, steps)

    actual, actual_grads = run(ours, module.weight_hh_l0.dtype)
    exact, exact_grads = run(loop, torch.float64)
    eager, eager_grads = run(loop, torch.float32)
    for number, (a, e, n) in enumerate(zip(actual, exact, eager, strict=True)):
        assert_close_to_oracle(a, e, n, f"result {number}")
    terms = BATCH * TIME * torch.Size(exact[0].shape[3:]).numel()
    for name, grad in exact_grads.items():
        if grad is None:
            assert actual_grads[name] is None, f"{name} has a gradient, expected none"
        else:
            assert_close_to_oracle(actual_grads[name], grad, eager_grads[name], f"gradient of {name}", terms)


OPTIONS = {
    "plain": {},
    "one_layer": {"hidden_channels": 4},
    "three_layers": {"hidden_channels": (4, 2, 5)},
    "kernel_per_layer": {"kernel_size": [5, (3, 1)]},
    "even_kernel": {"kernel_size": (2, 4)},
    "kernel_1": {"kernel_size": 1},
    "no_bias": {"bias": False},
    "unit_forget_bias": {"unit_forget_bias": True},
    "peephole": {"peephole": True, "image_size": SPACE},
    "bidirectional": {"bidirectional": True},
    "bidirectional_peephole": {"bidirectional": True, "peephole": True, "image_size": SPACE},
    "stride": {"stride": 2, "padding": 1},
    "stride_per_layer_peephole": {"stride": [(2, 1), 1], "padding": [1, "same"], "peephole": True, "image_size": SPACE},
    "valid": {"padding": ["valid", "same"]},
    "padding_per_dim": {"padding": (0, 2)},
    "dilation": {"dilation": [2, 1]},
    "groups": {"groups": [3, 2], "hidden_channels": [6, 4]},
    "reflect": {"padding_mode": "reflect"},
    "mode_per_layer": {"padding_mode": ["circular", "replicate"]},
    "lean": {"memory": "lean"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_option_matches_plain_loop(name: str, dtype: torch.dtype, backend: str) -> None:
    module = build(dtype=dtype, return_all_layers=True, backend=backend, **OPTIONS[name])
    check_against_loop(module, frames())


@pytest.mark.parametrize(("kind", "space"), [(ConvLSTM1d, (7,)), (ConvLSTM3d, (3, 4, 5))])
def test_frames_of_one_and_three_dims_match_plain_loop(kind: type[ConvLSTM], space: tuple, backend: str) -> None:
    module = build(kind, return_all_layers=True, peephole=True, image_size=space, bidirectional=True, backend=backend)
    check_against_loop(module, frames(space=space))


@pytest.mark.parametrize(("kind", "space"), [(ConvLSTMCell1d, (7,)), (ConvLSTMCell3d, (3, 4, 5))])
def test_cells_of_one_and_three_dims_are_a_step_of_the_stack(kind: type, space: tuple, backend: str) -> None:
    cell = kind(CHANNELS, 4, 3, backend=backend)
    stack = {1: ConvLSTM1d, 3: ConvLSTM3d}[cell.dims](CHANNELS, 4, 3, backend=backend)
    stack.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    x, state = frames(space=space)[:, :1], (torch.randn(BATCH, 4, *space), torch.randn(BATCH, 4, *space))
    assert all(torch.equal(*pair) for pair in zip(cell(x[:, 0], *state), stack(x, state)[1]))
    with pytest.raises(ValueError, match=rf"^{kind.__name__}: input has 2 dims, expected {cell.dims + 2} "):
        cell(x[0, 0, 0, :2].reshape(2, -1))


@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])
def test_state_and_lengths_match_plain_loop(bidirectional: bool, backend: str) -> None:
    module = build(return_all_layers=True, bidirectional=bidirectional, backend=backend)
    leading = (2, BATCH) if bidirectional else (BATCH,)
    states = [tuple(torch.randn(*leading, c, *SPACE) for _ in "hc") for c in module.hidden_channels]
    check_against_loop(module, frames(), states, torch.tensor([TIME - 1, 0]))


def test_decoder_without_input_matches_plain_loop(backend: str) -> None:
    module = build(return_all_layers=True, step=3, backend=backend)
    states = [tuple(torch.randn(BATCH, c, *SPACE) for _ in "hc") for c in module.hidden_channels]
    check_against_loop(module, None, states, steps=3)


def test_decoder_without_input_equals_zero_input() -> None:
    module = build(step=3)
    _, state = build()(frames())
    output, last = module(None, state)
    expected, expected_last = module(torch.zeros(BATCH, 3, CHANNELS, *SPACE), state)
    for a, b in zip(flat((output, last)), flat((expected, expected_last)), strict=True):
        torch.testing.assert_close(a, b)


def test_decoder_module_has_no_weight_for_input_that_never_comes() -> None:
    module = build(input_channels=0, step=3, hidden_channels=[4, 4])
    assert "weight_ih_l0" not in module.state_dict() and module.weight_ih_l0 is None
    _, state = build(hidden_channels=[4, 4])(frames())
    output, _ = module(None, state)
    assert output.shape == (BATCH, 3, 4, *SPACE)
    output.sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    with pytest.raises(ValueError, match="input is a Tensor, expected None with input_channels=0"):
        module(frames(channels=0), state)


def test_one_frame_is_read_at_every_step() -> None:
    module = build(step=TIME)
    frame = torch.randn(BATCH, CHANNELS, *SPACE)
    output, state = module(frame)
    expected, expected_state = module(frame.unsqueeze(1).repeat(1, TIME, 1, 1, 1))
    assert output.shape == (TIME, BATCH, 6, *SPACE)
    torch.testing.assert_close(output, expected.transpose(0, 1))
    for a, b in zip(state, expected_state, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("effective_step", [[0], [-1], [1, 3], [3, 1], [-1, 0, 3], []], ids=str)
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "time_first"])
def test_effective_step_picks_steps_in_order_of_time(effective_step: list[int], batch_first: bool) -> None:
    module = build(effective_step=effective_step, batch_first=batch_first, return_all_layers=True)
    x = frames() if batch_first else frames().transpose(0, 1)
    picked, state = module(x)
    whole = copy.copy(module)
    whole.effective_step = None
    expected, expected_state = whole(x)
    wanted = sorted({step % TIME for step in effective_step})
    dim = 1 if batch_first else 0
    assert_same(picked, [output.index_select(dim, torch.tensor(wanted, dtype=torch.int64)) for output in expected])
    assert_same(state, expected_state)


def test_effective_step_out_of_reach_is_refused_by_the_module_that_was_called() -> None:
    with pytest.raises(ValueError, match=rf"^ConvLSTM1d: effective_step has {TIME}, expected"):
        ConvLSTM1d(3, 4, 3, effective_step=[TIME])(torch.randn(2, TIME, 3, 6))


def test_dropout_of_one_layer_warns() -> None:
    with pytest.warns(UserWarning, match="ConvLSTM: dropout is 0.5, which has no effect with one layer"):
        ConvLSTM(3, 4, 3, dropout=0.5)


def test_effective_step_of_one_frame() -> None:
    module = build(step=TIME, effective_step=[1, 3])
    whole = copy.copy(module)
    whole.effective_step = None
    frame = torch.randn(BATCH, CHANNELS, *SPACE)
    assert_same(module(frame)[0], whole(frame)[0][[1, 3]])


def test_time_first_is_the_transpose_and_state_stays_batch_first() -> None:
    module = build(batch_first=False)
    same = build()
    same.load_state_dict(module.state_dict())
    x = frames()
    output, state = module(x.transpose(0, 1))
    expected, expected_state = same(x)
    assert_same((output.transpose(0, 1), state), (expected, expected_state))
    assert state[0].shape == (BATCH, 6, *SPACE)
    assert module(None, state)[0].shape == (1, BATCH, 6, *SPACE)


def test_return_all_layers() -> None:
    module = build(return_all_layers=True)
    last_only = copy.copy(module)
    last_only.return_all_layers = False
    x = frames()
    outputs, states = module(x)
    output, state = last_only(x)
    assert isinstance(outputs, list) and isinstance(states, list)
    assert [o.shape[2] for o in outputs] == [h.shape[1] for h, _ in states] == [4, 6]
    assert_same((outputs[-1], states[-1]), (output, state))
    assert isinstance(state, ConvLSTMState)
    assert_same(state.layers, states)


CHUNKED = {
    "one_layer": {"hidden_channels": 4},
    "two_layers": {},
    "all_layers": {"return_all_layers": True},
    "peephole": {"peephole": True},
    "time_first": {"batch_first": False},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("name", CHUNKED)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_chunked_sequence_equals_whole(name: str, training: bool, backend: str) -> None:
    module = build(backend=backend, **CHUNKED[name])
    time = 1 if module.batch_first else 0
    x = frames(dtype=CHUNKED[name].get("dtype", torch.float32))
    x = x if module.batch_first else x.transpose(0, 1)
    with torch.set_grad_enabled(training):
        whole, last = module(x)
        parts, state = [], None
        for chunk in x.split([1, 2, 1], dim=time):
            part, state = module(chunk, state)
            parts.append(part)
        if module.return_all_layers:
            parts = list(zip(*parts))
            assert_same([torch.cat(layer, dim=time) for layer in parts], whole)
        else:
            assert_same(torch.cat(parts, dim=time), whole)
        assert_same(state, last)


def test_gradient_flows_through_a_state_that_is_passed_back() -> None:
    module = build(dtype=torch.float64)
    x = frames(dtype=torch.float64)
    module(x)[0][:, 2:].sum().backward()
    expected = [p.grad for p in module.parameters()]
    module.zero_grad()
    _, state = module(x[:, :2])
    module(x[:, 2:], state)[0].sum().backward()
    for parameter, grad in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_state_of_layers_may_be_given_in_every_form() -> None:
    module, x = build(), frames()
    _, state = module(x)
    expected = module(x, state)
    assert_same(module(x, list(state.layers)), expected)
    assert_same(module(x, [list(pair) for pair in state.layers]), expected)
    zeros = [tuple(torch.zeros_like(part) for part in pair) for pair in state.layers]
    for a, b in zip(flat(module(x, [None, None])), flat(module(x, zeros)), strict=True):
        torch.testing.assert_close(a, b)
    single = build(hidden_channels=6, input_channels=CHANNELS)
    assert_same(single(x, state), single(x, tuple(state)))


def test_state_survives_pickle_and_deepcopy() -> None:
    _, state = build()(frames())
    state = ConvLSTMState([tuple(part.detach() for part in pair) for pair in state.layers])
    for again in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert isinstance(again, ConvLSTMState)
        assert_same((again, again.layers), (state, state.layers))


def test_state_survives_a_file() -> None:
    _, state = build()(frames())
    stored = io.BytesIO()
    torch.save(state, stored)
    stored.seek(0)
    again = torch.load(stored, weights_only=True)
    assert isinstance(again, ConvLSTMState)
    assert_same((again, again.layers), (state, state.layers))


def test_state_is_made_anew_by_code_that_iterates_over_it() -> None:
    single, double = build(hidden_channels=4), build()
    x = frames()
    _, pair = single(x)
    state = ConvLSTMState([pair])
    for again in (type(state)(part for part in state), type(state)(list(state)), _cast(state, "cpu", torch.float32)):
        assert isinstance(again, ConvLSTMState) and len(again.layers) == 1
        assert_same(single(x, again), single(x, pair))
    _, state = double(x)
    assert_same(ConvLSTMState(pair for pair in state.layers).layers, state.layers)
    with pytest.raises(ValueError, match="state has 1 entries, expected 2, one per layer; code that takes"):
        double(x, type(state)(list(state)))


@pytest.mark.parametrize("wrong", [None, torch.zeros(2, 3), [], [1, 2], [torch.zeros(1)] * 3], ids=str)
def test_state_of_something_else_is_refused(wrong) -> None:
    with pytest.raises(TypeError, match=r"ConvLSTMState: layers is .*, expected pairs \(h, c\), one per layer"):
        ConvLSTMState(wrong)


def test_samples_of_any_length_in_one_batch_equal_each_alone() -> None:
    module = build(bidirectional=True, hidden_channels=[4, 6, 3])
    x, lengths = frames(batch=3), torch.tensor([2, 4, 1], dtype=torch.int32)
    output, (h, c) = module(x, lengths=lengths)
    for sample, length in enumerate(lengths.tolist()):
        alone, (h_alone, c_alone) = module(x[sample : sample + 1, :length])
        torch.testing.assert_close(output[sample : sample + 1, :length], alone)
        torch.testing.assert_close(h[:, sample : sample + 1], h_alone)
        torch.testing.assert_close(c[:, sample : sample + 1], c_alone)
        assert not output[sample, length:].any()


def test_dropout_acts_between_layers_in_training_only() -> None:
    module, x = build(dropout=0.5, return_all_layers=True), frames()
    kept, _ = module.eval()(x)
    first, _ = module.train()(x)
    second, _ = module(x)
    assert_same(first[0], kept[0])
    assert not torch.equal(first[1], second[1]) and not torch.equal(first[1], kept[1])
    module.dropout = 1.0
    blind, _ = module(x)
    module.eval()
    with torch.no_grad():
        module.weight_ih_l1.zero_()
    assert_same(blind[1], module(x)[0][1])


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"effective_step": [0, 2]}], ids=str)
def test_output_feeds_a_channels_last_convolution_without_copy(options: dict) -> None:
    output, _ = build(**options)(frames())
    assert output.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert output.flatten(0, 1).data_ptr() == output.data_ptr()


def test_empty_batch() -> None:
    module = build(bidirectional=True)
    output, (h, c) = module(frames(batch=0))
    assert output.shape == (0, TIME, 12, *SPACE) and h.shape == c.shape == (2, 0, 6, *SPACE)


# The original class of system S3, in our own words.


class OriginalCell(nn.Module):
    def __init__(self, inputs: int, hidden: int, kernel: int, space: tuple[int, int] | None) -> None:
        super().__init__()
        for gate in "ifco":
            setattr(self, f"Wx{gate}", nn.Conv2d(inputs, hidden, kernel, padding=kernel // 2))
            setattr(self, f"Wh{gate}", nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2, bias=False))
        for gate in "ifo":
            size = (1, hidden, *space) if space else (1, hidden, 1, 1)
            value = torch.rand(size) - 0.5 if space else torch.zeros(size)
            setattr(self, f"Wc{gate}", nn.Parameter(value) if space else value)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i = torch.sigmoid(self.Wxi(x) + self.Whi(h) + c * self.Wci)
        f = torch.sigmoid(self.Wxf(x) + self.Whf(h) + c * self.Wcf)
        c = f * c + i * torch.tanh(self.Wxc(x) + self.Whc(h))
        o = torch.sigmoid(self.Wxo(x) + self.Who(h) + c * self.Wco)
        return o * torch.tanh(c), c


class Original(nn.Module):
    def __init__(self, input_channels, hidden_channels, kernel_size, step=1, effective_step=(1,), space=None) -> None:
        super().__init__()
        self.step, self.effective_step, self.hidden = step, effective_step, hidden_channels
        for k, (cin, c) in enumerate(zip([input_channels, *hidden_channels], hidden_channels)):
            setattr(self, f"cell{k}", OriginalCell(cin, c, kernel_size, space))

    def forward(self, input: Tensor) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
        zero = [input.new_zeros(input.shape[0], c, *input.shape[2:]) for c in self.hidden]
        states, outputs = [(z, z) for z in zero], []
        for step in range(self.step):
            x = input
            for k, state in enumerate(states):
                states[k] = getattr(self, f"cell{k}")(x, *state)
                x = states[k][0]
            if step in self.effective_step:
                outputs.append(x)
        return outputs, states[-1]


CALL = {
    "input_channels": 5,
    "hidden_channels": [8, 4, 4, 3, 2],
    "kernel_size": 3,
    "step": 5,
    "effective_step": [4],
}


def assert_equals_original(ours: ConvLSTM, original: Original, x: Tensor) -> None:
    expected, expected_state = original(x)
    output, state = ours(x)
    assert len(output) == len(expected)
    for a, b in zip([*output, *state], [*expected, *expected_state], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("has_peepholes", [False, True], ids=["as_trained", "with_peepholes"])
@pytest.mark.parametrize("peephole", [None, "lazy", "sized"])
def test_original_checkpoint_loads_and_gives_the_same(has_peepholes: bool, peephole: str | None) -> None:
    space = (8, 4)
    original = Original(**CALL, space=space if has_peepholes else None).double()
    for cell in original.children():  # the plain tensors that .double() does not reach
        for name in ("Wci", "Wcf", "Wco"):
            setattr(cell, name, getattr(cell, name) if has_peepholes else getattr(cell, name).double())
    ours = ConvLSTM(
        **CALL, dtype=torch.float64, peephole=peephole is not None, image_size=space if peephole == "sized" else None
    )
    if has_peepholes and peephole is None:
        with pytest.raises(RuntimeError, match=r"cell0.Wci, cell0.Wcf, cell0.Wco are peepholes .*pass peephole=True"):
            ours.load_state_dict(original.state_dict(), strict=True)
        return
    before = dict(original.state_dict())
    assert str(ours.load_state_dict(before, strict=True)) == "<All keys matched successfully>"
    assert before.keys() == original.state_dict().keys(), "the caller's dict has changed"
    assert_equals_original(ours, original, torch.randn(2, 5, *space, dtype=torch.float64))
    assert not any(name.startswith("cell") for name in ours.state_dict())


def test_original_checkpoint_with_zero_peepholes_loads_without_them() -> None:
    original = Original(**CALL, space=(8, 4))
    weights = {key: value * 0 if ".Wc" in key else value for key, value in original.state_dict().items()}
    original.load_state_dict(weights)
    ours = ConvLSTM(**CALL)
    ours.load_state_dict(weights, strict=True)
    assert_equals_original(ours, original, torch.randn(1, 5, 8, 4))


def test_original_checkpoint_loads_inside_a_larger_model() -> None:
    original = nn.Sequential(nn.Conv2d(5, 5, 1), Original(**CALL))
    ours = nn.Sequential(nn.Conv2d(5, 5, 1), ConvLSTM(**CALL))
    ours.load_state_dict(original.state_dict(), strict=True)
    assert_equals_original(ours, original, torch.randn(1, 5, 8, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("cell1.Whf.weight"), "Missing key.*weight_ih_l1"),
        (lambda d: d.update({"cell5.Wxi.weight": torch.zeros(1)}), "Unexpected key.*cell5.Wxi.weight"),
        (lambda d: d.update({f"cell0.Wx{g}.weight": torch.zeros(8, 6, 3, 3) for g in "ifco"}), "size mismatch"),
        (lambda d: d.update({f"cell0.Wc{g}": torch.zeros(1, 8, 8, 4) for g in "if"}), "Unexpected key.*cell0.Wc"),
        (lambda d: d.update({"weight_hh_l0": torch.zeros(32, 8, 3, 3)}), "Unexpected key.*cell0.Whi.weight"),
    ],
    ids=["missing", "unexpected", "wrong_size", "half_of_peepholes", "mixed"],
)
def test_broken_original_checkpoint_is_refused(change, message: str) -> None:
    weights = Original(**CALL).state_dict()
    change(weights)
    with pytest.raises(RuntimeError, match=message):
        ConvLSTM(**CALL).load_state_dict(weights, strict=True)


def test_example_of_the_original() -> None:
    module = ConvLSTM(
        input_channels=512, hidden_channels=[128, 64, 64, 32, 32], kernel_size=3, step=5, effective_step=[4]
    )
    output, (h, c) = module(torch.randn(1, 512, 64, 32))
    assert output[0][0].shape == (32, 64, 32)
    assert h.shape == c.shape == (1, 32, 64, 32)
    torch.testing.assert_close(output[0], h, rtol=0, atol=0)


@pytest.mark.parametrize("peephole", [False, True], ids=["plain", "peephole"])
def test_cell_equals_original_cell(peephole: bool) -> None:
    original = OriginalCell(3, 4, 3, SPACE if peephole else None)
    ours = ConvLSTMCell(3, 4, 3, peephole=peephole)
    ours.load_state_dict(original.state_dict(), strict=True)
    x = torch.randn(2, 3, *SPACE)
    h, c = ours.init_hidden(2, 4, SPACE)
    assert h.shape == c.shape == (2, 4, *SPACE) and h.data_ptr() != c.data_ptr()
    expected = (h, c)
    for _ in range(3):
        h, c = ours(x, h, c)
        expected = original(x, *expected)
    for a, b in zip((h, c), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_cell_in_a_loop_equals_layer() -> None:
    layer = build(hidden_channels=4, peephole=True, image_size=SPACE)
    cell = ConvLSTMCell(CHANNELS, 4, 3, peephole=True, image_size=SPACE)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
    x = frames()
    output, last = layer(x)
    h = c = None
    for t in range(TIME):
        h, c = cell(x[:, t], h, c)
        assert torch.equal(h, output[:, t])
    assert_same((h, c), last)
    assert_same(cell(None, h, c), layer(None, (h, c))[1])


def test_parameters_have_the_names_shapes_and_range_of_the_docs() -> None:
    module = ConvLSTM(
        6, [4, 8], 3, bidirectional=True, groups=2, peephole=True, image_size=SPACE, unit_forget_bias=True
    )
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    expected = {}
    for k, (inputs, c) in enumerate([(6, 4), (8, 8)]):
        for end in (f"_l{k}", f"_l{k}_reverse"):
            expected |= {
                f"weight_ih{end}": (4 * c, inputs // 2, 3, 3),
                f"weight_hh{end}": (4 * c, c, 3, 3),
                f"bias{end}": (4 * c,),
                f"peephole{end}": (3, c, *SPACE),
            }
            bound = ((inputs // 2 + c) * 9) ** -0.5
            for name in ("weight_ih", "weight_hh"):
                largest = getattr(module, name + end).abs().max()
                assert 0.8 * bound < largest <= bound
            bias = getattr(module, f"bias{end}")
            assert bias[c : 2 * c].eq(1).all() and bias[2 * c :].abs().max() <= bound
            assert not getattr(module, f"peephole{end}").any()
    assert shapes == expected
    assert not any(name.startswith("bias") for name, _ in ConvLSTM(3, 4, 3, bias=False).named_parameters())


def test_reset_draws_weights_anew_and_makes_peepholes_zero() -> None:
    module = build(peephole=True, image_size=SPACE)
    before = module.weight_ih_l0.clone()
    with torch.no_grad():
        module.peephole_l1.add_(1)
    module.reset_parameters()
    assert not module.peephole_l1.any()
    assert not torch.equal(module.weight_ih_l0, before)


def test_state_dict_round_trip() -> None:
    options = {"bidirectional": True, "peephole": True, "image_size": SPACE}
    module, other, x = build(**options), build(**options), frames()
    assert not torch.equal(module(x)[0], other(x)[0])
    stored = io.BytesIO()
    torch.save(module.state_dict(), stored)
    stored.seek(0)
    other.load_state_dict(torch.load(stored), strict=True)
    assert_same(other(x), module(x))


# Peepholes that get their size on the first call.


def test_peephole_gets_its_size_on_the_first_call_and_is_trained() -> None:
    module = build(peephole=True, stride=[2, 1])
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    assert isinstance(module.peephole_l0, nn.UninitializedParameter)
    assert not any("peephole" in name for name in module.state_dict())
    module(frames())[0].sum().backward()
    assert module.peephole_l0.shape == (3, 4, 3, 3) and module.peephole_l1.shape == (3, 6, 3, 3)
    assert not module.peephole_l0.any() and not module._forward_pre_hooks
    optimizer.step()
    assert module.peephole_l0.any() and module.peephole_l1.any()
    for state in (None, [tuple(torch.zeros(2, 4, 2, 3) for _ in "hc"), None]):
        with pytest.raises(ValueError, match=r"layer 0 has size \[2, 3\], expected \[3, 3\] as peephole_l0 has"):
            module(frames(space=(4, 5)), state)


REFUSED = {
    "frame_too_small": ({"padding": "valid"}, lambda: (frames(space=(2, 2)),)),
    "frame_far_too_small": ({"padding": "valid"}, lambda: (frames(space=(1, 1)),)),
    "frame_too_small_for_layer_1": ({"padding": "valid"}, lambda: (frames(space=(4, 4)),)),
    "empty_frame": ({}, lambda: (frames(space=(0, 5)),)),
    "reflect": ({"padding_mode": "reflect", "kernel_size": 5}, lambda: (frames(space=(2, 2)),)),
    "dtype": ({}, lambda: (frames(dtype=torch.float64),)),
    "lengths": ({}, lambda: (frames(), None, torch.tensor([1, 9]))),
    "state_rank": ({}, lambda: (None, pairs((2, 4, 6), (2, 6, 6)))),
    "state_of_layer_1": ({}, lambda: (frames(), [None, *pairs((2, 6, 7, 7))])),
    "step_too_late": ({"effective_step": [4]}, lambda: (frames(time=4),)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_first_call_leaves_peepholes_without_size(name: str) -> None:
    options, arguments = REFUSED[name]
    module = build(peephole=True, bidirectional=name == "dtype", **options)
    expected = module.state_dict().keys()
    with pytest.raises((ValueError, TypeError), match=r"(?i)^(ConvLSTM|conv_lstm): ") as refused:
        module(*arguments())
    assert isinstance(module.peephole_l0, nn.UninitializedParameter) and module.state_dict().keys() == expected
    module(frames(time=5, space=(8, 9)))[0].sum().backward()
    assert module.peephole_l0.grad.shape == module.peephole_l0.shape and not module._forward_hooks
    del refused  # until here its traceback has held what the call had computed


def test_peephole_sized_in_inference_can_be_trained() -> None:
    module = build(peephole=True)
    with torch.inference_mode():
        module(frames())
    module(frames())[0].sum().backward()
    assert module.peephole_l0.grad is not None


def test_peephole_gets_its_size_from_a_state_without_input() -> None:
    module = build(peephole=True, stride=[1, 2])
    module(None, [tuple(torch.zeros(BATCH, 4, *SPACE) for _ in "hc"), None])
    assert module.peephole_l0.shape == (3, 4, *SPACE) and module.peephole_l1.shape == (3, 6, 3, 3)


@pytest.mark.parametrize("kind", [ConvLSTM, ConvLSTMCell])
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_peephole_gets_its_size_from_a_checkpoint(kind, assign: bool) -> None:
    module, other = (kind(3, 4, 3, peephole=True) for _ in range(2))
    x = torch.randn(2, 3, *SPACE)
    module(x)
    nn.init.normal_(next(p for name, p in module.named_parameters() if name.startswith("peephole")))
    other.load_state_dict(module.state_dict(), strict=True, assign=assign)
    assert not other._forward_pre_hooks
    assert_same(other(x), module(x))


@pytest.mark.parametrize("shape", [(3, 7, 10, 9), (3, 8, 10), (4, 8, 10, 9), (3, 8, 0, 9)], ids=str)
def test_peephole_of_another_shape_is_refused_and_leaves_no_size(shape: tuple[int, ...]) -> None:
    module = ConvLSTM(3, 8, 3, peephole=True)
    weights = module.state_dict() | {"peephole_l0": torch.zeros(shape)}
    with pytest.raises(RuntimeError, match=r"size mismatch for peephole_l0: .* in current model is \[3, 8, \*S'\]"):
        module.load_state_dict(weights)
    assert isinstance(module.peephole_l0, nn.UninitializedParameter) and "peephole_l0" in weights
    module.load_state_dict(weights | {"peephole_l0": torch.ones(3, 8, 10, 9)})
    assert module.peephole_l0.shape == (3, 8, 10, 9) and module.peephole_l0.all()


def test_module_without_peephole_size_moves_copies_pickles_and_loads() -> None:
    module = build(peephole=True, bidirectional=True)
    stored = io.BytesIO()
    torch.save(module.state_dict(), stored)
    stored.seek(0)
    weights = torch.load(stored)
    loaded = build(peephole=True, bidirectional=True)
    loaded.load_state_dict(weights, strict=True)
    x = frames()
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded]
    expected = module(x)
    for again in copies:
        assert_same(again(x), expected)
        assert again.peephole_l1_reverse is not module.peephole_l1_reverse
    double = build(peephole=True).double()
    assert double(x.double())[0].dtype == double.peephole_l0.dtype == torch.float64


def test_forward_past_the_hooks_says_that_the_peephole_has_no_size() -> None:
    with pytest.raises(RuntimeError, match="peephole_l0 has no size yet, expected image_size"):
        build(peephole=True).forward(frames())


# What users do to modules.


def test_repr_shows_what_is_not_default() -> None:
    assert repr(ConvLSTM(3, [4, 6], 3, step=5)) == (
        "ConvLSTM(input_channels=3, hidden_channels=[4, 6], kernel_size=3, step=5)"
    )
    assert repr(ConvLSTM1d(3, 4, 3, bias=False, stride=2)) == (
        "ConvLSTM1d(input_channels=3, hidden_channels=[4], kernel_size=3, bias=False, stride=2)"
    )
    assert repr(ConvLSTMCell(3, 4, 3, peephole=True)) == (
        "ConvLSTMCell(input_channels=3, hidden_channels=4, kernel_size=3, peephole=True)"
    )


def test_copies_are_equal_and_apart() -> None:
    module = build(bidirectional=True, peephole=True, image_size=SPACE)
    assert_copies_are_equal_and_apart(module, frames())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_module(dtype: torch.dtype, backend: str) -> None:
    module = build(return_all_layers=True, peephole=True, image_size=SPACE, backend=backend).to(dtype)
    x = frames(dtype=dtype)
    outputs, states = module(x)
    outputs_2, _ = module(x, states)
    assert all(o.dtype == dtype for o in outputs + outputs_2)
    assert all(h.dtype == dtype and c.dtype == torch.float32 for h, c in states)
    outputs_2[-1].float().sum().backward()
    assert all(p.grad.dtype == dtype for p in module.parameters())
    exact = plain_stack(module, {n: p.double() for n, p in module.named_parameters()}, x.double())
    eager = plain_stack(module, dict(module.named_parameters()), x)
    for a, e, n in zip(flat((outputs, states)), flat(exact), flat(eager), strict=True):
        assert_close_to_oracle(a, e, n)


def test_weights_may_be_parametrized() -> None:
    module, x = build(), frames()
    expected, _ = module(x)
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0", dim=0)
    output, _ = module(x)
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parametrizations.weight_hh_l0.parameters())

    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    module = build()
    halved = copy.deepcopy(module)
    nn.utils.parametrize.register_parametrization(halved, "weight_ih_l1", Half())
    with torch.no_grad():
        module.weight_ih_l1 /= 2
    assert_same(halved(x), module(x))


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "peephole": True, "image_size": SPACE}], ids=str)
def test_every_parameter_gets_a_gradient_under_ddp(options: dict, tmp_path: Path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch.distributed is not built into this torch")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    module = None
    try:
        module = nn.parallel.DistributedDataParallel(build(**options))
        for _ in range(2):  # the second forward raises if the first left a parameter without a gradient
            module(frames())[0].sum().backward()
        assert all(p.grad is not None for p in module.parameters())
    finally:
        # Were the module the last to hold the group, it would wait for the group's thread, which may wait for the GIL.
        del module
        gc.collect()
        torch.distributed.destroy_process_group()


def test_weights_may_be_shared_between_processes() -> None:
    module, x = build(peephole=True, image_size=SPACE), frames()
    expected = module(x)
    assert module.share_memory().weight_hh_l0.is_shared()
    assert_same(module(x), expected)


# Capture.


class Head(nn.Module):
    """A model around a ConvLSTM that is called with a state."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.rnn = build(**options)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        half = x.shape[1] // 2
        _, state = self.rnn(x[:, :half])
        output, (h, _) = self.rnn(x[:, half:], state)
        return output, h


COMPILED = {
    "two_layers": {},
    "bidirectional": {"bidirectional": True, "hidden_channels": 4},
    "peephole": {"peephole": True, "image_size": SPACE, "hidden_channels": 4},
    "stride_and_groups": {"stride": 2, "groups": 3, "hidden_channels": 6},
    "last_step": {"effective_step": [-1], "hidden_channels": 4},
    "some_steps": {"effective_step": [0, -1], "hidden_channels": 4},
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_whole_for_any_time_and_batch(name: str, native_ops) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = Head(**COMPILED[name])
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for batch, time in ((4, 8), (7, 10), (9, 12)):  # unlike any other size, which would be taken for the same
        x = frames(batch, time)
        results = []
        for run in (model, compiled):
            model.zero_grad()
            output = run(x)
            sum(o.sum() for o in output).backward()
            results.append([*output, *(p.grad.clone() for p in model.parameters())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
        with torch.no_grad():
            assert_same(compiled(x), model(x))
        compilations.append(counter.frame_count)
    assert compilations == compilations[:1] * 3, "other sizes were compiled again"


def test_compiled_module_returns_a_state_that_goes_back_in() -> None:
    torch._dynamo.reset()
    module, x = build(), frames()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    _, state = compiled(x)
    assert isinstance(state, ConvLSTMState)
    for a, b in zip(flat(compiled(x, state)), flat(module(x, module(x)[1])), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["h_is_c", "tied_weights"])
def test_compiles_with_one_tensor_in_two_places(name: str, native_ops) -> None:
    torch._dynamo.reset()
    module = build(hidden_channels=4, input_channels=4)
    if name == "tied_weights":
        module.weight_ih_l0 = module.weight_hh_l0
    x, z = frames(channels=4), torch.randn(BATCH, 4, *SPACE, requires_grad=True)
    leaves = [z, module.weight_hh_l0]
    found = []
    for run in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        output, _ = run(x, (z, z))
        found.append([output, *torch.autograd.grad(output.sum(), leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_compiling_gives_peepholes_their_size_first() -> None:
    torch._dynamo.reset()
    module = build(peephole=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with pytest.raises(TypeError, match=r"conv_lstm: input has dtype torch.float64"):
        compiled(frames(space=(7, 7), dtype=torch.float64))
    output, _ = compiled(frames())
    assert output.shape == (BATCH, TIME, 6, *SPACE) and module.peephole_l0.shape == (3, 4, *SPACE)


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])
def test_exports_as_one_op_a_layer_and_direction(strict: bool, bidirectional: bool, native_ops) -> None:
    module = build(bidirectional=bidirectional).eval()
    batch, time = torch.export.Dim("batch"), torch.export.Dim("time")
    dynamic = {"input": {0: batch, 1: time}}
    program = torch.export.export(module, (frames(),), dynamic_shapes=dynamic, strict=strict)
    called = [str(node.target) for node in program.graph.nodes]
    assert sum("conv_lstm_forward" in target for target in called) == (4 if bidirectional else 2)
    stored = io.BytesIO()
    torch.export.save(program, stored)
    stored.seek(0)
    again = torch.export.load(stored).module()
    x = frames(batch=3, time=7)
    with torch.no_grad():
        assert_same(again(x), module(x))


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_exported_example_says_nothing_of_other_inputs(strict: bool, native_ops) -> None:
    module, x = build().eval(), frames()
    same = frames(time=1).expand(-1, TIME, -1, -1, -1)  # one frame at every step has a way of its own
    for run in (torch.export.export(module, (same,), strict=strict).module(), torch.jit.trace(module, (same,))):
        with torch.no_grad():
            assert_same(run(x), module(x))


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_state_goes_in_and_out_of_an_exported_program(strict: bool, native_ops) -> None:
    module, x = build().eval(), frames()
    with torch.no_grad():
        _, state = module(x)
        program = torch.export.export(module, (x, state), strict=strict)
        assert_same(program.module()(x, state), module(x, state))
    assert len(program.module()(x, state)[1].layers) == 2


SCRIPTED = {
    **{name: options for name, options in OPTIONS.items() if name != "lean"},
    "all_layers": {"return_all_layers": True, "bidirectional": True},
    "time_first": {"batch_first": False},
    "last_step": {"effective_step": [-1]},
    "some_steps": {"effective_step": [2, -1, 2]},
}


@pytest.mark.parametrize("name", SCRIPTED)
def test_scripts_saves_and_loads(name: str, native_ops) -> None:
    module = build(dtype=torch.float64, step=3, **SCRIPTED[name])
    x = frames(dtype=torch.float64)
    x = x if module.batch_first else x.transpose(0, 1)
    script = scripted(module)
    with torch.no_grad():
        for input in (x, x[:, 0] if module.batch_first else x[0]):
            for a, b in zip(flat(script(input)), flat(module(input)), strict=True):
                torch.testing.assert_close(a, b)


def test_scripted_module_equals_eager_bit_for_bit(native_ops) -> None:
    module = build(return_all_layers=True, step=2)
    script, x, lengths = scripted(module), frames(), torch.tensor([3, 0], dtype=torch.int32)
    with torch.no_grad():
        states = module(x)[1]
        assert_same(script(x), module(x))
        assert_same(script(x, states, lengths), module(x, states, lengths))
        assert_same(script(None, states), module(None, states))


@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])
def test_scripts_inside_a_model(bidirectional: bool, native_ops) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = build(bidirectional=bidirectional, hidden_channels=4, peephole=True, image_size=SPACE)
            self.head = nn.Conv2d(8 if bidirectional else 4, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            _, state = self.rnn(x)
            output, _ = self.rnn(x, [state])
            return self.head(output.flatten(0, 1))

    model, x = Model(), frames()
    with torch.no_grad():
        torch.testing.assert_close(scripted(model)(x), model(x))


def test_scripted_module_refuses_what_does_not_fit(native_ops) -> None:
    script = scripted(build())
    for arguments in ((frames()[:, 0, 0],), (None,), (frames(), [(torch.zeros(1), torch.zeros(1))])):
        with pytest.raises((RuntimeError, torch.jit.Error), match=r"ConvLSTM: (input|state) "):
            script(*arguments)
    with pytest.raises(RuntimeError, match="peepholes have no size yet"):
        torch.jit.script(build(peephole=True))


# Bad arguments: what was wrong, what was expected, what came.

BAD_CONSTRUCTION = {
    "backend": ({"backend": "cudnn"}, "backend is 'cudnn', expected one of cpu, triton, cuda, reference"),
    "hidden_empty": ({"hidden_channels": []}, r"hidden_channels is \[\], expected positive ints"),
    "hidden_none": ({"hidden_channels": None}, "hidden_channels is None, expected positive ints"),
    "hidden_float": ({"hidden_channels": 4.0}, "hidden_channels is 4.0, expected positive ints"),
    "hidden_bool": ({"hidden_channels": True}, "hidden_channels is True, expected positive ints"),
    "hidden_zero": ({"hidden_channels": [4, 0]}, r"hidden_channels is \[4, 0\], expected positive ints"),
    "input_negative": ({"input_channels": -1}, "input_channels is -1, expected an int >= 0"),
    "input_bool": ({"input_channels": True}, "input_channels is True, expected an int >= 0"),
    "kernel_bool": ({"kernel_size": True}, "kernel_size is True, expected an int >= 1"),
    "kernel_zero": ({"kernel_size": 0}, "kernel_size is 0, expected an int >= 1 or a tuple of 2"),
    "kernel_rank": ({"kernel_size": (3, 3, 3)}, r"kernel_size is \(3, 3, 3\), expected an int >= 1 or a tuple of 2"),
    "kernel_layers": ({"kernel_size": [3, 3, 3]}, r"kernel_size is \[3, 3, 3\], expected 2 entries, one per layer"),
    "stride": ({"stride": 0}, "stride is 0, expected an int >= 1"),
    "dilation": ({"dilation": (1, 0)}, r"dilation is \(1, 0\), expected an int >= 1"),
    "padding": ({"padding": -1}, "padding is -1, expected an int >= 0"),
    "padding_name": ({"padding": "full"}, "padding is 'full', expected 'same', 'valid', an int"),
    "padding_mode": ({"padding_mode": "zero"}, "padding_mode is 'zero', expected one of zeros, reflect"),
    "groups": ({"groups": 2}, "groups is 2, expected a divisor of the 3 input channels"),
    "groups_bool": ({"groups": True}, "groups is True, expected a divisor of the 3 input channels"),
    "step": ({"step": 0}, "step is 0, expected an int >= 1"),
    "step_bool": ({"step": True}, "step is True, expected an int >= 1"),
    "effective_step": ({"effective_step": ["a"]}, "effective_step is .* expected None or a list of ints"),
    "effective_step_int": ({"effective_step": 4}, "effective_step is 4, expected None or a list of ints"),
    "dropout": ({"dropout": 1.5}, r"dropout is 1.5, expected a probability \(0 to 1\)"),
    "dropout_none": ({"dropout": None}, r"dropout is None, expected a probability \(0 to 1\)"),
    "dropout_text": ({"dropout": "a"}, r"dropout is 'a', expected a probability \(0 to 1\)"),
    "memory": ({"memory": "slow"}, "memory is 'slow', expected one of fast, lean"),
    "unit_forget_bias": ({"unit_forget_bias": True, "bias": False}, "unit_forget_bias is True with bias=False"),
    "image_size": ({"peephole": True, "image_size": (6,)}, r"image_size is \(6,\), expected .* a tuple of 2"),
    "image_small": (
        {"peephole": True, "image_size": 2, "padding": "valid"},
        "expected frames that are not smaller than the kernel",
    ),
}


@pytest.mark.parametrize("name", BAD_CONSTRUCTION)
def test_bad_constructor_argument(name: str) -> None:
    options, message = BAD_CONSTRUCTION[name]
    with pytest.raises(ValueError, match=f"^ConvLSTM: .*{message}"):
        ConvLSTM(**({"input_channels": 3} | STACK | options))


@pytest.mark.parametrize("kind", [ConvLSTM, ConvLSTMCell])
@pytest.mark.parametrize("dtype", ["float32", torch.int64], ids=str)
def test_bad_dtype(dtype, kind) -> None:
    with pytest.raises(TypeError, match=rf"^{kind.__name__}: dtype is {dtype!r}, expected a floating point type"):
        kind(3, 4, 3, dtype=dtype)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kernel_size": [3, 3]}, r"kernel_size is \[3, 3\], expected an int >= 1 or a tuple of 2$"),
        ({"groups": [1]}, r"groups is \[1\], expected a divisor"),
        ({"hidden_channels": 0}, "hidden_channels is 0, expected an int >= 1$"),
        ({"hidden_channels": [4]}, r"hidden_channels is \[4\], expected an int >= 1$"),
    ],
)
def test_bad_constructor_argument_of_a_cell_is_not_about_layers(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^ConvLSTMCell: {message}"):
        ConvLSTMCell(**({"input_channels": 3, "hidden_channels": 4, "kernel_size": 3} | wrong))


def test_integers_of_numpy_are_taken() -> None:
    n = np.int64
    options = {"stride": (n(1), n(2)), "padding": n(1), "dilation": n(1), "groups": n(1), "step": n(2)}
    module = ConvLSTM(n(3), [n(4), n(6)], n(3), effective_step=[n(1)], image_size=n(6), peephole=True, **options)
    assert module(torch.randn(2, 3, 6, 6))[0].shape == (1, 2, 6, 6, 2)
    assert ConvLSTMCell(n(3), n(4), n(3))(torch.randn(2, 3, 6, 6))[0].shape == (2, 4, 6, 6)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def pairs(*shapes: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    return [(zeros(*shape), zeros(*shape)) for shape in shapes]


GOOD = pairs((2, 4, 6, 5), (2, 6, 6, 5))
BAD_CALLS = {
    "rank": ({}, (zeros(2, 3, 6),), ValueError, r"ConvLSTM: input has 3 dims, expected 5, layout \[B, T, C, H, W\]"),
    "channels": (
        {},
        (zeros(2, 4, 5, 6, 5),),
        ValueError,
        r"^ConvLSTM: input has 5 channels, expected input_channels=3 "
        r"\(input shape \[2, 4, 5, 6, 5\], layout \[B, T, C, H, W\]\)$",
    ),
    "channels_time_first": (
        {"batch_first": False},
        (zeros(4, 2, 5, 6, 5),),
        ValueError,
        r"input has 5 channels, .*layout \[T, B, C, H, W\]",
    ),
    "channels_of_frame": ({}, (zeros(2, 5, 6, 5),), ValueError, r"input has 5 channels, .*layout \[B, C, H, W\]"),
    "no_time": ({}, (zeros(2, 0, 3, 6, 5),), ValueError, "input has 0 time steps, expected at least 1"),
    "no_pixel": ({}, (zeros(2, 4, 3, 0, 5),), ValueError, "input has an empty frame"),
    "type": ({}, ([1.0],), TypeError, "ConvLSTM: input is a list of 1, expected a Tensor or None"),
    "dtype": ({}, (zeros(2, 4, 3, 6, 5, dtype=torch.float64),), TypeError, "input has dtype torch.float64"),
    "integers": ({}, (zeros(2, 4, 3, 6, 5, dtype=torch.int64),), TypeError, "input has dtype torch.int64"),
    "device": ({}, (zeros(2, 4, 3, 6, 5).to("meta"),), ValueError, "input is on meta, expected cpu"),
    "sparse": ({}, (zeros(2, 4, 3, 6, 5).to_sparse(),), TypeError, r"input is a torch.sparse_coo tensor, .* a dense"),
    "nested": (
        {},
        (torch.nested.nested_tensor([zeros(4, 3, 6, 5), zeros(2, 3, 6, 5)], layout=torch.jagged),),
        TypeError,
        r"^ConvLSTM: input is a nested tensor, expected a dense \(strided\) tensor$",
    ),
    "sparse_state": (
        {},
        (zeros(2, 4, 3, 6, 5), [None, tuple(part.to_sparse() for part in GOOD[1])]),
        TypeError,
        "state h of layer 1 is a torch.sparse_coo tensor, expected a dense",
    ),
    "nothing": ({}, (None,), ValueError, "state is None, expected one where input is None"),
    "no_first_state": ({}, (None, [None, GOOD[1]]), ValueError, "state is None, expected one where input is None"),
    "step_too_late": (
        {"effective_step": [4]},
        (zeros(2, 4, 3, 6, 5),),
        ValueError,
        "effective_step has 4, expected -4",
    ),
    "step_too_early": ({"effective_step": [-5]}, (zeros(2, 4, 3, 6, 5),), ValueError, "effective_step has -5"),
    "step_of_frame": (
        {"effective_step": [1]},
        (zeros(2, 3, 6, 5),),
        ValueError,
        "effective_step has 1, expected -1 to 0",
    ),
    "state_of_one_layer": ({}, (zeros(2, 4, 3, 6, 5), GOOD[1]), ValueError, "state is one .* return_all_layers=True"),
    "state_count": ({}, (zeros(2, 4, 3, 6, 5), GOOD[:1]), ValueError, "state has 1 entries, expected 2"),
    "state_type": ({}, (zeros(2, 4, 3, 6, 5), zeros(2)), TypeError, "state is a Tensor, expected"),
    "state_entry": ({}, (zeros(2, 4, 3, 6, 5), [1, 2]), TypeError, "state of layer 0 is an int, expected two tensors"),
    "state_part": (
        {"hidden_channels": 4},
        (zeros(2, 4, 3, 6, 5), (zeros(2, 4, 6, 5), None)),
        TypeError,
        "c of state of layer 0 is None, expected a Tensor",
    ),
    "state_numpy": (
        {"hidden_channels": 4},
        (zeros(2, 4, 3, 6, 5), (np.zeros(2), np.zeros(2))),
        TypeError,
        "h of state of layer 0 is a ndarray, expected a Tensor",
    ),
    "state_batch": (
        {},
        (zeros(2, 4, 3, 6, 5), pairs((3, 4, 6, 5), (2, 6, 6, 5))),
        ValueError,
        r"state h of layer 0 has shape \[3, 4, 6, 5\], expected \[2, 4, 6, 5\]",
    ),
    "state_channels": (
        {},
        (zeros(2, 4, 3, 6, 5), pairs((2, 4, 6, 5), (2, 4, 6, 5))),
        ValueError,
        r"state h of layer 1 has shape \[2, 4, 6, 5\], expected \[2, 6, 6, 5\]",
    ),
    "state_size": (
        {"stride": 2},
        (zeros(2, 4, 3, 6, 5), pairs((2, 4, 6, 5), (2, 6, 6, 5))),
        ValueError,
        r"state h of layer 0 has shape \[2, 4, 6, 5\], expected \[2, 4, 3, 3\]",
    ),
    "state_rank": ({}, (None, pairs((2, 4, 6), (2, 6, 6, 5))), ValueError, "state h of layer 0 has shape"),
    "state_scalar": ({}, (None, pairs((), ())), ValueError, "state h of layer 0 has shape"),
    "state_directions": (
        {"bidirectional": True},
        (zeros(2, 4, 3, 6, 5), GOOD),
        ValueError,
        r"state h of layer 0 has shape \[2, 4, 6, 5\], expected \[2, 2, 4, 6, 5\]",
    ),
    "lengths_shape": ({}, (zeros(2, 4, 3, 6, 5), None, torch.tensor([1])), ValueError, r"lengths has shape \[1\]"),
    "lengths_negative": ({}, (zeros(2, 4, 3, 6, 5), None, torch.tensor([1, -1])), ValueError, "lengths has -1"),
    "lengths_too_long": ({}, (zeros(2, 4, 3, 6, 5), None, torch.tensor([1, 5])), ValueError, "lengths has 5"),
    "lengths_device": (
        {},
        (zeros(2, 4, 3, 6, 5), None, torch.tensor([1, 2], device="meta")),
        ValueError,
        "lengths is on meta, expected cpu",
    ),
    "lengths_dtype": ({}, (zeros(2, 4, 3, 6, 5), None, torch.tensor([1.0, 2])), TypeError, "lengths has dtype"),
    "reflect": (
        {"kernel_size": 4, "padding_mode": "reflect"},
        (zeros(2, 4, 3, 2, 5),),
        ValueError,
        "padding is 2 in spatial dim 0, expected at most 1 with padding_mode='reflect'",
    ),
    "frame_too_small": ({"padding": "valid"}, (zeros(2, 4, 3, 2, 5),), ValueError, "input has size 2 in spatial dim 0"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call_is_named_with_what_was_expected(name: str) -> None:
    options, arguments, error, message = BAD_CALLS[name]
    module = build(**options)
    with pytest.raises(error, match=message):
        module(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((zeros(2, 3, 6),), ValueError, r"ConvLSTMCell: input has 3 dims, expected 4 .*layout \[B, C, H, W\]"),
        ((zeros(2, 5, 6, 5),), ValueError, "ConvLSTMCell: input has 5 channels, expected input_channels=3"),
        ((zeros(2, 3, 6, 5), zeros(2, 4, 6, 5)), ValueError, "expected h and c together"),
        ((None,), ValueError, r"given are \[\], expected h and c together, and at least them or input"),
        ((zeros(2, 3, 6, 5), *pairs((2, 5, 6, 5))[0]), ValueError, r"^ConvLSTMCell: h has shape \[2, 5, 6, 5\]"),
        ((1,), TypeError, "ConvLSTMCell: input is an int, expected a Tensor or None"),
        ((zeros(2, 3, 6, 5).to_sparse(),), TypeError, "ConvLSTMCell: input is a torch.sparse_coo .* a dense"),
    ],
)
def test_bad_call_of_a_cell(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ConvLSTMCell(3, 4, 3)(*arguments)
