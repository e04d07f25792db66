"""The pointwise LSTM cell with Hadamard peepholes (Shi et al. 2015), gates i f g o:

i = σ(i + p_i∘c)    f = σ(f + p_f∘c)    c' = f∘c + i∘tanh(g)    o = σ(o + p_o∘c')    h = o∘tanh(c')
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of the cell state and of gate arithmetic: float32 for anything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cell_forward(gates: Tensor, c: Tensor | None, peephole: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """gates [N, 4C, *S], c [N, C, *S], peephole [3, C, *S] → h, c', activated gates, all of the state's type."""
    dtype = state_dtype(gates.dtype)
    i, f, g, o = gates.to(dtype).chunk(4, dim=1)
    p_i, p_f, p_o = (None, None, None) if peephole is None else peephole.to(dtype).unbind(0)
    if c is not None:
        c = c.to(dtype)
        if peephole is not None:
            i, f = i + p_i * c, f + p_f * c
    i, f, g = i.sigmoid(), f.sigmoid(), g.tanh()
    c_out = i * g if c is None else f * c + i * g
    o = (o if peephole is None else o + p_o * c_out).sigmoid()
    return o * c_out.tanh(), c_out, torch.cat([i, f, g, o], dim=1)


def cell_backward(
    activated: Tensor,
    c: Tensor | None,
    c_out: Tensor,
    peephole: Tensor | None,
    dh: Tensor | None,
    dc_out: Tensor | None,
    dactivated: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `cell_forward` → (dgates [N, 4C, *S], dc [N, C, *S]).

    `dactivated` is only there in a second derivative, which this function's own use of `activated` brings about.
    """
    dtype = c_out.dtype
    i, f, g, o = activated.to(dtype).chunk(4, dim=1)
    p_i, p_f, p_o = (None, None, None) if peephole is None else peephole.to(dtype).unbind(0)
    c = torch.zeros_like(c_out) if c is None else c.to(dtype)
    dh = torch.zeros_like(c_out) if dh is None else dh.to(dtype)
    i_add, f_add, g_add, o_add = (0, 0, 0, 0) if dactivated is None else dactivated.chunk(4, dim=1)
    squashed = c_out.tanh()
    do = (dh * squashed + o_add) * o * (1 - o)
    dc_total = dh * o * (1 - squashed * squashed)
    if dc_out is not None:
        dc_total = dc_total + dc_out
    if peephole is not None:
        dc_total = dc_total + p_o * do
    di = (dc_total * g + i_add) * i * (1 - i)
    df = (dc_total * c + f_add) * f * (1 - f)
    dg = (dc_total * i + g_add) * (1 - g * g)
    dc = dc_total * f
    if peephole is not None:
        dc = dc + p_i * di + p_f * df
    return torch.cat([di, df, dg, do], dim=1), dc


def peephole_backward(dgates: Tensor, c: Tensor | None, c_out: Tensor) -> Tensor:
    """Gradient of the peephole, [3, C, *S], from dgates [N, 4C, *S] and the cell states before and after."""
    di, df, _, do = dgates.chunk(4, dim=1)
    c = torch.zeros_like(c_out) if c is None else c.to(c_out.dtype)
    return torch.stack([(di * c).sum(0), (df * c).sum(0), (do * c_out).sum(0)])


def lstm_gates_forward(
    gates: Tensor, c: Tensor | None, peephole: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """→ (h, c_out, activated); activated is empty unless `save`."""
    h, c_out, activated = cell_forward(gates, c, peephole)
    # Not by `to` where it would change nothing: torch 2.11's compiler loses the gradient of such a result.
    h = h if h.dtype == gates.dtype else h.to(gates.dtype)
    return h, c_out, activated if save else activated.new_empty(0)


def lstm_gates_backward(
    activated: Tensor,
    c: Tensor | None,
    c_out: Tensor,
    peephole: Tensor | None,
    dh: Tensor | None,
    dc_out: Tensor | None,
    needs: Sequence[int],
    dactivated: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """→ (dgates, dc, dpeephole); None where not needed."""
    dgates, dc = cell_backward(activated, c, c_out, peephole, dh, dc_out, dactivated)
    dpeephole = peephole_backward(dgates, c, c_out).to(peephole.dtype) if needs[2] else None
    dgates = dgates.to(activated.dtype if dh is None else dh.dtype)
    return dgates if needs[0] else None, dc if needs[1] else None, dpeephole
