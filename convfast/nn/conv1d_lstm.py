"""Conv1d → LSTM without permutes or copies between the layers: whole sequences, or chunk by chunk."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.checks import autocast_dtype, autocast_to, check_count, check_dense, check_flag, check_integers, kind
from .conv1d import Conv1d
from .handoff import call_conv, call_lstm, convolve_into_lstm
from .lstm import LSTM, takes
from .options import check_dropout, counts, per_layer, shown
from .pool1d import Pool, Pool1d
from .scripted_lstm import ScriptedCNNLSTM, ScriptedConv1dLSTM
from .state import Conv1dLSTMState, ConvTail, Pair


class Conv1dLSTM(nn.Module):
    """Layers of 1-D convolution over time, each with an activation and perhaps pooling, and an LSTM on top.

    Parameters are those of the `Conv1d` layers `conv.0`, `conv.1`, ... and of the `LSTM` `lstm`.

    Letters: B batch, T time, F input size, T' time after convolutions and pooling, L layers of the LSTM, D directions
    (2 when bidirectional), H hidden size, P size of h (`proj_size`, else H).

    Args:
        input_size: F.
        conv_channels: channels of the convolutions; a list has one per layer.
        hidden_size, num_layers, dropout, bidirectional, proj_size: as in `torch.nn.LSTM`.
        kernel_size, stride, padding, dilation, groups, padding_mode, activation: as in `Conv1d`.
        pool: pooling after the activation, `("max", kernel)` or `("avg", kernel)`, or with a stride other than the
            kernel `("max", kernel, stride)`; None for none.
        bias: False for no bias in convolutions and LSTM.
        channels_first: the input is `[B, F, T]`, whatever `batch_first`; the output is not.
        batch_first: input and output are `[B, T, ...]`, else `[T, B, ...]`. The state is the same in both.
        backend: a name from `convfast.available("conv1d")`; None takes the best.
        device, dtype: of the parameters, as in all modules of torch.

    Options of convolutions, `pool` among them, hold for every layer; a list has one entry per layer.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, what was expected and what came.

    `torch.jit.script` gives a model for inference, and puts it into a model that holds this module: to go on training
    that, script `copy.deepcopy(model)`, see `convfast.nn.scripted_lstm`.
    """

    def __init__(
        self,
        input_size: int,
        conv_channels: int | Sequence[int],
        hidden_size: int,
        kernel_size: int | list[int] = 3,
        num_layers: int = 1,
        *,
        stride: int | list[int] = 1,
        padding: str | int | list[str | int] = "same",
        dilation: int | list[int] = 1,
        groups: int | list[int] = 1,
        padding_mode: str | list[str] = "zeros",
        activation: str | list[str] = "relu",
        pool: Pool | list[Pool] = None,
        bias: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        channels_first: bool = False,
        batch_first: bool = True,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        input_size = check_count(owner, "input_size", input_size, 1)
        channels = counts(owner, "conv_channels", conv_channels)
        check_flag(owner, "channels_first", channels_first)
        options = {
            "kernel_size": kernel_size,
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "padding_mode": padding_mode,
            "activation": activation,
        }
        for name, value in options.items():
            if isinstance(value, tuple) and len(value) != 1:
                raise ValueError(f"{owner}: {name} is {value}, expected one for all layers, or a list, one per layer")
        spread = {name: per_layer(owner, name, value, len(channels)) for name, value in options.items()}
        factory = {"backend": backend, "device": device, "dtype": dtype}
        self.conv = nn.ModuleList()
        for k, sizes in enumerate(zip([input_size, *channels], channels)):
            layer = {name: value[k] for name, value in spread.items()} | {"bias": bias, **factory}
            self.conv.append(Conv1d(*sizes, **layer))
        self.pools = nn.ModuleList(Pool1d(spec, owner) for spec in per_layer(owner, "pool", pool, len(channels)))
        self.lstm = LSTM(
            channels[-1],
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            **factory,
        )
        self.input_size = input_size
        self.conv_channels = channels
        self.hidden_size = hidden_size
        self.kernel_size = kernel_size
        self.num_layers = num_layers
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.groups = groups
        self.padding_mode = padding_mode
        self.activation = activation
        self.pool = pool
        self.bias = bias
        self.dropout = dropout
        self.bidirectional = bidirectional
        self.proj_size = proj_size
        self.channels_first = channels_first
        self.batch_first = batch_first
        self.backend = backend

    def forward(self, input: Tensor, state: Pair | None = None, lengths: Tensor | None = None) -> tuple[Tensor, Pair]:
        """Run all layers over all steps.

        Args:
            input: `[B, T, F]` (`[T, B, F]` without `batch_first`), or `[B, F, T]` with `channels_first`, in any memory
                layout.
            state: `(h, c)` of the LSTM, `[L·D, B, P]` and `[L·D, B, H]`; None for zero.
            lengths: `[B]` integers in 0..T. Every sample gives what it gives alone: padding starts at its own end,
                and windows of the pooling that reach past it do not count.

        Returns:
            output: `[B, T', D·P]` (`[T', B, D·P]` without `batch_first`), zero past each sample's `output_lengths`.
            `(h, c)` after each sample's last step, shaped as `state`; c is float32 for bfloat16 and float16.
        """
        x = self._batch_first(input)
        if state is not None and isinstance(self.lstm, LSTM):
            self.lstm.check_state(state, (x.shape[0],), type(self).__name__, "state")
        if lengths is not None:
            _check_lengths(type(self).__name__, lengths, self.lstm)
        layers = list(zip(self.conv, self.pools))
        pooled = len(layers)
        while pooled and layers[pooled - 1][1].kind == "none":
            pooled -= 1
        for conv, pool in layers[:pooled]:
            x = pool(call_conv(conv, x, lengths))
            if lengths is not None:
                lengths = pool.output_lengths(conv.output_lengths(lengths))
        if pooled < len(layers):
            convs = [conv for conv, _ in layers[pooled:]]
            return convolve_into_lstm(convs, self.lstm, x, state, lengths, self.batch_first)
        return call_lstm(self.lstm, x if self.batch_first else x.transpose(0, 1), state, lengths)

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Steps of the output for each number of steps of the input."""
        check_integers(type(self).__name__, lengths)
        for conv, pool in zip(self.conv, self.pools):
            lengths = pool.output_lengths(conv.output_lengths(lengths))
        return lengths

    def step(self, input: Tensor, state: Conv1dLSTMState | None = None) -> tuple[Tensor, Conv1dLSTMState]:
        """Run over the next steps of a sequence that comes in chunks of any size.

        All outputs together are those of the whole sequence. Padding is "valid" or "causal" (with zeros), in one
        direction, without pooling.

        Args:
            input: the next steps, laid out as in `forward`.
            state: what the call before returned; None at the start of the sequence.

        Returns:
            output: the steps that are complete; there may be none.
            state: inputs that each convolution still needs, and `(h, c)`.

        Raises:
            ValueError, TypeError: as `forward`; or the module has options with which outputs depend on later chunks.
        """
        owner = type(self).__name__
        self._check_step(state)
        x = self._batch_first(input, least=0)
        if state is not None and (batch := state.conv[0].frames.shape[0]) != x.shape[0]:
            raise ValueError(f"{owner}: input has {x.shape[0]} samples, expected {batch} as state has")
        tails = []
        for k, conv in enumerate(self.conv):
            x, tail = _complete(conv, x, None if state is None else state.conv[k], f"{owner}: state of layer {k}")
            tails.append(tail)
        hx = None if state is None else state.lstm
        if isinstance(self.lstm, LSTM):
            self.lstm.check_state(hx, (x.shape[0],), owner, "lstm of state")
        if not self.batch_first:
            x = x.transpose(0, 1)
        if x.numel() == 0:
            output = x.new_zeros(*x.shape[:2], self.proj_size or self.hidden_size)
        else:
            output, hx = call_lstm(self.lstm, x, hx, None)
        return output, Conv1dLSTMState(tails, hx)

    def _batch_first(self, input: Tensor, least: int = 1) -> Tensor:
        """→ `[B, T, F]`, a view, of at least so many steps."""
        owner = type(self).__name__
        if not isinstance(input, Tensor):
            raise TypeError(f"{owner}: input is a {type(input).__name__}, expected a Tensor")
        check_dense(owner, {"input": input})
        letters = "BFT" if self.channels_first else "BTF" if self.batch_first else "TBF"
        sizes = dict(zip(letters, input.shape))
        if input.ndim == 3 and sizes["F"] == self.input_size and sizes["T"] >= least:
            return input if letters == "BTF" else input.permute([letters.index(letter) for letter in "BTF"])
        legend = f"input shape {list(input.shape)}, layout [{', '.join(letters)}]"
        if input.ndim != 3:
            raise ValueError(f"{owner}: input has {input.ndim} dims, expected 3 ({legend})")
        if sizes["F"] != self.input_size:
            raise ValueError(
                f"{owner}: input has {sizes['F']} features, expected input_size={self.input_size} ({legend})"
            )
        raise ValueError(f"{owner}: input has 0 time steps, expected at least 1 ({legend})")

    def _check_step(self, state: Conv1dLSTMState | None) -> None:
        owner = type(self).__name__
        if state is not None and not isinstance(state, Conv1dLSTMState):
            raise TypeError(f"{owner}: state is {kind(state)}, expected None or what step() returned")
        if state is not None and len(state.conv) != len(self.conv):
            raise ValueError(f"{owner}: state has {len(state.conv)} convolutions, expected {len(self.conv)}")
        if self.bidirectional:
            raise ValueError(f"{owner}: bidirectional is True, expected False for step()")
        for k, (conv, pool) in enumerate(zip(self.conv, self.pools)):
            if not isinstance(conv, Conv1d):
                raise TypeError(f"{owner}: conv.{k} is {kind(conv)}, expected a Conv1d for step()")
            if pool.kind != "none":
                raise ValueError(f"{owner}: pool of layer {k} is {pool.kind!r}, expected None for step()")
            if conv.padding not in ("valid", "causal", 0):
                raise ValueError(
                    f"{owner}: padding of layer {k} is {conv.padding!r}, expected 'valid' or 'causal' for step()"
                )
            if conv.padding == "causal" and conv.padding_mode != "zeros":
                raise ValueError(
                    f"{owner}: padding_mode of layer {k} is {conv.padding_mode!r}, expected 'zeros' for step()"
                )

    def __prepare_scriptable__(self) -> nn.Module:
        return ScriptedConv1dLSTM(self)

    def extra_repr(self) -> str:
        return shown(self, Conv1dLSTM.__init__)


