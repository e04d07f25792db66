"""One LSTM layer in one or both directions: the input product once for all steps, then a loop over time."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .lstm_gates import cell_backward, cell_forward, peephole_backward, state_dtype
from .sequence import active_frames, keep, order, ordered, previous, rows

Weights = Sequence[Tensor | None]  # w_ih, w_hh, bias, peephole, w_hr of one direction


def _forward(
    x: Tensor, weights: Weights, h0: Tensor | None, c0: Tensor | None, active: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One direction → (h [B, T, P], h_n [B, P], c_n [B, H], c [B, T, H], gates [B, T, 4H])."""
    w_ih, w_hh, bias, peephole, w_hr = weights
    dtype, time = state_dtype(w_hh.dtype), x.shape[1]
    gates_x = F.linear(keep(x, active), w_ih).to(dtype)
    if bias is not None:
        gates_x = gates_x + bias.to(dtype)
    h, c = h0, None if c0 is None else c0.to(dtype)
    hs: list[Tensor] = [x] * time
    cs: list[Tensor] = [x] * time
    activations: list[Tensor] = [x] * time
    for t in order(time, reverse):
        gates = gates_x[:, t]
        if h is not None:
            gates = gates + F.linear(h, w_hh).to(dtype)
        h_new, c_new, activations[t] = cell_forward(gates, c, peephole)
        h_new = h_new.to(w_hh.dtype)
        if w_hr is not None:
            h_new = F.linear(h_new, w_hr)
        if active is None:
            h, c, hs[t] = h_new, c_new, h_new
        else:
            step = active[:, t]
            hs[t] = keep(h_new, step)
            h = torch.where(step, h_new, torch.zeros_like(h_new) if h is None else h)
            c = torch.where(step, c_new, torch.zeros_like(c_new) if c is None else c)
        cs[t] = c
    return torch.stack(hs, 1), h, c, torch.stack(cs, 1), torch.stack(activations, 1)


def lstm_forward(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor | None,
    peephole: Tensor | None,
    w_hr: Tensor | None,
    w_ih_r: Tensor | None,
    w_hh_r: Tensor | None,
    bias_r: Tensor | None,
    peephole_r: Tensor | None,
    w_hr_r: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    time_major: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """→ (y, h_n, c_n, c, gates) as csrc/ops.h says; c and gates in the order of the frames."""
    active = active_frames(lengths, x.shape[1], 0)
    directions = [(w_ih, w_hh, bias, peephole, w_hr), (w_ih_r, w_hh_r, bias_r, peephole_r, w_hr_r)]
    found = [
        _forward(x, weights, one_of(h0, d), one_of(c0, d), active, reverse=d == 1)
        for d, weights in enumerate(directions[: 1 if w_hh_r is None else 2])
    ]
    h, h_n, c_n, c, gates = zip(*found)
    empty = c_n[0].new_empty(0)
    return (
        ordered(torch.cat(h, dim=2), time_major),
        torch.stack(h_n),
        torch.stack(c_n),
        torch.stack(c) if save else empty,
        torch.stack(gates) if save else empty,
    )


def one_of(tensor: Tensor | None, direction: int) -> Tensor | None:
    """One direction of what holds one or both."""
    return None if tensor is None else tensor[direction]


def _backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    weights: Weights,
    h0: Tensor | None,
    c0: Tensor | None,
    active: Tensor | None,
    h: Tensor,
    c: Tensor,
    gates: Tensor,
    reverse: bool,
    needs: Sequence[int],
) -> tuple[Any, ...]:
    """One direction → (dx, dw_ih, dw_hh, dbias, dpeephole, dw_hr, dh0, dc0); the first six None if not needed."""
    w_ih, w_hh, _, peephole, w_hr = weights
    dtype, time = c.dtype, x.shape[1]
    c = keep(c, active)
    h_before, c_before = previous(h, h0, active, reverse), previous(c, c0, active, reverse)
    dgates: list[Tensor] = [c] * time
    dhs: list[Tensor] = [c] * time
    dh_step = torch.zeros_like(h[:, 0], dtype=dtype) if dh_n is None else dh_n.to(dtype)
    dc_step = torch.zeros_like(c[:, 0]) if dc_n is None else dc_n.to(dtype)
    for t in order(time, not reverse):
        step = None if active is None else active[:, t]
        dh = dh_step if dy is None else dh_step + dy[:, t].to(dtype)
        dhs[t] = keep(dh, step)
        if w_hr is not None:
            dh = (dh.to(w_hr.dtype) @ w_hr).to(dtype)
        dgates_t, dc_before = cell_backward(gates[:, t], c_before[:, t], c[:, t], peephole, dh, dc_step)
        dgates[t] = keep(dgates_t, step)
        dh_before = (dgates[t].to(w_hh.dtype) @ w_hh).to(dtype)
        dh_step = dh_before if step is None else torch.where(step, dh_before, dh_step)
        dc_step = dc_before if step is None else torch.where(step, dc_before, dc_step)

    wide = rows(torch.stack(dgates, 1))
    dpre = wide.to(w_hh.dtype)
    dx = dw_ih = dw_hh = dbias = dpeephole = dw_hr = None
    if needs[0]:
        dx = (dpre @ w_ih).reshape(x.shape)
    if needs[1]:
        dw_ih = dpre.T @ rows(keep(x, active))
    if needs[2]:
        dw_hh = dpre.T @ rows(h_before)
    if needs[3]:
        dbias = wide.sum(0).to(w_hh.dtype)
    if needs[4]:
        dpeephole = peephole_backward(wide, rows(c_before), rows(c)).to(w_hh.dtype)
    if needs[5]:
        o = keep(gates.chunk(4, dim=2)[3], active)
        projected = rows((o * c.tanh()).to(w_hr.dtype))
        dw_hr = rows(torch.stack(dhs, 1)).to(w_hr.dtype).T @ projected
    return dx, dw_ih, dw_hh, dbias, dpeephole, dw_hr, dh_step, dc_step


