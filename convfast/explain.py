"""Which backend and which algorithm a call takes, and why."""

from torch import Tensor

from . import backends
from .nn import ConvLSTM, ConvLSTMCell
from .ops.conv_lstm import algorithm_of

_OP = "conv_lstm"


def explain(module: ConvLSTM | ConvLSTMCell, input: Tensor) -> str:
    """What a call of `module` on `input` runs, one line a layer and direction. Nothing is computed.

    Args:
        module: a ConvLSTM (of 1 to 3 dims) or a ConvLSTMCell.
        input: as for its call; only its shape is looked at, so it may be on the meta device.

    Raises:
        TypeError: `module` or `input` is of another type.
        ValueError: `input` does not fit the module.
        RuntimeError: the backend or the algorithm asked for cannot be had.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"explain: input is a {type(input).__name__}, expected a Tensor")
    if isinstance(module, ConvLSTMCell):
        module._check(input, None, None)
        frames, steps = input.unsqueeze(1), 1
    elif isinstance(module, ConvLSTM):
        frames, steps, _ = module._frames(input)
        steps = frames.shape[1] if steps is None else steps
    else:
        raise TypeError(f"explain: module is a {type(module).__name__}, expected a ConvLSTM or a ConvLSTMCell")
    batch, size = frames.shape[0], frames.shape[3:]
    lines = []
    for index, (layer, suffixes) in enumerate(zip(module._layers, module._suffixes)):
        for suffix in suffixes:
            weight_ih, weight_hh = (getattr(module, f"weight_{name}{suffix}") for name in ("ih", "hh"))
            device, dtype = weight_hh.device.type, weight_hh.dtype
            name = backends.select(_OP, module.backend, device, dtype)
            better = list(backends.BACKENDS)[: list(backends.BACKENDS).index(name)] if module.backend is None else []
            passed = [f"{other}: {why}" for other in better if (why := backends.why_not(_OP, other, device, dtype))]
            # One element, seen in the shape of the frames: the choice depends on nothing else.
            like = weight_hh.detach().new_empty(1)
            repeated = index == 0 and frames.shape[1] < steps
            x = like.expand(batch, steps, layer.input_channels, *size)
            if layer.groups > 1 or repeated:
                x, weight_ih = like.expand(batch, steps, weight_hh.shape[0], *layer.state_size(size)), None
            options = (layer.stride, layer.pads, layer.dilation, layer.padding_mode, module.algorithm)
            how = algorithm_of(name, x, weight_ih, weight_hh, *options)
            where = f"layer {index}{suffix.removeprefix(f'_l{index}')}"
            hoisted = ", input convolution by the library" if weight_ih is None else ""
            lines.append(f"{where}: backend {name}, {how}{hoisted}" + "".join(f" ({reason})" for reason in passed))
        size = layer.state_size(size)
    return "\n".join(lines)
