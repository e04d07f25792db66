"""Registers each launcher as the op `convfast_triton::<name>`, so that a captured graph holds one node a call;
csrc/ops.h has the contract."""

import torch
from torch import Tensor, library

from .. import ops
from ..ops.checks import empty_sequence
from ..reference.padded_conv import output_length
from .conv1d import conv1d_backward, conv1d_forward, conv1d_gates
from .conv_lstm import conv_lstm_backward, conv_lstm_forward
from .lstm import lstm_backward, lstm_forward, lstm_from_gates
from .lstm_gates import lstm_gates_backward, lstm_gates_forward

_LIBRARY = library.Library("convfast_triton", "DEF")
for _launcher in (
    lstm_gates_forward, lstm_gates_backward, conv_lstm_forward, conv_lstm_backward,
    conv1d_forward, conv1d_backward, lstm_forward, lstm_backward,
    conv1d_gates, lstm_from_gates,
):  # fmt: skip
    _LIBRARY.define(_launcher.__name__ + library.infer_schema(_launcher, mutates_args=()))
    _LIBRARY.impl(_launcher.__name__, _launcher, "CompositeExplicitAutograd")
ops.register_fakes("convfast_triton")


@library.register_fake("convfast_triton::conv1d_gates")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    stride: int,
    padding: list[int],
    dilation: int,
    padding_mode: str,
    activation: str,
    w_ih: Tensor,
    gate_bias: Tensor | None,
) -> Tensor:
    time = output_length(x.shape[1], weight.shape[2], stride, padding, dilation)
    return empty_sequence(weight, (x.shape[0], time, w_ih.shape[0]), True, weight.dtype)


@library.register_fake("convfast_triton::lstm_from_gates")
def _(
    gates_x: Tensor,
    w_hh: Tensor,
    peephole: Tensor | None,
    w_hr: Tensor | None,
    w_hh_r: Tensor | None,
    peephole_r: Tensor | None,
    w_hr_r: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    time_major: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, time), (gates, size), directions = gates_x.shape[:2], w_hh.shape, 1 if w_hh_r is None else 2
    return (
        empty_sequence(w_hh, (batch, time, directions * size), time_major, w_hh.dtype),
        w_hh.new_empty((directions, batch, size)),
        w_hh.new_empty((directions, batch, gates // 4), dtype=torch.float32),
    )