def lstm_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor | None,
    peephole: Tensor | None,
    w_hr: Tensor | None,
    w_ih_r: Tensor | None,
    w_hh_r: Tensor | None,
    bias_r: Tensor | None,
    peephole_r: Tensor | None,
    w_hr_r: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    y: Tensor,
    c: Tensor,
    gates: Tensor,
    needs: Sequence[int],
) -> tuple[Tensor | None, ...]:
    """→ (dx, dw_ih, dw_hh, dbias, dpeephole, dw_hr, the five of the reverse direction, dh0, dc0) as csrc/ops.h says;
    None where not needed."""
    active = active_frames(lengths, x.shape[1], 0)
    directions = [(w_ih, w_hh, bias, peephole, w_hr), (w_ih_r, w_hh_r, bias_r, peephole_r, w_hr_r)]
    count, size = c.shape[0], w_hh.shape[1]
    dx, dweights, dh0, dc0 = [], [], [], []
    for d, weights in enumerate(directions[:count]):
        # All of it is no slice: that would be an alias, which vmap has no rule for.
        columns = slice(d * size, (d + 1) * size)
        dy_d, y_d = (t if t is None or count == 1 else t[..., columns] for t in (dy, y))
        dx_d, *found, dh0_d, dc0_d = _backward(
            dy_d,
            one_of(dh_n, d),
            one_of(dc_n, d),
            x,
            weights,
            one_of(h0, d),
            one_of(c0, d),
            active,
            y_d,
            c[d],
            gates[d],
            reverse=d == 1,
            needs=[needs[0], *needs[1 + 5 * d : 6 + 5 * d]],
        )
        dx.append(dx_d)
        dweights += found
        dh0.append(dh0_d)
        dc0.append(dc0_d)
    return (
        sum(dx) if needs[0] else None,
        *dweights,
        *[None] * (5 * (2 - count)),
        torch.stack(dh0).to(h0.dtype) if needs[11] else None,
        torch.stack(dc0).to(c0.dtype) if needs[12] else None,
    )
