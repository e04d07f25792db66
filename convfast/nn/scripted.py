"""What `torch.jit.script` makes of a ConvLSTM: the native op per layer and direction, for inference.

    forward(input: Tensor?, state: List[Tuple[Tensor, Tensor]]?, lengths: Tensor?)

with the results of the module: `(output, (h, c))`, or lists with `return_all_layers`. The state that goes in is always
a list with one pair per layer: `[(h, c)]` for a single layer; with several, script a module with `return_all_layers`
to get it. A ConvLSTMCell is called as it is in Python. Weights are shared with the module that was scripted, as
buffers; there are no gradients and no dropout.

`torch.jit.script(model)` also puts these modules in the place of the layers of `model` itself. There they compute the
same numbers, but do not learn: called in training mode with gradients enabled, they raise RuntimeError. To go on
training a model, script `copy.deepcopy(model)`.
"""

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import backends
from .hooks import watched
from .options import Layer

if TYPE_CHECKING:
    from .conv_lstm import ConvLSTM, ConvLSTMCell

_ORIGINALS: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()

# TorchScript wants its types spelled out.
Pairs = list[tuple[Tensor, Tensor]]


class Twin(nn.Module):
    """What `__prepare_scriptable__` of a module returns: its forward for TorchScript."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.owner = name = type(module).__name__  # how messages start
        own = next(base for base in type(module).__mro__ if "__prepare_scriptable__" in vars(base))
        if any(is_lazy(parameter) for parameter in module.parameters()):
            raise RuntimeError(f"{name}: peepholes have no size yet, expected a call (or image_size) before scripting")
        if type(module).forward is not own.forward:
            raise RuntimeError(
                f"{name}: forward is overridden, which torch.jit.script would leave out; expected that of "
                f"{own.__name__} (call one in the forward of a module of your own instead)"
            )
        if watched(module):
            raise RuntimeError(
                f"{name}: hooks are set or forward is replaced, which torch.jit.script would leave out; expected none"
            )
        backends.load_native(next(module.parameters()))
        # torch.jit.script knows objects by their addresses, which those of a module that is gone may have again.
        _ORIGINALS[self] = module
        # Of this module alone: others in it may belong to the model that is scripted.
        self.training = module.training

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Only Python comes by here, scripts call forward.
        if self.training and torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(self).__name__}: torch.jit.script put this module, which does not learn, in the place of a "
                "layer of the model; expected torch.jit.script(copy.deepcopy(model)) for a model to go on training, "
                "eval() or torch.no_grad() for inference"
            )
        return super().__call__(*args, **kwargs)


def integers(owner: str, lengths: Tensor) -> Tensor:
    """→ lengths as int64."""
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        # TorchScript has no names of dtypes.
        got = "bool" if lengths.dtype == torch.bool else "complex" if lengths.is_complex() else "floating point"
        raise TypeError(f"{owner}: lengths has a {got} dtype, expected a Tensor of integers")
    return lengths.to(torch.int64)


def pick_steps(owner: str, output: Tensor, effective_step: list[int]) -> Tensor:
    """output [B, T, C, *S] → [B, T', C, *S] at the steps wanted, in order of time, channels-last."""
    time = output.size(1)
    for step in effective_step:
        if step >= time or step < -time:
            raise ValueError(f"{owner}: effective_step has {step}, expected {-time} to {time - 1} ({time} steps)")
    if len(effective_step) == 1:
        step = effective_step[0]
        return output.narrow(1, step if step >= 0 else step + time, 1)
    wanted: list[int] = []
    for step in effective_step:
        step = step if step >= 0 else step + time
        # sorted() would stop torch.compile where the number of steps is dynamic.
        place = 0
        while place < len(wanted) and wanted[place] < step:
            place += 1
        if place == len(wanted) or wanted[place] != step:
            wanted.insert(place, step)
    index = torch.tensor(wanted, dtype=torch.int64, device=output.device)
    return output.movedim(2, -1).index_select(1, index).movedim(-1, 2)


class _Layer(nn.Module):
    """One layer in one direction."""

    # Without annotations: TorchScript makes plain attributes of buffers that have one.
    def __init__(self, module: "ConvLSTM | ConvLSTMCell", layer: Layer, suffix: str) -> None:
        super().__init__()
        self.owner = type(module).__name__
        for name in ("weight_ih", "weight_hh", "bias", "peephole"):
            value = getattr(module, f"{name}{suffix}")
            self.register_buffer(name, None if value is None else value.detach())
        self.stride, self.dilation, self.pads = list(layer.stride), list(layer.dilation), list(layer.pads)
        pairs = [self.pads[2 * i : 2 * i + 2] for i in range(len(layer.kernel))]
        self.pads_of_pad = [n for pair in reversed(pairs) for n in pair]
        self.groups = layer.groups
        self.padding_mode = layer.padding_mode
        self.mode_of_pad = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        self.reverse = suffix.endswith("_reverse")
        self.algorithm = module.algorithm

    def input_gates(self, frames: Tensor, weight: Tensor) -> Tensor:
        x = F.pad(frames.flatten(0, 1), self.pads_of_pad, self.mode_of_pad)
        none = [0 for _ in self.stride]
        x = torch.convolution(x, weight, None, self.stride, none, self.dilation, False, none, self.groups)
        return x.unflatten(0, [frames.size(0), frames.size(1)])

    def forward(
        self, frames: Tensor | None, steps: int, h: Tensor | None, c: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight: Tensor | None = None  # that the op is to convolve with
        if frames is not None:
            weight_ih = self.weight_ih
            if weight_ih is None:
                raise ValueError(f"{self.owner}: input is a Tensor, expected None with input_channels=0")
            # No raise ends a branch for TorchScript, which knows that weight_ih is None.
            elif self.groups == 1 and frames.size(1) == steps:
                weight = weight_ih
            else:
                gates = self.input_gates(frames, weight_ih)
                sizes = list(gates.size())
                sizes[1] = steps
                frames = gates.expand(sizes)
        output, h_n, c_n, _, _ = torch.ops.convfast.conv_lstm_forward(
            frames, weight, self.weight_hh, self.bias, self.peephole, h, c, lengths, steps,
            self.stride, self.pads, self.dilation, self.padding_mode, self.reverse,
            self.algorithm, "none",
        )  # fmt: skip
        return output, h_n, c_n


class _Stack(Twin):
    effective_step: list[int] | None

    def __init__(self, module: "ConvLSTM") -> None:
        super().__init__(module)
        self.dims = module.dims
        self.step = module.step
        self.effective_step = module.effective_step
        self.batch_first = module.batch_first
        self.bidirectional = module.bidirectional
        self.layers = nn.ModuleList(
            nn.ModuleList(_Layer(module, layer, suffix) for suffix in group)
            for layer, group in zip(module._layers, module._suffixes)
        ).train(module.training)

    def run(self, input: Tensor | None, state: Pairs | None, lengths: Tensor | None) -> tuple[list[Tensor], Pairs]:
        owner = self.owner
        frames = input
        steps = self.step
        if frames is None:
            if state is None:
                raise ValueError(f"{owner}: state is None, expected one where input is None")
        elif frames.dim() == self.dims + 2:
            frames = frames.unsqueeze(1)
        elif frames.dim() == self.dims + 3:
            if not self.batch_first:
                frames = frames.transpose(0, 1)
            steps = frames.size(1)
        else:
            raise ValueError(f"{owner}: input has {frames.dim()} dims, expected {self.dims + 3} or {self.dims + 2}")
        if state is not None and len(state) != len(self.layers):
            raise ValueError(f"{owner}: state has {len(state)} entries, expected {len(self.layers)}, one per layer")
        if lengths is not None:
            lengths = integers(owner, lengths)

        outputs: list[Tensor] = []
        last: list[tuple[Tensor, Tensor]] = []
        for index, directions in enumerate(self.layers):
            parts: list[Tensor] = []
            hs: list[Tensor] = []
            cs: list[Tensor] = []
            for direction, layer in enumerate(directions):
                h: Tensor | None = None
                c: Tensor | None = None
                if state is not None:
                    h, c = state[index]
                    if self.bidirectional:
                        h, c = h[direction], c[direction]
                output, h_n, c_n = layer(frames, steps, h, c, lengths)
                parts.append(output.movedim(2, -1))
                hs.append(h_n)
                cs.append(c_n)
            if self.bidirectional:
                frames = torch.cat(parts, dim=-1).movedim(-1, 2)
                last.append((torch.stack(hs), torch.stack(cs)))
            else:
                frames = parts[0].movedim(-1, 2)
                last.append((hs[0], cs[0]))
            outputs.append(frames)
        return outputs, last

    def pick(self, output: Tensor, time_first: bool) -> Tensor:
        effective_step = self.effective_step
        if effective_step is not None:
            output = pick_steps(self.owner, output, effective_step)
        return output.transpose(0, 1) if time_first else output

    def is_time_first(self, input: Tensor | None) -> bool:
        return not self.batch_first or (input is not None and input.dim() == self.dims + 2)


class ScriptedConvLSTM(_Stack):
    """`(output, (h, c))` of the last layer."""

    def forward(
        self, input: Tensor | None, state: Pairs | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        outputs, last = self.run(input, state, lengths)
        return self.pick(outputs[-1], self.is_time_first(input)), last[-1]


class ScriptedConvLSTMAllLayers(_Stack):
    """Lists of the outputs and of the `(h, c)` of all layers."""

    def forward(
        self, input: Tensor | None, state: Pairs | None = None, lengths: Tensor | None = None
    ) -> tuple[list[Tensor], Pairs]:
        outputs, last = self.run(input, state, lengths)
        time_first = self.is_time_first(input)
        return [self.pick(output, time_first) for output in outputs], last


class ScriptedConvLSTMCell(Twin):
    """`(h, c)` after one step."""

    def __init__(self, module: "ConvLSTMCell") -> None:
        super().__init__(module)
        self.dims = module.dims
        self.layer = _Layer(module, module._layers[0], "").train(module.training)

    def forward(self, input: Tensor | None, h: Tensor | None = None, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if (h is None) != (c is None) or (h is None and input is None):
            raise ValueError(f"{self.owner}: expected h and c together, and at least them or input")
        frames: Tensor | None = None
        if input is not None:
            if input.dim() != self.dims + 2:
                raise ValueError(f"{self.owner}: input has {input.dim()} dims, expected {self.dims + 2}")
            frames = input.unsqueeze(1)
        _, h_n, c_n = self.layer(frames, 1, h, c, None)
        return h_n, c_n

    @torch.jit.export
    def init_hidden(self, batch_size: int, hidden: int, shape: list[int]) -> tuple[Tensor, Tensor]:
        zeros = self.layer.weight_hh.new_zeros([batch_size, hidden] + shape)  # noqa: RUF005
        return zeros, zeros.clone()
