"""Constructor arguments, checked and spread over layers and spatial dims."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..ops.conv_lstm import PADDING_MODES
from ..reference.padded_conv import same_padding

Numbers = int | tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """One layer's convolutions; `pads` holds (before, behind) of each spatial dim of the input convolution."""

    input_channels: int
    channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    pads: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    def state_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Spatial size of the state for frames of `size`."""
        return tuple(
            (n + self.pads[2 * i] + self.pads[2 * i + 1] - self.dilation[i] * (self.kernel[i] - 1) - 1)
            // self.stride[i]
            + 1
            for i, n in enumerate(size)
        )


def numbers(owner: str, name: str, value: Any, dims: int, least: int) -> tuple[int, ...]:
    """An int, or one for each spatial dim."""
    found = (value,) * dims if isinstance(value, int) else value
    if not isinstance(found, tuple) or len(found) != dims or not all(isinstance(n, int) and n >= least for n in found):
        raise ValueError(f"{owner}: {name} is {value!r}, expected an int >= {least} or a tuple of {dims}")
    return found


def _padding(owner: str, value: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[Any, tuple[int, ...]]:
    dims = len(kernel)
    if value == "same":
        return value, tuple(same_padding(kernel, dilation))
    if value == "valid":
        return value, (0,) * (2 * dims)
    if isinstance(value, str):
        raise ValueError(f"{owner}: padding is {value!r}, expected 'same', 'valid', an int or a tuple of {dims}")
    found = numbers(owner, "padding", value, dims, 0)
    return found, tuple(p for p in found for _ in range(2))


def make_layers(
    owner: str, dims: int, input_channels: int, hidden: Sequence[int], directions: int, **options: Any
) -> list[Layer]:
    """An option that is a list has one entry per layer, any other holds for every layer."""
    if not isinstance(input_channels, int) or input_channels < 0:
        raise ValueError(f"{owner}: input_channels is {input_channels!r}, expected an int >= 0 (0: no input)")
    if not hidden or not all(isinstance(c, int) and c > 0 for c in hidden):
        raise ValueError(f"{owner}: hidden_channels is {list(hidden)}, expected positive ints, one per layer")
    for name, value in options.items():
        if not isinstance(value, list):
            options[name] = [value] * len(hidden)
        elif len(value) != len(hidden):
            raise ValueError(
                f"{owner}: {name} is {value}, expected {len(hidden)} entries, one per layer "
                "(a tuple has one number per spatial dim)"
            )

    layers = []
    inputs = [input_channels, *(c * directions for c in hidden[:-1])]
    for index, (cin, channels) in enumerate(zip(inputs, hidden)):
        option = {name: value[index] for name, value in options.items()}
        kernel = numbers(owner, "kernel_size", option["kernel_size"], dims, 1)
        stride = numbers(owner, "stride", option["stride"], dims, 1)
        dilation = numbers(owner, "dilation", option["dilation"], dims, 1)
        padding, pads = _padding(owner, option["padding"], kernel, dilation)
        groups, mode = option["groups"], option["padding_mode"]
        if not isinstance(groups, int) or groups < 1 or cin % groups or 4 * channels % groups:
            raise ValueError(
                f"{owner}: groups is {groups!r}, expected a divisor of the {cin} input channels and "
                f"the {4 * channels} gate channels of layer {index}"
            )
        if mode not in PADDING_MODES:
            raise ValueError(f"{owner}: padding_mode is {mode!r}, expected one of {', '.join(PADDING_MODES)}")
        layers.append(Layer(cin, channels, kernel, stride, padding, pads, dilation, groups, mode))
    return layers
