"""Constructor arguments: checked, spread over layers and spatial dims, and shown."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import nn

from ..ops import checks
from ..ops.checks import PADDING_MODES, check_choice, check_count, integer
from ..reference.padded_conv import output_length, same_padding

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
            output_length(n, self.kernel[i], self.stride[i], self.pads[2 * i : 2 * i + 2], self.dilation[i])
            for i, n in enumerate(size)
        )


def numbers(owner: str, name: str, value: Any, dims: int, least: int) -> tuple[int, ...]:
    """An int, or a tuple with one for each spatial dim: a list has one for each layer."""
    return checks.numbers(owner, name, value, dims, least, tuple)


def counts(owner: str, name: str, value: Any) -> list[int]:
    """A positive int, or one for each layer."""
    one = integer(value) is not None
    found = [integer(n) for n in ([value] if one else value if isinstance(value, Iterable) else [])]
    if not found or not all(n is not None and n > 0 for n in found):
        raise ValueError(f"{owner}: {name} is {value!r}, expected positive ints, one per layer")
    return found


def check_dropout(owner: str, value: Any) -> None:
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError(f"{owner}: dropout is {value!r}, expected a probability (0 to 1)")


def check_dtype(owner: str, value: Any) -> None:
    if value is not None and not (isinstance(value, torch.dtype) and value.is_floating_point):
        raise TypeError(f"{owner}: dtype is {value!r}, expected a floating point type")


def per_layer(owner: str, name: str, value: Any, layers: int, hint: str = "") -> list[Any]:
    """A list has one entry per layer, anything else holds for every layer."""
    if not isinstance(value, list):
        return [value] * layers
    if len(value) != layers:
        raise ValueError(f"{owner}: {name} is {value}, expected {layers} entries, one per layer{hint}")
    return value


def shown(module: nn.Module, constructor: Callable[..., None]) -> str:
    """The constructor's arguments, without those that have their default."""
    listed = []
    for name, parameter in inspect.signature(constructor).parameters.items():
        if name in ("self", "device", "dtype"):
            continue
        value = getattr(module, name)
        if name in ("bias", "peephole"):  # parameters may bear these names
            value = value if isinstance(value, bool) else value is not None
        if parameter.default is inspect.Parameter.empty or value != parameter.default:
            listed.append(f"{name}={value!r}")
    return ", ".join(listed)


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
    """One `Layer` for each of `hidden`; see `per_layer` for the options."""
    input_channels = check_count(owner, "input_channels", input_channels, 0)
    hint = " (a tuple has one number per spatial dim)"
    options = {name: per_layer(owner, name, value, len(hidden), hint) for name, value in options.items()}
    layers = []
    inputs = [input_channels, *(c * directions for c in hidden[:-1])]
    for index, (cin, channels) in enumerate(zip(inputs, hidden)):
        option = {name: value[index] for name, value in options.items()}
        kernel = numbers(owner, "kernel_size", option["kernel_size"], dims, 1)
        stride = numbers(owner, "stride", option["stride"], dims, 1)
        dilation = numbers(owner, "dilation", option["dilation"], dims, 1)
        padding, pads = _padding(owner, option["padding"], kernel, dilation)
        groups, mode = integer(option["groups"]), option["padding_mode"]
        if groups is None or groups < 1 or cin % groups or 4 * channels % groups:
            raise ValueError(
                f"{owner}: groups is {option['groups']!r}, expected a divisor of the {cin} input channels and "
                f"the {4 * channels} gate channels of layer {index}"
            )
        check_choice(owner, "padding_mode", mode, PADDING_MODES)
        layers.append(Layer(cin, channels, kernel, stride, padding, pads, dilation, groups, mode))
    return layers
