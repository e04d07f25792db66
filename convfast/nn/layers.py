"""Parameters of ConvLSTM layers, and one layer's call: what the stack and the single cell share."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter, UninitializedParameter

from ..compat import automan000
from ..ops import conv_lstm
from ..ops.conv_lstm import ALGORITHMS
from .options import Layer
from .state import Pair


class ConvLSTMLayers(nn.Module):
    """Parameters `weight_ih`, `weight_hh`, `bias` and `peephole` of each layer and direction.

    Their names end in the suffix of layer and direction. Weights and biases start uniform within
    ±1 / sqrt((Cin / groups + C) prod(K)), as one convolution over cat(x, h) would; peepholes start at zero. A layer
    with 0 input channels has no `weight_ih`.

    Peepholes whose size is not given are made on the first call, from its input or state. Until then they are
    `torch.nn.UninitializedParameter`, with the limits that all lazy modules of torch have, and not in `state_dict`.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        suffixes: Sequence[Sequence[str]],
        *,
        bias: bool,
        peephole: bool,
        image_size: tuple[int, ...] | None,
        unit_forget_bias: bool,
        memory: str,
        algorithm: str,
        backend: str | None,
        device: Any,
        dtype: Any,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        if memory not in ("fast", "lean"):
            raise ValueError(f"{owner}: memory is {memory!r}, expected 'fast' or 'lean'")
        if algorithm not in ALGORITHMS:
            raise ValueError(f"{owner}: algorithm is {algorithm!r}, expected one of {', '.join(ALGORITHMS)}")
        if unit_forget_bias and not bias:
            raise ValueError(f"{owner}: unit_forget_bias is True with bias=False, expected bias=True")
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"{owner}: dtype is {dtype}, expected a floating point type")
        self.image_size = image_size
        self.unit_forget_bias = unit_forget_bias
        self.memory = memory
        self.algorithm = algorithm
        self.backend = backend
        self._layers = list(layers)
        self._suffixes = [list(group) for group in suffixes]

        factory = {"device": device, "dtype": dtype}
        size = image_size
        for index, (layer, group) in enumerate(zip(self._layers, self._suffixes)):
            if size is not None:
                size = layer.state_size(size)
                if min(size) < 1:
                    raise ValueError(
                        f"{owner}: image_size is {image_size}, expected frames that are not smaller than the kernel; "
                        f"the state of layer {index} would have size {size}"
                    )
            gates = 4 * layer.channels
            shapes: dict[str, tuple[int, ...] | None] = {
                "weight_ih": (gates, layer.input_channels // layer.groups, *layer.kernel),
                "weight_hh": (gates, layer.channels, *layer.kernel),
                "bias": (gates,) if bias else None,
                "peephole": (3, layer.channels, *size) if peephole and size is not None else None,
            }
            if layer.input_channels == 0:
                shapes["weight_ih"] = None
            for suffix in group:
                for name, shape in shapes.items():
                    parameter = None if shape is None else Parameter(torch.empty(shape, **factory))
                    self.register_parameter(f"{name}{suffix}", parameter)
                if peephole and size is None:
                    self.register_parameter(f"peephole{suffix}", UninitializedParameter(**factory))
        if self._is_lazy():
            # torch.compile looks for this name and for `_infer_parameters`, to call it before it traces.
            self._initialize_hook = self.register_forward_pre_hook(self._infer_parameters, with_kwargs=True)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weights and biases anew; peepholes become zero."""
        for layer, group in zip(self._layers, self._suffixes):
            fan_in = (layer.input_channels // layer.groups + layer.channels) * torch.Size(layer.kernel).numel()
            bound = fan_in**-0.5
            for suffix in group:
                for name in ("weight_ih", "weight_hh", "bias"):
                    parameter = getattr(self, f"{name}{suffix}")
                    if parameter is not None:
                        parameter.uniform_(-bound, bound)
                if self.unit_forget_bias:
                    getattr(self, f"bias{suffix}")[layer.channels : 2 * layer.channels] = 1
                peephole = getattr(self, f"peephole{suffix}")
                if peephole is not None and not _is_lazy(peephole):
                    peephole.zero_()

    def _run(
        self,
        index: int,
        direction: int,
        frames: Tensor | None,
        steps: int | None,
        state: Pair | None,
        lengths: Tensor | None,
    ) -> tuple[Tensor, Pair]:
        layer, suffix = self._layers[index], self._suffixes[index][direction]
        peephole = getattr(self, f"peephole{suffix}")
        if _is_lazy(peephole):
            raise RuntimeError(
                f"{type(self).__name__}: peephole{suffix} has no size yet, expected image_size in the constructor, or "
                "a call of the module before it is compiled, exported or reached through forward()"
            )
        if peephole is not None:
            size = tuple(state[0].shape[2:]) if frames is None else layer.state_size(frames.shape[3:])
            if tuple(peephole.shape[2:]) != size:
                raise ValueError(
                    f"{type(self).__name__}: the state of layer {index} has size {list(size)}, expected "
                    f"{list(peephole.shape[2:])} as peephole{suffix} has (from image_size, or from the first call)"
                )
        return conv_lstm(
            frames,
            None if frames is None else getattr(self, f"weight_ih{suffix}"),
            getattr(self, f"weight_hh{suffix}"),
            getattr(self, f"bias{suffix}"),
            peephole,
            state,
            lengths,
            steps=steps,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            padding_mode=layer.padding_mode,
            reverse=direction == 1,
            memory=self.memory,
            algorithm=self.algorithm,
            backend=self.backend,
        )

    def _check_frame(self, input: Tensor, channel_dim: int, letters: str) -> None:
        owner, legend = type(self).__name__, f"input shape {list(input.shape)}, layout [{', '.join(letters)}]"
        expected = self._layers[0].input_channels
        if expected == 0:
            raise ValueError(f"{owner}: input is a Tensor, expected None with input_channels=0 ({legend})")
        if input.shape[channel_dim] != expected:
            raise ValueError(
                f"{owner}: input has {input.shape[channel_dim]} channels, expected input_channels={expected} ({legend})"
            )

    def _check_state(self, index: int, state: Pair, leading: tuple[int, ...], frame_size: Sequence[int] | None) -> None:
        """`leading` is what comes before the channels, `frame_size` the spatial size of the layer's input."""
        layer = self._layers[index]
        size = tuple(state[0].shape[len(leading) + 1 :]) if frame_size is None else layer.state_size(frame_size)
        expected = (*leading, layer.channels, *size)
        for name, part in zip("hc", state):
            if tuple(part.shape) != expected or len(size) != len(layer.kernel):
                shown = [*expected[: len(leading) + 1], *(size if len(size) == len(layer.kernel) else ["*S'"])]
                raise ValueError(
                    f"{type(self).__name__}: state {name} of layer {index} has shape {list(part.shape)}, "
                    f"expected [{', '.join(map(str, shown))}]"
                )

    def _first_state_size(self, *args: Any, **kwargs: Any) -> tuple[int, ...]:
        """Spatial size of the first layer's state, from the arguments of `forward`."""
        raise NotImplementedError

    def _original_prefix(self, index: int) -> str:
        """Where the class that automan000 wrote keeps the weights of a layer."""
        raise NotImplementedError

    def _is_lazy(self) -> bool:
        return any(_is_lazy(parameter) for parameter in self._parameters.values())

    def _infer_parameters(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook while there are peepholes without a size."""
        size = self._first_state_size(*args, **kwargs)
        for index, (layer, group) in enumerate(zip(self._layers, self._suffixes)):
            size = size if index == 0 else layer.state_size(size)
            for suffix in group:
                peephole = getattr(self, f"peephole{suffix}")
                if _is_lazy(peephole):
                    peephole.materialize((3, layer.channels, *size))
                    nn.init.zeros_(peephole)
        self._end_of_lazy()

    def _end_of_lazy(self) -> None:
        self._initialize_hook.remove()
        del self._initialize_hook

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # A peephole without a size has nothing to save, cannot be detached, and torch.load would refuse its type.
        super()._save_to_state_dict(destination, prefix, keep_vars=True)
        for name, value in chain(self._parameters.items(), self._buffers.items()):
            if _is_lazy(value):
                del destination[prefix + name]
            elif prefix + name in destination and not keep_vars:
                destination[prefix + name] = value.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for index, group in enumerate(self._suffixes):
            source = prefix + self._original_prefix(index)
            peephole = getattr(self, f"peephole{group[0]}")
            error_msgs += automan000.convert_cell(state_dict, source, prefix, group[0], peephole)
        for name, parameter in self._parameters.items():
            if _is_lazy(parameter) and prefix + name in state_dict:
                parameter.materialize(state_dict[prefix + name].shape)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        lazy = [prefix + name for name, parameter in self._parameters.items() if _is_lazy(parameter)]
        missing_keys[:] = [key for key in missing_keys if key not in lazy]
        if not lazy and hasattr(self, "_initialize_hook"):
            self._end_of_lazy()


def _is_lazy(value: Any) -> bool:
    # torch.nn.parameter.is_lazy cannot be traced by torch.compile.
    return isinstance(value, UninitializedParameter)
