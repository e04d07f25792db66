"""Which backend and which algorithm a call takes, and why."""

from collections.abc import Iterable, Iterator

from torch import Tensor

from . import backends
from .nn import CNN_LSTM, LSTM, Conv1d, Conv1dLSTM, ConvLSTM, ConvLSTMCell, RegLSTM
from .ops.conv_lstm import algorithm_of

Explained = ConvLSTM | ConvLSTMCell | LSTM | Conv1d | Conv1dLSTM | CNN_LSTM | RegLSTM


def explain(module: Explained, input: Tensor) -> str:
    """What a call of `module` on `input` runs, one line a layer and direction. Nothing is computed.

    Args:
        module: a ConvLSTM (of 1 to 3 dims), a ConvLSTMCell, LSTM, Conv1d, Conv1dLSTM, CNN_LSTM or RegLSTM.
        input: as for its call; only its shape is looked at, so it may be on the meta device.

    Raises:
        TypeError: `module` or `input` is of another type.
        ValueError: `input` does not fit the module.
        RuntimeError: the backend or the algorithm asked for cannot be had.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"explain: input is a {type(input).__name__}, expected a Tensor")
    if isinstance(module, ConvLSTM | ConvLSTMCell):
        lines = _conv_lstm(module, input)
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


def _conv_lstm(module: ConvLSTM | ConvLSTMCell, input: Tensor) -> Iterator[str]:
    if isinstance(module, ConvLSTMCell):
        module._check(input, None, None)
        frames, steps = input.unsqueeze(1), 1
    else:
        frames, steps, _ = module._frames(input)
        steps = frames.shape[1] if steps is None else steps
    batch, size = frames.shape[0], frames.shape[3:]
    sizes = module._state_sizes(module._layers[0].state_size(size), f"input with frames of {list(size)}")
    for index, (layer, suffixes, state_size) in enumerate(zip(module._layers, module._suffixes, sizes)):
        for suffix in suffixes:
            weight_ih, weight_hh = (getattr(module, f"weight_{name}{suffix}") for name in ("ih", "hh"))
            # One element, seen in the shape of the frames: the choice depends on nothing else.
            like = weight_hh.detach().new_empty(1)
            repeated = index == 0 and frames.shape[1] < steps
            x = like.expand(batch, steps, layer.input_channels, *size)
            if layer.groups > 1 or repeated:
                x, weight_ih = like.expand(batch, steps, weight_hh.shape[0], *state_size), None
            options = (layer.stride, layer.pads, layer.dilation, layer.padding_mode, module.algorithm)
            how = algorithm_of(_backend("conv_lstm", module, weight_hh), x, weight_ih, weight_hh, *options)
            hoisted = ", input convolution by the library" if weight_ih is None else ""
            where = f"layer {index}{suffix.removeprefix(f'_l{index}')}"
            yield _line(where, "conv_lstm", module, weight_hh, f", {how}{hoisted}")
        size = state_size


def _lstm(module: LSTM) -> Iterator[str]:
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
    name, reasons = _backend(op, module, weight), []
    if module.backend is None:
        device, dtype = weight.device.type, weight.dtype
        for other in list(backends.BACKENDS)[: list(backends.BACKENDS).index(name)]:
            if why := backends.why_not(op, other, device, dtype):
                reasons.append(f"{other}: {why}")
        if device == "cuda" and name == "triton":
            reasons.append(f"cuda: {backends.GPU_ORDER[op]}")
    return f"{where}: backend {name}{how}" + "".join(f" ({reason})" for reason in reasons)