def _check_lengths(owner: str, lengths: Tensor, rnn: nn.Module) -> None:
    check_integers(owner, lengths)
    if isinstance(rnn, nn.LSTM):
        raise TypeError(f"{owner}: lengths is a Tensor, expected None with a torch.nn.LSTM in the place of the LSTM")


def _complete(conv: Conv1d, x: Tensor, tail: ConvTail | None, shown: str) -> tuple[Tensor, ConvTail]:
    """x `[B, t, F]`, the next inputs → the outputs `[B, t', C]` that they complete, and what later ones need. `shown`
    is how messages on the tail start."""
    extent = conv.dilation * (conv.kernel_size - 1) + 1
    if tail is None:
        tail = ConvTail(x.new_zeros(x.shape[0], conv.pads()[0], x.shape[2]), 0)
    else:
        if autocast_dtype(conv.weight) is not None and x.is_floating_point():
            tail = tail._replace(frames=autocast_to(x.dtype, tail.frames)[0])  # as h and c
        _check_tail(tail.frames, x, max(0, extent - conv.stride) if conv.pads()[0] else 0, extent - 1, shown)
    skip = max(tail.skip - x.shape[1], 0)
    x = torch.cat([tail.frames, x[:, tail.skip :]], dim=1)
    steps = max((x.shape[1] - extent) // conv.stride + 1, 0)
    if steps > 0:
        y = conv(x) if conv.padding in ("valid", 0) else conv(x, padding="valid")
    else:
        y = x.new_zeros(x.shape[0], 0, conv.out_channels)
        if (dtype := autocast_dtype(conv.weight)) is not None:
            (y,) = autocast_to(dtype, y)
    read = steps * conv.stride
    # A copy: a view would keep the whole chunk.
    rest = x[:, read:].clone() if read > 0 else x
    return y, ConvTail(rest, skip + max(read - x.shape[1], 0))


def _check_tail(frames: Tensor, x: Tensor, least: int, most: int, shown: str) -> None:
    count = frames.shape[1]
    if frames.shape != (x.shape[0], count, x.shape[2]):
        expected = f"[{x.shape[0]}, n, {x.shape[2]}]"
        raise ValueError(f"{shown} has frames of shape {list(frames.shape)}, expected {expected}")
    if not least <= count <= most:
        raise ValueError(f"{shown} has {count} frames, expected {least} to {most} with its kernel")
    if frames.dtype != x.dtype:
        raise TypeError(f"{shown} has dtype {frames.dtype}, expected {x.dtype} as its input has")


class _Numbered(nn.ModuleDict):
    """Modules by the numbers that they have in a Sequential, in which there is more between them."""

    def __getitem__(self, key: int | str) -> nn.Module:
        return super().__getitem__(str(key))


class CNN_LSTM(nn.Module):
    """Two convolutions with ReLU, an LSTM, and a linear layer at every step.

    What `Sequential(Conv1d(F, c, k, padding=1), ReLU(), Conv1d(c, 2c, k, padding=1), ReLU())`, `LSTM` and `Linear` of
    torch give, with their parameters: `cnn.0`, `cnn.2`, `lstm` and `fc`; `model.cnn[0]` and `model.cnn[2]` are the
    convolutions, each with its ReLU. Equations are those of `convfast.conv1d` and `convfast.lstm`.

    Args:
        input_dim: F.
        output_dim: size of the output at each step.
        cnn_out_channels: c.
        cnn_kernel_size: k.
        lstm_hidden_size, lstm_num_layers: of the LSTM.
        dropout: between the layers of the LSTM.
        backend: a name from `convfast.available("lstm")`; None takes the best.
        device, dtype: of the parameters, as in all modules of torch.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, what was expected and what came.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        cnn_out_channels: int = 64,
        cnn_kernel_size: int = 3,
        lstm_hidden_size: int = 128,
        lstm_num_layers: int = 2,
        dropout: float = 0.2,
        *,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        sizes = {
            "input_dim": input_dim,
            "output_dim": output_dim,
            "cnn_out_channels": cnn_out_channels,
            "cnn_kernel_size": cnn_kernel_size,
            "lstm_hidden_size": lstm_hidden_size,
            "lstm_num_layers": lstm_num_layers,
        }
        for name, value in sizes.items():
            check_count(owner, name, value, 1)
        check_dropout(owner, dropout)
        factory = {"device": device, "dtype": dtype}
        options = {"padding": 1, "activation": "relu", "backend": backend, **factory}
        hidden = 2 * cnn_out_channels
        first = Conv1d(input_dim, cnn_out_channels, cnn_kernel_size, **options)
        second = Conv1d(cnn_out_channels, hidden, cnn_kernel_size, **options)
        self.cnn = _Numbered({"0": first, "2": second})
        self.lstm = LSTM(
            hidden,
            lstm_hidden_size,
            lstm_num_layers,
            batch_first=True,
            dropout=dropout if lstm_num_layers > 1 else 0.0,
            backend=backend,
            **factory,
        )
        self.fc = nn.Linear(lstm_hidden_size, output_dim, **factory)

    def forward(self, input: Tensor, lengths: Tensor | None = None) -> Tensor:
        """input `[B, T, F]`, lengths `[B]` integers in 0..T → `[B, T', output_dim]`, T' = T + 4 - 2 (k-1).

        With `lengths` every sample gives what it gives alone; outputs past its end are the bias of `fc`.
        """
        owner = type(self).__name__
        if isinstance(input, Tensor) and input.ndim != 3:
            raise ValueError(
                f"{owner}: input has {input.ndim} dims, expected 3 (input shape {list(input.shape)}, layout [B, T, F])"
            )
        if lengths is not None:
            _check_lengths(owner, lengths, self.lstm)
        run = partial(convolve_into_lstm, tuple(self.cnn.values()), self.lstm, input, None, lengths, True)
        return run(self.fc)[0] if takes(self.lstm, self.fc) else self.fc(run()[0])

    def __prepare_scriptable__(self) -> nn.Module:
        return ScriptedCNNLSTM(self, takes(self.lstm, self.fc))
