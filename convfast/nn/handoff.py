"""Convolutions and the LSTM on top of them: in one op, or with nothing between the two in memory, where it can be."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .. import backends
from ..ops.checks import autocast_dtype, autocast_state, autocast_to, check_tensors, needs_function, needs_reference
from ..ops.conv1d import check_conv1d
from ..ops.conv1d_lstm import backend_of_all, conv1d_lstm_layers
from ..triton import runtime
from .conv1d import Conv1d
from .hooks import plain
from .lstm import LSTM
from .state import Pair


def convolve_into_lstm(
    convs: Sequence[Conv1d],
    rnn: nn.Module,
    x: Tensor,
    state: Pair | None,
    lengths: Tensor | None,
    batch_first: bool,
    head: nn.Linear | None = None,
) -> tuple[Tensor, Pair]:
    """x `[B, T, F]` → what `rnn`, an LSTM or what stands in its place, gives on what `convs` give one after another,
    its output sent through a `head` that it takes."""
    in_order = plain(rnn, LSTM) and rnn.batch_first == batch_first
    if in_order and lengths is None and (found := _in_one_op(convs, rnn, x, state, head)) is not None:
        return found
    *below, conv = convs
    for layer in below:
        x, lengths = call_conv(layer, x, lengths), None if lengths is None else layer.output_lengths(lengths)
    ends = None if lengths is None else conv.output_lengths(lengths)
    if in_order and _fuses(conv, rnn, x, state):
        return rnn.run(x, state, ends, partial(_gates_into_lstm, conv, lengths), head)
    x = call_conv(conv, x, lengths)
    x = x if batch_first else x.transpose(0, 1)
    return call_lstm(rnn, x, state, ends) if head is None else rnn.under(head, x, state, ends)


def call_conv(conv: nn.Module, x: Tensor, lengths: Tensor | None) -> Tensor:
    """`conv(x, lengths)`; what stands in the place of a Conv1d may take less."""
    return conv(x) if lengths is None else conv(x, lengths)


def call_lstm(rnn: nn.Module, x: Tensor, state: Pair | None, lengths: Tensor | None) -> tuple[Tensor, Pair]:
    """`rnn(x, state, lengths)`; what stands in the place of an LSTM may take less."""
    if lengths is not None:
        return rnn(x, state, lengths)
    return rnn(x) if state is None else rnn(x, state)


def _in_one_op(
    convs: Sequence[Conv1d], rnn: LSTM, x: Tensor, state: Pair | None, head: nn.Linear | None
) -> tuple[Tensor, Pair] | None:
    """`convolve_into_lstm` without gradients and compiled, where nobody watches the layers; else None."""
    if torch.compiler.is_compiling() or not all(plain(conv, Conv1d) for conv in convs):
        return None
    first = convs[0]
    if not isinstance(x, Tensor) or needs_function(first.weight) or (rnn.dropout > 0 and rnn.training):
        return None
    common = (first.bias is None, first.padding_mode, first.activation, rnn.backend, False)
    convolutions, pads = [], []
    for conv in convs:
        weight, bias = conv.weight, conv.bias
        if (bias is None, conv.padding_mode, conv.activation, conv.backend, conv.channels_first) != common:
            return None
        convolutions += [weight] if bias is None else [weight, bias]
        pads += conv.pads()
    weights, peepholes = rnn.weights_by_name(), rnn.peepholes()
    on_top = None if head is None else (head.weight, head.bias)
    name = backend_of_all(x, convolutions, weights, (*peepholes, *(on_top or ()), *(state or ())), rnn.backend)
    if name is None:
        return None
    stride, dilation, groups = ([getattr(conv, n) for conv in convs] for n in ("stride", "dilation", "groups"))
    try:
        y, state = conv1d_lstm_layers(
            x, convolutions, first.bias is not None, stride, pads, dilation, groups, first.padding_mode,
            first.activation, weights, peepholes, *rnn.options_of_layers(), state, on_top,
            not rnn.batch_first, name,
        )  # fmt: skip
    except RuntimeError:
        return None  # what is wrong, the layers say
    return y if rnn.batch_first else y.transpose(0, 1), state


def _fuses(conv: Conv1d, rnn: LSTM, x: Tensor, state: Pair | None) -> bool:
    """For inference with Triton, where the tile between the two and the LSTM's weights fit on the chip."""
    if not plain(conv, Conv1d):
        return False
    weight = conv.weight
    if weight.device.type not in runtime.devices() or conv.groups > 1 or needs_reference():
        return False
    dtype = autocast_dtype(weight) or weight.dtype
    for op, name in (("conv1d", conv.backend), ("lstm", rnn.backend)):
        if backends.select(op, name, weight.device.type, dtype) != "triton":
            return False
    if needs_function(x, *conv.parameters(), *rnn.parameters(), *(state or ())):
        return False
    from ..triton.conv1d import handoff_tile
    from ..triton.lstm import fits

    chip, sizes = runtime.chip(weight), (conv.out_channels, conv.in_channels, conv.kernel_size)
    projected, size = rnn.proj_size > 0, rnn.proj_size or rnn.hidden_size
    return handoff_tile(dtype, *sizes, chip) is not None and fits(
        rnn.hidden_size, size, projected, dtype, runtime.input_precision(dtype), chip
    )


def _gates_into_lstm(
    conv: Conv1d,
    lengths: Tensor | None,
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    peephole: Tensor | None,
    weight_hr: Tensor | None,
    reverse: tuple[Tensor | None, ...] | None,
    state: Pair | None,
    ends: Tensor | None,
    *,
    time_major: bool,
    backend: str | None,
) -> tuple[Tensor, Pair]:
    """`lstm` on what `conv` gives for x and lengths."""
    h0, c0 = state or (None, None)
    weight, conv_bias = conv.weight, conv.bias
    w_ih_r, w_hh_r, bias_r, peephole_r, w_hr_r = reverse or (None,) * 5
    if (dtype := autocast_dtype(weight)) is not None:
        h0, c0 = autocast_state(dtype, weight.to(dtype), h0, c0)
        x, weight, conv_bias, weight_ih, weight_hh, bias, peephole, weight_hr = autocast_to(
            dtype, x, weight, conv_bias, weight_ih, weight_hh, bias, peephole, weight_hr
        )
        w_ih_r, w_hh_r, bias_r, peephole_r, w_hr_r = autocast_to(dtype, w_ih_r, w_hh_r, bias_r, peephole_r, w_hr_r)
    options = (conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode, conv.activation)
    x, lengths, pads = check_conv1d(x, weight, conv_bias, lengths, *options, conv.channels_first)
    check_tensors("lstm", {"weight_hh": weight_hh, "input": x, "state h": h0, "state c": c0}, state="state c")
    if w_ih_r is not None:
        weight_ih = torch.cat([weight_ih, w_ih_r])
        bias = None if bias is None else torch.cat([bias, bias_r])
    gates = torch.ops.convfast_triton.conv1d_gates(
        x, weight, conv_bias, lengths, conv.stride, pads, conv.dilation, conv.padding_mode, conv.activation, weight_ih,
        bias,
    )  # fmt: skip
    if ends is not None:
        ends = ends.to(x.device)
    y, h, c = torch.ops.convfast_triton.lstm_from_gates(
        gates, weight_hh, peephole, weight_hr, w_hh_r, peephole_r, w_hr_r, h0, c0, ends, time_major
    )
    return y, (h, c)
