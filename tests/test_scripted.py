"""What `torch.jit.script` makes of every module: buffers, mode, what it refuses, and its place in a model."""

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convfast.nn import CNN_LSTM, LSTM, Conv1d, Conv1dLSTM, ConvLSTM, ConvLSTMCell, RegLSTM
from tests.modules import assert_close, flat, scripted

OPS = ("conv_lstm", "conv1d", "lstm")
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

FRAMES, STEPS = (2, 4, 3, 5, 6), (2, 9, 3)
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv_lstm": (lambda: ConvLSTM(3, [4, 2], 3), FRAMES),
    "conv_lstm_peephole": (
        lambda: ConvLSTM(3, 4, 3, bidirectional=True, bias=False, peephole=True, image_size=(5, 6)),
        FRAMES,
    ),
    "cell": (lambda: ConvLSTMCell(3, 4, 3, peephole=True, image_size=(5, 6)), FRAMES[1:]),
    "lstm": (lambda: LSTM(3, 5, 2), STEPS),
    "lstm_peephole": (lambda: LSTM(3, 5, bias=False, proj_size=2, peephole=True), STEPS),
    "reg_lstm": (lambda: RegLSTM(3, 5), STEPS),
    "conv1d": (lambda: Conv1d(3, 4, 3), STEPS),
    "conv1d_no_bias": (lambda: Conv1d(3, 4, 3, bias=False), STEPS),
    "conv1d_lstm": (lambda: Conv1dLSTM(3, [4, 2], 5, pool=[None, ("max", 2)]), STEPS),
    "cnn_lstm": (lambda: CNN_LSTM(3, 2, 4, lstm_hidden_size=5), STEPS),
}
every = pytest.mark.parametrize("name", MODULES)


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


def without_gradients(module: Callable[..., Any], *arguments: Any) -> list[Tensor]:
    with torch.no_grad():
        return flat(module(*arguments))


@every
def test_state_dict_and_dtype_have_every_weight(name: str, native_ops) -> None:
    build, shape = MODULES[name]
    module, other = build().eval(), scripted(build())
    script = scripted(module)
    assert sum(t.numel() for t in script.state_dict().values()) == sum(p.numel() for p in module.parameters())
    other.load_state_dict(script.state_dict())
    x = torch.randn(shape)
    assert_close(without_gradients(other, x), without_gradients(module, x))
    assert_close(without_gradients(script.double(), x.double()), without_gradients(module.double(), x.double()))


@every
def test_scripting_keeps_what_it_replaces(name: str, native_ops) -> None:
    # torch knows objects by their addresses, which those of a module that is gone may have again.
    model = Model(MODULES[name][0]()).eval()
    layer = weakref.ref(model.layer)
    script = torch.jit.script(model)
    assert layer() is not None and layer() is not model.layer
    del script


@every
def test_mode_is_that_of_the_module(name: str, native_ops) -> None:
    build, shape = MODULES[name]
    module, x = build(), torch.randn(shape)
    assert torch.jit.script(module).training
    part = next(module.children(), module).eval()
    torch.jit.script(module)
    assert module.training is (part is not module) and not part.training
    script = torch.jit.script(module.eval())
    assert not any(part.training for part in script.modules())
    assert_close(without_gradients(torch.jit.freeze(script), x), without_gradients(module, x))


@every
def test_what_a_script_would_leave_out_is_refused(name: str, native_ops) -> None:
    build, _ = MODULES[name]
    module = build()
    owner = type(module)

    class Twice(owner):
        def forward(self, *arguments: Any) -> Any:
            return super().forward(*arguments)

    module.__class__ = Twice
    with pytest.raises(RuntimeError, match=f"^Twice: forward is overridden.* expected that of {owner.__name__} "):
        torch.jit.script(module)
    module.__class__ = type("Plain", (owner,), {})
    torch.jit.script(module)
    module.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"^Plain: hooks are set"):
        torch.jit.script(module)


def test_hook_of_a_linear_layer_on_top_is_kept(native_ops) -> None:
    def twice(module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return 2 * output

    module, x = RegLSTM(3, 5), torch.randn(STEPS)
    expected = [2 * y for y in without_gradients(module, x)]
    module.reg.register_forward_hook(twice)
    assert_close(without_gradients(scripted(module), x), expected)


@every
def test_layer_of_a_scripted_model_does_not_stop_learning_unnoticed(name: str, native_ops) -> None:
    build, shape = MODULES[name]
    model, x = Model(build()), torch.randn(shape)
    expected = without_gradients(copy.deepcopy(model).eval(), x)
    torch.jit.script(copy.deepcopy(model))
    assert all(y.requires_grad for y in flat(model(x)))
    script = torch.jit.script(model)
    with pytest.raises(RuntimeError, match=r"expected torch\.jit\.script\(copy\.deepcopy\(model\)\)"):
        model(x)
    script(x)
    assert_close(without_gradients(model, x), expected)
    assert_close([y.detach() for y in flat(model.eval()(x))], expected)
    assert_close(without_gradients(torch.jit.script(model), x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("name", ["conv_lstm", "lstm", "conv1d", "conv1d_lstm", "cnn_lstm"])
def test_lengths_that_are_no_integers_are_refused(name: str, dtype: torch.dtype, native_ops) -> None:
    build, shape = MODULES[name]
    script, x = scripted(build()), torch.randn(shape)
    lengths = torch.ones(shape[0] if name != "lstm" else shape[1])
    script(x, lengths=lengths.to(torch.uint8))
    with pytest.raises(torch.jit.Error, match=r"lengths has a .* dtype, expected a Tensor of integers"):
        script(x, lengths=lengths.to(dtype))


CELLS = {"groups": {"groups": 3, "hidden_channels": 3}, "stride": {"stride": 2, "bias": False}}


@pytest.mark.parametrize("name", CELLS)
def test_scripted_cell_steps_as_the_cell(name: str, native_ops) -> None:
    cell = ConvLSTMCell(**({"input_channels": 3, "hidden_channels": 4, "kernel_size": 3} | CELLS[name]))
    script, x = scripted(cell), torch.randn(FRAMES[1:])
    state = without_gradients(cell, x)
    for arguments in ((x,), (x, *state), (None, *state)):
        assert_close(without_gradients(script, *arguments), without_gradients(cell, *arguments))
    assert_close(script.init_hidden(2, 4, [5, 6]), cell.init_hidden(2, 4, [5, 6]))
    for arguments in ((None,), (x, state[0]), (x[0],)):
        with pytest.raises(torch.jit.Error, match=r"ConvLSTMCell: (expected h and c|input has 3 dims)"):
            script(*arguments)


@every
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_without_turning_gradients_off(name: str, tmp_path: Path, native_ops) -> None:
    build, shape = MODULES[name]
    module, x = build().eval(), torch.randn(shape)
    traced = torch.jit.trace(Model(module), (x,))
    traced.save(str(tmp_path / "traced.pt"))
    assert_close(flat(torch.jit.load(str(tmp_path / "traced.pt"))(x)), without_gradients(module, x))
