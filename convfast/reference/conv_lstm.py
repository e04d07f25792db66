"""One ConvLSTM layer over a sequence: the input convolution once for all steps, then a loop over time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .lstm_gates import cell_backward, cell_forward, peephole_backward, state_dtype
from .padded_conv import conv, conv_backward, same_padding
from .sequence import active_frames, keep, order, previous, rows


def channels_last(x: Tensor, channel_dim: int) -> Tensor:
    """A view of x, or a copy, with the channels innermost and nothing between the elements."""
    # Not `if is_contiguous()`: asked in a backward, torch.compile makes every incoming gradient contiguous.
    return x.movedim(channel_dim, -1).contiguous().movedim(-1, channel_dim)


def recurrent_options(w_hh: Tensor) -> tuple[list[int], list[int], list[int], str]:
    """Of the convolution by w_hh: stride, padding, dilation and mode."""
    ones = [1] * (w_hh.ndim - 2)
    return ones, same_padding(w_hh.shape[2:], ones), ones, "zeros"


def _input_gates(
    x: Tensor | None,
    w_ih: Tensor | None,
    active: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    padding_mode: str,
) -> Tensor | None:
    """The input convolution [B, T, 4C, *S'] of all frames, without bias."""
    if x is None:
        return None
    x = keep(x, active)
    if w_ih is None:
        return x
    gates = conv(rows(x), w_ih, None, stride, padding, dilation, padding_mode)
    # Not by unflatten(), which torch.compile does not trace under a default device.
    return gates.reshape(*x.shape[:2], *gates.shape[1:])


def conv_lstm_forward(
    x: Tensor | None,
    w_ih: Tensor | None,
    w_hh: Tensor,
    bias: Tensor | None,
    peephole: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    time: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    padding_mode: str,
    reverse: bool,
    algorithm: str,
    save: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """→ (h, h_n, c_n, c, gates) as csrc/ops.h says. `algorithm` is the library's own affair here."""
    dims = w_hh.ndim - 2
    dtype = state_dtype(w_hh.dtype)
    active = active_frames(lengths, time, dims)
    gates_x = _input_gates(x, w_ih, active, stride, padding, dilation, padding_mode)
    if gates_x is None:
        like = h0 if h0 is not None else c0
        zeros = like.new_zeros([like.shape[0], 1, w_hh.shape[0], *like.shape[2:]])
        gates_x = zeros.expand(-1, time, *[-1] * (dims + 1))
    offset = 0 if bias is None else bias.to(dtype).view(-1, *[1] * dims)

    h, c = h0, None if c0 is None else c0.to(dtype)
    hs: list[Tensor] = [w_hh] * time
    cs: list[Tensor] = [w_hh] * time
    activations: list[Tensor] = [w_hh] * time
    for t in order(time, reverse):
        gates = gates_x[:, t].to(dtype) + offset
        if h is not None:
            gates = gates + conv(h, w_hh, None, *recurrent_options(w_hh)).to(dtype)
        h_new, c_new, activations[t] = cell_forward(gates, c, peephole)
        h_new = h_new.to(w_hh.dtype)
        if active is None:
            h, c, hs[t] = h_new, c_new, h_new
        else:
            step = active[:, t]
            hs[t] = keep(h_new, step)
            h = torch.where(step, h_new, torch.zeros_like(h_new) if h is None else h)
            c = torch.where(step, c_new, torch.zeros_like(c_new) if c is None else c)
        cs[t] = c

    def sequence(frames: list[Tensor], wanted: bool = True) -> Tensor:
        if not wanted:
            return frames[0].new_empty(0)
        return torch.stack([f.movedim(1, -1) for f in frames], dim=1).movedim(-1, 2)

    return (
        sequence(hs),
        channels_last(h, 1),
        channels_last(c, 1),
        sequence(cs, save != "none"),
        sequence(activations, save == "fast"),
    )


def conv_lstm_backward(
    dh: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor | None,
    w_ih: Tensor | None,
    w_hh: Tensor,
    bias: Tensor | None,
    peephole: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    h: Tensor,
    c: Tensor,
    gates: Tensor,
    time: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    padding_mode: str,
    reverse: bool,
    algorithm: str,
    needs: Sequence[int],
) -> tuple[Tensor | None, ...]:
    """→ (dx, dw_ih, dw_hh, dbias, dpeephole, dh0, dc0) as csrc/ops.h says; None where not needed."""
    dims = w_hh.ndim - 2
    dtype = state_dtype(w_hh.dtype)
    batch_time = h.shape[:2]
    recurrent = recurrent_options(w_hh)
    active = active_frames(lengths, time, dims)
    c = keep(c, active)
    h_before = previous(h, h0, active, reverse)
    c_before = previous(c, c0, active, reverse)
    if gates.numel() == 0:
        gates_x = _input_gates(x, w_ih, active, stride, padding, dilation, padding_mode)
        pre = conv(rows(h_before), w_hh, None, *recurrent).to(dtype)
        if gates_x is not None:
            pre = pre + rows(gates_x.to(dtype))
        if bias is not None:
            pre = pre + bias.to(dtype).view(-1, *[1] * dims)
        gates = cell_forward(pre, rows(c_before), peephole)[2]
        gates = gates.reshape(*batch_time, *gates.shape[1:])

    dgates: list[Tensor] = [c] * time
    dh_step = torch.zeros_like(h[:, 0]) if dh_n is None else dh_n
    dc_step = torch.zeros_like(c[:, 0]) if dc_n is None else dc_n.to(dtype)
    for t in order(time, not reverse):
        step = None if active is None else active[:, t]
        dh_total = dh_step.to(dtype) if dh is None else dh_step.to(dtype) + dh[:, t].to(dtype)
        dgates_t, dc_before = cell_backward(gates[:, t], c_before[:, t], c[:, t], peephole, dh_total, dc_step)
        dgates[t] = keep(dgates_t, step)
        dh_before, _ = conv_backward(dgates[t].to(w_hh.dtype), h[:, t], w_hh, *recurrent, needs=(True, False))
        dh_step = dh_before if step is None else torch.where(step, dh_before, dh_step)
        dc_step = dc_before if step is None else torch.where(step, dc_before, dc_step)

    dgates_wide = torch.stack(dgates, dim=1)
    dpre = dgates_wide.to(w_hh.dtype)
    dx = dw_ih = dw_hh = dbias = dpeephole = None
    if x is not None and w_ih is None:
        dx = dpre
    elif x is not None:
        dx, dw_ih = conv_backward(
            rows(dpre),
            rows(keep(x, active)),
            w_ih,
            stride,
            padding,
            dilation,
            padding_mode,
            needs=(bool(needs[0]), bool(needs[1])),
        )
        dx = None if dx is None else dx.reshape(x.shape)
    if needs[2]:
        _, dw_hh = conv_backward(rows(dpre), rows(h_before), w_hh, *recurrent, needs=(False, True))
    if needs[3]:
        dbias = dgates_wide.sum((0, 1, *range(3, dgates_wide.ndim))).to(bias.dtype)
    if needs[4]:
        flat = (rows(dgates_wide), rows(c_before), rows(c))
        dpeephole = peephole_backward(*flat).to(peephole.dtype)
    return (
        dx if needs[0] else None,
        dw_ih,
        dw_hh,
        dbias,
        dpeephole,
        dh_step if needs[5] else None,
        dc_step.to(c0.dtype) if needs[6] else None,
    )
