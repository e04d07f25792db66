"""Parameters of ConvLSTM layers, and one layer's call: what the stack and the single cell share."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter, UninitializedParameter

from ..backends import check_name
from ..compat import automan000, ndrplz
from ..ops import conv_lstm
from ..ops.checks import check_choice
from ..ops.conv_lstm import ALGORITHMS, MEMORIES
from .options import Layer, check_dtype
from .state import Pair


class ConvLSTMLayers(nn.Module):
    """Parameters `weight_ih`, `weight_hh`, `bias` and `peephole` of each layer and direction.

    Their names end in the suffix of layer and direction. Weights and biases start uniform within
    ±1 / sqrt((Cin / groups + C) prod(K)), as one convolution over cat(x, h) would; peepholes start at zero. A layer
    with 0 input channels has no `weight_ih`.

    Peepholes whose size is not given are made on the first call, from its input or state. Until one succeeds they are
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
        check_choice(owner, "memory", memory, MEMORIES)
        check_choice(owner, "algorithm", algorithm, ALGORITHMS)
        if unit_forget_bias and not bias:
            raise ValueError(f"{owner}: unit_forget_bias is True with bias=False, expected bias=True")
        check_dtype(owner, dtype)
        check_name(owner, backend)
        self.image_size = image_size
        self.unit_forget_bias = unit_forget_bias
        self.memory = memory
        self.algorithm = algorithm
        self.backend = backend
        self._layers = list(layers)
        self._suffixes = [list(group) for group in suffixes]
        self._sized_by_call: list[Parameter] = []

        factory = {"device": device, "dtype": dtype}
        sizes: Sequence[tuple[int, ...] | None] = [None] * len(self._layers)
        if image_size is not None:
            sizes = self._state_sizes(self._layers[0].state_size(image_size), f"image_size {image_size}")
        for layer, group, size in zip(self._layers, self._suffixes, sizes):
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
            self._initialize_hook = [
                self.register_forward_pre_hook(self._before_first_call, with_kwargs=True),
                self.register_forward_hook(self._after_first_call, always_call=True),
            ]
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

    def _check_state(self, index: int, state: Pair, frames: Tensor | None) -> None:
        """`frames` `[B, T, Cin, *S]` are the layer's input, None for steps without."""
        layer, both = self._layers[index], len(self._suffixes[index]) == 2
        batch = state[0].shape[both:][:1] if frames is None else frames.shape[:1]
        leading = (2, *batch) if both else tuple(batch)  # what comes before the channels
        size = tuple(state[0].shape[len(leading) + 1 :]) if frames is None else layer.state_size(frames.shape[3:])
        expected = (*leading, layer.channels, *size)
        for name, part in zip("hc", state):
            if tuple(part.shape) != expected or len(size) != len(layer.kernel):
                shown = [*expected[: len(leading) + 1], *(size if len(size) == len(layer.kernel) else ["*S'"])]
                raise ValueError(
                    f"{type(self).__name__}: {self._state_name(index, name)} has shape {list(part.shape)}, "
                    f"expected [{', '.join(map(str, shown))}]"
                )

    def _first_state_size(self, *args: Any, **kwargs: Any) -> tuple[int, ...]:
        """Spatial size of the first layer's state, from the arguments of `forward`."""
        raise NotImplementedError

    def _original_prefix(self, index: int, stacked: str) -> str:
        """Where the class of another project keeps the weights of a layer, `stacked` in a stack."""
        raise NotImplementedError

    def _state_name(self, index: int, name: str) -> str:
        """What messages call the h or c that a layer is given."""
        return f"state {name} of layer {index}"

    def _state_sizes(self, first: tuple[int, ...], source: str) -> list[tuple[int, ...]]:
        """Spatial size of each layer's state from that of the first one's, which comes from `source`."""
        sizes = [first]
        for layer in self._layers[1:]:
            sizes.append(layer.state_size(sizes[-1]))
        for index, size in enumerate(sizes):
            if any(n < 1 for n in size):
                raise ValueError(
                    f"{type(self).__name__}: {source} gives layer {index} a state of size {list(size)}, expected "
                    "frames that are not smaller than the kernel"
                )
        return sizes

    def _is_lazy(self) -> bool:
        return any(_is_lazy(parameter) for parameter in self._parameters.values())

    def _lazy_peepholes(self) -> Iterator[tuple[int, str, UninitializedParameter]]:
        """Layer, name and parameter of peepholes without a size."""
        for index, group in enumerate(self._suffixes):
            for suffix in group:
                name = f"peephole{suffix}"
                if _is_lazy(parameter := self._parameters.get(name)):
                    yield index, name, parameter

    @torch.inference_mode(False)  # what inference makes cannot be trained
    def _before_first_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook while there are peepholes without a size."""
        sizes = self._state_sizes(self._first_state_size(*args, **kwargs), "the first call")
        for index, _, peephole in list(self._lazy_peepholes()):
            peephole.materialize((3, self._layers[index].channels, *sizes[index]))
            nn.init.zeros_(peephole)
            self._sized_by_call.append(peephole)

    @torch.inference_mode(False)
    def _after_first_call(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        """Forward hook, also of a call that raises: that one has no result, and its sizes may be wrong."""
        if result is not None:
            self._end_of_lazy()
            return
        for peephole in self._sized_by_call:
            # By way of another type: a graph of the call that is still alive would keep the size of the gradient.
            empty = peephole.new_empty(0)
            peephole.data = empty.to(torch.complex64)
            peephole.data = empty
            peephole.__class__ = UninitializedParameter
        self._sized_by_call.clear()

    def _infer_parameters(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The first call, for torch.compile: what it refuses is refused before there is a graph."""
        with torch.no_grad():
            self(*args, **kwargs)

    def _end_of_lazy(self) -> None:
        for hook in self._initialize_hook:
            hook.remove()
        del self._initialize_hook
        self._sized_by_call.clear()

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
        for index, (suffix, *_) in enumerate(self._suffixes):
            for project in (automan000, ndrplz):
                error_msgs += self._convert(project, index, state_dict, prefix, suffix)
        for index, name, peephole in list(self._lazy_peepholes()):
            found, layer = state_dict.get(prefix + name), self._layers[index]
            if not isinstance(found, Tensor):
                continue
            if found.shape[:2] == (3, layer.channels) and found.ndim == 2 + len(layer.kernel) and 0 not in found.shape:
                peephole.materialize(found.shape)
                continue
            del state_dict[prefix + name]
            error_msgs.append(
                f"size mismatch for {prefix + name}: copying a param with shape {found.shape} from checkpoint, the "
                f"shape in current model is [3, {layer.channels}, *S'] with {len(layer.kernel)} spatial dims."
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        lazy = [prefix + name for name, parameter in self._parameters.items() if _is_lazy(parameter)]
        missing_keys[:] = [key for key in missing_keys if key not in lazy]
        if not lazy and hasattr(self, "_initialize_hook"):
            self._end_of_lazy()

    def _convert(
        self, project: ModuleType, index: int, state_dict: dict[str, Any], prefix: str, suffix: str
    ) -> list[str]:
        """Put a layer's weights in a checkpoint of another project under our names. → error messages"""
        ours = {name: f"{prefix}{name}{suffix}" for name in ("weight_ih", "weight_hh", "bias", "peephole")}
        if not state_dict.keys().isdisjoint(ours.values()):
            return []
        peephole = getattr(self, f"peephole{suffix}")
        source = prefix + self._original_prefix(index, project.STACKED.format(index))
        errors = project.convert_cell(state_dict, source, ours, peephole is not None)
        # A cell without peepholes is one whose peepholes are zero.
        converted = ours["weight_hh"] in state_dict
        if converted and peephole is not None and not _is_lazy(peephole):
            state_dict.setdefault(ours["peephole"], torch.zeros_like(peephole))
        return errors


def _is_lazy(value: Any) -> bool:
    # torch.nn.parameter.is_lazy cannot be traced by torch.compile.
    return isinstance(value, UninitializedParameter)
