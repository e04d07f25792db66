"""ConvLSTM modules: stacks of layers over sequences of frames of one to three dims, and the single cell."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import check_count, check_dense, check_pair, integer, kind
from .layers import ConvLSTMLayers
from .options import Numbers, check_dropout, counts, make_layers, numbers, shown
from .scripted import ScriptedConvLSTM, ScriptedConvLSTMAllLayers, ScriptedConvLSTMCell, pick_steps
from .state import ConvLSTMState, Pair

State = Pair | Sequence[Pair | None]


class ConvLSTM(ConvLSTMLayers):
    """Layers of ConvLSTM (Shi et al. 2015) over a sequence of 2-D frames; each layer is one op over all steps.

    i = σ(W_xi*x + W_hi*h + p_i∘c + b_i), f = σ(W_xf*x + W_hf*h + p_f∘c + b_f), g = tanh(W_xg*x + W_hg*h + b_g),
    c' = f∘c + i∘g, o = σ(W_xo*x + W_ho*h + p_o∘c' + b_o), h' = o∘tanh(c'); `*` is convolution.

    Letters: B batch, T time, C hidden channels, D directions (2 when bidirectional), H' W' size of the state.

    Parameters of layer k are named as in `torch.nn.LSTM`, and end in `_reverse` for the backward direction:
    `weight_ih_l{k}` `[4C, Cin / groups, *K]`, `weight_hh_l{k}` `[4C, C, *K]`, `bias_l{k}` `[4C]`, gates in the order
    i, f, g, o; `peephole_l{k}` `[3, C, H', W']` in the order i, f, o. Input of layer k > 0 are the D·C channels of the
    one before. Checkpoints of automan000/Convolutional_LSTM_PyTorch, and of ndrplz/ConvLSTM_pytorch and its copies
    (torchgeo, satflow, conv-lstm), load with `load_state_dict`.

    Args:
        input_channels: channels of a frame. 0 for a decoder that never gets input: it has no `weight_ih_l0`. With
            `input_channels > 0`, calls without input leave that weight without a gradient.
        hidden_channels: C; a list has one per layer.
        kernel_size: of both convolutions; odd or even.
        step: steps of a call with one frame or without input.
        effective_step: steps whose outputs are returned, in order of time; negative ones count from the end. None
            for all.
        bias: False for no bias.
        peephole: train Hadamard peepholes: i and f look at the cell state before the step, o at the one after it.
        image_size: `(H, W)` of the input frames, or an int; used for the size of peepholes, which is otherwise taken
            from the first call.
        batch_first: sequences are `[B, T, ...]`, else `[T, B, ...]`. The state is the same in both.
        bidirectional: add a direction from the last frame to the first; outputs are concatenated over channels.
        dropout: probability of dropout on the outputs of all layers but the last, in training; warns with one.
        stride, padding, dilation, groups, padding_mode: of the input convolution, as in `torch.nn.Conv2d`; the
            recurrent one always keeps the size, with zeros. `padding="same"` adds d(k-1), half of it (rounded down)
            before, whatever the stride.
        unit_forget_bias: biases of the forget gates start at 1.
        return_all_layers: return lists of the outputs and states of all layers.
        memory: what is kept for the backward: "fast" the activated gates and c, "lean" only c.
        algorithm: "auto", "direct" or "winograd", see `convfast.conv_lstm`; `convfast.explain(module, input)` tells
            which one a call takes, and why.
        backend: a name from `convfast.available("conv_lstm")`; None takes the best.
        device, dtype: of the parameters, as in all modules of torch.

    `kernel_size` and the options of the input convolution hold for every layer (so `stride=2` halves the frames once
    per layer); a tuple has one number per spatial dim, and a list one entry per layer: `stride=[2, 1]`.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, what was expected and what came.

    `torch.jit.script` gives a model for inference, see `convfast.nn.scripted`.
    """

    dims = 2

    def __init__(
        self,
        input_channels: int,
        hidden_channels: int | Sequence[int],
        kernel_size: Numbers | list[Numbers],
        step: int = 1,
        effective_step: Sequence[int] | None = None,
        *,
        bias: bool = True,
        peephole: bool = False,
        image_size: Numbers | None = None,
        batch_first: bool = True,
        bidirectional: bool = False,
        dropout: float = 0.0,
        stride: Numbers | list[Numbers] = 1,
        padding: str | Numbers | list[str | Numbers] = "same",
        dilation: Numbers | list[Numbers] = 1,
        groups: int | list[int] = 1,
        padding_mode: str | list[str] = "zeros",
        unit_forget_bias: bool = False,
        return_all_layers: bool = False,
        memory: str = "fast",
        algorithm: str = "auto",
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        owner = type(self).__name__
        hidden = counts(owner, "hidden_channels", hidden_channels)
        step = check_count(owner, "step", step, 1)
        steps = None
        if effective_step is not None:
            listed = isinstance(effective_step, (list, tuple, range))
            steps = [integer(s) for s in effective_step] if listed else [None]
            if None in steps:
                raise ValueError(f"{owner}: effective_step is {effective_step!r}, expected None or a list of ints")
        check_dropout(owner, dropout)
        if dropout > 0 and len(hidden) == 1:
            warnings.warn(
                f"{owner}: dropout is {dropout}, which has no effect with one layer: it is on the outputs of all but "
                "the last",
                stacklevel=2,
            )
        directions = ["", "_reverse"] if bidirectional else [""]
        layers = make_layers(
            owner, self.dims, input_channels, hidden, len(directions), kernel_size=kernel_size, stride=stride,
            padding=padding, dilation=dilation, groups=groups, padding_mode=padding_mode,
        )  # fmt: skip
        super().__init__(
            layers,
            [[f"_l{k}{direction}" for direction in directions] for k in range(len(layers))],
            bias=bias,
            peephole=peephole,
            image_size=None if image_size is None else numbers(owner, "image_size", image_size, self.dims, 1),
            unit_forget_bias=unit_forget_bias,
            memory=memory,
            algorithm=algorithm,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.input_channels = layers[0].input_channels
        self.hidden_channels = hidden
        self.num_layers = len(layers)
        self.kernel_size = kernel_size
        self.step = step
        self.effective_step = steps
        self.bias = bias
        self.peephole = peephole
        self.batch_first = batch_first
        self.bidirectional = bidirectional
        self.dropout = dropout
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.groups = groups
        self.padding_mode = padding_mode
        self.return_all_layers = return_all_layers

    def forward(
        self, input: Tensor | None, state: State | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor | list[Tensor], Pair | list[Pair]]:
        """Run all layers over all steps.

        Args:
            input: `[B, T, Cin, H, W]` (`[T, B, ...]` without `batch_first`); or one frame `[B, Cin, H, W]`, read at
                each of `step` steps; or None with a state, for `step` steps without input. Any memory layout.
            state: `(h, c)` of a module with one layer, each `[B, C, H', W']`, bidirectional `[2, B, C, H', W']`; or a
                list with such a pair, or None for zero, per layer; or what an earlier call returned. None for zero.
            lengths: `[B]` integers in 0..T. The state stops at each sample's length and outputs past it are zero; the
                backward direction starts at each sample's own end.

        Returns:
            output: `[B, T', D·C, H', W']` of the last layer (`[T', B, ...]` without `batch_first` and for one frame),
            in channels-last memory; T' counts the steps in `effective_step`. A list with `return_all_layers`.
            state: `(h, c)` of the last layer after the last step; c is float32 for bfloat16 and float16. With
            several layers it carries the others along (`state.layers`), so that it can be passed back in. A list of
            `(h, c)` with `return_all_layers`. To change the state of several layers between calls, say to detach it,
            use that list.
        """
        owner = type(self).__name__
        frames, steps, time_first = self._frames(input)
        states = self._states(state)
        if frames is None and states[0] is None:
            raise ValueError(f"{owner}: state is None, expected one where input is None")
        outputs, last = [], []
        for index in range(self.num_layers):
            if index > 0 and self.dropout > 0:
                frames = F.dropout(frames, self.dropout, self.training)
            frames, pair = self._layer(index, frames, steps, states[index], lengths)
            steps = None
            outputs.append(frames)
            last.append(pair)
        if not self.return_all_layers:
            outputs = outputs[-1:]
        if self.effective_step is not None:
            outputs = [pick_steps(owner, output, self.effective_step) for output in outputs]
        if time_first:
            outputs = [output.transpose(0, 1) for output in outputs]
        if self.return_all_layers:
            return outputs, last
        return outputs[0], last[0] if self.num_layers == 1 else ConvLSTMState(last)

    def _frames(self, input: Tensor | None) -> tuple[Tensor | None, int | None, bool]:
        """→ (`[B, T or 1, Cin, *S]`, steps where the op cannot know them, whether the output is time-first)."""
        if input is None:
            return None, self.step, not self.batch_first
        owner, space = type(self).__name__, "DHW"[-self.dims :]
        if not isinstance(input, Tensor):
            raise TypeError(f"{owner}: input is {kind(input)}, expected a Tensor or None")
        check_dense(owner, {"input": input})
        if input.ndim == self.dims + 2:
            self._check_frame(input, 1, f"BC{space}")
            return input.unsqueeze(1), self.step, True
        letters = f"BTC{space}" if self.batch_first else f"TBC{space}"
        if input.ndim != self.dims + 3:
            raise ValueError(
                f"{owner}: input has {input.ndim} dims, expected {self.dims + 3}, layout [{', '.join(letters)}], or "
                f"{self.dims + 2} for a single frame (input shape {list(input.shape)})"
            )
        self._check_frame(input, 2, letters)
        if not self.batch_first:
            input = input.transpose(0, 1)
        if input.shape[1] == 0:
            raise ValueError(f"{owner}: input has 0 time steps, expected at least 1 (layout [{', '.join(letters)}])")
        return input, None, not self.batch_first

    def _states(self, state: State | None) -> Sequence[Pair | None]:
        """One entry per layer."""
        owner = type(self).__name__
        if state is None:
            return [None] * self.num_layers
        if not isinstance(state, (tuple, list)):
            raise TypeError(
                f"{owner}: state is {kind(state)}, expected (h, c), or a list with one of them per layer"
            )
        hint = ""
        if isinstance(state, ConvLSTMState) and self.num_layers > 1:
            state = state.layers
            hint = "; code that takes a state apart, as FSDP's, keeps its last layer: use return_all_layers=True"
        nested = any(isinstance(part, (tuple, list)) for part in state)
        alone = not nested if self.num_layers == 1 else any(isinstance(part, Tensor) for part in state)
        if len(state) == 2 and alone:
            if self.num_layers > 1:
                raise ValueError(
                    f"{owner}: state is one (h, c), expected a list with one per layer ({self.num_layers}), as "
                    "returned with return_all_layers=True, or the unchanged state of an earlier call"
                )
            state = [state]
        if len(state) != self.num_layers:
            raise ValueError(
                f"{owner}: state has {len(state)} entries, expected {self.num_layers}, one per layer{hint}"
            )
        for index, pair in enumerate(state):
            if pair is not None:
                check_pair(owner, f"state of layer {index}", pair)
                check_dense(owner, {f"state {name} of layer {index}": part for name, part in zip("hc", pair)})
        return state

    def _layer(
        self, index: int, frames: Tensor | None, steps: int | None, state: Pair | None, lengths: Tensor | None
    ) -> tuple[Tensor, Pair]:
        if state is not None:
            self._check_state(index, state, frames)
        if not self.bidirectional:
            return self._run(index, 0, frames, steps, state, lengths)
        outputs, pairs = [], []
        for direction in range(2):
            pair = None if state is None else (state[0][direction], state[1][direction])
            output, pair = self._run(index, direction, frames, steps, pair, lengths)
            outputs.append(output.movedim(2, -1))
            pairs.append(pair)
        h, c = (torch.stack(parts) for parts in zip(*pairs))
        return torch.cat(outputs, dim=-1).movedim(-1, 2), (h, c)

    def _first_state_size(
        self, input: Tensor | None, state: State | None = None, lengths: Tensor | None = None
    ) -> tuple[int, ...]:
        frames, _, _ = self._frames(input)
        if frames is not None:
            return self._layers[0].state_size(frames.shape[3:])
        pair = self._states(state)[0]
        if pair is None:
            raise ValueError(f"{type(self).__name__}: state is None, expected one where input is None")
        return tuple(pair[0].shape[-self.dims :])

    def _original_prefix(self, index: int, stacked: str) -> str:
        return stacked

    def __prepare_scriptable__(self) -> nn.Module:
        return (ScriptedConvLSTMAllLayers if self.return_all_layers else ScriptedConvLSTM)(self)

    def extra_repr(self) -> str:
        return shown(self, ConvLSTM.__init__)


class ConvLSTM1d(ConvLSTM):
    """`ConvLSTM` over sequences of 1-D frames, `[B, T, C, W]`."""

    dims = 1


class ConvLSTM3d(ConvLSTM):
    """`ConvLSTM` over sequences of 3-D frames, `[B, T, C, D, H, W]`."""

    dims = 3


class ConvLSTMCell(ConvLSTMLayers):
    """One step of a 2-D ConvLSTM; equations and options are those of `ConvLSTM`.

    A `ConvLSTM` runs a sequence faster than a loop over cells. Parameters are `weight_ih`, `weight_hh`, `bias` and
    `peephole`, shaped as those of a layer there. Checkpoints of automan000's and ndrplz's cells load with
    `load_state_dict`.
    """

    dims = 2

    def __init__(
        self,
        input_channels: int,
        hidden_channels: int,
        kernel_size: Numbers,
        *,
        bias: bool = True,
        peephole: bool = False,
        image_size: Numbers | None = None,
        stride: Numbers = 1,
        padding: str | Numbers = "same",
        dilation: Numbers = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        unit_forget_bias: bool = False,
        memory: str = "fast",
        algorithm: str = "auto",
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        owner = type(self).__name__
        hidden_channels = check_count(owner, "hidden_channels", hidden_channels, 1)
        # One entry per layer, so that a list given to a cell is not taken for that.
        layers = make_layers(
            owner, self.dims, input_channels, [hidden_channels], 1, kernel_size=[kernel_size], stride=[stride],
            padding=[padding], dilation=[dilation], groups=[groups], padding_mode=[padding_mode],
        )  # fmt: skip
        super().__init__(
            layers,
            [[""]],
            bias=bias,
            peephole=peephole,
            image_size=None if image_size is None else numbers(owner, "image_size", image_size, self.dims, 1),
            unit_forget_bias=unit_forget_bias,
            memory=memory,
            algorithm=algorithm,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.input_channels = layers[0].input_channels
        self.hidden_channels = hidden_channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.groups = groups
        self.padding_mode = padding_mode

    def forward(self, input: Tensor | None, h: Tensor | None = None, c: Tensor | None = None) -> Pair:
        """One step.

        Args:
            input: `[B, Cin, H, W]`, or None for a step without input.
            h, c: `[B, C, H', W']`; both or none of them, None for zero.

        Returns:
            `(h, c)` after the step; c is float32 for bfloat16 and float16.
        """
        self._check(input, h, c)
        frames = None if input is None else input.unsqueeze(1)
        if h is not None:
            self._check_state(0, (h, c), frames)
        _, pair = self._run(0, 0, frames, 1, None if h is None else (h, c), None)
        return pair

    def init_hidden(self, batch_size: int, hidden: int, shape: int | Sequence[int]) -> Pair:
        """Zero states `(h, c)`, each `[batch_size, hidden, *shape]`; name and arguments are automan000's."""
        shape = numbers(type(self).__name__, "shape", tuple(shape) if isinstance(shape, list) else shape, self.dims, 1)
        zeros = self.weight_hh.new_zeros(batch_size, hidden, *shape)
        return zeros, zeros.clone()

    def _check(self, input: Tensor | None, h: Tensor | None, c: Tensor | None) -> None:
        owner, letters = type(self).__name__, "BC" + "DHW"[-self.dims :]
        given = {"input": input, "h": h, "c": c}
        for name, value in given.items():
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(f"{owner}: {name} is {kind(value)}, expected a Tensor or None")
        check_dense(owner, given)
        if (h is None) != (c is None) or (h is None and input is None):
            names = [name for name, value in given.items() if value is not None]
            raise ValueError(f"{owner}: given are {names}, expected h and c together, and at least them or input")
        if input is not None:
            if input.ndim != self.dims + 2:
                raise ValueError(
                    f"{owner}: input has {input.ndim} dims, expected {self.dims + 2} "
                    f"(input shape {list(input.shape)}, layout [{', '.join(letters)}])"
                )
            self._check_frame(input, 1, letters)

    def _first_state_size(
        self, input: Tensor | None, h: Tensor | None = None, c: Tensor | None = None
    ) -> tuple[int, ...]:
        self._check(input, h, c)
        return tuple(h.shape[2:]) if input is None else self._layers[0].state_size(input.shape[2:])

    def _original_prefix(self, index: int, stacked: str) -> str:
        return ""

    def _state_name(self, index: int, name: str) -> str:
        return name

    def __prepare_scriptable__(self) -> nn.Module:
        return ScriptedConvLSTMCell(self)

    def extra_repr(self) -> str:
        return shown(self, ConvLSTMCell.__init__)


class ConvLSTMCell1d(ConvLSTMCell):
    """`ConvLSTMCell` over 1-D frames, `[B, C, W]`."""

    dims = 1


class ConvLSTMCell3d(ConvLSTMCell):
    """`ConvLSTMCell` over 3-D frames, `[B, C, D, H, W]`."""

    dims = 3
