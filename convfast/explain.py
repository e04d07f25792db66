"""Which backend and which algorithm a call takes, and why."""

from collections.abc import Iterable, Iterator

from torch import Tensor

from . import backends
from .nn import CNN_LSTM, LSTM, Conv1d, Conv1dLSTM, ConvLSTM, ConvLSTMCell, RegLSTM
from .nn.conv_lstm import State
from .ops.conv_lstm import algorithm_of, given_once

Explained = ConvLSTM | ConvLSTMCell | LSTM | Conv1d | Conv1dLSTM | CNN_LSTM | RegLSTM


def explain(module: Explained, input: Tensor | None, state: State | None = None) -> str:
    """What a call of `module` on `input` runs, one line a layer and direction. Nothing is computed.

    Args:
        module: a ConvLSTM (of 1 to 3 dims), a ConvLSTMCell, LSTM, Conv1d, Conv1dLSTM, CNN_LSTM or RegLSTM.
        input: as for its call; only its shape is looked at, so it may be on the meta device.
        state: as for a call of a ConvLSTM without input, `(h, c)` for a ConvLSTMCell; looked at in the same way.

    Raises:
        TypeError: `module` or `input` is of another type, or `state` is given with a module of another kind.
        ValueError: `input` does not fit a ConvLSTM or its cell; of other modules only the weights are looked at.
        RuntimeError: the backend or the algorithm asked for cannot be had.
    """
    of_frames = isinstance(module, ConvLSTM | ConvLSTMCell)
    if not isinstance(input, Tensor) and not (of_frames and input is None):
        raise TypeError(f"explain: input is a {type(input).__name__}, expected a Tensor")
    if state is not None and not of_frames:
        raise TypeError(f"explain: state is a {type(state).__name__}, expected None with a {type(module).__name__}")
    if of_frames:
        lines = _conv_lstm(module, input, state)
    elif isinstance(module, Conv1d):
        lines = iter([_line("conv", "conv1d", module, module.weight)])
    elif isinstance(module, LSTM):
        lines = _lstm(module)
    elif isinstance(module, Conv1dLSTM):
        lines = _conv1d_lstm(module.conv, module.lstm)
    elif isinstance(module, CNN_LSTM):
        lines = _conv1d_lstm(module.cnn.values(), module.lstm)
    elif isinstance(module, RegLSTM):
        lines = _lstm(module.rnn)
    else:
        raise TypeError(
            f"explain: module is a {type(module).__name__}, expected a ConvLSTM, ConvLSTMCell, LSTM, Conv1d, "
            "Conv1dLSTM, CNN_LSTM or RegLSTM"
        )
    return "\n".join(lines)


def _conv_lstm(module: ConvLSTM | ConvLSTMCell, input: Tensor | None, state: State | None) -> Iterator[str]:
    if isinstance(module, ConvLSTMCell):
        h, c = state or (None, None)
        module._check(input, h, c)
        frames, steps = None if input is None else input.unsqueeze(1), 1
        first, pair = module._first_state_size(input, h, c), (h, c)
    else:
        frames, steps, _ = module._frames(input)
        steps = frames.shape[1] if steps is None else steps
        frames = None if frames is None else given_once(frames)
        first, pair = module._first_state_size(input, state), module._states(state)[0]
    if frames is None:
        module._check_state(0, pair, None)
    size = first if frames is None else frames.shape[3:]
    sizes = module._state_sizes(first, f"{'state' if frames is None else 'input'} with frames of {list(size)}")
    for index, (layer, suffixes, state_size) in enumerate(zip(module._layers, module._suffixes, sizes)):
        for suffix in suffixes:
            weight_ih, weight_hh = (getattr(module, f"weight_{name}{suffix}") for name in ("ih", "hh"))
            # One element, seen in the shape of the frames: the choice depends on nothing else, nor on the batch.
            one = weight_hh.detach().new_empty(1)
            x, h0, note = one.expand(1, steps, layer.input_channels, *size), None, ""
            if index == 0 and frames is None:
                x, weight_ih, h0 = None, None, one.expand(1, weight_hh.shape[1], *state_size)
                note = ", without input"
            elif layer.groups > 1 or (index == 0 and frames.shape[1] < steps):
                x, weight_ih = one.expand(1, steps, weight_hh.shape[0], *state_size), None
                note = ", input convolution by the library"
            options = (layer.stride, layer.pads, layer.dilation, layer.padding_mode, module.algorithm)
            how = algorithm_of(_backend("conv_lstm", module, weight_hh), x, weight_ih, weight_hh, h0, steps, *options)
            where = f"layer {index}{suffix.removeprefix(f'_l{index}')}"
            yield _line(where, "conv_lstm", module, weight_hh, f", {how}{note}")
        size = state_size


def _lstm(module: LSTM) -> Iterator[str]:
    if not isinstance(module, LSTM):
        found = f"{type(module).__module__}.{type(module).__name__}"
        raise TypeError(f"explain: in the place of an LSTM is a {found}, expected a convfast.LSTM")
    for layer in range(module.num_layers):
        for direction in module._directions():
            weight = getattr(module, f"weight_hh_l{layer}{direction}")
            yield _line(f"layer {layer}{direction}", "lstm", module, weight)


def _conv1d_lstm(convs: Iterable[Conv1d], lstm: LSTM) -> Iterator[str]:
    for index, conv in enumerate(convs):
        yield _line(f"conv {index}", "conv1d", conv, conv.weight)
    yield from _lstm(lstm)


def _backend(op: str, module: ConvLSTM | ConvLSTMCell | LSTM | Conv1d, weight: Tensor) -> str:
    return backends.choose(op, module.backend, weight.device.type, weight.dtype)[0]


def _line(
    where: str, op: str, module: ConvLSTM | ConvLSTMCell | LSTM | Conv1d, weight: Tensor, how: str = ""
) -> str:
    """The backend, how it computes, and why no other was chosen."""
    device = weight.device.type
    name, passed = backends.choose(op, module.backend, device, weight.dtype)
    reasons = [f"{other}: {why}" for other, why in zip(backends.BACKENDS, passed)]
    if module.backend is None and device == "cuda" and name == "triton":
        reasons.append(f"cuda: {backends.WHY_TRITON_FIRST}")
    return f"{where}: backend {name}{how}" + "".join(f" ({reason})" for reason in reasons)
